"""The base checkpoint: find it, refuse what cannot be compressed (in one line each), load it.

The checks need only config.json and the headers of the safetensors files; weights are loaded after them.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from supernet.architecture import Structure
from supernet.common.errors import RequestError, reading
from supernet.common.files import content_fingerprint
from supernet.common.progress import say
from supernet.families import describe, family_of
from supernet.loading import check_fit, checkpoint_folder, load_causal_lm
from supernet.raw_config import loaded_files, read_raw_config
from supernet.streaming import WeightFiles
from supernet.tokens import read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk that passed all checks. `name` is the path or hub name that the user gave."""

    name: str
    path: Path
    config: PreTrainedConfig
    structure: Structure
    trust_remote_code: bool

    @property
    def weight_files(self) -> list[Path]:
        """The weight files that transformers loads; other files in the folder are ignored."""
        return loaded_files(self.path)

    @property
    def weight_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.weight_files)

    def fingerprint(self) -> str:
        """SHA-256 over all weight files and the configuration, first 16 digits."""
        config = (self.path / "config.json").read_bytes()
        return content_fingerprint(self.weight_files, config)

    def load_model(self, dtype: torch.dtype | str, device: torch.device | str) -> PreTrainedModel:
        """The network in evaluation mode. Raises `RequestError` where weights and configuration do not fit."""
        with reading(f"{self.name}: transformers cannot load it"):
            model, info = load_causal_lm(self.path, dtype, self.trust_remote_code, copy.deepcopy(self.config))
        check_fit(self.name, info)
        if left_out := info["unexpected_keys"]:
            say(f"warning: {self.name}: transformers leaves {len(left_out)} weights out, such as {min(left_out)}")
        self._check_structure(model)
        return model.to(device).eval()

    def _check_structure(self, model: PreTrainedModel) -> None:
        """The network that was loaded has the parameters that sizes are counted with, a tied one once."""
        structure = self.structure
        counted = {tensor.name: structure.shape(tensor, structure.base) for tensor in structure.tensors}
        loaded = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        for name in sorted(counted.keys() | loaded.keys()):
            if loaded.get(name) != counted.get(name):
                raise RequestError(
                    f"{self.name}: transformers loads {name} as {loaded.get(name)}, config.json says "
                    f"{counted.get(name)}; this checkpoint cannot be compressed"
                )

    def check_finite(self) -> None:
        """Read every weight once, one at a time. Raises `RequestError` naming the first with NaN or infinite values."""
        for file in self.weight_files:
            with safe_open(file, "pt") as weights:
                for name in weights.keys():  # noqa: SIM118 - not a dictionary
                    if not torch.isfinite(weights.get_tensor(name)).all():
                        raise RequestError(
                            f"{self.name}: the weight {name} in {file.name} has NaN or infinite values; fetch it again"
                        )

    def weight_scale(self) -> float:
        """Root mean square of the matrices of three layers, the first, the middle and the last one: what is typical of
        a weight. 0 where the files number no layers."""
        files, by_layer = WeightFiles(self.path), defaultdict[int, list[str]](list)
        for name in files:
            if numbered := re.search(r"\.(\d+)\.", name):
                by_layer[int(numbered[1])].append(name)
        layers = sorted(by_layer)
        squares, count = 0.0, 0
        for layer in {layers[0], layers[len(layers) // 2], layers[-1]} if layers else ():
            for tensor in map(files.read, by_layer[layer]):
                if tensor.ndim > 1:
                    squares += float(tensor.float().square().sum(dtype=torch.float64))
                    count += tensor.numel()
        return sqrt(squares / max(count, 1))

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        return read_tokenizer(self.path, trust_remote_code=self.trust_remote_code)


def open_checkpoint(
    name: str, revision: str | None = None, trust_remote_code: bool = False, *, weights: bool = True
) -> Checkpoint:
    """The checkpoint at a path or of a hub name. Raises `RequestError` where it cannot be compressed.

    Without `weights`, only config.json is fetched and checked, to inspect a model without downloading it.
    """
    path = checkpoint_folder(name, revision, weights=weights)
    config = _read_config(name, path, trust_remote_code)
    shapes = _check_weights(name, path) if weights else {}
    if weights:
        _untie(name, path, config)
        if getattr(config, "dtype", None) is None:
            config.dtype = WeightFiles(path).dtype
    if weights and not any((path / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise RequestError(f"{name}: no tokenizer in {path} (tokenizer.json or tokenizer.model); copy it there")
    with reading(f"{name}: no network can be built from config.json"):
        structure = describe(config, trust_remote_code)
    _compare(name, shapes, structure, family_of(config).layers)
    return Checkpoint(name, path, config, structure, trust_remote_code)


def _read_config(name: str, path: Path, trust_remote_code: bool) -> PreTrainedConfig:
    """The configuration. Raises `RequestError` where it is not that of a network that can be compressed."""
    from transformers import AutoConfig

    read_raw_config(name, path)
    with reading(f"{name}: config.json cannot be read"):
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
    family_of(config)
    return config


def _untie(name: str, path: Path, config: PreTrainedConfig) -> None:
    """Make a head of its own known where the weights have one though `config` says that it is the embedding's.

    transformers loads such a head as it is. All that is counted and cut follows from the configuration.
    """
    if not config.tie_word_embeddings:
        return
    family, files = family_of(config), WeightFiles(path)
    if not {family.head, family.embedding} <= set(files):
        return
    if not torch.equal(files.read(family.head), files.read(family.embedding)):
        config.tie_word_embeddings = False
        say(
            f"note: {name}: {family.head} differs from the embedding, though config.json says tie_word_embeddings; "
            "it is taken as a head of its own"
        )


def _check_weights(name: str, path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in the files that transformers loads, by name.

    Raises `RequestError` where a file is missing or damaged.
    """
    if (path / "adapter_config.json").is_file():
        raise RequestError(
            f"{name}: an adapter lies beside the weights; merge it into them, or remove adapter_config.json"
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for file in loaded_files(path):
        try:
            with safe_open(file, "pt") as tensors:
                shapes |= {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise RequestError(f"{name}: {file.name} is cut off or damaged; fetch it again ({error})") from error
    return shapes


def _compare(name: str, shapes: Mapping[str, tuple[int, ...]], structure: Structure, layers: str) -> None:
    """Refuse weights that are not those of the network of config.json, as far as names tell.

    Some families are stored under other names than transformers' parameters, so what has no like in `structure` is left
    to transformers. `layers` is the path of the decoder layers.
    """
    wanted = {tensor.name: structure.shape(tensor, structure.base) for tensor in structure.tensors}
    modules = {tensor.rpartition(".")[0] for tensor in wanted}
    count = len(structure.base.layers)

    def kind(tensor: str) -> str:
        return re.sub(rf"^{re.escape(layers)}\.\d+\.", "", tensor)

    stored_kinds = {kind(tensor) for tensor in shapes if tensor in wanted}
    for tensor, shape in shapes.items():
        layer = re.match(rf"{re.escape(layers)}\.(\d+)\.", tensor)
        if wanted.get(tensor, shape) != shape:
            raise RequestError(
                f"{name}: {tensor} is {list(shape)} in the weights and {list(wanted[tensor] or ())} by config.json; "
                "one of them is wrong"
            )
        if (layer and int(layer[1]) >= count) or (tensor not in wanted and tensor.rpartition(".")[0] in modules):
            raise RequestError(
                f"{name}: the weights hold {tensor}, the network of config.json does not; mend config.json"
            )
    for tensor in wanted:
        if tensor not in shapes and kind(tensor) in stored_kinds:
            raise RequestError(f"{name}: the weights lack {tensor}; fetch it again")
