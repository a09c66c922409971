"""How llama.cpp stores each family: one table for each. Nothing else in the gguf layout knows a family by name.

A `Stored` names the tensors that a parameter becomes, and the `Change` of its values on the way, which can be undone.
`assumed` holds what llama.cpp takes for granted though a configuration may say otherwise: `export.layouts.gguf.checks`
refuses what differs, so that a file is written only where llama.cpp computes what transformers does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from supernet.common.errors import NotHeldError
from supernet.families import families, head_dim

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True, eq=False)
class Change:
    """How a parameter's values are laid out in the file, and back; both functions also get the configuration."""

    to_file: Callable[[Tensor, PreTrainedConfig], Tensor]
    from_file: Callable[[Tensor, PreTrainedConfig], Tensor]


def _neighbours(values: Tensor, config: PreTrainedConfig) -> Tensor:
    """Rows of a query or key projection, from halves of a head that rotate together to neighbours that do."""
    return values.unflatten(0, (-1, 2, head_dim(config) // 2)).transpose(1, 2).flatten(0, 2)


def _halves(values: Tensor, config: PreTrainedConfig) -> Tensor:
    return values.unflatten(0, (-1, head_dim(config) // 2, 2)).transpose(1, 2).flatten(0, 2)


def _by_kind(values: Tensor, config: PreTrainedConfig) -> Tensor:
    """Rows of a fused projection, from query, key, value of each head to all queries, all keys, all values."""
    return values.unflatten(0, (-1, 3, head_dim(config))).transpose(0, 1).flatten(0, 2)


def _by_head(values: Tensor, config: PreTrainedConfig) -> Tensor:
    return values.unflatten(0, (3, -1, head_dim(config))).transpose(0, 1).flatten(0, 2)


SAME = Change(lambda values, config: values, lambda values, config: values)
PERMUTED = Change(_neighbours, _halves)
BY_KIND = Change(_by_kind, _by_head)
PLUS_ONE = Change(lambda values, config: values + 1, lambda values, config: values - 1)
TRANSPOSED = Change(lambda values, config: values.T, lambda values, config: values.T)


@dataclass(frozen=True)
class Stored:
    """The tensors that one parameter becomes: with several names it is split evenly along its last axis but one.

    `exact` ones stay float32 in files of every type: a router, which may choose other experts when it is rounded, and
    convolutions, which llama.cpp computes in float32 only.
    """

    names: tuple[str, ...]
    change: Change = SAME
    exact: bool = False

    def to_file(self, values: Tensor, config: PreTrainedConfig) -> dict[str, Tensor]:
        """The tensors by name."""
        changed = self.change.to_file(values, config)
        split = changed.chunk(len(self.names), -2) if len(self.names) > 1 else [changed]
        return dict(zip(self.names, split, strict=True))

    def inputs_to_file(self, values: Tensor, config: PreTrainedConfig) -> Tensor:
        """Values of a matrix's inputs, [inputs], in the order in which the file has these."""
        return self.change.to_file(values[None], config)[0] if self.change is TILED_COLUMNS else values

    def from_file(self, tensors: Mapping[str, Tensor], config: PreTrainedConfig) -> Tensor:
        """The parameter's values, from tensors by name; others may be among them."""
        own = [tensors[name] for name in self.names]
        return self.change.from_file(torch.cat(own, -2) if len(own) > 1 else own[0], config)


Header = dict[str, Any]
"""Values of a file's header, by the `GGUFWriter` method that adds each (without `add_`).

A name with a dot is that of a list, for which there is no method.
"""
Parts = Mapping[str, Stored]
BIAS = ("bias",)
BOTH = ("weight", "bias")


def parts(names: Mapping[str, str], kinds: Collection[str] = ("weight",), change: Change = SAME) -> dict[str, Stored]:
    """Parameters of modules that are stored alike, from the modules' names in transformers and in the file."""
    return {f"{ours}.{kind}": Stored((f"{gguf}.{kind}",), change) for ours, gguf in names.items() for kind in kinds}


@dataclass(frozen=True, eq=False)
class GGUFFamily:
    """What llama.cpp calls a family, its parameters and its settings, and what it cannot compute.

    `name` is the architecture in the file. `layer` (names within a decoder layer, as in `supernet.families`) and
    `outer` (absolute names) are the parameters that must be there, `optional` those of a layer that need not be.

    `header` gives what the header has besides what every family has, or in place of it. `rope` finds the rotary
    embeddings in the configuration, and `rotary` names the types that the architecture computes; `partial`: it may
    rotate a part of each head's channels. `head` says whether the output head is the embedding or has its own weight,
    `square` that all query heads together are as wide as the residual, and `activations` which ones it computes.
    `listed`: sizes are lists over the layers, and parameters of removed half-blocks may be missing.

    `assumed` and `assumed_of_layers` map what llama.cpp takes for granted, worded to follow "networks", to whether it
    holds: the first what no choice of sizes changes, the other what depends on the layers that are left.

    `uneven` is the table for networks whose sizes this one cannot hold, where there is one.
    """

    model_type: str
    name: str
    layer: Parts
    outer: Parts
    optional: Parts = field(default_factory=dict)
    header: Callable[[PreTrainedConfig], Header] = lambda config: {"layer_norm_rms_eps": config.rms_norm_eps}
    rope: Callable[[PreTrainedConfig], Mapping[str, Any]] = lambda config: config.rope_parameters
    rotary: tuple[str, ...] = ("default", "linear")
    partial: bool = False
    head: Literal["either", "tied", "own"] = "either"
    square: bool = False
    listed: bool = False
    activations: tuple[str, ...] = ("silu", "swish")
    assumed: Callable[[PreTrainedConfig], Mapping[str, bool]] = lambda config: {}
    assumed_of_layers: Callable[[PreTrainedConfig], Mapping[str, bool]] = lambda config: {}
    uneven: GGUFFamily | None = None

    @property
    def half_activation(self) -> bool:
        """Whether llama.cpp computes the activation in half precision in files of every type: GELU is a table."""
        return any("gelu" in name for name in self.activations)

    def stored(self, parameter: str) -> Stored:
        """How a parameter is stored, its names complete. Raises `NotHeldError` where the file cannot hold it."""
        prefix = families()[self.model_type].layers + "."
        number, _, rest = parameter.removeprefix(prefix).partition(".")
        inside = parameter.startswith(prefix)
        stored = {**self.layer, **self.optional}.get(rest) if inside else self.outer.get(parameter)
        if stored is None:
            raise NotHeldError(f"llama.cpp's {self.name} networks have no {parameter}")
        return replace(stored, names=tuple(f"blk.{number}.{name}" for name in stored.names)) if inside else stored

    def missing(self, parameters: Collection[str], layers: int) -> Iterable[str]:
        """Parameters that llama.cpp requires of a network with so many layers, and that are not there."""
        family = families()[self.model_type]
        required = [name for name in self.outer if name != family.head]
        required += [f"{family.layers}.{i}.{name}" for i in range(layers) for name in self.layer]
        return (name for name in required if name not in parameters)


# --- Llama and those whose modules are named like its ---------------------------------------------------------------

ROTATED = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k"}
ATTENTION = {"self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output"}
MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
QK_NORM = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

DECI = GGUFFamily(
    model_type="llama",
    name="deci",
    layer=parts(ROTATED, change=PERMUTED) | parts({**ATTENTION, **MLP, **NORMS}),
    optional=parts(ROTATED, BIAS, PERMUTED) | parts({**ATTENTION, **MLP}, BIAS),
    outer=parts(OUTER),
    rotary=("default", "linear", "llama3"),
    listed=True,
)
LLAMA = replace(DECI, name="llama", listed=False, uneven=DECI)
MISTRAL = replace(LLAMA, model_type="mistral")
QWEN2 = GGUFFamily(
    model_type="qwen2",
    name="qwen2",
    layer=parts({**ROTATED, **ATTENTION, **MLP, **NORMS}),
    optional=parts({**ROTATED, "self_attn.v_proj": "attn_v"}, BIAS),
    outer=parts(OUTER),
    square=True,
    uneven=DECI,
)
QWEN3 = GGUFFamily(model_type="qwen3", name="qwen3", layer={**QWEN2.layer, **parts(QK_NORM)}, outer=parts(OUTER))
GRANITE = replace(
    LLAMA,
    model_type="granite",
    name="granite",
    header=lambda config: {
        "layer_norm_rms_eps": config.rms_norm_eps,
        "embedding_scale": config.embedding_multiplier,
        "residual_scale": config.residual_multiplier,
        "attention_scale": config.attention_multiplier,
        "logit_scale": config.logits_scaling,
    },
    uneven=None,
)
SMOLLM3 = GGUFFamily(
    model_type="smollm3",
    name="smollm3",
    layer=LLAMA.layer,
    outer=parts(OUTER),
    assumed_of_layers=lambda config: {
        "leave out rotary positions in every fourth layer, and in no other": all(
            bool(turns) == bool((i + 1) % 4) for i, turns in enumerate(config.no_rope_layers)
        )
    },
)
OLMO2 = GGUFFamily(
    model_type="olmo2",
    name="olmo2",
    layer=parts({**ROTATED, **ATTENTION, **MLP, **QK_NORM})
    | parts({"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}),
    outer=parts(OUTER),
    head="own",
    square=True,
)
PHI3 = GGUFFamily(
    model_type="phi3",
    name="phi3",
    layer=parts({"self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output", **NORMS})
    | parts({"mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}),
    outer=parts(OUTER),
    rotary=("default", "longrope"),
    partial=True,
    square=True,
)

# --- mixtures of experts ---------------------------------------------------------------------------------------------

EXPERTS = {
    "mlp.gate.weight": Stored(("ffn_gate_inp.weight",), exact=True),
    "mlp.experts.gate_up_proj": Stored(("ffn_gate_exps.weight", "ffn_up_exps.weight")),
    "mlp.experts.down_proj": Stored(("ffn_down_exps.weight",)),
}

MIXTRAL = GGUFFamily(
    model_type="mixtral",
    name="llama",
    layer=parts(ROTATED, change=PERMUTED) | parts({**ATTENTION, **NORMS}) | EXPERTS,
    outer=parts(OUTER),
    header=lambda config: {
        "layer_norm_rms_eps": config.rms_norm_eps,
        "expert_count": config.num_local_experts,
        "expert_used_count": config.num_experts_per_tok,
    },
    rotary=LLAMA.rotary,
)
QWEN3_MOE = GGUFFamily(
    model_type="qwen3_moe",
    name="qwen3moe",
    layer=parts({**ROTATED, **ATTENTION, **NORMS, **QK_NORM}) | EXPERTS,
    outer=parts(OUTER),
    header=lambda config: {
        "layer_norm_rms_eps": config.rms_norm_eps,
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
    },
    assumed=lambda config: {
        "make the shares of the chosen experts add up to 1 (norm_topk_prob)": config.norm_topk_prob
    },
)

# --- linear attention ------------------------------------------------------------------------------------------------


def _value_heads(heads: int, groups: int, width: int, values: Tensor) -> Tensor:
    """`values` with its last `heads * width` rows reordered: from group after group to one head of each group in turn.

    With heads / groups for `groups`, that is undone.
    """
    others, last = values.split([values.shape[0] - heads * width, heads * width])
    return torch.cat([others, last.unflatten(0, (groups, -1, width)).transpose(0, 1).flatten(0, 2)])


def _tiled(values: Tensor, config: PreTrainedConfig, width: int = 0) -> Tensor:
    heads, groups = config.linear_num_value_heads, config.linear_num_key_heads
    return _value_heads(heads, groups, width or config.linear_value_head_dim, values)


def _grouped(values: Tensor, config: PreTrainedConfig, width: int = 0) -> Tensor:
    heads, groups = config.linear_num_value_heads, config.linear_num_key_heads
    return _value_heads(heads, heads // groups, width or config.linear_value_head_dim, values)


TILED = Change(_tiled, _grouped)
TILED_COLUMNS = Change(
    lambda values, config: _tiled(values.T, config).T, lambda values, config: _grouped(values.T, config).T
)
TILED_HEADS = Change(
    lambda values, config: _tiled(values, config, 1), lambda values, config: _grouped(values, config, 1)
)
# A state decays by exp(-exp(A) * step) in a step; llama.cpp reads -exp(A).
DECAY = Change(
    lambda values, config: -_tiled(values, config, 1).exp(), lambda values, config: _grouped((-values).log(), config, 1)
)
CONVOLUTION = Change(
    lambda values, config: _tiled(values.squeeze(1), config),
    lambda values, config: _grouped(values, config).unsqueeze(1),
)


def _qwen3_5_header(config: PreTrainedConfig) -> Header:
    pairs = int(head_dim(config) * config.rope_parameters.get("partial_rotary_factor", 1.0)) // 2
    return {
        "layer_norm_rms_eps": config.rms_norm_eps,
        # Each pair of channels turns with one of three positions, which are all the same in text.
        "rope_dimension_sections": [*(len(range(first, pairs, 3)) for first in range(3)), 0],
        "ssm_conv_kernel": config.linear_conv_kernel_dim,
        "ssm_inner_size": config.linear_num_value_heads * config.linear_value_head_dim,
        "ssm_state_size": config.linear_key_head_dim,
        "ssm_time_step_rank": config.linear_num_value_heads,
        "ssm_group_count": config.linear_num_key_heads,
        "attention.recurrent_layers": [kind == "linear_attention" for kind in config.layer_types],
    }


QWEN3_5 = GGUFFamily(
    model_type="qwen3_5_text",
    name="qwen35",
    layer=parts(MLP)
    | parts({"input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm"}, change=PLUS_ONE),
    optional=parts({**ROTATED, **ATTENTION, "linear_attn.norm": "ssm_norm"})
    | parts(QK_NORM, change=PLUS_ONE)
    | parts({"linear_attn.in_proj_qkv": "attn_qkv", "linear_attn.in_proj_z": "attn_gate"}, change=TILED)
    | parts({"linear_attn.in_proj_b": "ssm_beta", "linear_attn.in_proj_a": "ssm_alpha"}, change=TILED_HEADS)
    | parts({"linear_attn.out_proj": "ssm_out"}, change=TILED_COLUMNS)
    | {
        "linear_attn.conv1d.weight": Stored(("ssm_conv1d.weight",), CONVOLUTION, exact=True),
        "linear_attn.A_log": Stored(("ssm_a",), DECAY),
        "linear_attn.dt_bias": Stored(("ssm_dt.bias",), TILED_HEADS),
    },
    outer=parts(OUTER) | parts({"model.norm": "output_norm"}, change=PLUS_ONE),
    header=_qwen3_5_header,
    partial=True,
    assumed=lambda config: {
        "have keys and values of the same width in linear attention": (
            config.linear_key_head_dim == config.linear_value_head_dim
        ),
        # llama.cpp normalizes its queries and keys with the same constant; transformers has another one for them.
        "have a rms_norm_eps of at most 1e-6": config.rms_norm_eps <= 1e-6,
    },
)

# --- Gemma -----------------------------------------------------------------------------------------------------------


def _full_every(config: PreTrainedConfig) -> int | None:
    """The period p, where every p-th layer attends to everything and all others to a window; None without such a p."""
    full = [kind == "full_attention" for kind in config.layer_types]
    period = full.index(True) + 1 if True in full else len(full) + 1
    return period if all(is_full == ((i + 1) % period == 0) for i, is_full in enumerate(full)) else None


def _gemma2_header(config: PreTrainedConfig) -> Header:
    period, window, context = _full_every(config), config.sliding_window, config.max_position_embeddings
    if period is None:  # other layers than llama.cpp's have windows: within one, all layers are alike
        context = min(window, context)
    elif period == 1:  # llama.cpp requires a layer with a window
        window = context
    return {
        "layer_norm_rms_eps": config.rms_norm_eps,
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
        "sliding_window": window,
        "sliding_window_pattern": period if period and period > 1 else len(config.layer_types) + 1,
        "context_length": context,
    }


def _gemma_scale(config: PreTrainedConfig, largest: int) -> dict[str, bool]:
    """What queries are scaled by, which llama.cpp infers from the number of layers: the largest model differs."""
    wide = config.num_hidden_layers == largest
    scalar = config.hidden_size // config.num_attention_heads if wide else head_dim(config)
    return {f"have a query_pre_attn_scalar of {scalar} at this depth": config.query_pre_attn_scalar == scalar}


GEMMA2 = GGUFFamily(
    model_type="gemma2",
    name="gemma2",
    layer=parts({**ROTATED, **ATTENTION, **MLP})
    | parts({"input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm"}, change=PLUS_ONE)
    | parts({"pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm"}, change=PLUS_ONE),
    outer=parts(OUTER) | parts({"model.norm": "output_norm"}, change=PLUS_ONE),
    header=_gemma2_header,
    head="tied",
    activations=("gelu_pytorch_tanh", "gelu_new"),
    assumed=lambda config: {
        "cap attention scores and logits": bool(config.attn_logit_softcapping and config.final_logit_softcapping)
    },
    assumed_of_layers=lambda config: _gemma_scale(config, largest=46),
)
GEMMA3 = replace(
    GEMMA2,
    model_type="gemma3_text",
    name="gemma3",
    layer={**GEMMA2.layer, **parts(QK_NORM, change=PLUS_ONE)},
    header=lambda config: {
        "layer_norm_rms_eps": config.rms_norm_eps,
        "sliding_window": config.sliding_window,
        "sliding_window_pattern": _full_every(config),
        "context_length": config.max_position_embeddings,
        "rope_freq_base_swa": float(config.rope_parameters["sliding_attention"]["rope_theta"]),
    },
    rope=lambda config: config.rope_parameters["full_attention"],
    assumed=lambda config: {
        "cap neither attention scores nor logits": not (
            config.attn_logit_softcapping or config.final_logit_softcapping
        ),
        "scale no rotary positions within windows": (
            config.rope_parameters["sliding_attention"].get("rope_type", "default") == "default"
        ),
    },
    assumed_of_layers=lambda config: {
        **_gemma_scale(config, largest=62),
        # Layers with windows have other rotary positions, so the right layers must have them.
        "have windows in all layers but every second, third and so on": (_full_every(config) or 1) > 1,
    },
)

# --- those with biases and without a gate ----------------------------------------------------------------------------

GPT2_MATRICES = {
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}

GPT2 = GGUFFamily(
    model_type="gpt2",
    name="gpt2",
    layer=parts(GPT2_MATRICES, change=TRANSPOSED)
    | parts(GPT2_MATRICES, BIAS)
    | parts({"ln_1": "attn_norm", "ln_2": "ffn_norm"}, BOTH),
    outer=parts({"transformer.wte": "token_embd", "transformer.wpe": "position_embd", "lm_head": "output"})
    | parts({"transformer.ln_f": "output_norm"}, BOTH),
    header=lambda config: {"layer_norm_eps": config.layer_norm_epsilon},
    rope=lambda config: {},
    square=True,
    activations=("gelu_new", "gelu_pytorch_tanh"),
    assumed=lambda config: {"scale attention scores by the width of a head": config.scale_attn_weights},
)
STARCODER2 = GGUFFamily(
    model_type="starcoder2",
    name="starcoder2",
    layer=parts({**ROTATED, **ATTENTION, **NORMS, "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}, BOTH),
    outer=parts(OUTER) | parts({"model.norm": "output_norm"}, BIAS),
    header=lambda config: {"layer_norm_eps": config.norm_epsilon},
    square=True,
    activations=("gelu_pytorch_tanh", "gelu_new"),
)
GPT_NEOX = GGUFFamily(
    model_type="gpt_neox",
    name="gptneox",
    layer=parts({"attention.query_key_value": "attn_qkv"}, BOTH, BY_KIND)
    | parts({**NORMS, "attention.dense": "attn_output"}, BOTH)
    | parts({"mlp.dense_h_to_4h": "ffn_up", "mlp.dense_4h_to_h": "ffn_down"}, BOTH),
    outer=parts({"gpt_neox.embed_in": "token_embd", "lm_head": "output"})
    | parts({"gpt_neox.final_layer_norm": "output_norm"}, BOTH),
    header=lambda config: {
        "layer_norm_eps": config.layer_norm_eps,
        "parallel_residual": config.use_parallel_residual,
    },
    partial=True,
    head="own",
    square=True,
    # llama.cpp computes GELU by its tanh form, which is as near to the exact one as half precision is.
    activations=("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"),
)

FAMILIES = {
    family.model_type: family
    for family in (
        LLAMA,
        MISTRAL,
        QWEN2,
        QWEN3,
        GRANITE,
        SMOLLM3,
        OLMO2,
        PHI3,
        MIXTRAL,
        QWEN3_MOE,
        QWEN3_5,
        GEMMA2,
        GEMMA3,
        GPT2,
        STARCODER2,
        GPT_NEOX,
    )
}
