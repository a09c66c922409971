"""Writing packages: a folder with weights, tokenizer and compression.json that appears whole or not at all.

Weights are safetensors, sharded as the hub's loaders expect; nothing is pickled. Reading: `export.package_record`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from export.package_record import CARD, RECORD, Layout, PackageRecord, Probe, read_record, write_record
from export.probe import default_ids, logits_of, make_probe, save_reference, stored_network
from export.shards import MAX_SHARD_BYTES, FileRecord, WeightWriter, weight_bytes
from supernet.common.errors import RequestError, out_of_space
from supernet.common.files import follow_umask, read_json, temporary_name, write_json
from supernet.common.formatting import size
from supernet.families import families
from supernet.streaming import StreamedNetwork
from supernet.trust import load_tokenizer
from supernet.uneven import UNEVEN_PREFIX, auto_map, modeling_file_name, modeling_source

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
NAMED_TEMPLATES = "additional_chat_templates"
"""The folder of those that are not the default one."""


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
    except Exception as error:
        if not out_of_space(error):
            raise
        raise RequestError(f"{destination}: no disk space left; {size(needed)} are needed") from error
    finally:
        if old.exists() and not destination.exists():  # interrupted between the two
            old.rename(destination)
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)


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


@dataclass
class PackageDraft:
    """A package that is being written: the folder that its files go to, and what its record will say."""

    folder: Path
    entry: dict[str, object]
    lineage: dict[str, object]
    probe: Probe = field(init=False)
    hashed: Mapping[str, FileRecord] = field(default_factory=dict)
    """Files whose hashes are known already."""


@contextmanager
def package_draft(
    destination: Path,
    needed: int,
    *,
    entry: Mapping[str, object],
    lineage: Mapping[str, object] | None = None,
    card: str | None = None,
) -> Iterator[PackageDraft]:
    """A draft that becomes the package at `destination` when the block ends well, and leaves nothing otherwise.

    The block puts weights, configuration and tokenizer into `draft.folder`, adds `layout`, `quantization`, `params` and
    what else its layout has to `draft.entry`, and sets `draft.probe`. `entry` holds at least `name` and `architecture`
    (as a dict). Raises `RequestError` as `staged` does.
    """
    with staged(destination, needed) as folder:
        # As seen from the run directory: it tells nothing of this machine.
        path = f"{destination.parent.name}/{destination.name}"
        draft = PackageDraft(folder, {**entry, "path": path}, dict(lineage or {}))
        yield draft
        if card is not None:
            (folder / CARD).write_text(card, encoding="utf-8")
        draft.entry["bytes"] = weight_bytes(folder)
        follow_umask(folder)
        write_record(folder, entry=draft.entry, lineage=draft.lineage, probe=draft.probe, hashed=draft.hashed)


def write_tokenizer(tokenizer: PreTrainedTokenizerBase | Path, folder: Path) -> PreTrainedTokenizerBase:
    """Save a tokenizer, or copy the tokenizer files (with the chat template) of a checkpoint's folder; returns it.

    Raises `RequestError` where that folder holds none.
    """
    if not isinstance(tokenizer, Path):
        tokenizer.save_pretrained(folder)
        return tokenizer
    files = [tokenizer / name for name in TOKENIZER_FILES if (tokenizer / name).is_file()]
    if not any(file.name.startswith("tokenizer") for file in files):
        raise RequestError(f"{tokenizer}: no tokenizer files; a package needs the base's tokenizer")
    for file in files:
        shutil.copyfile(file, folder / file.name)
    if (tokenizer / NAMED_TEMPLATES).is_dir():
        shutil.copytree(tokenizer / NAMED_TEMPLATES, folder / NAMED_TEMPLATES)
    return load_tokenizer(folder)


def write_config(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> Layout:
    """Write config.json, generation_config.json and, for an uneven network, its code file. Returns the layout."""
    model.config.save_pretrained(folder)
    config = read_json(folder / "config.json")
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(dtype).removeprefix("torch.")
    uneven = model.config.model_type.startswith(UNEVEN_PREFIX)
    if uneven:
        family = families()[model.config.model_type.removeprefix(UNEVEN_PREFIX)]
        config["auto_map"] = auto_map(family)
        (folder / modeling_file_name(family)).write_text(modeling_source(family), encoding="utf-8")
    write_json(folder / "config.json", config)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)
    return "uneven" if uneven else "uniform"


def write_package(
    model: PreTrainedModel | StreamedNetwork,
    destination: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | Path,
    entry: Mapping[str, object],
    dtype: torch.dtype,
    lineage: Mapping[str, object] | None = None,
    probe_ids: Tensor | None = None,
    reference: Path | None = None,
    card: str | None = None,
    layout: Layout | None = None,
    expected: PreTrainedModel | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> PackageRecord:
    """Write a standalone model (from `supernet.slicing.extract`) as an unquantized package; returns its record.

    A model may also be streamed, from the files that it is cut out of to those of the package.

    `tokenizer` is a tokenizer or the folder of the base's tokenizer files. `entry` holds `name`, `architecture` (as a
    dict) and, where known, more of a `PackageEntry`. Weights are stored in `dtype`, the base's. `probe_ids`
    [sequences, length] are token ids to compare on (held-out text is best; random ids otherwise); with `reference`, the
    full logits on them go to that safetensors file, for `verify`. The logits are those of `expected` where the package
    must equal another network than the one it holds (a padded one).

    Raises `RequestError` where the destination holds something else, the disk is too small, or the tokenizer is
    missing, and ValueError where `dtype` cannot hold a weight or `entry` has another number of parameters.
    """
    streamed = model if isinstance(model, StreamedNetwork) else None
    network: PreTrainedModel = streamed.model if streamed else model
    parameters = dict(network.named_parameters())  # a tied head appears once, under the embedding's name
    params = sum(p.numel() for p in parameters.values())
    if entry.get("params", params) != params:
        raise ValueError(f"the entry says {entry['params']} parameters, the network has {params}")
    needed = params * dtype.itemsize + 2**24
    with package_draft(destination, needed, entry=entry, lineage=lineage, card=card) as draft:
        # 1. Configuration, code and tokenizer.
        written_layout = write_config(network, draft.folder, dtype)
        tokenizer = write_tokenizer(tokenizer, draft.folder)
        # 2. The weights, and the logits that they give.
        ids = probe_ids if probe_ids is not None else default_ids(network.config)
        with WeightWriter(draft.folder, max_shard_bytes) as weights:

            def add(name: str, weight: Tensor) -> None:
                # transformers stacks experts in memory: in the files they have the names that the hub's loaders expect.
                for final, part in revert_weight_conversion(network, {name: _stored(name, weight, dtype)}).items():
                    weights.add(final, part)

            if streamed:
                logits = streamed.logits(ids, dtype, each=add)
            else:
                for name, parameter in parameters.items():
                    add(name, parameter)
                logits = logits_of(stored_network(expected or network, dtype), ids)
        if reference is not None:
            save_reference(reference, ids, logits)
        # 3. What the record says.
        draft.probe, draft.hashed = make_probe(logits, ids, tokenizer), weights.hashed
        draft.entry |= {"layout": layout or written_layout, "quantization": None, "params": params}
    return read_record(destination)


def _stored(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight as it is stored. Raises ValueError where `dtype` cannot hold its values."""
    stored = weight.detach().to(dtype)
    if not torch.isfinite(torch.stack(stored.aminmax())).all():  # far faster than to ask every value
        raise ValueError(f"{name} holds values that {dtype} cannot: not finite")
    return stored
