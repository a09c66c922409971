"""What can be refused of a checkpoint by its name, its config.json as text and the names of its files, without torch or
transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from supernet.common.errors import RequestError
from supernet.common.files import read_json
from supernet.elastic import ELASTIC_PREFIX
from supernet.families import family_named
from supernet.uneven import UNEVEN_PREFIX

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def local_folder(name: str) -> Path | None:
    """The folder that a checkpoint's name is, or None where it can only be a repository of the hub.

    Raises `RequestError` for a file, and for a path at which there is nothing.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise RequestError(f"{name}: is a file; give the folder that holds config.json and the weights")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise RequestError(f"{name}: no such folder; give the folder of a Hugging Face checkpoint")
    return None


def read_raw_config(name: str, path: Path) -> dict[str, Any]:
    """The values of a checkpoint's config.json. Raises `RequestError` where there is none, and where it is not that of
    a network that can be compressed."""
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise RequestError(f"{name}: an adapter without its base; merge it into the base model and give that")
        raise RequestError(f"{name}: there is no config.json in {path}; give the folder of a Hugging Face checkpoint")
    try:
        raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise RequestError(f"{name}: config.json is not valid JSON ({error})") from error
    if not isinstance(raw, dict):
        raise RequestError(f"{name}: config.json holds no settings by name; give the folder of a checkpoint")
    if (quantized := raw.get("quantization_config")) is not None:
        method = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else quantized
        raise RequestError(f"{name}: already quantized ({method}); give the unquantized checkpoint")
    if any(key in raw for key in ("vision_config", "audio_config", "text_config")):
        raise RequestError(f"{name}: a multimodal wrapper; extract its text model first and give that")
    architectures = raw.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(entry, str) for entry in architectures):
        raise RequestError(f"{name}: config.json: architectures is no list of names")
    if architectures and not any("CausalLM" in entry or "LMHead" in entry for entry in architectures):
        raise RequestError(f"{name}: not a causal language model (its architecture is {architectures[0]})")
    if str(raw.get("model_type", "")).startswith(UNEVEN_PREFIX):
        raise RequestError(f"{name}: already an uneven package; compress the base it was made from")
    if str(raw.get("model_type", "")).startswith(ELASTIC_PREFIX):
        raise RequestError(f"{name}: an elastic package; cut a size out of it (compressor slice), or compress its base")
    if "model_type" not in raw:
        raise RequestError(f"{name}: config.json does not say its model_type")
    if "auto_map" not in raw:
        family_named(raw["model_type"])
    return raw


def loaded_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads of a folder: one, or the shards of an index.

    Others, such as `consolidated.safetensors`, are not looked at. Raises `RequestError` where there are none, or one
    is missing or outside the folder.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        others = [file.name for file in files_like_weights(folder)]
        hint = f"; {others[0]} is not read: save it anew, from transformers with save_pretrained" if others else ""
        raise RequestError(f"{folder}: no weights, neither {SINGLE} nor {INDEX}{hint}")
    names = files_of_index(folder)
    for name in names:
        if Path(name).name != name:
            raise RequestError(f"{folder / INDEX}: names the file {name}, which is outside the folder")
        if not (folder / name).is_file():
            raise RequestError(f"{folder}: the shard {name} is missing ({len(names)} are listed); fetch it again")
    return [folder / name for name in names]


def files_of_index(folder: Path) -> list[str]:
    """The names of the files that a folder's index lists. Raises `RequestError` where it is no such index."""
    index = read_json(folder / INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise RequestError(f"{folder / INDEX}: has no 'weight_map' of tensors to files; fetch it again")
    return sorted(set(weight_map.values()))


def files_like_weights(folder: Path) -> list[Path]:
    """The files of a folder that hold weights by their names, whether they are read or not."""
    return sorted(file for name in ("*.safetensors", "pytorch_model*", "consolidated*") for file in folder.glob(name))
