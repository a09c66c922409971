"""The base checkpoint: find it, refuse what cannot be compressed (in one line each), load it.

Everything is checked before weights are loaded, from config.json and the safetensors headers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supernet.architecture import Structure
from supernet.common.errors import RequestError
from supernet.common.files import content_fingerprint
from supernet.families import describe, family_of

_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py", "LICENSE*", "README.md"]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk that passed all checks. `name` is what the user called it."""

    name: str
    path: Path
    config: Any
    structure: Structure
    trust_remote_code: bool

    @property
    def weight_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.path.glob("*.safetensors"))

    def fingerprint(self) -> str:
        """SHA-256 over all weight files and the configuration, first 16 digits."""
        config = (self.path / "config.json").read_bytes()
        return content_fingerprint(sorted(self.path.glob("*.safetensors")), config)

    def load_model(self, dtype: Any, device: Any) -> Any:
        """The network in evaluation mode. Raises `RequestError` where a weight is missing."""
        from transformers import AutoModelForCausalLM

        model, info = AutoModelForCausalLM.from_pretrained(
            self.path,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=self.trust_remote_code,
            output_loading_info=True,
        )
        if info["missing_keys"]:
            raise RequestError(f"{self.name}: the weights lack {sorted(info['missing_keys'])[0]}; fetch it again")
        return model.to(device).eval()

    def check_finite(self) -> None:
        """Read every weight once, one at a time. Raises `RequestError` naming the first that is not a number."""
        import torch
        from safetensors import safe_open

        for file in sorted(self.path.glob("*.safetensors")):
            with safe_open(file, "pt") as weights:
                for name in weights.keys():  # noqa: SIM118 - not a dictionary
                    if not torch.isfinite(weights.get_tensor(name)).all():
                        raise RequestError(
                            f"{self.name}: the weight {name} in {file.name} has NaN or infinite values; fetch it again"
                        )

    def load_tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.path, local_files_only=True, trust_remote_code=self.trust_remote_code)


def open_checkpoint(
    name: str, revision: str | None = None, trust_remote_code: bool = False, *, weights: bool = True
) -> Checkpoint:
    """Find a checkpoint by path or hub name and check that it can be compressed. Raises `RequestError`.

    Without `weights`, config.json is enough: for looking at a model that is not here.
    """
    path = _locate(name, revision, _PATTERNS if weights else ["*config.json"])
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


def _locate(name: str, revision: str | None, patterns: list[str]) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise RequestError(f"{name}: is a file; give the folder that holds config.json and the weights")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise RequestError(f"{name}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RequestError(
            f"{name}: neither a folder nor a model that can be fetched from the hub ({reason})"
        ) from error


def _read_config(name: str, path: Path, trust_remote_code: bool) -> Any:
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
    if str(raw.get("model_type", "")).startswith("uneven_"):
        raise RequestError(f"{name}: already an uneven package; compress the base it was made from")
    if "model_type" not in raw:
        raise RequestError(f"{name}: config.json does not say its model_type")
    if "auto_map" not in raw:
        from types import SimpleNamespace

        family_of(SimpleNamespace(model_type=raw["model_type"]))
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise RequestError(f"{name}: {str(error).strip().splitlines()[0]}") from error
    family_of(config)
    return config


def _check_weights(name: str, path: Path) -> None:
    """Presence and completeness of the safetensors files, from the index and the headers alone."""
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
