"""Reading a tree of tokens with a network's own modelling code: what sequences share is computed once.

- The tokens of all requests form trees (`evals.scoring.prefix_tree`), and the network reads a tree as one sequence,
  without padding. Its attention is exchanged for one that follows the tree (`tree_interface`); all else stays.
- Logits are computed only where a token is scored. The last layer that attends takes keys and values from all tokens,
  but computes its outputs, and all that follows, for the scored ones only (`LastLayer`).
- Where consecutive calls activate sub-networks with equal leading layers, those layers are not computed again
  (`Layers`, `SharedLayer`).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface

from evals.scoring.encoding import Span
from evals.scoring.prefix_tree import Blocks, Pack, coarse_sizes, fine_sizes, pack
from supernet.architecture import Architecture

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TREE_ATTENTION = "nas_compressor_tree"
SMALLEST_PASS = 256
"""Tokens below which a pass is not cut further for the sake of more workers."""

Scored = tuple[Tensor, Tensor, Tensor]
"""Of scored tokens, [n] each: the span that it belongs to, its log-probability in nats, and whether it is not the
network's first choice."""


def token_scores(logits: Tensor, at: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of `targets` [n] at the rows `at` [n] of `logits` [r, vocabulary], and where they are not the
    first choice, [n]. Overwrites `logits`."""
    logits = logits.float()
    scores, top = logits[at, targets], logits.amax(-1)
    missed = scores != top[at]
    ties = (~missed).nonzero()[:, 0]  # of equal logits the first is chosen; argmax of all rows would be slow
    missed[ties] = logits[at[ties]].argmax(-1) != targets[ties]
    total = logits.sub_(top[:, None]).exp_().sum(-1)  # in place: the largest tensor of a pass
    return scores - (top + total.log())[at], missed


class Plan:
    """Spans in the form that a network reads: the distinct ones, packed, on the network's device.

    `index`: for each span that was given, its number in `distinct`. With several `workers`, packs are made smaller, so
    that there are as many of equal size as keep all workers busy to the end.
    """

    def __init__(
        self, spans: Sequence[Span], max_tokens: int, max_rows: int, device: torch.device, workers: int = 1
    ) -> None:
        self.distinct = list(dict.fromkeys(spans))
        number = {span: i for i, span in enumerate(self.distinct)}
        self.index = [number[span] for span in spans]
        round_up = coarse_sizes if device.type == "cuda" else fine_sizes
        packs = pack(self.distinct, max_tokens, max_rows, round_up=round_up)
        if workers > 1:
            rounds = -(-len(packs) // workers)
            even = int(1.05 * sum(map(len, packs)) / (rounds * workers))
            packs = pack(self.distinct, min(max_tokens, max(even, SMALLEST_PASS)), max_rows, round_up=round_up)
        self.packs = [DevicePack(p, device) for p in packs]
        self.longest = max((len(span.tokens) for span in self.distinct), default=0)

    @property
    def tokens(self) -> int:
        """Tokens that the network reads to answer all spans."""
        return sum(p.tokens.shape[1] for p in self.packs)


class DevicePack:
    """A `Pack` as tensors: tokens and positions [1, n]; the blocks' indices; rows, at, targets and owner."""

    def __init__(self, source: Pack, device: torch.device) -> None:
        def put(array: NDArray[np.generic]) -> Tensor:
            return torch.from_numpy(array).to(device)

        self.tokens, self.positions = put(source.tokens)[None], put(source.positions)[None]
        self.rows, self.at, self.targets, self.owner = map(put, (source.rows, source.at, source.targets, source.owner))
        self.blocks = [DeviceBlocks(block, put) for block in source.blocks]
        self.last = [DeviceBlocks(block, put) for block in source.last]


class DeviceBlocks:
    """`Blocks` as tensors: `queries` [b, q], `keys` [b, k], and the mask. Of the b * q outputs those at `valid` (None:
    all) are real, and belong to the queries `places`."""

    def __init__(self, source: Blocks, put: Callable[[NDArray[np.generic]], Tensor]) -> None:
        valid = source.valid.reshape(-1)
        self.queries, self.keys = put(source.queries), put(source.keys)
        self.places = put(source.queries.reshape(-1)[valid])
        self.valid = None if valid.all() else put(valid.nonzero()[0])
        self._mask = put(source.mask)[:, None]
        self._additive: dict[torch.dtype, Tensor] = {}

    def mask(self, dtype: torch.dtype) -> Tensor:
        """[b, 1, q, k]: zero where a query sees a key, minus infinity elsewhere."""
        if dtype not in self._additive:
            zero = torch.zeros((), dtype=dtype, device=self._mask.device)
            self._additive[dtype] = torch.where(self._mask, zero, torch.full_like(zero, -torch.inf))
        return self._additive[dtype]

    def forget_mask(self) -> None:
        """Free the masks until they are asked for again: four bytes for each pair add up over a plan, and making them
        is quick."""
        self._additive.clear()


class Reading(threading.local):
    """What this thread reads: a pack, its number in the plan, and the original attention of each configuration by `id`.

    `capturing`: attention raises its keys and values as `_KeysAndValues`; `captured`: it uses these instead of the ones
    it is given. `LastLayer` sets both.
    """

    pack: DevicePack
    number: int
    implementations: dict[int, str]
    capturing = False
    captured: tuple[Tensor, Tensor] | None = None


reading = Reading()


class _KeysAndValues(Exception):
    """Not an error: leaves a layer as soon as its keys and values, [1, kv heads, n, d] each, are computed."""


def _tree_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The network's own attention, block by block, as transformers' attention interface: [1, n, heads, d].

    `query` [1, heads, n, d], `key` and `value` [1, kv heads, n, d]. In the last layer, the n queries are those of the
    rows.
    """
    # 1. The last layer: give keys and values of all nodes, then use them with the queries of the rows.
    if reading.capturing:
        raise _KeysAndValues(key, value)
    blocks = reading.pack.blocks
    if reading.captured is not None:
        (key, value), blocks = reading.captured, reading.pack.last
    # 2. The attention that the network would use, such as sdpa or its class's eager one.
    name = reading.implementations[id(module.config)]
    if name in AttentionInterface._global_mapping:
        attend: Callable[..., Any] = AttentionInterface._global_mapping[name]
    else:
        attend = sys.modules[type(module).__module__].eager_attention_forward
    kwargs.pop("is_causal", None)
    # 3. Each block's queries with the keys that they may see; results to the places of the queries.
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))  # [n, heads, d]
    result = torch.empty((q.shape[0], q.shape[1], v.shape[2]), dtype=q.dtype, device=q.device)

    def gather(states: Tensor, nodes: Tensor) -> Tensor:
        return states.index_select(0, nodes.reshape(-1)).unflatten(0, nodes.shape).transpose(1, 2)  # [b, heads, m, d]

    for block in blocks:
        seen, _ = attend(
            module,
            gather(q, block.queries),
            gather(k, block.keys),
            gather(v, block.keys),
            block.mask(q.dtype),
            **kwargs,
        )
        flat = seen.reshape(-1, *result.shape[1:])
        result.index_copy_(0, block.places, flat if block.valid is None else flat[block.valid])
    return result[None], None


AttentionInterface.register(TREE_ATTENTION, _tree_attention)


@contextmanager
def tree_interface(model: PreTrainedModel) -> Iterator[dict[int, str]]:
    """Within, the network's attention is `_tree_attention`; gives {id of a configuration: its original attention}.

    Each layer of an uneven network has a configuration, so all that modules hold are switched.
    """
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    originals = {key: getattr(config, "_attn_implementation", None) or "eager" for key, config in configs.items()}
    for config in configs.values():
        config._attn_implementation_internal = TREE_ATTENTION
    try:
        yield originals
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = originals[key]


class Layers:
    """The network's layers, and what stands in for them while trees are read: those whose outputs are known from the
    call before, and the last one that attends."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        config: Any = getattr(model.config, "text_config", None) or model.config
        depth = getattr(config, "num_hidden_layers", None)
        self._owner: tuple[nn.Module, str] | None = None
        for module in model.modules():
            for name, child in module.named_children():
                if self._owner is None and isinstance(child, nn.ModuleList) and len(child) == depth:
                    self._owner = (module, name)
        self._plan: Plan | None = None
        self._kept_of: tuple[tuple[Any, ...], Architecture] | None = None  # weights and sub-network of the outputs
        self._outputs: list[list[Any]] = []

    @contextmanager
    def standing_in(self, plan: Plan, architecture: Architecture | None, budget: int) -> Iterator[bool]:
        """Within, layers answer from what is kept where they can; gives whether only rows leave the last of them.

        `budget`: bytes for what is kept. Nothing is kept where `architecture` is None.
        """
        if self._owner is None:
            yield False
            return
        module, name = self._owner
        own = list(getattr(module, name))
        last: int | None = len(own) - 1
        depth = known = 0
        if architecture is not None:
            last = max((i for i, sizes in enumerate(architecture.layers) if sizes.num_key_value_heads), default=None)
            config: Any = getattr(self._model.config, "text_config", None) or self._model.config
            width = next(self._model.parameters()).element_size() * config.hidden_size
            depth = min(len(own) if last is None else last, budget // (plan.tokens * width))
            weights = self._weights()
            known = self._keep_common(plan, weights, architecture, depth)
        stand_ins = [
            SharedLayer(layer, i, i < known, self._outputs) if i < depth else layer for i, layer in enumerate(own)
        ]
        if last is not None:
            stand_ins[last] = LastLayer(own[last])
        previous = module.__dict__.get(name)
        module.__dict__[name] = stand_ins
        try:
            yield last is not None
            if architecture is not None:
                self._kept_of = (weights, architecture)
        finally:
            if previous is None:
                del module.__dict__[name]
            else:
                module.__dict__[name] = previous

    def _keep_common(self, plan: Plan, weights: tuple[Any, ...], architecture: Architecture, depth: int) -> int:
        """How many leading layers, at most `depth`, put out what is kept; drops what is kept of the others."""
        if self._plan is not plan:
            self._plan, self._kept_of, self._outputs = plan, None, [[] for _ in plan.packs]
        known = 0
        if self._kept_of is not None and self._kept_of[0] == weights:
            known = min(depth, architecture.common_layers(self._kept_of[1]), *map(len, self._outputs))
        for outputs in self._outputs:
            del outputs[known:]
        self._kept_of = None  # until all outputs are complete: a pass that fails leaves some of them unfinished
        return known

    def _weights(self) -> tuple[Any, ...]:
        """Changes whenever a parameter is replaced or written to."""
        return tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in self._model.parameters())


class SharedLayer:
    """Stands in for a layer: its output of the call before where that is `known`, else a new one, which is kept."""

    def __init__(self, layer: nn.Module, position: int, known: bool, outputs: list[list[Any]]) -> None:
        self._layer, self._position, self._known, self._outputs = layer, position, known, outputs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self._outputs[reading.number]
        if not self._known:
            outputs.append(self._layer(*args, **kwargs))
        return outputs[self._position]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


class LastLayer:
    """Stands in for the last layer that attends. Given all n nodes, it gives only the r rows whose logits are needed:
    after its keys and values, nothing depends on the other nodes."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        pack = reading.pack
        count = pack.tokens.shape[1]

        def rows(value: Any) -> Any:
            """What is [1, n, ...], as hidden states and rotary angles are, for the rows only."""
            if isinstance(value, tuple):
                return tuple(map(rows, value))
            if isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == count:
                return value[:, pack.rows]
            return value

        # 1. Run the layer as far as its keys and values of all nodes.
        reading.capturing = True
        try:
            return rows(self._layer(*args, **kwargs))  # a layer without attention runs through
        except _KeysAndValues as keys_and_values:
            reading.captured = keys_and_values.args
        finally:
            reading.capturing = False
        # 2. Run it again for the rows, whose attention uses these.
        try:
            return self._layer(*rows(args), **{key: rows(value) for key, value in kwargs.items()})
        finally:
            reading.captured = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)
