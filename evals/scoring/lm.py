"""A network in memory as an lm-eval `LM`: the answers of HFLM, computed with as little work as possible.

Requests for log-likelihoods are read as trees (`evals.scoring.tree_attention`), so that what they share is computed
once. Some networks cannot read a tree: their attention does not go through transformers' interface, or it looks at a
window. A comparison of both ways detects them, and they read plain padded batches.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import postprocess_generated_text
from torch import Tensor

from evals.scoring.encoding import Encoder, Span
from evals.scoring.generation import Generator
from evals.scoring.tree_attention import SMALLEST_PASS, Layers, Plan, Scored, reading, token_scores, tree_interface
from supernet.architecture import Architecture
from supernet.device import cache_bytes as bytes_to_keep
from supernet.device import logits_at_once, pass_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)

Answer = tuple[float, bool]
"""Log-likelihood in nats, and whether every scored token is the network's first choice."""

COMPARED = 1024
"""Tokens at most of a request that both ways of reading are compared on."""


class NetworkLM(LM):
    """lm-eval's view of `model`, a transformers causal language model or one that takes the same arguments.

    `max_tokens`: tokens to read in one pass. `max_logits`: logits to hold at once. `cache_bytes`: memory for the
    outputs of layers that the next call may share. `workers`: passes to run side by side; on a CPU, a small network
    makes far better use of n cores with n workers and one torch thread than the other way round. The caller sets
    evaluation mode and torch's threads.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        encoder: Encoder,
        *,
        max_tokens: int | None = None,
        max_logits: int | None = None,
        cache_bytes: int | None = None,
        workers: int = 1,
    ) -> None:
        super().__init__()
        self.model = model
        self.encoder = encoder
        parameter = next(model.parameters())
        self._device = parameter.device
        self.max_tokens = max_tokens or pass_tokens(self._device)
        config = model.config
        vocabulary = getattr(getattr(config, "text_config", None) or config, "vocab_size", 2**16)
        self.max_rows = max(1, (max_logits or logits_at_once(self._device)) // vocabulary)
        self.cache_bytes = bytes_to_keep(self._device) if cache_bytes is None else cache_bytes
        self.workers = workers
        parameters = inspect.signature(model.forward).parameters
        self._window = _attention_window(config)
        self._as_tree: bool | None = None if {"position_ids", "logits_to_keep"} <= set(parameters) else False
        self._layers = Layers(model)
        self._generator = Generator(model, encoder)

    # -- what lm-eval asks of an LM --

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
        """Log-likelihood of each continuation given its context."""
        pairs = [(request.args[0], request.args[1]) for request in requests]
        return self.answer(self.plan(self.encoder.spans(pairs)))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, in nats."""
        windows = self.encoder.rolling(request.args[0] for request in requests)
        scores = iter(self.answer(self.plan([span for spans in windows for span in spans])))
        return [sum(next(scores)[0] for _ in spans) for spans in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first stop string, greedy unless a task's settings say otherwise.

        Each is what HFLM gives with a batch of one: there, where a document stops does not depend on its neighbours.
        """
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}  # requests with the same settings
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items(), key=str)), []).append(i)
        for members in groups.values():
            settings = self.encoder.generation(requests[members[0]].args[1])
            prompts = self.encoder.prompts([requests[i].args[0] for i in members], settings.new)
            order = sorted(range(len(members)), key=lambda j: len(prompts[j]))
            for batch in _batches(order, [len(prompt) + settings.new for prompt in prompts], self.max_tokens):
                written = self._generator.continuations([prompts[j] for j in batch], settings)
                for j, ids in zip(batch, written, strict=True):
                    text = self.encoder.tokenizer.decode(ids, skip_special_tokens=True)
                    texts[members[j]] = postprocess_generated_text(text, settings.until, None)
        return texts

    # -- what `Scorer` asks --

    def tune(self, spans: Sequence[Span], cores: int) -> None:
        """Set `workers` and torch's threads by timing some of `spans` both ways: one pass at a time on all `cores`,
        and a pass on each core."""
        if cores == 1 or self._device.type != "cpu" or not spans:
            return
        # 1. Neighbouring spans, as they are read, of about four passes for each core.
        ordered = sorted(set(spans), key=lambda span: span.tokens)
        sizes = itertools.accumulate(len(span.tokens) for span in ordered)
        sample = [span for span, size in zip(ordered, sizes, strict=True) if size <= 4 * cores * SMALLEST_PASS]
        # 2. Time both ways, once warm: threads start and masks are made in the first call.
        seconds = {}
        for workers in (1, cores):
            self.set_workers(workers, cores)
            plan = self.plan(sample or ordered[:1])
            self.answer(plan)
            began = time.perf_counter()
            self.answer(plan)
            seconds[workers] = time.perf_counter() - began
        self.set_workers(min(seconds, key=lambda workers: seconds[workers]), cores)

    def set_workers(self, workers: int, cores: int) -> None:
        """Read `workers` passes side by side, each with its share of the cores."""
        self.workers = workers
        torch.set_num_threads(cores // workers)

    def plan(self, spans: Sequence[Span]) -> Plan:
        """The passes that answer these spans; `answer` runs them as often as wanted."""
        return Plan(spans, self.max_tokens, self.max_rows, self._device, self.workers)

    @torch.inference_mode()
    def answer(self, plan: Plan, architecture: Architecture | None = None) -> list[Answer]:
        """One answer for each span of the plan.

        `architecture`, where the network is a super-network: what is active. Leading layers equal to those of the
        call before, on the same plan, are not computed again, unless weights changed in between.
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
        """The scored tokens of each pass over a tree."""
        with (
            tree_interface(self.model) as implementations,
            self._layers.standing_in(plan, architecture, self.cache_bytes) as only_rows,
        ):

            def read(number: int) -> Scored:
                pack = plan.packs[number]
                reading.pack, reading.number, reading.implementations = pack, number, implementations
                with torch.inference_mode():  # it holds for one thread only
                    logits = self.model(
                        input_ids=pack.tokens,
                        position_ids=pack.positions,
                        use_cache=False,
                        logits_to_keep=0 if only_rows else pack.rows,  # 0: of all that is left
                    ).logits[0]
                    for block in (*pack.blocks, *pack.last):
                        block.forget_mask()
                    return pack.owner, *token_scores(logits, pack.at, pack.targets)

            if self.workers == 1 or len(plan.packs) == 1:
                yield from map(read, range(len(plan.packs)))
            else:
                with ThreadPoolExecutor(self.workers) as pool:
                    yield from pool.map(read, range(len(plan.packs)))

    def _read_padded(self, plan: Plan, beside: int = 0) -> Iterator[Scored]:
        """The scored tokens of each padded batch, which is `beside` tokens longer than it need be."""
        for ids, rows, targets, owner in self._padded(plan, beside):
            logits = self.model(input_ids=ids, use_cache=False).logits
            used, at = torch.unique(rows, return_inverse=True)
            yield owner, *token_scores(logits.flatten(0, 1)[used], at, targets)

    def _reads_trees(self, plan: Plan) -> bool:
        """Whether the network can read this plan's trees; decided by comparison at the first call."""
        if self._window is not None and plan.longest > self._window:
            return False
        if self._as_tree is None:
            self._as_tree = self._tree_equals_plain(plan)
            if not self._as_tree:
                log.warning("this network cannot read shared prefixes once: scoring it in padded batches")
        return self._as_tree

    def _tree_equals_plain(self, plan: Plan) -> bool:
        """Whether both ways agree on a few spans of the plan, among them some that share a prefix."""
        by_length = sorted(plan.distinct, key=lambda span: len(span.tokens))
        # Whole articles say no more of masks and positions than a page does, and take minutes on a CPU; but where
        # rotary angles change with the length, they do.
        most = plan.longest if _angles_follow_length(self.model.config) else COMPARED
        short = [span for span in by_length if len(span.tokens) <= most] or by_length[:1]
        spans = dict.fromkeys([*sorted(short, key=lambda span: span.tokens)[:6], *short[-2:]])
        sample = Plan(list(spans), 2**20, 2**20, self._device)
        plain = self._totals(self._read_padded(sample), len(spans))
        try:
            tree = self._totals(self._read_trees(sample, None), len(spans))
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            log.info("reading as a tree failed: %s", error)
            return False
        allowed = 1e-3 * (1 + plain.abs())
        if next(self.model.parameters()).dtype not in (torch.float32, torch.float64):
            # Half precision rounds differently in every layout, in a bad network by several percent. How much, other
            # paddings show; a wrong mask is off by far more.
            longer = self._totals(self._read_padded(sample, beside=7), len(spans))
            allowed = 0.05 * (1 + plain.abs()) + 8 * (longer - plain).abs().max()
        return bool(((plain - tree).abs() <= allowed).all())

    def _totals(self, parts: Iterable[Scored], spans: int) -> Tensor:
        """Log-likelihood of each span, float64 [spans]."""
        totals = torch.zeros(spans, dtype=torch.float64, device=self._device)
        for owner, scores, _ in parts:
            totals.index_add_(0, owner, scores.double())
        return totals

    def _padded(self, plan: Plan, beside: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Distinct inputs in right-padded batches: ids [b, t]; flat row, target and owner of each scored token."""
        spans_of: dict[tuple[int, ...], list[int]] = {}  # spans with the same input differ in their last token
        for i, span in enumerate(plan.distinct):
            spans_of.setdefault(span.tokens[:-1], []).append(i)
        inputs = sorted(spans_of, key=len)
        for batch in _batches(range(len(inputs)), [len(ids) for ids in inputs], min(self.max_tokens, self.max_rows)):
            width = max(len(inputs[b]) for b in batch) + beside
            rows, targets, owner = list[int](), list[int](), list[int]()
            for place, b in enumerate(batch):
                for i in spans_of[inputs[b]]:
                    stop, scored = place * width + len(inputs[b]), plan.distinct[i].scored
                    rows += range(stop - scored, stop)
                    targets += plan.distinct[i].tokens[-scored:]
                    owner += [i] * scored
            ids = [inputs[b] + (0,) * (width - len(inputs[b])) for b in batch]
            tensors = [torch.tensor(x, dtype=torch.int64, device=self._device) for x in (ids, rows, targets, owner)]
            yield tensors[0], tensors[1], tensors[2], tensors[3]


def _angles_follow_length(config: PreTrainedConfig) -> bool:
    """Whether rotary angles depend on how long a text is (`dynamic`, `longrope`)."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = str(rope)
    return "dynamic" in kinds or "longrope" in kinds


def _batches(order: Sequence[int], lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices in `order`, shortest first, in batches whose padded size stays within `budget` tokens."""
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * lengths[i] > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _attention_window(config: PreTrainedConfig) -> int | None:
    """Tokens that the narrowest layer's attention reaches, or None where it reaches all."""
    config = getattr(config, "text_config", None) or config
    kinds = set(getattr(config, "layer_types", None) or [])
    if kinds - {"full_attention", "sliding_attention"}:
        return 0  # recurrent or chunked layers: a mask cannot show them a tree
    if kinds == {"full_attention"} or getattr(config, "use_sliding_window", True) is False:
        return None
    return getattr(config, "sliding_window", None)
