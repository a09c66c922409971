"""Repair: what was cut is given back by least squares, without training.

A slice of a trained network throws away what the removed neurons and heads said, though those that stay can say most of
it. So the output projection of a cut half-block is refitted, in closed form, to what the uncut one puts out on
calibration text. For inputs x with second moments H = E[x xᵀ], kept ones K and weight W [outputs, inputs],

    W'_K = W H[:, K] H[K, K]⁻¹

is the optimum (optimal brain surgery for groups: Kurtić et al., ZipLM, arXiv 2302.04089; Ling et al., SlimGPT, arXiv
2412.18110; Tang et al., DarwinLM, arXiv 2502.07780, builds its database of block variants so). H + λI stands for H in
both places, so that a large λ gives the plain slice W_K, and not zero. A projection with a bias is fitted to inputs
less their means, which the bias then carries (all that FLAP does, An et al., arXiv 2312.11983).

`RepairedVariants` repairs any sub-network from moments of the full network, each layer for itself: for a search.
`repair_in_sequence` repairs one, from the first layer to the last, on its own activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from supernet.activation import SuperNetwork
from supernet.architecture import Architecture, Half, LayerSizes, Structure
from supernet.common.byte_cache import ByteCache
from supernet.expert_repair import refit_experts
from supernet.experts import ExpertInputs, Experts, stacked_experts
from supernet.hooks import Hooks
from supernet.layer_walk import LayerWalk, Through, residual_scale
from supernet.least_squares import Sums, factorised, prefix_weight, refit
from supernet.moments import OTHER, Moments, Projection, check_finite, expert_place, is_held_out, projections
from supernet.variants import FixedVariants


@dataclass(frozen=True)
class _Factor:
    """What all prefixes of one order of a projection's inputs are made from (`prefix_weight`), where the projection's
    module lies. Kept in float32: it takes half the memory of float64, which is solved in."""

    products: Tensor
    lower: Tensor
    means: tuple[Tensor, Tensor] | None
    """E[x], and what the projection puts out on average; of a projection with a bias."""

    @property
    def bytes(self) -> int:
        return self.products.nbytes + self.lower.nbytes

    def weight(self, count: int) -> Tensor:
        """The refitted weight [outputs, count] in float64."""
        return prefix_weight(self.products[:, :count].double(), self.lower[:count, :count].double(), count)


@dataclass(frozen=True)
class _Repaired:
    """A refitted projection as its module holds it."""

    weight: Tensor
    bias: Tensor | None

    @property
    def bytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)


def _bytes_of(made: _Factor | _Repaired | None) -> int:
    return 0 if made is None else made.bytes


class RepairedVariants:
    """Repaired output projections for every size of a super-network, made when they are first asked for.

    `load` gives a layer's moments. What was made is kept within `memory` bytes, and made again where it was dropped; so
    are the factorisations, in as much again, of which one serves all sizes with the same query heads in each group.

    Where one half-block of a layer is removed, the other one is fitted to what both put out, in families that simply
    add them to the residual: with C = E[o xᵀ] of the removed one's output o, W H + C stands for W H above. What a
    removed layer said is not made up for, nor what the last MLP said: in sequence the layer behind one does that.

    Of experts, each is fitted to its own output on the tokens that come to it in the full network. So neurons that were
    cut are made up for, and experts that were removed are not.
    """

    def __init__(self, supernet: SuperNetwork, load: Callable[[int], Mapping[str, Moments]], memory: int) -> None:
        self._full, self._load = supernet.base.layers, load
        self._by_name: dict[str, Projection] = {}
        for projection in projections(supernet).values():
            self._by_name[projection.weight_name] = projection
            if projection.bias() is not None:
                self._by_name[projection.bias_name] = projection
        parameters = dict(supernet.model.named_parameters())  # what shadows hide from `get_parameter`
        self._experts = {
            experts.name: (layer, parameters[experts.name]) for layer, experts in stacked_experts(supernet).items()
        }
        self._made: ByteCache[_Repaired | None] = ByteCache(memory, _bytes_of)
        self._factors: ByteCache[_Factor | None] = ByteCache(memory, _bytes_of)
        self._carrying: dict[tuple[int, Half], bool] = {}

    @property
    def names(self) -> Collection[str]:
        return self._by_name.keys() | self._experts.keys()

    def tensor(self, name: str, kept: LayerSizes) -> Tensor | None:
        if name in self._experts:
            return self._of_experts(*self._experts[name], kept)
        projection = self._by_name[name]
        full, half = self._full[projection.layer], projection.half
        units, alone = _units(half, kept), OTHER[half] in kept.skip and OTHER[half] not in full.skip
        if not units[0] or (units == _units(half, full) and not alone):
            return None
        key = (projection.layer, half, *units, alone)
        made = self._made.get_or_make(key, lambda: self._make(projection, kept, alone))
        if made is None:
            return None
        return made.weight if name == projection.weight_name else made.bias

    def _make(self, projection: Projection, kept: LayerSizes, alone: bool) -> _Repaired | None:
        """The refitted projection of a layer of these sizes, where the other half-block is removed if `alone`; None
        where the plain slice is better."""
        carries = alone and self._carries(projection)
        whole = _units(projection.half, kept) == _units(projection.half, self._full[projection.layer])
        if whole and not carries:
            return None
        factor = self._factor(projection, kept, carries)
        if factor is None:
            return None
        chosen = projection.kept(kept, self._full[projection.layer])
        weight = factor.weight(len(chosen))
        bias = None
        if factor.means is not None:
            mean, output = factor.means
            bias = projection.stored(output - weight @ mean[chosen])
        return _Repaired(projection.stored(weight), bias)

    def _of_experts(self, layer: int, full: Tensor, kept: LayerSizes) -> Tensor | None:
        """The output projections [experts, hidden, neurons] of a layer's experts that keep fewer neurons, from `full`
        ones; None where the plain slices are better, or whole."""
        width, number = kept.intermediate_size, kept.num_experts
        if not width or width == full.shape[2]:
            return None

        def make() -> _Repaired | None:
            factors = self._factors_of_experts(layer, full)[:number]
            weights = [
                full[expert, :, :width].detach() if factor is None else factor.weight(width).to(full)
                for expert, factor in enumerate(factors)
            ]
            return _Repaired(torch.stack(weights), None) if any(factors) else None

        made = self._made.get_or_make((layer, "experts", width, number), make)
        return None if made is None else made.weight

    def _factors_of_experts(self, layer: int, full: Tensor) -> list[_Factor | None]:
        """Of what each expert of a layer reads; None where the plain slice is better, or moments were not gathered."""
        keys = [(layer, "experts", expert) for expert in range(len(full))]
        if any(key not in self._factors for key in keys):
            moments, made = self._load(layer), list[_Factor | None]()
            for key, weight in zip(keys, full.detach(), strict=True):
                own, factor = moments.get(expert_place(key[-1])), None
                if own is not None and math.isfinite(own.ridge):
                    lower = factorised(own.to(full.device).of(centred=False), own.ridge)
                    factor = _Factor((weight.double() @ lower).float(), lower.float(), None)
                made.append(factor)
                self._factors.put(key, factor)
            return made
        return [self._factors[key] for key in keys]

    def _carries(self, projection: Projection) -> bool:
        """Whether a projection can say something of what the other half-block of its layer says."""
        key = (projection.layer, projection.half)
        if key == (len(self._full) - 1, "attention"):
            return False  # nothing stands behind the last MLP, so in sequence nothing makes up for it
        if key not in self._carrying:
            other = self._load(projection.layer)[projection.half].other
            self._carrying[key] = other is not None and math.isfinite(other.ridge)
        return self._carrying[key]

    def _factor(self, projection: Projection, kept: LayerSizes, carries: bool) -> _Factor | None:
        """Of the inputs in the order in which sizes with as many query heads in a group keep them, then the others;
        None where the plain slice is better. Fitted to the removed half-block's output too where it `carries` that."""
        heads = 0
        if projection.half == "attention":
            heads = kept.num_attention_heads // kept.num_key_value_heads

        def make() -> _Factor | None:
            moments = self._load(projection.layer)[projection.half].to(projection.device)
            return None if math.isinf(moments.ridge) else self._factorise(projection, heads, moments, carries)

        return self._factors.get_or_make((projection.layer, projection.half, heads, carries), make)

    def _factorise(self, projection: Projection, heads: int, moments: Moments, carries: bool) -> _Factor:
        full = self._full[projection.layer]
        widest = full
        if heads:
            widest = LayerSizes(heads * full.num_key_value_heads, full.num_key_value_heads, full.intermediate_size)
        first = projection.kept(widest, full)
        last = torch.ones(len(moments.mean), dtype=torch.bool).index_fill_(0, first, False).nonzero()[:, 0]
        order = torch.cat([first, last])
        other = moments.other if carries else None
        bias, weight, mean = projection.bias(), projection.weight(), moments.mean.double()
        ridge = moments.ridge if other is None else max(moments.ridge, other.ridge)
        lower = factorised(moments.of(bias is not None)[order][:, order], ridge)
        products = weight[:, order] @ lower
        if other is not None:
            product = other.product.double()
            if bias is not None and not moments.centred:
                product = product - torch.outer(other.mean.double(), mean)
            products += torch.linalg.solve_triangular(lower.T, product[:, order], upper=True, left=False)
        means = None
        if bias is not None:
            output = bias + weight @ mean
            means = mean, output if other is None else output + other.mean.double()
        return _Factor(products.float(), lower.float(), means)


def experts_bytes(structure: Structure) -> int:
    """Of what all experts of a network are repaired from: `RepairedVariants` is quick where it may keep so much."""
    hidden = structure.base.hidden_size
    return sum(
        4 * layer.num_experts * (hidden + layer.intermediate_size) * layer.intermediate_size
        for layer in structure.base.layers
    )


def _units(half: Half, sizes: LayerSizes) -> tuple[int, ...]:
    """How many units of each kind a half-block keeps; the first number is 0 where it is removed."""
    if half == "attention":
        return sizes.num_key_value_heads, sizes.num_attention_heads
    return (sizes.intermediate_size,)


def repair_in_sequence(
    supernet: SuperNetwork,
    architecture: Architecture,
    batches: Sequence[Tensor],
    progress: Callable[[], object] = lambda: None,
) -> FixedVariants:
    """Variants of every output projection of `architecture`, fitted from the first layer to the last on the activations
    of the network as cut and repaired so far, so that later layers mend what earlier ones lost.

    A projection's target is what brings the residual stream behind it back to the uncut network's: the uncut output,
    and all that the residual lacks in front of it, of removed half-blocks too. Where a family norms what it adds to the
    residual, the target is the uncut output alone. `batches` are token ids, [rows, length] each. `progress` is called
    after each layer. The network needs memory once. Raises ValueError for another residual width than the base's.
    """
    if architecture.hidden_size != supernet.base.hidden_size:
        raise ValueError("another residual width cannot be repaired")
    before, previous = supernet.current, supernet.variants
    sequence = _Sequence(supernet, architecture, batches)
    try:
        for index in range(len(supernet.layers)):
            sequence.repair(index)
            progress()
    finally:
        supernet.use(None)
        supernet.activate(before)
        supernet.use(previous)
    return sequence.variants


class _Sequence:
    """The two walks of a repair in sequence, of the whole network and of the cut one, and what was repaired so far."""

    def __init__(self, supernet: SuperNetwork, architecture: Architecture, batches: Sequence[Tensor]) -> None:
        self.supernet, self.architecture, self.batches = supernet, architecture, batches
        self.tensors: dict[str, Tensor] = {}
        self.variants = FixedVariants(self.tensors)
        self.whole, self.cut = LayerWalk.of(supernet, batches), LayerWalk.of(supernet, batches)
        self.first_rows = [sum(len(batch) for batch in batches[:n]) for n in range(len(batches))]
        self._show(whole=True)
        self.scale = residual_scale(supernet, batches[0][:1])
        self._projections, self._experts = projections(supernet), stacked_experts(supernet)

    def repair(self, index: int) -> None:
        """Repair the half-blocks that layer `index` keeps, and take both walks through it."""
        here = {half: p for (layer, half), p in self._projections.items() if layer == index}
        # 1. The whole network's layer.
        self._show(whole=True)
        spoken: dict[Half, list[Tensor]] = {half: [] for half in here}

        def listen(half: Half) -> Callable[..., None]:
            return lambda _, __, output: spoken[half].append(output.flatten(0, -2))

        with Hooks([p.module.register_forward_hook(listen(half)) for half, p in here.items()]):
            outputs = self.whole.outputs(index)
        # 2. The half-blocks of the cut one, the second with the first as repaired.
        self._show(whole=False)
        for half, projection in here.items():
            if half not in self.architecture.layers[index].skip:
                self._repair(projection, spoken[half], outputs)
                self.supernet.use(self.variants)
        if index in self._experts and "mlp" not in self.architecture.layers[index].skip:
            self._repair_experts(index, self._experts[index], outputs)
            self.supernet.use(self.variants)
        # 3. What the next layer reads.
        self.cut.step(index)
        self.whole.states = outputs

    def _repair(self, projection: Projection, spoken: list[Tensor], outputs: list[Tensor]) -> None:
        """Refit one projection of the cut network. `spoken` [tokens, hidden] is what the uncut one puts out for each
        batch, `outputs` what leaves the whole network's layer."""
        index, half, scale = projection.layer, projection.half, self.scale
        base = self.supernet.base.layers[index]
        kept = projection.kept(self.architecture.layers[index], base)
        start = projection.weight()[:, kept.to(spoken[0].device)]
        ends = half == "attention" or scale is None  # no need of what comes behind the projection
        seen: list[tuple[Tensor, Tensor]] = []

        def look(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen.append((inputs[0].flatten(0, -2), output.flatten(0, -2)))
            if ends:
                raise Through

        with Hooks([projection.module.register_forward_hook(look)]):
            behind = self.cut.outputs(index)
        outs, ins = start.shape
        training, held_out = Sums(ins, outs, start.device), Sums(ins, outs, start.device)
        for n, ((x, own), target) in enumerate(zip(seen, spoken, strict=True)):
            if scale is not None and half == "mlp":
                target = own + (outputs[n] - behind[n]).flatten(0, -2) / scale
            elif scale is not None and index:
                target = target + (self.whole.states[n] - self.cut.states[n]).flatten(0, -2) / scale
            held = self._held_out(n, x)
            training.add(x[~held], target[~held])
            held_out.add(x[held], target[held])
        if not (training.tokens and held_out.tokens):
            return
        check_finite(projection.name, training.xx, training.xt, held_out.xx, held_out.xt)
        biased = projection.bias() is not None
        weight, ridge = refit(start, training, held_out, biased)
        if math.isfinite(ridge):
            self.tensors[projection.weight_name] = projection.stored(weight)
        if biased:  # it carries the means in any case
            both = training + held_out
            self.tensors[projection.bias_name] = projection.stored((both.t - weight @ both.x) / both.tokens)

    def _repair_experts(self, index: int, experts: Experts, outputs: list[Tensor]) -> None:
        """Refit the output projections of a layer's active experts to what the residual stream behind them lacks."""
        if self.scale is None:  # no family with experts norms what they put out
            return
        expert_inputs: list[ExpertInputs] = []

        def look(_: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
            states, chosen, weights = inputs
            expert_inputs.append(ExpertInputs(states, chosen, weights, self._held_out(self.cut.number, states)))

        with Hooks([experts.module.register_forward_pre_hook(look)]):
            behind = self.cut.outputs(index)
        gaps = [(whole - cut).flatten(0, -2) / self.scale for whole, cut in zip(outputs, behind, strict=True)]
        if (refitted := refit_experts(experts, expert_inputs, gaps)) is not None:
            self.tensors[experts.name] = refitted.contiguous()

    def _held_out(self, number: int, of_tokens: Tensor) -> Tensor:
        """Which of the tokens of batch `number` are held out, where these lie that are `of_tokens`."""
        held = is_held_out(len(of_tokens), self.batches[number].shape[1], self.first_rows[number])
        return held.to(of_tokens.device)

    def _show(self, *, whole: bool) -> None:
        self.supernet.use(None if whole else self.variants)
        self.supernet.activate(self.supernet.base if whole else self.architecture)
