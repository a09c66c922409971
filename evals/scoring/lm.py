"""A network in memory as an lm-eval `LM`: what HFLM answers, computed with as little work as possible.

Requests for log-likelihoods are read as trees (`evals.scoring.tree_attention`), so that what they share is computed
once. Some networks cannot be read as a tree: their attention is not transformers' own interface, or looks at a window.
They are found out by comparison, and read in plain padded batches.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import postprocess_generated_text
from torch import Tensor, nn
from transformers import DynamicCache

from evals.scoring.encoding import Encoder, Generation, Span
from evals.scoring.tree_attention import SMALLEST_PASS, Layers, Plan, Scored, reading, token_scores, tree_interface
from supernet.architecture import Architecture
from supernet.device import cache_bytes as bytes_to_keep
from supernet.device import logits_at_once, pass_tokens

log = logging.getLogger(__name__)

Answer = tuple[float, bool]
"""Log-likelihood in nats, and whether every scored token is the network's first choice."""


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
        config: Any = model.config
        vocabulary = getattr(getattr(config, "text_config", None) or config, "vocab_size", 2**16)
        self.max_rows = max(1, (max_logits or logits_at_once(self._device)) // vocabulary)
        self.cache_bytes = bytes_to_keep(self._device) if cache_bytes is None else cache_bytes
        self.workers = workers
        parameters = inspect.signature(model.forward).parameters
        self._keeps_logits = "logits_to_keep" in parameters
        self._window = _attention_window(config)
        self._as_tree: bool | None = None if {"position_ids", "logits_to_keep"} <= set(parameters) else False
        self._layers = Layers(model)

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
            tree_interface(self.model) as implementations,
            self._layers.standing_in(plan, architecture, self.cache_bytes) as only_rows,
        ):

            def read(number: int) -> Scored:
                source = plan.packs[number]
                reading.pack, reading.number, reading.implementations = source, number, implementations
                with torch.inference_mode():  # of this thread
                    logits = self.model(
                        input_ids=source.tokens,
                        position_ids=source.positions,
                        use_cache=False,
                        logits_to_keep=0 if only_rows else source.rows,  # 0: of all that is left
                    ).logits[0]
                    for block in (*source.blocks, *source.last):
                        block.forget_mask()
                    return source.owner, *token_scores(logits, source.at, source.targets)

            if self.workers == 1 or len(plan.packs) == 1:
                yield from map(read, range(len(plan.packs)))
            else:
                with ThreadPoolExecutor(self.workers) as pool:
                    yield from pool.map(read, range(len(plan.packs)))

    def _read_padded(self, plan: Plan, beside: int = 0) -> Iterator[Scored]:
        """Scores of right-padded batches, each `beside` tokens longer than it need be."""
        for ids, rows, targets, owner in self._padded(plan, beside):
            logits = self.model(input_ids=ids, use_cache=False).logits
            used, at = torch.unique(rows, return_inverse=True)
            yield owner, *token_scores(logits.flatten(0, 1)[used], at, targets)

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
        readers: dict[tuple[int, ...], list[int]] = {}
        for i, span in enumerate(plan.distinct):
            readers.setdefault(span.tokens[:-1], []).append(i)
        inputs = sorted(readers, key=len)
        for batch in _batches(range(len(inputs)), [len(ids) for ids in inputs], min(self.max_tokens, self.max_rows)):
            width = max(len(inputs[b]) for b in batch) + beside
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
