"""How important each neuron, head, expert and residual channel is, by published criteria; `IMPORTANCES` names them.

A criterion is a function of the super-network, with its full network active, and of calibration batches of token ids
[batch, length]; it gives `Scores`. All criteria read the same calibration data, so they can be compared.
`block_influence` scores layers.

For stacked experts, an expert's activation is the weight that the router gives to its output. The neurons of experts
are inside one fused product, where no module reads them, so they are ordered by magnitude.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supernet.activation import SuperNetwork
from supernet.architecture import REMOVED, Architecture, Half, Unit
from supernet.device import logits_at_once
from supernet.experts import projects_experts
from supernet.hooks import Hooks
from supernet.learned_masks import learn_masks
from supernet.moments import gather, projections
from supernet.ordering import Scores, UnitSlice, readers, score_shapes, unit_slices
from supernet.surgeon import removal_errors

Batches = Iterable[Tensor]
"""Token ids, [batch, length] each, on the super-network's device."""


def magnitude(supernet: SuperNetwork, batches: Batches) -> Scores:
    """The L2 norm of all weights that belong to a unit, biases included: for a neuron its rows of gate and up and its
    column of down (Li et al., arXiv 1608.08710, with the coupled weights of Fang et al., arXiv 2301.12900)."""
    squares: Scores = {}
    for spec in supernet.structure.tensors:
        weight = supernet.model.get_parameter(spec.name).detach().double()
        for part in unit_slices(spec, supernet.base):
            _add(squares, part, _sum_along(weight.square(), part.dimension))
    return _roots(squares)


def activation(supernet: SuperNetwork, batches: Batches) -> Scores:
    """The L2 norm of a unit's activation over all calibration tokens, at the linear modules that read it: the output
    projections for neurons and heads, every module behind a norm for residual channels (Muralidharan et al., Minitron,
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
    network cancel over the data. A parameter's gradient is reduced and freed as soon as it is computed.
    """
    changes: Scores = {}  # signed, of the current batch
    scores: Scores = {}
    with ExitStack() as afterwards:
        # 1. Compute gradients of the parameters that hold units, and reduce each to its units.
        for spec in supernet.structure.tensors:
            parameter = supernet.model.get_parameter(spec.name)
            parts = list(unit_slices(spec, supernet.base))
            afterwards.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(bool(parts))

            def reduce(parameter: Tensor, parts: list[UnitSlice] = parts) -> None:
                assert parameter.grad is not None
                product = parameter.detach().double() * parameter.grad.double()
                for part in parts:
                    _add(changes, part, _sum_along(product, part.dimension))
                parameter.grad = None

            if parts:
                afterwards.enter_context(Hooks([parameter.register_post_accumulate_grad_hook(reduce)]))
        # 2. Sum the absolute changes over batches. Rows have equal lengths, so the mean of their losses is the batch's,
        #    and only one row's logits are in memory.
        with torch.enable_grad():
            for ids in batches:
                for row in ids.split(1):
                    (supernet.model(input_ids=row, labels=row, use_cache=False).loss / len(ids)).backward()
                for units, change in changes.items():
                    scores[units] = scores.get(units, torch.zeros_like(change)) + change.abs()
                changes.clear()
    return _not_empty(scores)


def learned(supernet: SuperNetwork, batches: Batches, seed: int = 0) -> Scores:
    """Scores of masks learnt on frozen weights, starting in Wanda's order (Lottery Jackpots, `learned_masks`)."""
    batches = list(batches)
    first = wanda(supernet, batches)
    learnt: Scores = {}
    for kinds in (("kv", "ffn"), ("query",), ("hidden",)):  # one after another: masks of one kind hide another's effect
        learnt |= learn_masks(
            supernet, batches, {units: first[units] for units in first if units[1] in kinds}, seed=seed
        )
    return first | learnt


def surgeon(supernet: SuperNetwork, batches: Batches) -> Scores:
    """Errors after repair: what the other neurons, or head groups, of a half-block can say best goes first
    (`supernet.surgeon`; ZipLM, arXiv 2302.04089). Query heads, experts and residual channels as Wanda scores them."""
    batches = list(batches)
    scores = wanda(supernet, batches)
    names: dict[Half, Unit] = {"attention": "kv", "mlp": "ffn"}
    by_half = projections(supernet)
    for layer, moments in gather(supernet, batches, more="more text"):
        for half in names.keys() & moments.keys():  # not of experts
            units, found = (layer, names[half]), moments[half]
            scores[units] = removal_errors(by_half[layer, half], found, len(scores[units]))
    return scores


def random(supernet: SuperNetwork, batches: Batches, seed: int = 0) -> Scores:
    """Uniform random numbers in [0, 1): the baseline that every criterion has to beat."""
    generator = torch.Generator().manual_seed(seed)
    return {
        units: torch.rand(shape, generator=generator, dtype=torch.float64)
        for units, shape in score_shapes(supernet.structure).items()
    }


IMPORTANCES: dict[str, Callable[..., Scores]] = {
    "magnitude": magnitude,
    "activation": activation,
    "wanda": wanda,
    "taylor": taylor,
    "learned": learned,
    "surgeon": surgeon,
    "random": random,
}
OF_CHANCE = ("learned", "random")
"""Those that draw, and so take a seed."""
OF_ACTIVATIONS = ("activation", "wanda")
"""Those that take one pass of the whole network over the batches, and change nothing in it."""


def importance_and_influence(
    criterion: str, supernet: SuperNetwork, batches: Batches, seed: int = 0
) -> tuple[Scores, list[float]]:
    """A criterion's scores, and `block_influence`; from one pass over the batches where the criterion is of
    activations. The seed is for those that draw."""
    batches = list(batches)
    if criterion not in OF_ACTIVATIONS:
        drawn = {"seed": seed} if criterion in OF_CHANCE else {}
        return IMPORTANCES[criterion](supernet, batches, **drawn), block_influence(supernet, batches)
    with _InfluenceProbe(supernet) as probe:
        scores = IMPORTANCES[criterion](supernet, batches)
    return scores, probe.influence()


def block_influence(supernet: SuperNetwork, batches: Batches) -> list[float]:
    """Importance of each layer: 1 - the mean cosine, over all tokens, of its input and its output (Men et al.,
    ShortGPT, arXiv 2403.03853, eq. 1). Raises ValueError where there are no batches."""
    with _InfluenceProbe(supernet) as probe:
        _forward(supernet, batches)
    return probe.influence()


@torch.no_grad()
def skipped_error(supernet: SuperNetwork, batches: Batches) -> list[float]:
    """Importance of each layer: the square error of the last hidden states when it is skipped, as a share of their own
    squares, over all tokens: sum of ||h - h_without||^2 / sum of ||h||^2 (Taghibakhshi et al., Nemotron Elastic,
    arXiv 2511.16664; here of the states that the head reads, behind the last norm). Takes a pass for each
    layer. Raises ValueError where there are no batches."""
    batches, base = list(batches), supernet.base
    if not batches:
        raise ValueError("no calibration batch was given")
    errors = [0.0] * len(base.layers)
    squares = 0.0
    for ids in batches:
        full = hidden_states(supernet, ids)
        squares += float(full.square().sum())
        for index in range(len(errors)):
            layers = tuple(REMOVED if i == index else layer for i, layer in enumerate(base.layers))
            with supernet.activated(Architecture(base.hidden_size, layers)):
                errors[index] += float((hidden_states(supernet, ids) - full).square().sum())
    return [error / squares for error in errors]


def hidden_states(supernet: SuperNetwork, ids: Tensor) -> Tensor:
    """What the head reads of a batch of token ids, [batch, length, hidden], float64."""
    return supernet.model.base_model(input_ids=ids, use_cache=False).last_hidden_state.double()


class _InfluenceProbe:
    """Sums, over the passes within, of the cosines between each layer's input and output."""

    def __init__(self, supernet: SuperNetwork) -> None:
        layers = list(supernet.model.get_submodule(supernet.family.layers).children())
        self._cosines, self._tokens = [0.0] * len(layers), [0] * len(layers)
        self._hooks = Hooks([layer.register_forward_hook(partial(self._add, i)) for i, layer in enumerate(layers)])

    def __enter__(self) -> _InfluenceProbe:
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.remove()

    def _add(self, index: int, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        after = output if isinstance(output, Tensor) else output[0]
        cosine = F.cosine_similarity(inputs[0].double(), after.double(), dim=-1)
        self._cosines[index] += float(cosine.sum())
        self._tokens[index] += cosine.numel()

    def influence(self) -> list[float]:
        """Of each layer. Raises ValueError where there was no pass."""
        if not all(self._tokens):
            raise ValueError("no calibration batch was given")
        return [1 - total / count for total, count in zip(self._cosines, self._tokens, strict=True)]


def _reader_energy(supernet: SuperNetwork, batches: Batches, weighted: bool) -> Scores:
    """For each unit, the root of the sum of its squared activations where it is read, over all tokens and the unit's
    channels; with `weighted`, each channel's sum times the squares of the weights that it meets."""
    reading = readers(supernet)
    energy: dict[str, Tensor] = {}  # by name of the reading weight: sum over tokens of each squared input

    def collect(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            # Of one batch, float32 is precise enough; float64 takes over ten times as long.
            squares = inputs[0].float().square().flatten(0, -2).sum(0).double()
            energy[name] = energy[name] + squares if name in energy else squares

        return hook

    def collect_routing(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], tuple[Tensor, ...]], None]:
        def hook(router: nn.Module, _: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
            logits, weights, chosen = output  # [tokens, experts], and two times [tokens, experts of each]
            squares = torch.zeros(logits.shape[-1], dtype=torch.float64, device=logits.device)
            squares.index_add_(0, chosen.flatten(), weights.double().square().flatten())
            energy[name] = energy[name] + squares if name in energy else squares

        return hook

    def weights(name: str) -> Tensor:
        return supernet.model.get_parameter(name).detach().double().square()

    # 1. Run the network, with hooks on the linear modules and the routers.
    modules = {reader.spec.name: reader.module for reader in reading}
    hooks = [module.register_forward_pre_hook(collect(name)) for name, module in modules.items()]
    experts = [spec for spec in supernet.structure.tensors if projects_experts(spec)]
    for spec in experts:
        layer = supernet.model.get_submodule(f"{supernet.family.layers}.{spec.layer}")
        router = layer.get_submodule(supernet.family.router)
        hooks.append(router.register_forward_hook(collect_routing(spec.name)))
    with Hooks(hooks):
        _forward(supernet, batches, head=any(reader.spec.role == "head" for reader in reading))
    # 2. Sum over all modules that read a unit.
    squares: Scores = {}
    for reader in reading if energy else ():
        name, dimension = reader.spec.name, reader.inputs.dimension
        factor = _sum_along(weights(name), dimension) if weighted else 1
        _add(squares, reader.inputs, energy[name] * factor)
    scores = _roots(_not_empty(squares))
    # 3. Experts by their routing, and their neurons by magnitude.
    for spec in experts:
        factor = _sum_along(weights(spec.name), 0) if weighted else 1
        scores[spec.layer, "experts"] = (energy[spec.name] * factor).sqrt().cpu()
    return magnitude(supernet, ()) | scores if experts else scores


def _sum_along(values: Tensor, dimension: int) -> Tensor:
    """Sums of `values` over all dimensions but one, [size of that dimension]."""
    others = [d for d in range(values.dim()) if d != dimension]
    return values.sum(others) if others else values


def _add(scores: Scores, part: UnitSlice, along: Tensor) -> None:
    """Add each unit's sum of values [size of the dimension] to its score."""
    sums = part.sums(along).cpu()
    scores[part.units] = scores[part.units] + sums if part.units in scores else sums


def _roots(squares: Scores) -> Scores:
    return {units: value.sqrt() for units, value in squares.items()}


def _not_empty(scores: Scores) -> Scores:
    """The scores. Raises ValueError where there are none."""
    if not scores:
        raise ValueError("no calibration batch was given")
    return scores


def _forward(supernet: SuperNetwork, batches: Batches, *, head: bool = False) -> None:
    """Run the decoder over all batches and, with `head`, the head too, on so few tokens at a time that the logits stay
    within `logits_at_once`."""
    decoder = supernet.model.get_submodule(supernet.family.layers.rpartition(".")[0])
    output = supernet.model.get_output_embeddings()
    with torch.no_grad():
        for ids in batches:
            states = decoder(input_ids=ids, use_cache=False).last_hidden_state
            if head:
                rows = max(1, logits_at_once(states.device) // output.weight.shape[0])
                for part in states.flatten(0, 1).split(rows):
                    output(part)
