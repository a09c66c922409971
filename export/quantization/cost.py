"""What tuned rounding costs: the seconds of one step of one block, measured on the network at hand."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from export.quantization.autoround_child import BATCH
from supernet.hooks import Hooks, frozen
from supernet.uneven import family_of_standalone

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROUP = 32
"""Input channels that share a scale in the step that is timed."""
STEPS = 3
"""Steps of which the fastest counts, since other work on the machine only ever adds time."""


class _Reached(Exception):
    """Ends the pass at the block that is timed."""


@torch.enable_grad()
def step_seconds(model: PreTrainedModel, length: int, sequences: int = BATCH) -> float:
    """Seconds of one AutoRound step of one block of a network, on its device, on `sequences` of `length` tokens.

    A tuning of `iterations` steps of each block takes this times iterations, blocks and schemes, beside what loading
    and storing takes. What is timed is what a step does (SignRound, arXiv 2309.05516, eq. 3 to 5): the weights of the
    first block are rounded with an offset of each weight and two factors of each scale, the block computes the
    sequences, and the error of its output is differentiated with respect to these.
    """
    block = next(iter(model.get_submodule(family_of_standalone(model.config).layers).children()))
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise _Reached

    device = next(model.parameters()).device
    ids = torch.randint(0, model.config.vocab_size, (sequences, length), generator=torch.Generator().manual_seed(0))
    with Hooks([block.register_forward_pre_hook(look, with_kwargs=True)]), torch.no_grad(), suppress(_Reached):
        model(input_ids=ids.to(device), use_cache=False)
    ((args, kwargs),) = seen
    weights = {f"{name}.weight": m.weight.detach() for name, m in block.named_modules() if isinstance(m, nn.Linear)}
    tuned = {name: _Rounding(weight) for name, weight in weights.items()}
    taken = []
    with frozen(block):
        for _ in range(STEPS):
            began = _now(device)
            output = functional_call(block, {name: rounding() for name, rounding in tuned.items()}, args, kwargs)
            (output if isinstance(output, Tensor) else output[0]).float().square().mean().backward()
            for rounding in tuned.values():
                rounding.step()
            taken.append(_now(device) - began)
    return min(taken)


class _Rounding:
    """A weight rounded to 4 bits, with what AutoRound tunes of it."""

    def __init__(self, weight: Tensor) -> None:
        group = GROUP if weight.shape[1] % GROUP == 0 else weight.shape[1]
        self._groups, self._shape = weight.unflatten(1, (-1, group)), weight.shape
        self._offset = torch.zeros_like(self._groups, requires_grad=True)
        self._factors = [torch.ones_like(self._groups[..., :1], requires_grad=True) for _ in range(2)]

    def __call__(self) -> Tensor:
        low, high = self._groups.aminmax(dim=-1, keepdim=True)
        scale = torch.maximum(-low * self._factors[0], high * self._factors[1]) / 7 + 1e-9
        codes = self._groups / scale + self._offset
        codes = codes + (codes.round() - codes).detach()  # gradients pass straight through
        return (codes.clamp(-8, 7) * scale).view(self._shape)

    def step(self) -> None:
        for value in (self._offset, *self._factors):
            assert value.grad is not None
            value.data.sub_(value.grad.sign(), alpha=1e-3)
            value.grad = None


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
