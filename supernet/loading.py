"""A network from a folder, through transformers: how everything here loads what may be quantized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn


def load_network(folder: Path, dtype: torch.dtype | str, trust_remote_code: bool) -> tuple[Any, dict[str, Any]]:
    """The causal language model of a folder's safetensors, and transformers' account of keys that did not fit.

    auto-round's own form is read in half precision and then widened, where `dtype` is float32: asked for float32,
    auto-round would round everything to float16, rotary frequencies too. Its layers compute in the dtype that they get.
    """
    from transformers import AutoModelForCausalLM

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    method = (config.get("quantization_config") or {}).get("quant_method")
    widened = method == "auto-round" and dtype in (torch.float32, "float32")
    if widened:
        dtype = torch.float16 if config.get("dtype") == "float16" else torch.bfloat16
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        local_files_only=True,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        output_loading_info=True,
    )
    if widened:
        nn.Module.to(model, torch.float32)  # transformers' own `float` refuses quantized networks
    return model, info
