"""A network in memory as an lm-eval `LM`: what HFLM answers, computed with as little work as possible.

- What requests share is computed once: the tokens of all requests form a tree (`evals.packing`), and the network
  reads a tree as one sequence, without padding, through its own modelling code; only attention knows the tree.
- Logits are computed where a token is scored, and nowhere else; the last layer that attends reads keys and values
  from all tokens and computes the rest of itself, and of what follows, for those same tokens only.
- Where consecutive calls activate sub-networks with equal leading layers, those layers are not computed again.

A network that cannot be read as a tree (its attention is not transformers' own interface, or looks at a window) is
found out by comparison and read in plain padded batches.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import postprocess_generated_text
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache

from compressor.architecture import Architecture
from evals.encoding import Encoder, Generation, Span
from evals.packing import Blocks, Pack, pack

log = logging.getLogger(__name__)

TREE_ATTENTION = "nas_compressor_tree"
SMALLEST_PASS = 256
"""Tokens below which a pass is not cut further for the sake of more workers."""

Answer = tuple[float, bool]
"""Log-likelihood in nats, and whether every scored token is the network's first choice."""


def available_cores() -> int:
    """CPU cores that this process may keep busy: OMP_NUM_THREADS (its first level) where the user set it, else those
    that it is bound to."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if asked.isdecimal() and int(asked):
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Plan:
    """Spans in the form that a network reads: the distinct ones, packed, on the network's device."""

    def __init__(
        self, spans: Sequence[Span], max_tokens: int, max_rows: int, device: torch.device, workers: int = 1
    ) -> None:
        self.distinct = list(dict.fromkeys(spans))
        number = {span: i for i, span in enumerate(self.distinct)}
        self.index = [number[span] for span in spans]
        packs = pack(self.distinct, max_tokens, max_rows)
        if workers > 1:  # as many passes as keep all workers busy to the end
            rounds = -(-len(packs) // workers)
            even = int(1.05 * sum(map(len, packs)) / (rounds * workers))
            packs = pack(self.distinct, min(max_tokens, max(even, SMALLEST_PASS)), max_rows)
        self.packs = [_DevicePack(p, device) for p in packs]
        self.longest = max((len(span.tokens) for span in self.distinct), default=0)

    @property
    def tokens(self) -> int:
        """Tokens that the network reads to answer all spans."""
        return sum(p.tokens.shape[1] for p in self.packs)


class _DevicePack:
    """A `Pack` as tensors: tokens and positions [1, n]; the blocks' indices; rows, at, targets and owner."""

    def __init__(self, source: Pack, device: torch.device) -> None:
        def put(array: Any) -> Tensor:
            return torch.from_numpy(array).to(device)

        self.tokens, self.positions = put(source.tokens)[None], put(source.positions)[None]
        self.rows, self.at, self.targets, self.owner = map(put, (source.rows, source.at, source.targets, source.owner))
        self.blocks = [_DeviceBlocks(block, put) for block in source.blocks]
        self.last = [_DeviceBlocks(block, put) for block in source.last]


class _DeviceBlocks:
    """`queries` [b, q], `keys` [b, k], `mask` [b, 1, q, k]; `places`: where the valid outputs, `valid`, belong."""

    def __init__(self, source: Blocks, put: Callable[[Any], Tensor]) -> None:
        valid = source.valid.reshape(-1)
        self.queries, self.keys = put(source.queries), put(source.keys)
        self.places = put(source.queries.reshape(-1)[valid])
        self.valid = None if valid.all() else put(valid.nonzero()[0])
        self._mask = put(source.mask)[:, None]
        self._additive: dict[torch.dtype, Tensor] = {}

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Zero where a query sees a key, minus infinity elsewhere."""
        if dtype not in self._additive:
            zero = torch.zeros((), dtype=dtype, device=self._mask.device)
            self._additive[dtype] = torch.where(self._mask, zero, torch.full_like(zero, -torch.inf))
        return self._additive[dtype]

    def forget_mask(self) -> None:
        """Until it is asked for again: four bytes for each pair add up over a plan, and making them takes no time."""
        self._additive.clear()


class _Reading(threading.local):
    """What this thread reads: a pack, its number in the plan, and each configuration's own attention by `id`.

    `capturing`: the layer at work is to give its keys and values away; `captured`: they are in place of its own.
    """

    pack: _DevicePack
    number: int
    implementations: dict[int, str]
    capturing = False
    captured: tuple[Tensor, Tensor] | None = None


_reading = _Reading()


class _KeysAndValues(Exception):
    """Not an error: the way out of a layer that is not to be finished, with its keys and values [1, kv heads, n, d]."""


def _tree_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The network's own attention, block by block. `query` [1, heads, n, d], `key` and `value` [1, kv heads, n, d]."""
    if _reading.capturing:
        raise _KeysAndValues(key, value)
    blocks = _reading.pack.blocks
    if _reading.captured is not None:  # the queries are those of the rows
        (key, value), blocks = _reading.captured, _reading.pack.last
    config: Any = module.config
    name = _reading.implementations[id(config)]
    if name in AttentionInterface._global_mapping:
        attend: Callable[..., Any] = AttentionInterface._global_mapping[name]
    else:
        attend = sys.modules[type(module).__module__].eager_attention_forward
    kwargs.pop("is_causal", None)
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


class NetworkLM(LM):
    """lm-eval's view of `model`, a transformers causal language model or one that takes the same arguments.

    `max_tokens`: tokens to read in one pass. `max_logits`: logits to hold at once. `cache_bytes`: memory for the
    outputs of layers that the next call may share. `workers`: passes to run side by side; on a CPU, a small network
    makes far better use of n cores with n workers and one torch thread than the other way round. Evaluation mode is
    the caller's to set, and so are torch's threads.
    """

    def __init__(
        self,
        model: nn.Module,
        encoder: Encoder,
        *,
        max_tokens: int | None = None,
        max_logits: int = 2**25,
        cache_bytes: int = 2**28,
        workers: int = 1,
    ) -> None:
        super().__init__()
        self.model = model
        self.encoder = encoder
        parameter = next(model.parameters())
        self._device = parameter.device
        self.max_tokens = max_tokens or (2048 if parameter.device.type == "cpu" else 16384)
        config: Any = model.config
        vocabulary = getattr(getattr(config, "text_config", None) or config, "vocab_size", 2**16)
        self.max_rows = max(1, max_logits // vocabulary)
        self.cache_bytes = cache_bytes
        self.workers = workers
        parameters = inspect.signature(model.forward).parameters
        self._keeps_logits = "logits_to_keep" in parameters
        self._window = _attention_window(config)
        self._as_tree: bool | None = None if {"position_ids", "logits_to_keep"} <= set(parameters) else False
        self._layers = _Layers(model)

    # What lm-eval asks of an LM

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def max_length(self) -> int:
        return self.encoder.max_length

    @property
    def tokenizer_name(self) -> str:
        return str(self.encoder.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.encoder.chat(chat_history, add_generation_prompt)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Answer]:
        pairs = [(request.args[0], request.args[1]) for request in requests]
        return self.answer(self.plan(self.encoder.spans(pairs)))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows = self.encoder.rolling(request.args[0] for request in requests)
        scores = iter(self.answer(self.plan([span for own in windows for span in own])))
        return [sum(next(scores)[0] for _ in own) for own in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first stop string, greedy unless a task's settings say otherwise.

        Each is what HFLM gives with a batch of one: there, what a document stops at does not depend on its neighbours.
        """
        texts: list[str | None] = [None] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items(), key=str)), []).append(i)
        for members in groups.values():
            how = self.encoder.generation(requests[members[0]].args[1])
            prompts = self.encoder.prompts([requests[i].args[0] for i in members], how.new)
            greedy = not set(how.arguments) - {"do_sample", "temperature"} and not how.arguments.get("do_sample")
            write = self._greedy if greedy and self._plain_generation() else self._generate
            order = sorted(range(len(members)), key=lambda j: len(prompts[j]))
            for batch in _batches(order, [len(prompt) + how.new for prompt in prompts], self.max_tokens):
                for j, ids in zip(batch, write([prompts[j] for j in batch], how), strict=True):
                    text = self.encoder.tokenizer.decode(ids, skip_special_tokens=True)
                    texts[members[j]] = postprocess_generated_text(text, how.until, None)
        return texts  # type: ignore[return-value]

    # What our own scoring asks

    def tune(self, spans: Sequence[Span], cores: int) -> None:
        """Set `workers` and torch's threads by timing some of `spans` both ways: one pass at a time on all `cores`,
        and a pass on each core."""
        if cores == 1 or self._device.type != "cpu" or not spans:
            return
        ordered = sorted(set(spans), key=lambda span: span.tokens)  # neighbours, as they are read
        sizes = itertools.accumulate(len(span.tokens) for span in ordered)
        sample = [span for span, size in zip(ordered, sizes, strict=True) if size <= 4 * cores * SMALLEST_PASS]
        seconds = {}
        for workers in (1, cores):
            self.set_workers(workers, cores)
            plan = self.plan(sample or ordered[:1])
            self.answer(plan)  # threads start, masks are made
            began = time.perf_counter()
            self.answer(plan)
            seconds[workers] = time.perf_counter() - began
        self.set_workers(min(seconds, key=lambda workers: seconds[workers]), cores)

    def set_workers(self, workers: int, cores: int) -> None:
        """Read `workers` passes side by side, each with its share of the cores."""
        self.workers = workers
        torch.set_num_threads(cores // workers)

    def plan(self, spans: Sequence[Span]) -> Plan:
        return Plan(spans, self.max_tokens, self.max_rows, self._device, self.workers)

    @torch.inference_mode()
    def answer(self, plan: Plan, architecture: Architecture | None = None) -> list[Answer]:
        """One answer for each span of the plan.

        `architecture`, where the network is a super-network: what is active. Leading layers equal to those of the
        call before, on the same plan, are not computed again; weights that changed in between are noticed.
        """
        if not plan.distinct:
            return []
        parts = self._read_trees(plan, architecture) if self._reads_trees(plan) else self._read_padded(plan)
        totals = torch.zeros(len(plan.distinct), dtype=torch.float64, device=self._device)
        misses = torch.zeros(len(plan.distinct), dtype=torch.int64, device=self._device)
        for owner, scores, missed in parts:
            totals.index_add_(0, owner, scores.double())
            misses.index_add_(0, owner, missed.long())
        values, firsts = totals.tolist(), (misses == 0).tolist()
        return [(values[i], firsts[i]) for i in plan.index]

    def _read_trees(self, plan: Plan, architecture: Architecture | None) -> Iterator[Scored]:
        with (
            _tree_interface(self.model) as implementations,
            self._layers.standing_in(plan, architecture, self.cache_bytes) as only_rows,
        ):

            def read(number: int) -> Scored:
                source = plan.packs[number]
                _reading.pack, _reading.number, _reading.implementations = source, number, implementations
                with torch.inference_mode():  # of this thread
                    logits = self.model(
                        input_ids=source.tokens,
                        position_ids=source.positions,
                        use_cache=False,
                        logits_to_keep=0 if only_rows else source.rows,  # 0: of all that is left
                    ).logits[0]
                    for block in (*source.blocks, *source.last):
                        block.forget_mask()
                    return source.owner, *_scores(logits, source.at, source.targets)

            if self.workers == 1 or len(plan.packs) == 1:
                yield from map(read, range(len(plan.packs)))
            else:
                with ThreadPoolExecutor(self.workers) as pool:
                    yield from pool.map(read, range(len(plan.packs)))

    def _read_padded(self, plan: Plan) -> Iterator[Scored]:
        for ids, rows, targets, owner in self._padded(plan):
            logits = self.model(input_ids=ids, use_cache=False).logits
            used, at = torch.unique(rows, return_inverse=True)
            yield owner, *_scores(logits.flatten(0, 1)[used], at, targets)

    def _reads_trees(self, plan: Plan) -> bool:
        if self._window is not None and plan.longest > self._window:
            return False
        if self._as_tree is None:
            self._as_tree = self._tree_equals_plain(plan)
            if not self._as_tree:
                log.warning("this network cannot read shared prefixes once: scoring it in padded batches")
        return self._as_tree

    def _tree_equals_plain(self, plan: Plan) -> bool:
        """Compare both ways on a few spans of the plan, among them some that share a prefix."""
        ordered = sorted(plan.distinct, key=lambda span: span.tokens)
        spans = dict.fromkeys([*ordered[:6], *sorted(ordered, key=lambda span: len(span.tokens))[-2:]])
        sample = Plan(list(spans), 2**20, 2**20, self._device)
        plain = list(self._read_padded(sample))
        try:
            tree = list(self._read_trees(sample, None))
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            log.info("reading as a tree failed: %s", error)
            return False
        totals = torch.zeros(2, len(spans), dtype=torch.float64, device=self._device)
        for total, parts in zip(totals, (plain, tree), strict=True):
            for owner, scores, _ in parts:
                total.index_add_(0, owner, scores.double())
        # Half precision rounds differently in every layout; a wrong mask is off by far more than this.
        slack = 1e-3 if next(self.model.parameters()).dtype in (torch.float32, torch.float64) else 0.05
        return bool(((totals[0] - totals[1]).abs() <= slack * (1 + totals[0].abs())).all())

    def _padded(self, plan: Plan) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Distinct inputs in right-padded batches: ids [b, t]; flat row, target and owner of each scored token."""
        readers: dict[tuple[int, ...], list[int]] = {}
        for i, span in enumerate(plan.distinct):
            readers.setdefault(span.tokens[:-1], []).append(i)
        inputs = sorted(readers, key=len)
        for batch in _batches(range(len(inputs)), [len(ids) for ids in inputs], min(self.max_tokens, self.max_rows)):
            width = max(len(inputs[b]) for b in batch)
            rows: list[int] = []
            targets: list[int] = []
            owner: list[int] = []
            for place, b in enumerate(batch):
                for i in readers[inputs[b]]:
                    stop, scored = place * width + len(inputs[b]), plan.distinct[i].scored
                    rows += range(stop - scored, stop)
                    targets += plan.distinct[i].tokens[-scored:]
                    owner += [i] * scored
            ids = [inputs[b] + (0,) * (width - len(inputs[b])) for b in batch]
            tensors = [torch.tensor(x, dtype=torch.int64, device=self._device) for x in (ids, rows, targets, owner)]
            yield tensors[0], tensors[1], tensors[2], tensors[3]

    # Generation

    def _plain_generation(self) -> bool:
        """Whether the network's own generation settings leave greedy decoding as it is."""
        settings: Any = getattr(self.model, "generation_config", None)
        if settings is None:
            return True
        harmless = (
            "_token_id",
            "_length",
            "_version",
            "_from_model_config",
            "temperature",
            "top_",
            "_sample",
            "_cache",
        )
        return not [name for name in settings.to_diff_dict() if not any(part in name for part in harmless)]

    def _stops(self, until: list[str]) -> Callable[[list[int]], bool]:
        """Whether the tokens written so far end a document: lm-eval's criterion, and the network's end of sequence."""
        tokenizer = self.encoder.tokenizer
        longest = max((len(tokenizer.encode(text, add_special_tokens=False)) for text in until), default=0) + 2
        ends = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        last = set(ends if isinstance(ends, list) else [ends]) | {self.encoder.eot_token_id}

        def stops(written: list[int]) -> bool:
            if written[-1] in last:
                return True
            tail = tokenizer.decode(written[-longest:])
            return any(text in tail for text in until)

        return stops

    @torch.inference_mode()
    def _greedy(self, prompts: list[tuple[int, ...]], how: Generation) -> list[list[int]]:
        """Greedy continuations with a key-value cache; a document that has ended leaves the batch."""
        ids, mask = self._left_padded(prompts)
        stops = self._stops(how.until)
        cache = DynamicCache(config=self.model.config)
        written: list[list[int]] = [[] for _ in prompts]
        active = list(range(len(prompts)))
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        for _ in range(how.new):
            last = {"logits_to_keep": 1} if self._keeps_logits else {}
            logits = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                **last,
            ).logits
            chosen = logits[:, -1].argmax(-1)
            for place, token in zip(active, chosen.tolist(), strict=True):
                written[place].append(token)
            keep = [row for row, place in enumerate(active) if not stops(written[place])]
            if not keep:
                break
            if len(keep) < len(active):
                kept = torch.tensor(keep, device=self._device)
                cache.batch_select_indices(kept)
                chosen, mask, positions = chosen[kept], mask[kept], positions[kept]
                active = [active[row] for row in keep]
            ids = chosen[:, None]
            mask = torch.cat([mask, mask.new_ones(len(active), 1)], 1)
            positions = positions[:, -1:] + 1
        return written

    @torch.inference_mode()
    def _generate(self, prompts: list[tuple[int, ...]], how: Generation) -> list[list[int]]:
        """Continuations by the network's own `generate`, with HFLM's arguments."""
        kwargs = {"temperature": 0.0, **how.arguments}
        if kwargs["temperature"] == 0.0 and not kwargs.get("do_sample"):
            kwargs["do_sample"] = False
            kwargs.pop("temperature")
        stops = self._stops(how.until)
        ids, mask = self._left_padded(prompts)
        model: Any = self.model
        length = kwargs.pop("max_length", ids.shape[1] + how.new)
        result = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_length=length,
            pad_token_id=self.encoder.tokenizer.pad_token_id,
            use_cache=True,
            **kwargs,
        )
        written = []
        for row in result[:, ids.shape[1] :].tolist():
            size = next((n for n in range(1, len(row) + 1) if stops(row[:n])), len(row))
            written.append(row[:size])
        return written

    def _left_padded(self, prompts: list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        width = max(map(len, prompts))
        pad = self.encoder.tokenizer.pad_token_id
        ids = torch.tensor([(pad,) * (width - len(p)) + p for p in prompts], device=self._device)
        mask = torch.tensor([(0,) * (width - len(p)) + (1,) * len(p) for p in prompts], device=self._device)
        return ids, mask


Scored = tuple[Tensor, Tensor, Tensor]
"""Of scored tokens: the span each belongs to, its log-probability, and whether it is not the first choice."""


def _scores(logits: Tensor, at: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of `targets` at rows `at` of `logits` [r, vocabulary]; where they are not the first choice."""
    logits = logits.float()
    scores, top = logits[at, targets], logits.amax(-1)
    missed = scores != top[at]
    ties = (~missed).nonzero()[:, 0]  # of equal logits the first one is chosen; argmax is too slow for all rows
    missed[ties] = logits[at[ties]].argmax(-1) != targets[ties]
    total = logits.sub_(top[:, None]).exp_().sum(-1)  # in place: nobody else holds these logits
    return scores - (top + total.log())[at], missed


def _batches(order: Sequence[int], lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """`order`, shortest first, in runs whose padded size stays within `budget` tokens."""
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * lengths[i] > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _attention_window(config: Any) -> int | None:
    """Tokens that the narrowest layer's attention reaches, or None where it reaches all."""
    config = getattr(config, "text_config", None) or config
    kinds = set(getattr(config, "layer_types", None) or [])
    if kinds - {"full_attention", "sliding_attention"}:
        return 0  # recurrent or chunked layers: neither is a matter of masks
    if kinds == {"full_attention"} or getattr(config, "use_sliding_window", True) is False:
        return None
    return getattr(config, "sliding_window", None)


@contextmanager
def _tree_interface(model: nn.Module) -> Iterator[dict[int, str]]:
    """Route the network's attention through `_tree_attention`; gives {id of a configuration: its own way}.

    Layers of an uneven network have configurations of their own, so all that modules hold are switched.
    """
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    own = {key: getattr(config, "_attn_implementation", None) or "eager" for key, config in configs.items()}
    for config in configs.values():
        config._attn_implementation_internal = TREE_ATTENTION
    try:
        yield own
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = own[key]


class _Layers:
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
        self._keys: list[Any] = []
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
            keys = [(self._weights(), architecture.hidden_size), *architecture.layers[:depth]]
            known = self._forget_all_but_common(plan, keys)
        stand_ins = [
            _SharedLayer(layer, i, i < known, self._outputs) if i < depth else layer for i, layer in enumerate(own)
        ]
        if last is not None:
            stand_ins[last] = _LastLayer(own[last])
        previous = module.__dict__.get(name)
        module.__dict__[name] = stand_ins
        try:
            yield last is not None
            if architecture is not None:
                self._keys = keys
        finally:
            if previous is None:
                del module.__dict__[name]
            else:
                module.__dict__[name] = previous

    def _forget_all_but_common(self, plan: Plan, keys: list[Any]) -> int:
        """Drop what is not true of a network with these `keys`; gives the number of layers that are left."""
        if self._plan is not plan:
            self._plan, self._keys, self._outputs = plan, [], [[] for _ in plan.packs]
        common = 0
        while common < min(len(keys), len(self._keys)) and keys[common] == self._keys[common]:
            common += 1
        known = max(common - 1, 0)
        for outputs in self._outputs:
            del outputs[known:]
        self._keys = []  # whatever happens next, nothing half-written is believed
        return known

    def _weights(self) -> tuple[Any, ...]:
        """Changes whenever a parameter is replaced or written to."""
        return tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in self._model.parameters())


class _SharedLayer:
    """Stands for a layer: gives its output from before where that is `known`, and keeps it where it is not."""

    def __init__(self, layer: Any, position: int, known: bool, outputs: list[list[Any]]) -> None:
        self._layer, self._position, self._known, self._outputs = layer, position, known, outputs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self._outputs[_reading.number]
        if not self._known:
            outputs.append(self._layer(*args, **kwargs))
        return outputs[self._position]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


class _LastLayer:
    """Stands for the last layer that attends. Given all n nodes, it gives the r rows whose logits are needed: behind
    its keys and values, nothing of the other nodes is looked at again."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        source = _reading.pack
        count = source.tokens.shape[1]

        def rows(value: Any) -> Any:
            """What is [1, n, ...], as hidden states and rotary angles are, for the rows only."""
            if isinstance(value, tuple):
                return tuple(map(rows, value))
            if isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == count:
                return value[:, source.rows]
            return value

        _reading.capturing = True
        try:
            return rows(self._layer(*args, **kwargs))  # a layer without attention runs through
        except _KeysAndValues as found:
            _reading.captured = found.args
        finally:
            _reading.capturing = False
        try:
            return self._layer(*rows(args), **{key: rows(value) for key, value in kwargs.items()})
        finally:
            _reading.captured = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)
