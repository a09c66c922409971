"""The base checkpoint: find it, refuse what cannot be compressed (in one line each), load it.

The checks need only config.json and the headers of the safetensors files; weights are loaded after them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from supernet.architecture import Structure
from supernet.common.errors import RequestError
from supernet.common.files import content_fingerprint
from supernet.families import describe, family_named, family_of
from supernet.loading import checkpoint_folder, load_causal_lm
from supernet.uneven import UNEVEN_PREFIX

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py", "LICENSE*", "README.md"]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk that passed all checks. `name` is the path or hub name that the user gave."""

    name: str
    path: Path
    config: PreTrainedConfig
    structure: Structure
    trust_remote_code: bool

    @property
    def weight_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.path.glob("*.safetensors"))

    def fingerprint(self) -> str:
        """SHA-256 over all weight files and the configuration, first 16 digits."""
        config = (self.path / "config.json").read_bytes()
        return content_fingerprint(sorted(self.path.glob("*.safetensors")), config)

    def load_model(self, dtype: torch.dtype | str, device: torch.device | str) -> PreTrainedModel:
        """The network in evaluation mode. Raises `RequestError` where a weight is missing."""
        model, info = load_causal_lm(self.path, dtype, self.trust_remote_code)
        if info["missing_keys"]:
            raise RequestError(f"{self.name}: the weights lack {sorted(info['missing_keys'])[0]}; fetch it again")
        return model.to(device).eval()

    def check_finite(self) -> None:
        """Read every weight once, one at a time. Raises `RequestError` naming the first with NaN or infinite values."""
        for file in sorted(self.path.glob("*.safetensors")):
            with safe_open(file, "pt") as weights:
                for name in weights.keys():  # noqa: SIM118 - not a dictionary
                    if not torch.isfinite(weights.get_tensor(name)).all():
                        raise RequestError(
                            f"{self.name}: the weight {name} in {file.name} has NaN or infinite values; fetch it again"
                        )

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.path, local_files_only=True, trust_remote_code=self.trust_remote_code)


def open_checkpoint(
    name: str, revision: str | None = None, trust_remote_code: bool = False, *, weights: bool = True
) -> Checkpoint:
    """The checkpoint at a path or of a hub name. Raises `RequestError` where it cannot be compressed.

    Without `weights`, only config.json is fetched and checked, to inspect a model without downloading it.
    """
    path = checkpoint_folder(name, revision, _PATTERNS if weights else ["*config.json"])
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise RequestError(f"{name}: an adapter without its base; merge it into the base model and give that")
        raise RequestError(f"{name}: there is no config.json in {path}; give the folder of a Hugging Face checkpoint")
    config = _read_config(name, path, trust_remote_code)
    if weights:
        _check_weights(name, path)
    if weights and not any((path / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise RequestError(f"{name}: no tokenizer in {path} (tokenizer.json or tokenizer.model); copy it there")
    return Checkpoint(name, path, config, describe(config, trust_remote_code), trust_remote_code)


def _read_config(name: str, path: Path, trust_remote_code: bool) -> PreTrainedConfig:
    """The configuration. Raises `RequestError` where it is not that of a network that can be compressed."""
    from transformers import AutoConfig

    try:
        raw = json.loads((path / "config.json").read_text())
    except ValueError as error:
        raise RequestError(f"{name}: config.json is not valid JSON ({error})") from error
    if raw.get("quantization_config") is not None:
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise RequestError(f"{name}: already quantized ({method}); give the unquantized checkpoint")
    if any(key in raw for key in ("vision_config", "audio_config", "text_config")):
        raise RequestError(f"{name}: a multimodal wrapper; extract its text model first and give that")
    architectures = raw.get("architectures") or []
    if architectures and not any("CausalLM" in entry or "LMHead" in entry for entry in architectures):
        raise RequestError(f"{name}: not a causal language model (its architecture is {architectures[0]})")
    if str(raw.get("model_type", "")).startswith(UNEVEN_PREFIX):
        raise RequestError(f"{name}: already an uneven package; compress the base it was made from")
    if "model_type" not in raw:
        raise RequestError(f"{name}: config.json does not say its model_type")
    if "auto_map" not in raw:
        family_named(raw["model_type"])
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise RequestError(f"{name}: {str(error).strip().splitlines()[0]}") from error
    family_of(config)
    return config


def _check_weights(name: str, path: Path) -> None:
    """Raises `RequestError` where a safetensors file is missing or incomplete by the index and the headers."""
    index = path / "model.safetensors.index.json"
    files = sorted(path.glob("*.safetensors"))
    if index.is_file():
        wanted = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        for shard in wanted:
            if not (path / shard).is_file():
                raise RequestError(f"{name}: the shard {shard} is missing ({len(wanted)} are listed); fetch it again")
        files = [path / shard for shard in wanted]
    elif not files:
        pickled = sorted([*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")])
        if pickled:
            raise RequestError(f"{name}: only pickled weights ({pickled[0].name}); convert them to safetensors first")
        raise RequestError(f"{name}: no weights (*.safetensors) in {path}")
    for file in files:
        with file.open("rb") as data:
            length = int.from_bytes(data.read(8), "little")
            try:
                header = json.loads(data.read(length)) if length < file.stat().st_size else None
            except ValueError:
                header = None
        ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"] if header else []
        if header is None or 8 + length + max(ends, default=0) != file.stat().st_size:
            raise RequestError(f"{name}: {file.name} is cut off or damaged; fetch it again")
