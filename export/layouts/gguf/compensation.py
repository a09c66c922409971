"""Before a llama.cpp file is rounded block by block of inputs: what a block loses, those behind it say.

The step of GPTQ (Frantar et al., arXiv 2210.17323) for blocks instead of single inputs, so that any type's own rounding
of a block will do, and the file is written as any other: of weights that were moved.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from export.layouts.gguf.checks import table_of
from export.layouts.gguf.file import Kinds
from export.layouts.gguf.types import TYPES, dequantized
from export.quantization.gptq import compensation, in_sequence
from supernet.uneven import family_of_standalone


@torch.no_grad()
def compensate(network: PreTrainedModel, kind_of: Kinds, ids: Tensor) -> dict[str, Tensor]:
    """Move the weights of linear layers inside blocks whose types' scales are searched, so that rounding them loses
    less; returns the mean squares of their inputs, [inputs], by the name of the weight: llama.cpp's importance matrix.

    `ids` are token ids [sequences, length]. Layer by layer, each on what those before it say once they are rounded.
    Needs memory for the network twice. Raises `RequestError` where inputs are not finite.
    """
    family, moved, importance = table_of(network.config), dict[str, Tensor](), dict[str, Tensor]()

    def rounded(module: str, weight: Tensor, second: Tensor) -> Tensor:
        name = f"{module}.weight"
        stored, importance[name] = family.stored(name), second.diagonal().float().cpu()
        makes_up, before, after = compensation(second).cpu(), dict[str, Tensor](), dict[str, Tensor]()
        for final, values in stored.to_file(weight.detach().float().cpu(), network.config).items():
            kind = kind_of(final, tuple(values.shape))
            before[final] = after[final] = values
            if TYPES[kind].searched:
                round_block = partial(_rounded, kind, importance[name])
                before[final], after[final] = by_blocks(values, makes_up, TYPES[kind].block, round_block)
        moved[name] = stored.from_file(before, network.config)
        return stored.from_file(after, network.config)

    blocks = family_of_standalone(network.config).layers + "."
    linear = [n for n, m in network.named_modules() if n.startswith(blocks) and isinstance(m, nn.Linear | Conv1D)]
    in_sequence(network, linear, ids, rounded)
    for name, values in moved.items():
        network.get_parameter(name).copy_(values)
    return importance


def by_blocks(
    weight: Tensor, makes_up: Tensor, block: int, rounded: Callable[[Tensor, slice], Tensor]
) -> tuple[Tensor, Tensor]:
    """A weight [out, in] with every block of inputs as it is when its turn comes, and its rounded values.

    `rounded` rounds a block [out, block], which is at these inputs; `makes_up` is of `compensation`.
    """
    left, values = weight.clone(), torch.empty_like(weight)
    for start in range(0, weight.shape[1], block):
        here, behind = slice(start, start + block), slice(start + block, None)
        values[:, here] = rounded(left[:, here], here)
        lost = left[:, here] - values[:, here]
        errors = torch.linalg.solve_triangular(makes_up[here, here], lost, upper=True, left=False)
        left[:, behind] -= errors @ makes_up[here, behind]
    return left, values


def _rounded(kind: str, importance: Tensor, values: Tensor, here: slice) -> Tensor:
    return dequantized(values.contiguous(), kind, importance[here])
