"""How llama.cpp stores each family: one table for each, and nothing else says anything of a family.

A `Stored` names the tensors that a parameter becomes, and the `Change` of its values on the way, which can be undone.
Whatever llama.cpp takes for granted and a configuration may say otherwise is refused here, in one line: a file is
written only where llama.cpp computes what transformers does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from compressor.errors import RequestError
from compressor.families import families, head_dim
from evals.trust import UNEVEN_PREFIX

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Change:
    """How a parameter's values are laid out otherwise in the file, and back. Both are given the width of a head."""

    to_file: Callable[[Tensor, int], Tensor]
    from_file: Callable[[Tensor, int], Tensor]


def _neighbours(values: Tensor, width: int) -> Tensor:
    """Rows of a query or key projection, from halves that rotate together to neighbours that do."""
    return values.unflatten(0, (-1, 2, width // 2)).transpose(1, 2).flatten(0, 2)


def _halves(values: Tensor, width: int) -> Tensor:
    return values.unflatten(0, (-1, width // 2, 2)).transpose(1, 2).flatten(0, 2)


def _by_kind(values: Tensor, width: int) -> Tensor:
    """Rows of a fused projection, from query, key, value of each head to all queries, all keys, all values."""
    return values.unflatten(0, (-1, 3, width)).transpose(0, 1).flatten(0, 2)


def _by_head(values: Tensor, width: int) -> Tensor:
    return values.unflatten(0, (3, -1, width)).transpose(0, 1).flatten(0, 2)


SAME = Change(lambda values, width: values, lambda values, width: values)
PERMUTED = Change(_neighbours, _halves)
PLUS_ONE = Change(lambda values, width: values + 1, lambda values, width: values - 1)
TRANSPOSED = Change(lambda values, width: values.T, lambda values, width: values.T)
BY_KIND = Change(_by_kind, _by_head)


@dataclass(frozen=True)
class Stored:
    """The tensors that one parameter becomes.

    With several names it is split evenly along its outputs (the last axis but one). `exact` ones stay float32 in files
    of every type: a router decides between experts, so a rounded activation would change what is computed.
    """

    names: tuple[str, ...]
    change: Change = SAME
    exact: bool = False

    def to_file(self, values: Tensor, width: int) -> dict[str, Tensor]:
        changed = self.change.to_file(values, width)
        return dict(zip(self.names, changed.chunk(len(self.names), -2) if self.names[1:] else [changed], strict=True))

    def from_file(self, parts: list[Tensor], width: int) -> Tensor:
        import torch

        return self.change.from_file(torch.cat(parts, -2) if parts[1:] else parts[0], width)


Parts = Mapping[str, Stored]
Metadata = dict[str, Any]
"""Values of the file's header, by the name of the `GGUFWriter` method that adds one (without `add_`)."""


def parts(names: Mapping[str, str], kinds: Collection[str] = ("weight",), change: Change = SAME) -> dict[str, Stored]:
    """One `Stored` for each module and kind of parameter, from the modules' names here to those in the file."""
    return {f"{mine}.{kind}": Stored((f"{its}.{kind}",), change) for mine, its in names.items() for kind in kinds}


@dataclass(frozen=True, eq=False)
class GGUFFamily:
    """What llama.cpp calls a family, its parameters and its settings, and what it cannot compute.

    `name` is the architecture in the file. `layer` (names within a decoder layer, as in `compressor.families`) and
    `outer` (absolute names) are the parameters that must be there, `optional` those of a layer that need not.

    `metadata` says what the header holds beyond what every family has; `rope` gives the configuration's rotary
    embeddings, of which `rotary` names the types that the architecture computes (`partial`: of a part of each head's
    channels too). `head` says whether the output head may be the embedding or a weight of its own. `square` says that
    the query heads must be as wide as the residual, all together. `activations` are those that it computes.

    `refused` and `refused_layers` say why a configuration cannot be written, or nothing: the first of what no choice
    of sizes changes, the other of what follows from the layers that are left. `uneven` is the table for networks whose
    layers differ in size.
    """

    model_type: str
    name: str
    layer: Parts
    outer: Parts
    optional: Parts = field(default_factory=dict)
    metadata: Callable[[Any], Metadata] = lambda config: {"layer_norm_rms_eps": config.rms_norm_eps}
    rope: Callable[[Any], Mapping[str, Any] | None] = lambda config: config.rope_parameters
    rotary: tuple[str, ...] = ("default", "linear")
    partial: bool = False
    head: Literal["either", "tied", "own"] = "either"
    square: bool = False
    activations: tuple[str, ...] = ("silu", "swish")
    refused: Callable[[Any], str] = lambda config: ""
    refused_layers: Callable[[Any], str] = lambda config: ""
    uneven: GGUFFamily | None = None

    def stored(self, parameter: str) -> Stored | None:
        """How a parameter is stored, its names complete; None where there is no place for it."""
        prefix = families()[self.model_type].layers + "."
        if not parameter.startswith(prefix):
            return self.outer.get(parameter)
        number, _, rest = parameter.removeprefix(prefix).partition(".")
        found = self.layer.get(rest) or self.optional.get(rest)
        return found and replace(found, names=tuple(f"blk.{number}.{name}" for name in found.names))

    def missing(self, parameters: Collection[str], layers: int) -> Iterable[str]:
        """Parameters that the architecture wants and the network lacks."""
        known = families()[self.model_type]
        wanted = [name for name in self.outer if name != known.head]
        wanted += [f"{known.layers}.{i}.{name}" for i in range(layers) for name in self.layer]
        return (name for name in wanted if name not in parameters)


ATTENTION = {"self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output"}
ROTATED = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k"}
MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
QK_NORM = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
BIAS = ("bias",)

DECI = GGUFFamily(
    model_type="llama",
    name="deci",
    layer=parts(ROTATED, change=PERMUTED) | parts({**ATTENTION, **MLP, **NORMS}),
    optional=parts(ROTATED, BIAS, PERMUTED) | parts({**ATTENTION, **MLP}, BIAS),
    outer=parts(OUTER),
    rotary=("default", "linear", "llama3"),
)
LLAMA = replace(DECI, name="llama", uneven=DECI)
MISTRAL = replace(LLAMA, model_type="mistral")
QWEN2 = replace(
    LLAMA,
    model_type="qwen2",
    name="qwen2",
    layer=parts({**ROTATED, **ATTENTION, **MLP, **NORMS}),
    optional=parts({**ROTATED, **ATTENTION}, BIAS),
)
QWEN3 = replace(
    QWEN2, model_type="qwen3", name="qwen3", layer={**QWEN2.layer, **parts(QK_NORM)}, optional={}, uneven=None
)

FAMILIES = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}


def table_of(config: Any) -> GGUFFamily:
    """The table for a network, plain or uneven. Raises `RequestError` where there is none."""
    plain = config.model_type.removeprefix(UNEVEN_PREFIX)
    if plain not in FAMILIES:
        raise RequestError(f"--format gguf does not know {plain} networks; it writes {', '.join(FAMILIES)}")
    family = FAMILIES[plain]
    if plain == config.model_type:
        return family
    if family.uneven is None:
        raise RequestError(f"llama.cpp has no architecture for uneven {plain} networks; use --format padded")
    return family.uneven


def check_family(config: Any, parameters: Collection[str]) -> None:
    """Refuse a family, a setting or a parameter that llama.cpp has no place for: what no choice of sizes changes.

    Raises `RequestError` that says what llama.cpp cannot do.
    """
    family = table_of(config)
    theirs = f"llama.cpp's {family.name} networks"
    known = families()[family.model_type]
    for parameter in parameters:
        if family.stored(parameter) is None:
            raise RequestError(f"{theirs} have no {parameter}")
    if config.model_type == family.model_type:
        for parameter in family.missing(parameters, config.num_hidden_layers):
            raise RequestError(f"{theirs} need {parameter}")
    tied = known.head not in parameters
    if family.head != "either" and tied != (family.head == "tied"):
        wanted = "the embedding as its output head" if family.head == "tied" else "an output head of its own"
        raise RequestError(f"{theirs} need {wanted}")
    names = ("hidden_activation", "activation_function", "hidden_act")
    activation = next(value for name in names if (value := getattr(config, name, None)))
    if activation not in family.activations:
        raise RequestError(f"{theirs} have no activation {activation}; known is {family.activations[0]}")
    if rope := family.rope(config):
        kind = rope.get("rope_type", "default")
        if kind not in family.rotary:
            known_types = ", ".join(family.rotary)
            raise RequestError(f"{theirs} have no rotary embeddings of type '{kind}'; known are: {known_types}")
        if rope.get("partial_rotary_factor", 1.0) != 1.0 and not family.partial:
            raise RequestError(f"{theirs} rotate whole heads, no part of them")
    if reason := family.refused(config):
        raise RequestError(f"{theirs} {reason}")


def check_network(config: Any, parameters: Collection[str]) -> None:
    """Refuse a cut-out network that llama.cpp does not compute. Raises `RequestError` as `check_family` does."""
    check_family(config, parameters)
    family = table_of(config)
    if family.square and head_dim(config) * config.num_attention_heads != config.hidden_size:
        raise RequestError(f"llama.cpp's {family.name} networks have query heads as wide as the residual, all together")
    if reason := family.refused_layers(config):
        raise RequestError(f"llama.cpp's {family.name} networks {reason}")
