"""Causal language models from folders, through transformers, and folders from the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import nn

from supernet.common.errors import RequestError
from supernet.common.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LoadingInfo(TypedDict):
    """Names of parameters that are missing in the files, are not the network's, or have another shape."""

    missing_keys: set[str]
    unexpected_keys: set[str]
    mismatched_keys: set[str]


def load_causal_lm(
    folder: Path, dtype: torch.dtype | str, trust_remote_code: bool
) -> tuple[PreTrainedModel, LoadingInfo]:
    """The causal language model of a folder's safetensors files, on the CPU, and what did not fit."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
    )


def load_network(
    folder: Path, dtype: torch.dtype | str, trust_remote_code: bool
) -> tuple[PreTrainedModel, LoadingInfo]:
    """As `load_causal_lm`, of a network that may be quantized.

    auto-round's format is read in half precision and then converted, where `dtype` is float32. Asked for float32,
    auto-round would round everything to float16, rotary frequencies too. Its layers compute in their inputs' dtype.
    """
    config = read_json(folder / "config.json")
    method = (config.get("quantization_config") or {}).get("quant_method")
    widened = method == "auto-round" and dtype in (torch.float32, "float32")
    if widened:
        dtype = torch.float16 if config.get("dtype") == "float16" else torch.bfloat16
    model, info = load_causal_lm(folder, dtype, trust_remote_code)
    if widened:
        nn.Module.to(model, torch.float32)  # transformers' own `float` refuses quantized networks
    return model, info


def checkpoint_folder(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The folder `name`, or that of the hub repository `name`, whose files that match `patterns` are fetched.

    Raises `RequestError` where it is neither.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise RequestError(f"{name}: is a file; give the folder that holds config.json and the weights")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise RequestError(f"{name}: no such folder; give the folder of a Hugging Face checkpoint")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RequestError(
            f"{name}: neither a folder nor a model that can be fetched from the hub ({reason})"
        ) from error
