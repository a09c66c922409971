"""Proposers: architectures worth measuring, found with the network's own outputs or gradients instead of task scores.

A proposer says how much it harms to size a half-block of one layer differently, all else being whole; `assemble` adds
such harms up and finds the best combination for every size by dynamic programming. Harms of several cuts do not add
up in truth: `refined` measures again around what was found, and what comes out is where a search starts, not its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn

from supernet.activation import SuperNetwork
from supernet.architecture import HALVES, Architecture, Half, LayerSizes, Structure, Unit
from supernet.common.errors import RequestError
from supernet.common.progress import bar
from supernet.ordering import output_projections
from supernet.training.data import Batch
from supernet.training.losses import token_losses
from supernet.training.traces import Leading, Trace, trace

UNIT: dict[Half, Unit] = {"attention": "kv", "mlp": "ffn"}
"""What a half-block is made of."""
ROUNDS = 2
"""How often at most `refined` measures around what it has found."""
GRID = 4096
"""Sizes that `assemble` tells apart, as parts of the base: so much rounding keeps deep networks quick."""

Variants = Sequence[tuple[int, LayerSizes]]
"""(layer, its sizes): a base in which just this layer, and just one half-block of it or the whole, is cut."""
Harms = Mapping[tuple[int, LayerSizes], float]
Path = list[tuple[int, Architecture]]
"""(parameters, architecture), ascending."""


def blockwise(supernet: SuperNetwork, variants: Variants, batches: Sequence[Batch]) -> Path:
    """Replace one block at a time and see how far the predictions move (Puzzle, arXiv 2411.19146, section 4.2; the
    block library of BossNAS, arXiv 2103.12424, with the pre-trained network as teacher); assemble for every size.

    The harm of a variant is KL(whole network || network with the one block replaced), in nats per token on `batches`.
    One pass over the batches for each variant.
    """
    harm, harms = harm_in(supernet, batches), {}
    with bar("measuring every block", len(variants)) as progress:
        for layer, sizes in sorted(variants, key=lambda variant: -variant[0]):  # the last first: `Leading`
            harms[layer, sizes] = harm(with_layer(supernet.base, layer, sizes))
            progress.advance()
    return assemble(supernet.structure, options(supernet.structure, harms))


def refined(
    supernet: SuperNetwork, variants: Variants, batches: Sequence[Batch], path: Path, sizes: Sequence[int]
) -> Path:
    """For each of `sizes`, the last of `path` within it, bettered by measuring around it.

    Harms of single blocks do not add up where many are cut. So each block of the architecture found is exchanged
    alone, for a smaller or a larger one, and the best of the size is assembled from the differences; at most twice, and
    only as long as KL(whole || architecture) falls. One pass over the batches for each variant and round.
    """
    structure, found = supernet.structure, []
    harm = harm_in(supernet, batches)
    starts = [(size, within[-1]) for size in sizes if (within := [a for p, a in path if p <= size])]
    with bar("measuring around them", ROUNDS * len(starts) * len(supernet.base.layers)) as progress:
        for size, best in starts:
            least = harm(best)
            for _ in range(ROUNDS):
                around = options_around(structure, best, variants, harm, least, progress.advance)
                better = [a for parameters, a in assemble(structure, around) if parameters <= size]
                if not better or (now := harm(better[-1])) >= least:
                    break
                best, least = better[-1], now
            found.append((structure.parameters(best), best))
    return found


def harm_in(supernet: SuperNetwork, batches: Sequence[Batch]) -> Callable[[Architecture], float]:
    """KL(whole network || architecture) on `batches`, nats per token, as a function of the architecture.

    It is quick where what it is asked about has leading layers in common with what it was asked before.
    """
    passes = Leading(supernet)
    with torch.no_grad():
        whole = [passes.trace(number, batch) for number, batch in enumerate(batches)]

    @torch.no_grad()
    def harm(architecture: Architecture) -> float:
        with supernet.activated(architecture):
            students = [passes.trace(number, batch) for number, batch in enumerate(batches)]
            return sum(float(divergence(*pair)) for pair in zip(students, whole, strict=True)) / len(batches)

    return harm


def superposition(supernet: SuperNetwork, variants: Variants, batches: Sequence[Batch], steps: int = 200) -> Path:
    """Learn a mixture of all sizes of every half-block at once, while the network is pressed to become smaller.

    TangleNAS (arXiv 2312.10440, section 3) superposes the weights of all choices, sum_k alpha_k W[:k]. Where choices
    are prefixes of the units that feed an output projection, that is one mask on those units: unit j is scaled by the
    sum of the alphas of the choices that keep it. So a step costs one pass through the whole network. The alphas learn
    (Adam; the weights do not) to keep the predictions, KL(whole || mixture), at an expected size that falls evenly
    over the steps from the base's to the smallest. Choices are then made not one by one, by the largest alpha
    (DARTS-PT, arXiv 2108.04392, shows how that fails), but together, as the most probable architecture of each size.
    """
    mixture = _Mixture(supernet, variants)
    optimizer = torch.optim.Adam(mixture.alphas, lr=0.05)
    full = supernet.structure.parameters(supernet.base)
    found: dict[Architecture, int] = {}
    with bar("mixing sizes", steps) as progress:
        for step in range(steps):
            batch = batches[step % len(batches)]
            target = full + (mixture.smallest - full) * (step + 1) / steps
            with torch.no_grad():
                whole = trace(supernet.model, batch)
            optimizer.zero_grad()
            with mixture.active():
                kept = divergence(trace(supernet.model, batch), whole)
                # A tenth too large weighs as much as a nat: enough to follow the target, and harms decide the rest.
                (kept + 100 * ((mixture.expected() - target) / full) ** 2).backward()
            optimizer.step()
            progress.advance()
            if (step + 1) % max(1, steps // 20) == 0:
                path = assemble(supernet.structure, options(supernet.structure, mixture.harms()))
                parameters, architecture = min(path, key=lambda point: abs(point[0] - target))
                found[architecture] = parameters
    return sorted(((p, a) for a, p in found.items()), key=lambda point: point[0])


def divergence(student: Trace, teacher: Trace) -> Tensor:
    """KL(teacher || student), nats per token."""
    return token_losses({"kl": 1.0}, student, teacher, 1.0) / max(1, len(student.targets))


PROPOSERS: dict[str, Callable[[SuperNetwork, Variants, Sequence[Batch]], Path]] = {
    "blockwise": blockwise,
    "superposition": superposition,
}


# -- assembling --


@dataclass(frozen=True)
class Option:
    """One way to size a layer: its parameters, and the harm it is thought to do."""

    sizes: LayerSizes
    parameters: int
    harm: float


def options(structure: Structure, harms: Harms) -> list[list[Option]]:
    """Every layer's options: all pairs of an attention and an MLP variant, harms added, and what harm is known of the
    layer's removal."""
    found = []
    for index, full in enumerate(structure.base.layers):
        known = {sizes: harm for (layer, sizes), harm in harms.items() if layer == index}
        attention = {full: 0.0} | {s: h for s, h in known.items() if half_of(s, full) == "attention"}
        mlp = {full: 0.0} | {s: h for s, h in known.items() if half_of(s, full) == "mlp"}
        found.append(_paired(structure, index, attention, mlp, {s: h for s, h in known.items() if s.removed}))
    return found


def options_around(
    structure: Structure,
    at: Architecture,
    variants: Variants,
    harm: Callable[[Architecture], float],
    before: float,
    on_layer: Callable[[], None],
) -> list[list[Option]]:
    """As `options`, with the harm of exchanging one half-block, or the layer, of `at` rather than of the base; `before`
    is the harm of `at` itself. `on_layer` is called when a layer is done, the last layer first (`Leading`)."""

    def more(index: int, sizes: LayerSizes) -> float:
        return 0.0 if sizes == at.layers[index] else harm(with_layer(at, index, sizes)) - before

    found = []
    for index, full in reversed(list(enumerate(structure.base.layers))):
        now = at.layers[index]
        mine = [full, now, *(sizes for layer, sizes in variants if layer == index)]
        halves: dict[Half | None, dict[LayerSizes, float]] = {"attention": {}, "mlp": {}, None: {}}
        for sizes in mine:
            half = None if sizes.removed else half_of(sizes, full)
            if half == "attention" or sizes in (full, now):
                halves["attention"][sizes] = more(index, joined(sizes, now))
            if half == "mlp" or sizes in (full, now):
                halves["mlp"][sizes] = more(index, joined(now, sizes))
            if half is None and sizes != now:
                halves[None][sizes] = more(index, sizes)
        found.append(_paired(structure, index, halves["attention"], halves["mlp"], halves[None]))
        on_layer()
    return found[::-1]


def _paired(
    structure: Structure,
    index: int,
    attention: Mapping[LayerSizes, float],
    mlp: Mapping[LayerSizes, float],
    whole: Mapping[LayerSizes, float],
) -> list[Option]:
    """A layer's options from the harm of each size of its halves, and of both together where that is known."""
    base = structure.base
    nothing = (LayerSizes(0, 0, 0),) * len(base.layers)
    outer = structure.parameters(Architecture(base.hidden_size, nothing))
    rows = {joined(a, m): attention[a] + mlp[m] for a, m in product(attention, mlp)} | dict(whole)
    found = []
    for sizes, harm in rows.items():
        alone = (*nothing[:index], sizes, *nothing[index + 1 :])
        parameters = structure.parameters(Architecture(base.hidden_size, alone)) - outer
        found.append(Option(sizes, parameters, harm))
    return found


def with_layer(architecture: Architecture, index: int, sizes: LayerSizes) -> Architecture:
    """`architecture` with one layer sized differently."""
    layers = architecture.layers
    return Architecture(architecture.hidden_size, (*layers[:index], sizes, *layers[index + 1 :]))


def half_of(sizes: LayerSizes, full: LayerSizes) -> Half | None:
    """The one half-block that a variant cuts, or None where it cuts both."""
    if sizes.intermediate_size == full.intermediate_size and sizes.num_experts == full.num_experts:
        return "attention"
    if sizes.num_key_value_heads == full.num_key_value_heads:
        return "mlp"
    return None


def joined(attention: LayerSizes, mlp: LayerSizes) -> LayerSizes:
    """The attention of one variant with the MLP of another."""
    return LayerSizes(
        attention.num_attention_heads, attention.num_key_value_heads, mlp.intermediate_size, mlp.num_experts
    )


def assemble(structure: Structure, layers: Sequence[Sequence[Option]]) -> Path:
    """For every size, the architecture of least total harm: a knapsack with one option from each layer, solved layer
    by layer (dynamic programming) over sizes rounded to 1/4096 of the base's, keeping what no other dominates.
    """
    whole = structure.parameters(structure.base)
    nothing = (LayerSizes(0, 0, 0),) * len(layers)
    outer = structure.parameters(Architecture(structure.base.hidden_size, nothing))
    sizes, totals = np.zeros(1, dtype=np.int64), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []  # of every state: the state before it, and the option taken
    for row in layers:
        grown = (sizes[:, None] + np.array([o.parameters for o in row])).ravel()
        harmed = (totals[:, None] + np.array([o.harm for o in row])).ravel()
        order = np.lexsort((grown, harmed, grown * GRID // whole))
        cells = (grown * GRID // whole)[order]
        best = order[np.r_[True, cells[1:] != cells[:-1]]]  # the least harm of each rounded size
        best = best[np.r_[True, harmed[best][1:] < np.minimum.accumulate(harmed[best])[:-1]]]
        sizes, totals = grown[best], harmed[best]
        steps.append((best // len(row), best % len(row)))
    found = []
    for state in range(len(sizes)):
        chosen, at = [], state
        for row, (before, taken) in zip(reversed(layers), reversed(steps), strict=True):
            chosen.append(row[taken[at]].sizes)
            at = int(before[at])
        if any(sizes.num_key_value_heads for sizes in chosen):  # a network keeps attention somewhere
            architecture = Architecture(structure.base.hidden_size, tuple(reversed(chosen)))
            found.append((outer + int(sizes[state]), architecture))
    return found


# -- the superposition --


class _Mixture:
    """Alphas over the sizes of every half-block, and over keeping or removing a layer where that is a choice."""

    def __init__(self, supernet: SuperNetwork, variants: Variants) -> None:
        self.supernet = supernet
        base, structure = supernet.base, supernet.structure
        self.choices: list[tuple[int, Half | None, list[LayerSizes]]] = []
        for layer, full in enumerate(base.layers):
            mine = [sizes for at, sizes in variants if at == layer and sizes.num_experts in (0, full.num_experts)]
            for half in (*HALVES, None):
                cut = [s for s in mine if (None if s.removed else half_of(s, full)) == half]
                if cut:
                    self.choices.append((layer, half, [full, *cut]))
        if not self.choices:
            raise ValueError("no layer has sizes of its own to choose from")
        self._projections = output_projections(supernet)
        mixed = {(layer, UNIT[one]) for layer, half, _ in self.choices for one in (HALVES if half is None else (half,))}
        if not mixed <= self._projections.keys():
            raise RequestError(
                "--warm-start superposition: no linear layer of this family reads the neurons of stacked experts, or "
                "what a layer of linear attention gives; use blockwise or greedy"
            )
        self.alphas = [torch.zeros(len(sizes), requires_grad=True) for _, _, sizes in self.choices]
        with torch.no_grad():
            for alpha in self.alphas:
                alpha[0] = 2.0 + float(np.log(len(alpha)))  # starts near the whole network
        self._parameters = [
            torch.tensor([structure.parameters(with_layer(base, layer, s)) for s in sizes], dtype=torch.float64)
            for layer, _, sizes in self.choices
        ]
        self._full = structure.parameters(base)
        self.smallest = min(parameters for parameters, _ in assemble(structure, options(structure, self.harms())))

    def harms(self) -> dict[tuple[int, LayerSizes], float]:
        """How much less probable each cut is than the whole half-block or layer: the difference of log alphas.

        The pressure to become smaller is in the alphas too, and makes cuts that save much look harmless. The same
        amount for every parameter saved is added to all, the least that leaves no harm negative: among architectures of
        one size, it changes nothing.
        """
        odds = [(alpha[0] - alpha).detach().double() for alpha in self.alphas]
        saved = [self._full - parameters for parameters in self._parameters]
        pressure = max(0.0, *(float((-o[1:] / s[1:]).max()) for o, s in zip(odds, saved, strict=True)))
        found: dict[tuple[int, LayerSizes], float] = {}
        for (layer, _, sizes), o, s in zip(self.choices, odds, saved, strict=True):
            harm = (o + 1.001 * pressure * s).tolist()
            found |= {(layer, cut): value for cut, value in zip(sizes[1:], harm[1:], strict=True)}
        return found

    def expected(self) -> Tensor:
        """Parameters of the mixture: what is expected of every choice is saved, within a layer that is kept."""
        kept = {
            layer: alpha.softmax(0)[0]
            for (layer, half, _), alpha in zip(self.choices, self.alphas, strict=True)
            if half is None
        }
        total = torch.tensor(float(self._full), dtype=torch.float64)
        for (layer, half, _), alpha, parameters in zip(self.choices, self.alphas, self._parameters, strict=True):
            saved = (alpha.softmax(0) * (self._full - parameters)).sum()
            total = total - (saved if half is None else saved * kept.get(layer, 1.0))
        return total

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within, the network's half-blocks are mixtures; gradients reach the alphas only."""
        base = self.supernet.base
        masks: dict[tuple[int, Half], list[tuple[list[LayerSizes], Tensor]]] = {}
        for (layer, half, sizes), alpha in zip(self.choices, self.alphas, strict=True):
            for one in HALVES if half is None else (half,):
                masks.setdefault((layer, one), []).append((sizes, alpha))
        trained = [parameter for parameter in self.supernet.model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        hooks = []
        for (layer, half), mixed in masks.items():
            module: nn.Module = self._projections[layer, UNIT[half]].module
            full = _units(base.layers[layer], half)

            def scale(
                _: nn.Module,
                inputs: tuple[Tensor, ...],
                mixed: list[tuple[list[LayerSizes], Tensor]] = mixed,
                half: Half = half,
                full: int = full,
            ) -> tuple[Tensor, ...]:
                mask = torch.ones(full, device=inputs[0].device)
                for sizes, alpha in mixed:
                    kept = torch.tensor([_units(s, half) for s in sizes])[:, None] > torch.arange(full)
                    mask = mask * (alpha.softmax(0)[:, None] * kept).sum(0).to(mask)
                return (inputs[0] * mask.repeat_interleave(inputs[0].shape[-1] // full).to(inputs[0]), *inputs[1:])

            hooks.append(module.register_forward_pre_hook(scale))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for parameter in trained:
                parameter.requires_grad_(True)


def _units(sizes: LayerSizes, half: Half) -> int:
    return sizes.num_key_value_heads if half == "attention" else sizes.intermediate_size
