"""Optimizers by name: functions of parameter groups and a learning rate; `OPTIMIZERS` names them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from supernet.common.errors import RequestError
from supernet.training.muon import Muon

Groups = list[dict[str, Any]]
"""Parameter groups as torch's optimizers take them: `params`, `weight_decay`, and `matrices`, whether these are
matrices that are no embeddings and no head."""

BETAS = (0.9, 0.95)


def adamw(groups: Groups, rate: float) -> torch.optim.Optimizer:
    """AdamW in one fused kernel for each parameter group (CPU and CUDA)."""
    return torch.optim.AdamW(groups, lr=rate, betas=BETAS, fused=True)


def adamw_8bit(groups: Groups, rate: float) -> torch.optim.Optimizer:
    """AdamW with its moments in 8 bits (Dettmers et al., arXiv 2110.02861): 2 bytes a parameter instead of 8."""
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(groups, lr=rate, betas=BETAS)


def muon(groups: Groups, rate: float) -> torch.optim.Optimizer:
    """Muon for the matrices of layers, AdamW for the rest."""
    return Muon(groups, rate, BETAS)


OPTIMIZERS: dict[str, Callable[[Groups, float], torch.optim.Optimizer]] = {
    "muon": muon,
    "adamw": adamw,
    "adamw-8bit": adamw_8bit,
}


def check_optimizer(name: str, device: str) -> None:
    """Raises `RequestError` for an optimizer that cannot run here."""
    if name == "adamw-8bit" and device != "cuda":
        raise RequestError("finetuning.optimizer: adamw-8bit runs on a GPU only; leave it out")
    if name == "adamw-8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise RequestError("finetuning.optimizer: adamw-8bit needs bitsandbytes: pip install bitsandbytes")
