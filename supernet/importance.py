"""How important each neuron, head, expert and residual channel is, by published criteria; `IMPORTANCES` names them.

One signature: (super-network with its full network active, calibration batches of token ids [batch, length]) ->
`Scores`. The calibration data is shared, so that criteria can be compared. `block_influence` does the same for layers.

What activations say of stacked experts: an expert's activation is the weight that the router gives to what it says.
Its neurons are inside one fused product, where no module reads them: they are ordered by magnitude, together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supernet.activation import SuperNetwork
from supernet.architecture import TensorSpec
from supernet.device import logits_at_once
from supernet.learned_masks import learn_masks
from supernet.ordering import Scores, UnitSlice, readers, runs, shapes

Batches = Iterable[Tensor]
"""Token ids, [batch, length] each, on the super-network's device."""


def magnitude(supernet: SuperNetwork, batches: Batches) -> Scores:
    """The L2 norm of all weights that belong to a unit, biases included: for a neuron its rows of gate and up and its
    column of down (Li et al., arXiv 1608.08710, with the coupled weights of Fang et al., arXiv 2301.12900)."""
    squares: Scores = {}
    for entry in supernet.structure.tensors:
        weight = supernet.model.get_parameter(entry.name).detach().double()
        for run in runs(entry, supernet.base):
            _add(squares, run, _along(weight.square(), run.dimension))
    return _roots(squares)


def activation(supernet: SuperNetwork, batches: Batches) -> Scores:
    """The L2 norm of a unit's activation over all calibration tokens, where linear modules read it: of neurons and
    heads the output projections, of residual channels all that stands behind a norm (Muralidharan et al., Minitron,
    arXiv 2407.14679, section 2.2)."""
    return _reader_energy(supernet, batches, weighted=False)


def wanda(supernet: SuperNetwork, batches: Batches) -> Scores:
    """The norm of a unit's activation times the norm of the weights that read it: for unit j of a half-block with
    output projection W (columns j), ||x_j||_2 * ||W[:, j]||_2 (Sun et al., arXiv 2306.11695, eq. 1, summed over a
    structure's weights in quadrature, and over all that read a residual channel)."""
    return _reader_energy(supernet, batches, weighted=True)


def taylor(supernet: SuperNetwork, batches: Batches) -> Scores:
    """The first-order change of the loss if a unit were removed: sum over batches b of |sum of w * dL_b/dw| over all
    weights w that belong to the unit.

    LLM-Pruner's (Ma et al., arXiv 2305.11627) vector-wise importance, eq. 3 without the second-order term, summed over
    the coupled structures of a group. The absolute value is taken for each batch, since gradients of a converged
    network cancel over the data. A parameter's gradient is reduced and freed as soon as it is there.
    """
    changes: Scores = {}
    scores: Scores = {}
    parameters = {entry.name: supernet.model.get_parameter(entry.name) for entry in supernet.structure.tensors}
    wanted = {name: parameter.requires_grad for name, parameter in parameters.items()}
    hooks = []
    for entry in supernet.structure.tensors:
        found = list(runs(entry, supernet.base))
        parameters[entry.name].requires_grad_(bool(found))

        def reduce(parameter: Tensor, found: list[UnitSlice] = found) -> None:
            assert parameter.grad is not None
            product = parameter.detach().double() * parameter.grad.double()
            for run in found:
                _add(changes, run, _along(product, run.dimension))
            parameter.grad = None

        if found:
            hooks.append(parameters[entry.name].register_post_accumulate_grad_hook(reduce))
    try:
        with torch.enable_grad():
            for ids in batches:
                for row in ids.split(1):  # of equal lengths: their mean is the batch's, and one row's logits are enough
                    (supernet.model(input_ids=row, labels=row, use_cache=False).loss / len(ids)).backward()
                for units, change in changes.items():
                    scores[units] = scores.get(units, torch.zeros_like(change)) + change.abs()
                changes.clear()
    finally:
        for hook in hooks:
            hook.remove()
        for name, parameter in parameters.items():
            parameter.requires_grad_(wanted[name])
    return _given(scores)


def learned(supernet: SuperNetwork, batches: Batches) -> Scores:
    """Scores of masks that were learnt on frozen weights, from Wanda's order on (Lottery Jackpots, `masks`)."""
    batches = list(batches)
    first = wanda(supernet, batches)
    learnt: Scores = {}
    for kinds in (("kv", "ffn"), ("query",), ("hidden",)):  # masks of one kind would hide what those of another do
        learnt |= learn_masks(supernet, batches, {units: first[units] for units in first if units[1] in kinds})
    return first | learnt


def random(supernet: SuperNetwork, batches: Batches, seed: int = 0) -> Scores:
    """Uniform random numbers: what every criterion has to beat."""
    generator = torch.Generator().manual_seed(seed)
    return {
        units: torch.rand(shape, generator=generator, dtype=torch.float64)
        for units, shape in shapes(supernet.structure).items()
    }


IMPORTANCES: dict[str, Callable[[SuperNetwork, Batches], Scores]] = {
    "magnitude": magnitude,
    "activation": activation,
    "wanda": wanda,
    "taylor": taylor,
    "learned": learned,
    "random": random,
}


def block_influence(supernet: SuperNetwork, batches: Batches) -> list[float]:
    """Importance of each layer: 1 - the mean cosine, over all tokens, of its input and its output (Men et al.,
    ShortGPT, arXiv 2403.03853, eq. 1). A layer that hardly turns the residual stream can go."""
    layers = list(supernet.model.get_submodule(supernet.family.layers).children())
    cosines, tokens = [0.0] * len(layers), [0] * len(layers)

    def collect(index: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor | tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
            after = output if isinstance(output, Tensor) else output[0]
            cosine = F.cosine_similarity(inputs[0].double(), after.double(), dim=-1)
            cosines[index] += float(cosine.sum())
            tokens[index] += cosine.numel()

        return hook

    hooks = [layer.register_forward_hook(collect(index)) for index, layer in enumerate(layers)]
    with _removing(hooks):
        _forward(supernet, batches)
    if not all(tokens):
        raise ValueError("no calibration batch was given")
    return [1 - total / count for total, count in zip(cosines, tokens, strict=True)]


def _reader_energy(supernet: SuperNetwork, batches: Batches, weighted: bool) -> Scores:
    """For each unit, the root of its squares where it is read, over all tokens and the unit's channels; `weighted`
    multiplies each channel's by the squares of the weights that it meets."""
    reading = readers(supernet)
    energy: dict[str, Tensor] = {}

    def collect(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            squares = inputs[0].double().square().flatten(0, -2).sum(0)
            energy[name] = energy[name] + squares if name in energy else squares

        return hook

    def collect_routing(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], tuple[Tensor, ...]], None]:
        def hook(router: nn.Module, _: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
            logits, weights, chosen = output  # [tokens, experts], and two times [tokens, experts of each]
            squares = torch.zeros(logits.shape[-1], dtype=torch.float64, device=logits.device)
            squares.index_add_(0, chosen.flatten(), weights.double().square().flatten())
            energy[name] = energy[name] + squares if name in energy else squares

        return hook

    modules = {reader.entry.name: reader.module for reader in reading}
    hooks = [module.register_forward_pre_hook(collect(name)) for name, module in modules.items()]
    experts = [entry for entry in supernet.structure.tensors if _reads_experts(entry)]
    for entry in experts:
        layer = supernet.model.get_submodule(f"{supernet.family.layers}.{entry.layer}")
        router = layer.get_submodule(supernet.family.router)
        hooks.append(router.register_forward_hook(collect_routing(entry.name)))
    with _removing(hooks):
        _forward(supernet, batches, head=any(reader.entry.role == "head" for reader in reading))
    squares: Scores = {}
    for reader in reading if energy else ():
        along = energy[reader.entry.name]
        if weighted:
            weight = supernet.model.get_parameter(reader.entry.name).detach().double()
            along = along * _along(weight.square(), reader.run.dimension)
        _add(squares, reader.run, along)
    scores = _roots(_given(squares))
    for entry in experts:
        weight = supernet.model.get_parameter(entry.name).detach().double()
        read = energy[entry.name] * (_along(weight.square(), 0) if weighted else 1)
        scores[entry.layer, "experts"] = read.sqrt().cpu()
    if experts:
        scores = magnitude(supernet, ()) | scores
    return scores


def _reads_experts(entry: TensorSpec) -> bool:
    """Whether a parameter holds the output projections of a layer's experts, [experts, residual channels, neurons]."""
    return entry.role == "experts" and entry.axes[-1].blocks[0][0] == "ffn"


def _along(values: Tensor, dimension: int) -> Tensor:
    """Sums of `values` over all dimensions but one."""
    others = [d for d in range(values.dim()) if d != dimension]
    return values.sum(others) if others else values


def _add(scores: Scores, run: UnitSlice, along: Tensor) -> None:
    part = run.sums(along).cpu()
    scores[run.units] = scores[run.units] + part if run.units in scores else part


def _roots(squares: Scores) -> Scores:
    return {units: value.sqrt() for units, value in squares.items()}


def _given(scores: Scores) -> Scores:
    if not scores:
        raise ValueError("no calibration batch was given")
    return scores


def _forward(supernet: SuperNetwork, batches: Batches, *, head: bool = False) -> None:
    """Run the decoder over all batches and, where its hooks want that, the head over as many tokens at a time as keep
    the logits within `logits_at_once`."""
    model: Any = supernet.model
    decoder = model.get_submodule(supernet.family.layers.rpartition(".")[0])
    output = model.get_output_embeddings()
    with torch.no_grad():
        for ids in batches:
            states = decoder(input_ids=ids, use_cache=False).last_hidden_state
            for part in (
                states.flatten(0, 1).split(max(1, logits_at_once(states.device) // output.weight.shape[0]))
                if head
                else ()
            ):
                output(part)


@contextmanager
def _removing(hooks: list[torch.utils.hooks.RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
