"""The elastic layout: the super-network itself, one set of weights for every size that is named.

`AutoModelForCausalLM.from_pretrained(folder, size="0.67", trust_remote_code=True)` reads only the part of the weights
that this size has; without `size` it is that of the pick. Nemotron Elastic (arXiv 2511.16664) and Gemma 3n ship such
checkpoints. What a size is stands in `elastic.json`, measured numbers in compression.json.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from export.package import PackageDraft, package_draft, write_tokenizer
from export.package_record import ElasticSize, PackageRecord, SizeProof, read_record
from export.probe import default_ids, make_probe, next_log_probabilities, save_reference
from export.shards import MAX_SHARD_BYTES, WeightWriter
from supernet.activation import slice_parameter
from supernet.architecture import Architecture, Structure, unit_counts
from supernet.common.errors import RequestError
from supernet.common.files import read_json, write_json
from supernet.elastic import (
    ELASTIC_PREFIX,
    SIZES,
    elastic_auto_map,
    elastic_file_name,
    elastic_source,
)
from supernet.families import describe, family_of
from supernet.slicing import renumbered, standalone_config
from supernet.streaming import StreamedNetwork, WeightFiles
from supernet.trust import check_code

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


Ranges = list[list[int]]
"""[start, stop] of the entries kept along one dimension, in order."""


@dataclass(frozen=True)
class ElasticSource:
    """A super-network in `folder`, whose files have the names of its parameters, and the sizes to name."""

    folder: Path
    config: PreTrainedConfig
    structure: Structure
    sizes: Sequence[ElasticSize]

    def size(self, architecture: Architecture) -> StreamedNetwork:
        """The sub-network of one size, read from the files."""
        return StreamedNetwork(self.folder, self.config, self.structure, architecture)


def size_name(share: float) -> str:
    """The name of a size: its share of the base's parameters, `0.67`."""
    return f"{share:.2f}"


def write(
    source: ElasticSource,
    architecture: Architecture,
    destination: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | Path,
    entry: dict[str, object],
    dtype: torch.dtype,
    lineage: dict[str, object] | None = None,
    probe_ids: Tensor | None = None,
    reference: Path | None = None,
    card: str | None = None,
) -> PackageRecord:
    """Write the super-network of `source` as one package that without a size is `architecture`; returns its record.

    Of three sizes (`to_prove`) the record holds what they say about `probe_ids`. The other arguments are those of
    `export.package.write_package`. Raises ValueError where no size is `architecture`.
    """
    family, structure = family_of(source.config), source.structure
    sizes = {size.name: size for size in source.sizes}
    default = next((size.name for size in source.sizes if size.architecture == architecture), None)
    if default is None:
        raise ValueError(f"none of the sizes is architecture {architecture.key}")
    needed = structure.parameters(structure.base) * dtype.itemsize + 2**24
    with package_draft(destination, needed, entry=entry, lineage=lineage, card=card) as draft:
        # 1. Configuration, code and tokenizer.
        write_sizes(source, draft.folder, dtype, default)
        write_json(draft.folder / "config.json", elastic_config(source.config, dtype))
        (draft.folder / elastic_file_name(family)).write_text(elastic_source(family), encoding="utf-8")
        tokenizer = write_tokenizer(tokenizer, draft.folder)
        # 2. The weights, all of them.
        with WeightWriter(draft.folder, MAX_SHARD_BYTES) as weights:
            files = WeightFiles(source.folder)
            for tensor in structure.tensors:
                weights.add(tensor.name, files.read(tensor.name).to(dtype))
        draft.hashed = weights.hashed
        # 3. What three of the sizes say, cut out of the files that the run slices.
        ids = probe_ids if probe_ids is not None else default_ids(source.config)
        for size in (sizes[name] for name in to_prove(source.sizes, default)):
            logits = source.size(size.architecture).logits(ids, dtype)
            proof = SizeProof(
                next_logprob=next_log_probabilities(logits, ids).tolist(), max_abs_logit=logits.abs().max().item()
            )
            sizes[size.name] = size.model_copy(update={"proof": proof})
            if size.name == default:
                draft.probe = make_probe(logits, ids, tokenizer)
                if reference is not None:
                    save_reference(reference, ids, logits)
        _record(draft, sizes, default)
    return read_record(destination)


def to_prove(sizes: Sequence[ElasticSize], default: str) -> list[str]:
    """Names of the three sizes that are proved: the smallest, the default and the largest; the middle one too where the
    default is one of those. Fewer where there are fewer."""
    by_size = [size.name for size in sorted(sizes, key=lambda size: size.params)]
    ends = [by_size[0], by_size[-1]]
    return list(dict.fromkeys([*ends, default, *([by_size[len(by_size) // 2]] if default in ends else [])]))


def _record(draft: PackageDraft, sizes: dict[str, ElasticSize], default: str) -> None:
    """What the record says of the package: the parameters are those of the size without a name."""
    draft.entry |= {
        "layout": "elastic",
        "quantization": None,
        "params": sizes[default].params,
        "sizes": [size.model_dump(mode="json") for size in sizes.values()],
        "default_size": default,
    }


def write_sizes(source: ElasticSource, folder: Path, dtype: torch.dtype, default: str) -> None:
    """Write `elastic.json`, and the base's generation settings."""
    entries = {
        size.name: size_entry(source.config, source.structure, size.architecture, dtype) for size in source.sizes
    }
    text = json.dumps({"default": default, "sizes": entries}, separators=(",", ":"))
    (folder / SIZES).write_text(text, encoding="utf-8")
    source.size(source.structure.base).model.generation_config.save_pretrained(folder)


def size_entry(
    config: PreTrainedConfig, structure: Structure, architecture: Architecture, dtype: torch.dtype
) -> dict[str, Any]:
    """What elastic.json says of one size: `config`, and `weights`, {name of a parameter: [name of the tensor, for each
    dimension the ranges that are kept (None: all)]}. `config` and `structure` are the super-network's."""
    family = family_of(config)
    own = standalone_config(config, architecture)
    values = _json_of(own) | {"dtype": str(dtype).removeprefix("torch.")}
    weights = {}
    for tensor in structure.tensors:
        if structure.shape(tensor, architecture) is None:
            continue
        full, kept = (
            unit_counts(sizes.hidden_size, None if tensor.layer is None else sizes.layers[tensor.layer])
            for sizes in (structure.base, architecture)
        )
        ranges = []
        for axis in tensor.axes:
            indices = torch.arange(axis.size(full))
            part = slice_parameter(indices, (axis,), full, kept)
            ranges.append(None if len(part) == len(indices) else _ranges(part))
        weights[renumbered(tensor.name, family, architecture)] = [tensor.name, ranges]
    return {"config": values, "weights": weights}


def _ranges(indices: torch.Tensor) -> Ranges:
    """Ascending indices [n] as ranges."""
    breaks = (indices.diff() != 1).nonzero().flatten() + 1
    return [[int(part[0]), int(part[-1]) + 1] for part in torch.tensor_split(indices, breaks)]


def elastic_config(config: PreTrainedConfig, dtype: torch.dtype) -> dict[str, Any]:
    """config.json: the base's, as the elastic class."""
    family = family_of(config)
    return {
        **_json_of(config),
        "architectures": [f"Elastic{family.class_name('ForCausalLM')}"],
        "auto_map": elastic_auto_map(family),
        "model_type": ELASTIC_PREFIX + family.model_type,
        "dtype": str(dtype).removeprefix("torch."),
        "size": None,
    }


def _json_of(config: PreTrainedConfig) -> dict[str, Any]:
    """A configuration as config.json holds it, without where it was read."""
    return {key: value for key, value in json.loads(config.to_json_string()).items() if key != "_name_or_path"}


def open_elastic(package: Path) -> tuple[PackageRecord, ElasticSource]:
    """An elastic package as a source of its sizes. Raises `RequestError` where the folder is another one."""
    record = read_record(package)
    if record.entry.layout != "elastic":
        raise RequestError(
            f"{package}: a package of one size ({record.entry.layout}); sizes are cut out of one that was written "
            "with --format elastic"
        )
    values = read_json(package / "config.json")
    values = {key: value for key, value in values.items() if key not in ("auto_map", "size", "architectures")}
    model_type = str(values.pop("model_type")).removeprefix(ELASTIC_PREFIX)
    config = AutoConfig.for_model(model_type, **values)
    return record, ElasticSource(package, config, describe(config), record.entry.sizes)


def load_size(folder: Path, name: str, dtype: torch.dtype) -> Any:
    """The network of one size of an elastic package, as users load it. Raises `VerificationError` where the folder's
    code is not what this version writes."""
    return AutoModelForCausalLM.from_pretrained(
        folder, size=name, dtype=dtype, local_files_only=True, trust_remote_code=check_code(folder)
    )


def nearest_size(sizes: Sequence[ElasticSize], most: int) -> ElasticSize:
    """The largest size of at most so many parameters. Raises `RequestError` where even the smallest has more."""
    fitting = [size for size in sizes if size.params <= most]
    if not fitting:
        least = min(sizes, key=lambda size: size.params)
        raise RequestError(
            f"--max-params: at most {most:,} parameters are asked for, the smallest size ({least.name}) has "
            f"{least.params:,}"
        )
    return max(fitting, key=lambda size: size.params)
