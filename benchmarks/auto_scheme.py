"""Bits of each linear layer as AutoRound chooses them: its AutoScheme, which weighs what each layer loses in every
number of bits and meets a mean (auto-round's `AutoScheme`), through neural-compressor's `target_bits`."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

OPTIONS = {2: "W2A16", 3: "W3A16", 4: "W4A16", 8: "W8A16"}
"""AutoRound's names of the bits to choose from."""
TOGETHER = (r"self_attn\.[qkv]_proj", r"mlp\.(?:gate|up)_proj")
"""Layers of a block that have the same bits: runtimes join them."""
LEFT_OUT = 8
"""Bits of a layer that AutoRound leaves out, as our packages store it."""


def bits_by_auto_scheme(
    network: Any, tokenizer: Any, texts: Sequence[str], mean_bits: float, group_size: int
) -> dict[str, int]:
    """Bits by name of the linear layers, `mean_bits` in the mean over their weights; those that AutoRound leaves out
    are not there and count as `LEFT_OUT`. The head is no part of it.

    It runs in a process of its own, since it changes the network that it is given and writes to the terminal. Raises
    RuntimeError, with the end of what it wrote, where it fails, and where this process may have computed on several
    threads: one that is forked from it would wait for them for ever.
    """
    if os.environ.get("OMP_NUM_THREADS") != "1":
        raise RuntimeError("AutoScheme is computed in a forked process; set OMP_NUM_THREADS=1")
    context = multiprocessing.get_context("fork")  # the network may be of a class that lies beside its weights
    here, there = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        child = context.Process(target=_choose, args=(there, network, tokenizer, texts, mean_bits, group_size, folder))
        child.start()
        there.close()
        try:
            return dict(here.recv())
        except EOFError:
            raise RuntimeError(f"AutoScheme failed:\n{(folder / 'log').read_text()[-2000:]}") from None
        finally:
            child.join()


def _choose(
    results: Connection,
    network: Any,
    tokenizer: Any,
    texts: Sequence[str],
    mean_bits: float,
    group_size: int,
    folder: Path,
) -> None:
    """What the process does: send the bits by name of the linear layer through `results`."""
    with (folder / "log").open("w") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    from neural_compressor.torch.quantization import AutoRoundConfig, convert, prepare  # only here: it takes seconds

    torch.set_grad_enabled(True)  # whatever the parent computes under
    network.requires_grad_(True)
    text = folder / "calibration.jsonl"
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in texts))
    linear = {name: module.weight for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    together: dict[str, list[str]] = {}
    for name in linear:
        for pattern in TOGETHER:
            if re.search(pattern, name):
                together.setdefault(re.sub(pattern, "*", name), []).append(name)
    config = AutoRoundConfig(
        tokenizer=tokenizer,
        target_bits=_counted(linear, network.get_output_embeddings().weight, mean_bits),
        ignore_scale_zp_bits=True,
        options=tuple(OPTIONS.values()),
        shared_layers=list(together.values()),
        group_size=group_size,
        iters=0,
        nsamples=16,
        seqlen=256,
        batch_size=4,
        dataset=str(text),
        seed=0,
        amp=False,
        device_map="cpu",
        export_format="auto_round",
        output_dir=str(folder / "out"),
        reloading=False,
    )
    converted = convert(prepare(network, config))
    results.send({name: int(layer["bits"]) for name, layer in converted.autoround_config.items() if layer["bits"] < 16})


def _counted(linear: Mapping[str, Tensor], head: Tensor, mean_bits: float) -> float:
    """A mean as AutoScheme counts it: a layer whose sides are not both multiples of 32, the head among them, has 16
    bits there. A head that is has no part in it."""
    of_blocks = [weight for weight in linear.values() if weight is not head]
    weights = sum(weight.numel() for weight in of_blocks)
    left_out = sum(weight.numel() for weight in of_blocks if _left_out(weight))
    chosen = mean_bits * weights - LEFT_OUT * left_out
    fixed = left_out + (head.numel() if _left_out(head) else 0)
    return (chosen + 16 * fixed) / (weights - left_out + fixed)


def _left_out(weight: Tensor) -> bool:
    return any(side % 32 for side in weight.shape)
