"""Causal language models from folders, through transformers, and folders from the hub."""

from __future__ import annotations

from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import nn

from supernet.common.errors import RequestError, first_line, out_of_space
from supernet.common.files import read_json
from supernet.raw_config import INDEX, SINGLE, files_of_index, loaded_files, local_folder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class LoadingInfo(TypedDict):
    """Names of parameters that are missing in the files, are not the network's, or have another shape; those with their
    shapes in the files and in the network."""

    missing_keys: set[str]
    unexpected_keys: set[str]
    mismatched_keys: set[tuple[str, torch.Size, torch.Size]]


def load_causal_lm(
    folder: Path, dtype: torch.dtype | str, trust_remote_code: bool, config: PreTrainedConfig | None = None
) -> tuple[PreTrainedModel, LoadingInfo]:
    """The causal language model of a folder's safetensors files, on the CPU, and what did not fit (`check_fit`)."""
    from transformers import AutoModelForCausalLM

    loaded_files(folder)  # says better than transformers what is missing
    return AutoModelForCausalLM.from_pretrained(
        folder,
        **({} if config is None else {"config": config}),
        dtype=dtype,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are in the information, by name
    )


def check_fit(name: str, info: LoadingInfo) -> None:
    """Raises `RequestError` for a parameter that the files lack or hold in another shape: transformers would have given
    it random values."""
    if missing := sorted(info["missing_keys"]):
        raise RequestError(
            f"{name}: the weights lack {missing[0]}; fetch it again, or mend config.json if the network has none "
            "(tie_word_embeddings, for a head)"
        )
    if mismatched := sorted(info["mismatched_keys"], key=str):
        tensor, stored, wanted = mismatched[0]
        raise RequestError(
            f"{name}: {tensor} is {list(stored)} in the weights and {list(wanted)} by config.json; one of them is wrong"
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


def stop_rounding(model: PreTrainedModel) -> None:
    """Let a compressed-tensors network on a CPU, whose first pass has unpacked its weights, compute with them as they
    are; nothing else changes, and other networks are left alone.

    compressed-tensors 0.20 puts a forward into every quantized module that rounds the unpacked weight again at every
    call, which changes no value, and one into every module that moves inputs to where its weights are. Both take time
    (`docs/results.md`). Modules that round activations keep the first, and are told that the weight needs no rounding.
    """
    quantized = [m for m in model.modules() if hasattr(m, "quantization_scheme") and hasattr(m, "weight")]
    if not quantized:
        return
    from compressed_tensors.offload.dispatch import remove_dispatch  # takes seconds to import

    remove_dispatch(model, onload_tensors=True)
    for module in quantized:
        scheme = module.quantization_scheme
        if scheme is None:
            continue
        if scheme.input_activations is None and scheme.output_activations is None:
            module.__dict__.pop("forward", None)
        else:
            module.quantization_status = type(module.quantization_status).COMPRESSED


@torch.no_grad()
def unpack(model: PreTrainedModel) -> None:
    """Unpack the weights of a compressed-tensors network, which a first pass does, and let it compute with them as they
    are (`stop_rounding`). Other networks are left alone."""
    if any(getattr(module, "quantization_scheme", None) is not None for module in model.modules()):
        with redirect_stderr(StringIO()):  # it draws a bar of its own
            model(input_ids=torch.zeros((1, 2), dtype=torch.long, device=model.device))
        stop_rounding(model)


BESIDE_WEIGHTS = ("*.json", "*.model", "*.txt", "*.jinja", "*.py", "LICENSE*", "README.md")
"""Files of a hub repository that are fetched beside the weights."""


def checkpoint_folder(name: str, revision: str | None, *, weights: bool = True, beside: bool = False) -> Path:
    """The folder `name`, or that of the hub repository `name`, of which what transformers loads is fetched.

    Without `weights`, only configurations are, and with `beside` all that lies beside the weights. Raises
    `RequestError` where it is neither.
    """
    if (folder := local_folder(name)) is not None:
        return folder

    def fetch(*patterns: str) -> Path:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns), ignore_patterns=["*/*"]))

    try:
        if not weights:
            return fetch(*(BESIDE_WEIGHTS if beside else ("*config.json",)))
        folder = fetch(*BESIDE_WEIGHTS, SINGLE)
        if not (folder / SINGLE).is_file() and (folder / INDEX).is_file():
            folder = fetch(*files_of_index(folder))
        return folder
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        if out_of_space(error):
            raise
        raise RequestError(
            f"{name}: neither a folder nor a model that can be fetched from the hub ({first_line(error)})"
        ) from error
