"""Muon: a matrix moves in all directions alike.

Nearly all of the size of a gradient lies in a few directions, so that the others, which have as much to learn, hardly
move. Muon replaces the momentum U S Vᵀ of a matrix by U Vᵀ (Jordan et al., Muon, 2024; for large networks Liu et al.,
arXiv 2502.16982). Embeddings, head, norms and biases are trained by AdamW beside it.

Its state is the momentum, 4 bytes for each weight of a matrix, where AdamW has 8. What it costs is products of the
matrices with themselves, whatever the batch is: as many operations as the passes over one and a half to two times as
many tokens as the network is wide.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor

from supernet.training.sharding import full_tensor, shard_like

MOMENTUM = 0.8
"""0.95, with which networks are trained from nothing, remembers more steps than a healing of some 30 has
(docs/results.md)."""
ITERATIONS = 3
"""Five, as published, end at the same held-out losses (docs/results.md)."""
COEFFICIENTS = 3.4445, -4.7750, 2.0315
AT_ONCE = 2**25
"""Numbers of a stack of matrices that are made orthogonal together; the work takes some five copies of them."""
STACKED = {"cuda": AT_ONCE}
"""The same of matrices of one shape, by kind of device. Where a launch takes longer than a small product, a network of
a few hundred of them is quick in stacks only; on a CPU these gain nothing, and take memory."""


class Muon(torch.optim.Optimizer):
    """Muon for the parameter groups that say `"matrices": True`, and fused AdamW for the others.

    Both share a rate: it is the most that a step moves a matrix by, as root mean square over its entries.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "fused": True})  # fused: AdamW's step count lies beside its moments
        others = [group for group in self.param_groups if not group["matrices"]]  # the same objects: they share rates
        self.adamw = torch.optim.AdamW(others, lr=lr, betas=betas, fused=True) if others else None
        if self.adamw is not None:
            self.adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move what has a gradient; there is no closure."""
        for group in self.param_groups:
            if group["matrices"]:
                moving = [parameter for parameter in group["params"] if parameter.grad is not None]
                for alike in in_stacks(moving):
                    self._move(alike, group["lr"], group["weight_decay"])
        if self.adamw is not None:
            self.adamw.step()

    def _move(self, alike: list[Tensor], rate: float, decay: float) -> None:
        """Move parameters of one shape."""
        directions = [self._direction(parameter) for parameter in alike]
        moves = orthogonal(torch.stack(directions)) if len(alike) > 1 else [orthogonal(directions[0])]
        for parameter, move in zip(alike, moves, strict=True):
            if decay:
                parameter.mul_(1 - rate * decay)
            # U Vᵀ of m x n numbers has a squared sum of at most min(m, n): its root mean square is 1 / sqrt(max(m, n)).
            parameter.add_(shard_like(move, parameter), alpha=-rate * sqrt(max(move.shape[-2:])))

    def _direction(self, parameter: Tensor) -> Tensor:
        """Where the momentum of a parameter leads (Nesterov's), of all of it where it is sharded."""
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(gradient)
        momentum = state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        gradient, nesterov = full_tensor(gradient), full_tensor(gradient.lerp(momentum, MOMENTUM))
        # An expert that no token came to has only its fading momentum, which would move it as far as ever.
        return nesterov * (gradient.abs().amax((-2, -1), keepdim=True) > 0)


def in_a_stack(numbers: int, device: torch.device) -> int:
    """Parameters of so many numbers each that are moved together."""
    return max(1, STACKED.get(device.type, 0) // numbers)


def in_stacks(parameters: list[Tensor]) -> list[list[Tensor]]:
    """Parameters that are moved together: of one shape, and as many as `STACKED` allows where they lie."""
    stacks: dict[tuple[object, ...], list[list[Tensor]]] = {}
    for parameter in parameters:
        stack = stacks.setdefault((parameter.shape, parameter.dtype, parameter.device), [[]])
        if len(stack[-1]) == in_a_stack(parameter.numel(), parameter.device):
            stack.append([])
        stack[-1].append(parameter)
    return [alike for stack in stacks.values() for alike in stack]


def orthogonal(matrix: Tensor) -> Tensor:
    """Nearly U Vᵀ of a matrix U S Vᵀ, or of each of a stack of them, by Newton-Schulz iterations: singular values are
    about 1, but for those that were below a fiftieth of the norm, which stay smaller. In bfloat16 on a GPU, else in
    float32: many processors are slow in less."""
    if matrix.ndim > 2:
        parts = matrix.split(max(1, AT_ONCE // prod(matrix.shape[1:])))
        return torch.cat([_orthogonal(part) for part in parts])
    return _orthogonal(matrix)


def _orthogonal(matrix: Tensor) -> Tensor:
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-12)
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).to(matrix.dtype)


def operations(shape: tuple[int, ...]) -> int:
    """Floating-point operations of `orthogonal` for a matrix, or a stack of them."""
    small, large = sorted(shape[-2:])
    return prod(shape[:-2]) * ITERATIONS * (4 * small**2 * large + 2 * small**3)


def is_matrix(shape: tuple[int, ...]) -> bool:
    """Whether a parameter of this shape is a matrix or a stack of them; a convolution of each channel is none."""
    return len(shape) > 1 and min(shape[-2:]) > 1
