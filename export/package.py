"""A package: the folder that leaves this house. Written whole or not at all, and readable without torch.

`compression.json` in it holds the package's own entry of report.json, its lineage, a probe of its outputs, and a hash
of every other file. Weights are safetensors, sharded as the hub's loaders expect; there is no pickle.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.package_record import CARD, RECORD, PackageInfo, path_in_run, read_package, write_record
from export.shards import MAX_SHARD_BYTES, WeightWriter, weight_bytes
from supernet.common.errors import RequestError
from supernet.common.files import read_json, temporary_name, write_json
from supernet.common.formatting import size
from supernet.trust import UNEVEN_PREFIX, load_tokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from supernet.streaming import StreamedNetwork

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)


@contextmanager
def staged(destination: Path, needed: int) -> Iterator[Path]:
    """A temporary sibling folder that becomes `destination` when the block ends well, and vanishes otherwise.

    An earlier package at `destination` is replaced, and what killed processes left beside it is removed. Raises
    `RequestError` as `check_destination` does, and where the disk turns out to be full.
    """
    partial, old = temporary_name(destination, "partial"), temporary_name(destination, "old")
    check_destination(destination, needed)
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial.mkdir()
    try:
        yield partial
        if destination.exists():
            destination.rename(old)
            partial.rename(destination)
            shutil.rmtree(old)
        else:
            partial.rename(destination)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise RequestError(f"{destination}: the disk is full; {size(needed)} are needed") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_destination(destination: Path, needed: int) -> None:
    """Raises `RequestError` where `destination` holds no earlier package but something else, and where the disk lacks
    `needed` bytes."""
    if destination.exists() and not (destination / RECORD).exists():
        if not destination.is_dir():
            raise RequestError(f"{destination}: a file is in the way; choose another output folder")
        if any(destination.iterdir()):
            raise RequestError(f"{destination}: the folder holds something else; choose another one or empty it")
    existing = next(parent for parent in (destination.absolute(), *destination.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise RequestError(
            f"{destination}: needs {size(needed)} of disk space, {size(free)} are free; "
            f"free {size(needed - free)} or choose another disk"
        )


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer object, or copy the tokenizer files (with the chat template) of a checkpoint's folder."""
    if not isinstance(tokenizer, Path):
        tokenizer.save_pretrained(folder)
        return
    found = [tokenizer / name for name in TOKENIZER_FILES if (tokenizer / name).is_file()]
    if not any(file.name.startswith("tokenizer") for file in found):
        raise RequestError(f"{tokenizer}: no tokenizer files; a package needs the base's tokenizer")
    for file in found:
        shutil.copyfile(file, folder / file.name)


def write_config(model: nn.Module, folder: Path, dtype: torch.dtype) -> str:
    """Write config.json, generation_config.json and, for an uneven network, its code file. Returns the layout."""
    from supernet.families import families
    from supernet.uneven import auto_map, modeling_file_name, modeling_source

    config: Any = model.config
    config.save_pretrained(folder)
    written = read_json(folder / "config.json")
    written["architectures"] = [type(model).__name__]
    written["dtype"] = str(dtype).removeprefix("torch.")
    layout = "uniform"
    if config.model_type.startswith(UNEVEN_PREFIX):
        layout = "uneven"
        family = families()[config.model_type.removeprefix(UNEVEN_PREFIX)]
        written["auto_map"] = auto_map(family)
        (folder / modeling_file_name(family)).write_text(modeling_source(family), encoding="utf-8")
    write_json(folder / "config.json", written)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)
    return layout


def write_package(
    model: nn.Module | StreamedNetwork,
    destination: Path,
    *,
    tokenizer: Any,
    entry: Mapping[str, Any],
    dtype: torch.dtype,
    lineage: Mapping[str, Any] | None = None,
    probe_ids: Tensor | None = None,
    reference: Path | None = None,
    card: str | None = None,
    layout: str | None = None,
    expected: nn.Module | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> PackageInfo:
    """Write a standalone model (from `supernet.slicing.extract`) as an unquantized package.

    A model may also be streamed, from the files that it is cut out of to those of the package.

    `tokenizer` is a tokenizer object or the folder of the base's tokenizer files. `entry` must hold `name` and
    `architecture` (as a dict); whatever else the report wants may be there. Weights are stored in `dtype`, the
    base's. `probe_ids` [sequences, length] are token ids to compare on (held-out text is best; random ids
    otherwise); with `reference`, the full logits on them go to that safetensors file, for `verify`. The logits are
    those of `expected` where the package must equal another network than the one it holds (a padded one).

    Raises `RequestError` where the destination holds something else, the disk is too small, or the tokenizer missing.
    """
    from transformers.core_model_loading import revert_weight_conversion

    from export import probe as probes
    from supernet.streaming import StreamedNetwork

    streamed = model if isinstance(model, StreamedNetwork) else None
    network: Any = streamed.model if streamed else model
    parameters = dict(network.named_parameters())  # a tied head appears once, under the embedding's name
    params = sum(p.numel() for p in parameters.values())
    if entry.get("params", params) != params:
        raise ValueError(f"the entry says {entry['params']} parameters, the network has {params}")
    with staged(destination, params * dtype.itemsize + 2**24) as folder:
        written_layout = write_config(network, folder, dtype)
        write_tokenizer(tokenizer, folder)
        ids = probe_ids if probe_ids is not None else probes.default_ids(network.config)
        with WeightWriter(folder, max_shard_bytes) as weights:

            def add(name: str, weight: Tensor) -> None:
                # Under the hub's own names where they differ (experts): plain packages load wherever the base does.
                for written, part in revert_weight_conversion(network, {name: _stored(name, weight, dtype)}).items():
                    weights.add(written, part)

            if streamed:
                logits = streamed.logits(ids, dtype, each=add)
            else:
                for name, parameter in parameters.items():
                    add(name, parameter)
                logits = probes.logits_of(probes.stored_network(expected or network, dtype), ids)
        if reference is not None:
            probes.save_reference(reference, ids, logits)
        if isinstance(tokenizer, Path):
            tokenizer = load_tokenizer(folder)
        if card is not None:
            (folder / CARD).write_text(card, encoding="utf-8")
        own = {
            **entry,
            "path": path_in_run(destination),
            "layout": layout or written_layout,
            "quantization": None,
            "params": params,
            "bytes": weight_bytes(folder),
        }
        probe = probes.make_probe(logits, ids, tokenizer)
        write_record(folder, entry=own, lineage=lineage or {}, probe=probe, fingerprints=weights.fingerprints)
    return read_package(destination)


def _stored(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight as it is stored. Raises ValueError where `dtype` cannot hold its values."""
    import torch

    stored = weight.detach().to(dtype)
    if not torch.isfinite(torch.stack(stored.aminmax())).all():  # far faster than to ask every value
        raise ValueError(f"{name} holds values that {dtype} cannot: not finite")
    return stored
