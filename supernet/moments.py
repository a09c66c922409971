"""Second moments of what the output projections of half-blocks and of experts read, on calibration text; kept with the
run.

They are gathered from the first layer to the last, so that no more than one layer's are in memory. A file holds those
of one layer, 4 bytes for each pair of inputs, and says which weights they belong to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from supernet.activation import SuperNetwork, slice_parameter
from supernet.architecture import Axis, Half, LayerSizes, unit_counts
from supernet.common.errors import RequestError, reading
from supernet.common.files import replacing
from supernet.common.progress import say
from supernet.experts import FEWEST_TOKENS, ExpertInputs, Experts, stacked_experts
from supernet.hooks import Hooks
from supernet.layer_walk import LayerWalk, first_of, residual_scale
from supernet.least_squares import Sums, choose_ridge, refit
from supernet.ordering import output_projections

HELD_OUT_PARTS = 4
"""One part of the calibration text in so many is held out to choose ridges by."""
LONGEST_PART = 1024
"""Tokens of a part: a row, or as many of a longer one."""


OTHER: dict[Half, Half] = {"attention": "mlp", "mlp": "attention"}
"""The other half-block of a layer."""


@dataclass(frozen=True)
class Projection:
    """The linear module that projects a half-block's units back to the residual."""

    layer: int
    half: Half
    name: str
    """Name of the module, in the network."""
    module: nn.Module
    axis: Axis
    """Axis of its inputs."""
    transposed: bool
    """Whether the weight is stored [inputs, outputs] (transformers' Conv1D)."""

    @property
    def weight_name(self) -> str:
        return f"{self.name}.weight"

    @property
    def bias_name(self) -> str:
        return f"{self.name}.bias"

    @property
    def device(self) -> torch.device:
        return cast(Tensor, self.module._parameters["weight"]).device

    def weight(self) -> Tensor:
        """The full network's weight in float64, [outputs, inputs]."""
        weight = cast(Tensor, self.module._parameters["weight"]).detach().double()
        return weight.T if self.transposed else weight

    def bias(self) -> Tensor | None:
        """The full network's bias in float64, [outputs]."""
        bias = self.module._parameters.get("bias")
        return None if bias is None else bias.detach().double()

    def kept(self, sizes: LayerSizes, full: LayerSizes) -> Tensor:
        """Indices of the inputs that a layer of `sizes` keeps."""
        counts, kept = unit_counts(1, full), unit_counts(1, sizes)
        return slice_parameter(torch.arange(self.axis.size(counts)), (self.axis,), counts, kept)

    def stored(self, weight: Tensor) -> Tensor:
        """A refitted weight [outputs, inputs], or bias [outputs], as the module holds it."""
        held = cast(Tensor, self.module._parameters["weight"])
        return (weight.T if self.transposed and weight.dim() > 1 else weight).to(held).contiguous()


def projections(supernet: SuperNetwork) -> dict[tuple[int, Half], Projection]:
    """The projection of every half-block that ends in one linear module: all but those of experts and of linear
    attention."""
    halves: dict[str, Half] = {"kv": "attention", "ffn": "mlp"}
    by_half: dict[tuple[int, Half], Projection] = {}
    for (layer, unit), reader in output_projections(supernet).items():
        dimension, half = reader.inputs.dimension, halves[unit]
        assert layer is not None
        name = reader.spec.name.removesuffix(".weight")
        axis = reader.spec.axes[dimension]
        by_half[layer, half] = Projection(layer, half, name, reader.module, axis, dimension == 0)
    return by_half


def is_held_out(tokens: int, length: int, first_row: int) -> Tensor:
    """Which of the tokens of a batch, in rows of `length`, are held out, [tokens]; its first row is number `first_row`
    of the text. Of long rows, parts are held out: a text may have few of them."""
    parts = (first_row * length + torch.arange(tokens)) // min(length, LONGEST_PART)
    return parts % HELD_OUT_PARTS == HELD_OUT_PARTS - 1


@dataclass(frozen=True)
class Other:
    """E[o xᵀ] [outputs, inputs], of both less their means where the moments are centred, and E[o] [outputs] in float32,
    and the ridge that fits o to x best."""

    product: Tensor
    mean: Tensor
    ridge: float


@dataclass(frozen=True)
class Moments:
    """Of one projection's inputs: E[x xᵀ] [inputs, inputs] and E[x] [inputs] in float32, the tokens that they are of,
    and the ridge that serves all sizes best (infinite where the plain slice does).

    `other` is of what the layer's other half-block puts out, o: with it, this one says what it can of o where the other
    is removed. `centred`: second moments are of x less its mean, as those of a projection with a bias are kept, since
    means that are large beside how x varies leave nothing of that in float32.
    """

    second: Tensor
    mean: Tensor
    tokens: int
    ridge: float
    other: Other | None = None
    centred: bool = False

    def to(self, device: torch.device) -> Moments:
        """The same on a device."""
        other = self.other and Other(self.other.product.to(device), self.other.mean.to(device), self.other.ridge)
        return replace(self, second=self.second.to(device), mean=self.mean.to(device), other=other)

    def of(self, centred: bool) -> Tensor:
        """Second moments in float64; with `centred`, of the inputs less their means."""
        second, mean = self.second.double(), self.mean.double()
        if centred == self.centred:
            return second
        means = torch.outer(mean, mean)
        return second - means if centred else second + means


def gather(
    supernet: SuperNetwork, batches: Sequence[Tensor], experts: bool = False, more: str = "repair.tokens, or more text"
) -> Iterator[tuple[int, dict[str, Moments]]]:
    """Each layer's moments on token ids [rows, length], first layer first: by half-block and, of stacked `experts`
    where they are asked for, by `expert_place`. The full network is active meanwhile.

    Raises `RequestError` where inputs are not finite. Says where tokens are fewer than a half-block's inputs; `more` is
    what gives more of them.
    """
    by_half, by_layer = projections(supernet), stacked_experts(supernet) if experts else {}
    walk = LayerWalk.of(supernet, batches)
    adds = bool(batches) and residual_scale(supernet, batches[0][:1]) is not None
    lengths = [batch.shape[1] for batch in batches]
    rows = [(length, sum(map(len, batches[:n]))) for n, length in enumerate(lengths)]
    few: list[tuple[int, int]] = []
    judging = 0
    for index in range(len(supernet.layers)):
        here = {half: p for (layer, half), p in by_half.items() if layer == index}
        stacked, adding = by_layer.get(index), supernet.halves(index) if adds else {}
        sums, expert_inputs = _sums_of_layer(supernet, walk, index, here, adding, stacked, rows)
        moments: dict[str, Moments] = {}
        for half, pair in sums.items():
            own = here[half]
            moments[half] = _moments(own.name, own.weight(), own.bias() is not None, *pair)
            judging += pair[1].tokens
        if stacked is not None:
            moments |= _moments_of_experts(stacked, expert_inputs)
            judging += sum(int(batch.held_out.sum()) for batch in expert_inputs)
        few += [(m.tokens, len(m.mean)) for m in moments.values() if m.tokens < len(m.mean)]
        yield index, moments
    if not judging and (by_half or by_layer):
        say(
            f"warning: repair: {sum(map(torch.Tensor.numel, batches)):,} calibration tokens are too few to hold some "
            f"out, by which it is judged; nothing is refitted (more: {more})"
        )
    elif few:
        tokens, inputs = max(few, key=lambda pair: pair[1])
        say(
            f"warning: repair: {tokens:,} calibration tokens are fewer than the {inputs:,} inputs of {len(few)} "
            f"projections; what is refitted stays nearer to the plain slice (more: {more})"
        )


def _sums_of_layer(
    supernet: SuperNetwork,
    walk: LayerWalk,
    index: int,
    here: Mapping[Half, Projection],
    adding: Mapping[Half, nn.Module],
    experts: Experts | None,
    rows: Sequence[tuple[int, int]],
) -> tuple[dict[Half, tuple[Sums, Sums]], list[ExpertInputs]]:
    """Take a walk through a layer. Sums of what each of its projections reads and of what the other half-block, where
    it is among those `adding`, puts out meanwhile: over the tokens to fit to, and over those held out. Beside them what
    came to its `experts`, batch by batch. `rows` has the length of each batch's rows and the number of its first."""
    sums: dict[Half, tuple[Sums, Sums]] = {}
    expert_inputs: list[ExpertInputs] = []
    read: dict[Half, Tensor] = {}
    outputs: dict[Half, Tensor] = {}

    def reads(half: Half) -> Callable[..., None]:
        return lambda _, inputs: read.update({half: inputs[0].detach().flatten(0, -2)})

    def puts_out(half: Half) -> Callable[..., None]:
        return lambda _, __, output: outputs.update({half: first_of(output).detach().flatten(0, -2)})

    def route(_: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
        states, chosen, weights = (part.detach() for part in inputs)
        held = is_held_out(len(states), *rows[walk.number]).to(states.device)
        expert_inputs.append(ExpertInputs(states, chosen, weights, held))

    def collect(*_: object) -> None:
        """At the layer's end, where both half-blocks have run."""
        for half, x in read.items():
            other = outputs.get(OTHER[half])
            if half not in sums:
                shape = x.shape[1], 0 if other is None else other.shape[1], x.device
                sums[half] = Sums(*shape), Sums(*shape)
            held = is_held_out(len(x), *rows[walk.number]).to(x.device)
            for part, chosen in zip(sums[half], (~held, held), strict=True):
                part.add(x[chosen], None if other is None else other[chosen])

    hooks = [p.module.register_forward_pre_hook(reads(half)) for half, p in here.items()]
    hooks += [module.register_forward_hook(puts_out(half)) for half, module in adding.items()]
    if experts is not None:
        hooks.append(experts.module.register_forward_pre_hook(route))
    with Hooks([*hooks, supernet.layers[index].register_forward_hook(collect)]):
        walk.step(index)
    return sums, expert_inputs


@torch.no_grad()
def _moments_of_experts(experts: Experts, inputs: Sequence[ExpertInputs]) -> dict[str, Moments]:
    """Of what the output projection of an expert reads times the router's weight, on the tokens that come to it;
    without those to which too few come."""
    found: dict[str, Moments] = {}
    for number, weight in enumerate(experts.outputs):
        training, held = (Sums(weight.shape[1], device=weight.device) for _ in range(2))
        for batch in inputs:
            tokens, x = experts.coming(batch, number)
            held_out = batch.held_out[tokens]
            training.add(x[~held_out])
            held.add(x[held_out])
        if training.tokens + held.tokens < FEWEST_TOKENS:
            continue
        name = f"{experts.name} of expert {number}"
        found[expert_place(number)] = _moments(name, weight.detach().double(), False, training, held)
    return found


def expert_place(number: int) -> str:
    """Where the moments of an expert are, among those of a layer."""
    return f"experts.{number}"


def _moments(name: str, weight: Tensor, centred: bool, training: Sums, held: Sums) -> Moments:
    """From sums of what the projection of that name and `weight` [outputs, inputs] reads; `centred` where it has a
    bias."""
    both = training + held
    check_finite(name, both.xx, both.x)
    ridge, other = math.inf, None  # nothing to judge by: the plain slice
    if training.tokens and held.tokens:
        ridge = choose_ridge(weight, training, held, centred)
        if len(both.t):
            product = both.moments(centred)[1]
            nothing = torch.zeros_like(product.T)
            fits = refit(nothing, training, held, centred)[1]
            other = Other(product.T.float().cpu(), (both.t / both.tokens).float().cpu(), fits)
    second, mean = both.moments(centred)[0].float().cpu(), (both.x / both.tokens).float().cpu()
    return Moments(second, mean, both.tokens, ridge, other, centred)


def check_finite(name: str, *sums: Tensor) -> None:
    """Raises `RequestError` where sums of what the projection of that name reads, or is to put out, are not finite."""
    if not all(torch.isfinite(part).all() for part in sums):
        raise RequestError(
            f"repair: what {name} reads is not finite on the calibration text; compute in float32 "
            "(--dtype float32), or leave repair off (--repair off)"
        )


def layer_file(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer:03d}.safetensors"


def save_moments(moments: Mapping[str, Moments], file: Path, of: str) -> None:
    """Write a layer's moments; `of` is the fingerprint of the weights and of the text that they are of."""
    tensors: dict[str, Tensor] = {}
    facts = {"of": of}
    for place, m in moments.items():
        tensors |= {f"{place}.second": m.second, f"{place}.mean": m.mean}
        facts |= {f"{place}.tokens": str(m.tokens), f"{place}.ridge": repr(m.ridge)}
        facts |= {f"{place}.centred": "yes"} if m.centred else {}  # those of earlier versions are not
        if m.other is not None:
            tensors |= {f"{place}.other.product": m.other.product.contiguous(), f"{place}.other.mean": m.other.mean}
            facts[f"{place}.other.ridge"] = repr(m.other.ridge)
    with replacing(file) as temporary:
        save_file(tensors, temporary, facts)


def load_moments(file: Path, of: str) -> dict[str, Moments]:
    """A layer's moments, as `gather` gave them, from a file of `save_moments`. Raises `RequestError` where they are of
    something else, or not finite."""
    with reading(f"{file}: not moments; remove {file.parent}"), safe_open(file, "pt") as stored:
        facts, names = stored.metadata() or {}, set(stored.keys())
        if facts.get("of") != of:
            raise RequestError(f"{file}: moments of other weights or another text; remove {file.parent}")
        moments = {
            place: Moments(
                stored.get_tensor(f"{place}.second"),
                stored.get_tensor(f"{place}.mean"),
                int(facts[f"{place}.tokens"]),
                float(facts[f"{place}.ridge"]),
                Other(
                    stored.get_tensor(f"{place}.other.product"),
                    stored.get_tensor(f"{place}.other.mean"),
                    float(facts[f"{place}.other.ridge"]),
                )
                if f"{place}.other.product" in names
                else None,
                f"{place}.centred" in facts,
            )
            for place in (name.removesuffix(".second") for name in sorted(names) if name.endswith(".second"))
        }
        values = [stored.get_tensor(name) for name in names]
    if any(not torch.isfinite(value).all() for value in values):
        raise RequestError(f"{file}: its moments are not finite; remove {file.parent}")
    return moments
