"""What is proved of a package that transformers loads: weights, logits, padding, cache, tokenizer, scores, saving.

To be run in a process that has seen nothing but the folder (`export.verify`).
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import AutoConfig

from export.package_record import PackageRecord
from export.probe import (
    NEW_TOKENS,
    compare_padded,
    largest,
    load_reference,
    logits_of,
    next_log_probabilities,
    padding_token,
    shorter_rows,
    tokenizer_fault,
)
from export.quantization.schemes import bound_of, form_of, in_transformers
from supernet.common.errors import RequestError, VerificationError
from supernet.common.files import read_json
from supernet.common.processes import last_line
from supernet.common.versions import versions
from supernet.loading import load_network
from supernet.tokens import GREEDY
from supernet.trust import check_code, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from evals.scoring.tasks import TaskSet

TOLERANCE = 1e-5
"""Largest |Δ logit| as a share of the largest |logit|, float32, the stored weights on both sides."""

OWN = "quantized_next_logprob"
"""Key of the probe, and of the claims, for what a quantized package itself says."""

PACKED = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
"""Parameters of compressed-tensors that are not the network's."""

Claims = dict[str, object]
"""What was proved: checks by name with true, a number or a text."""


@dataclass(frozen=True)
class TaskFiles:
    """The report's tasks are to be scored again: lm-eval's own, or those of the task files in `include_path`.

    Relative paths, of `include_path` and of the data that task files name, start at `folder`.
    """

    include_path: str | None = None
    folder: str = field(default_factory=os.getcwd)


class NetworkCheck:
    """The checks of one package, in order. Each returns its claims, or raises `VerificationError`."""

    def __init__(self, package: PackageRecord, reference: Path | None, tasks: TaskFiles | None) -> None:
        self.folder, self.entry, self.probe = package.folder, package.entry, package.probe
        self.documents, self.reference, self.tasks = package.lineage.task_documents, reference, tasks
        self.trusted = check_code(self.folder)
        quantization = self.entry.quantization
        if quantization is not None and not in_transformers(quantization):
            raise self.fail(f"transformers loads no package of the quantization {quantization}")
        self.scheme = None if quantization is None else form_of(quantization)
        report = self.entry.quantization_report
        self.bound = inf if quantization is None else bound_of(quantization, report.bits if report else None)
        self.ids = torch.tensor(self.probe.ids)

    def run(self) -> Claims:
        """All checks. Two networks are never in memory together."""
        task_set = self.reported_tasks()  # first, as it is quick to say what is missing
        model = self.load(self.folder)
        with tempfile.TemporaryDirectory(prefix="compressor-verify-") as saved:
            # A compressed network unpacks its weights in its first pass: it is saved before, as it was stored.
            with self.step("saving"):
                model.save_pretrained(saved)
            with self.step("a forward pass"):
                logits = logits_of(model, self.ids)
            claims = self.parameters(model) | self.logits(logits)
            with self.step("a padded batch"):
                claims |= self.padding(model, logits)
            with self.step("generation"):
                claims |= self.cache(model)
            with self.step("the tokenizer"):
                claims |= self.tokenizer()
            if task_set is not None:
                with self.step("scoring"):
                    claims |= self.scores(model, task_set)
            del model
            with self.step("saving and loading again"):
                claims |= self.reload(Path(saved), logits)
        return {
            "layout": self.entry.layout,
            "quantization": self.entry.quantization,
            **claims,
            "remote_code": self.trusted,
            "device": "cpu",
            "dtype": "float32",
            "versions": versions(("torch", "transformers", "tokenizers")),
        }

    def fail(self, message: str) -> VerificationError:
        return VerificationError(f"{self.folder}: {message}")

    def largest(self, difference: Tensor, allowed: float, message: str) -> float:
        return largest(difference, allowed, f"{self.folder}: {message}")

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[None]:
        """What transformers raises in this block is a fault of the package, and is reported as one."""
        try:
            yield
        except VerificationError:
            raise
        except RequestError as error:  # of a file of the package, which names it
            raise self.fail(str(error).removeprefix(f"{self.folder}: ")) from error
        except Exception as error:
            raise self.fail(f"{what} fails: {type(error).__name__}: {last_line(str(error))}") from error

    def load(self, folder: Path) -> PreTrainedModel:
        with self.step("loading"):
            model, info = load_network(folder, torch.float32, self.trusted)
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if names := sorted(map(str, info[key])):
                raise self.fail(f"{key.replace('_', ' ')} on loading: {', '.join(names[:3])}")
        return model.eval()

    def parameters(self, model: PreTrainedModel) -> Claims:
        count = sum(p.numel() for name, p in model.named_parameters() if not name.endswith(PACKED))
        for layer in model.modules():
            if hasattr(layer, "qweight"):  # one of auto-round's, which holds nothing that torch counts
                count += layer.infeatures * layer.outfeatures + (0 if layer.bias is None else layer.bias.numel())
        if count != self.entry.params:
            raise self.fail(f"has {count} parameters where compression.json says {self.entry.params}")
        return {"params": count}

    def logits(self, logits: Tensor) -> Claims:
        """A quantized network against the unquantized one, within its scheme's bound; any other against the full
        logits of the network in memory, or the probe."""
        computed = next_log_probabilities(logits, self.ids)
        expected = torch.tensor(self.probe.next_logprob, dtype=torch.float64)
        full = None
        if self.reference is not None:
            ids, full = load_reference(self.reference)
            if not torch.equal(ids, self.ids):
                raise self.fail("the reference logits are of other tokens than the probe")
            expected = next_log_probabilities(full, ids)
        mean = (computed - expected).abs().mean().item()
        if self.scheme is not None:
            if not mean <= self.bound:
                raise self.fail(
                    f"next-token log-probabilities are off by {mean:.4f} on average, allowed are {self.bound}"
                )
            claims: Claims = {"compared_with": "the unquantized network", "bound": self.bound}
            claims |= self.since_export(computed, self.slack(logits))
        elif full is not None:
            claims = self.full_logits(logits, full)
        else:
            claims = self.probed(logits, computed, expected)
        return claims | {"mean_abs_logprob_difference": mean}

    def since_export(self, computed: Tensor, allowed: float) -> Claims:
        """A quantized network against itself when it was first verified, if it was."""
        claims: Claims = {OWN: computed.tolist()}
        if self.probe.quantized_next_logprob is not None:
            before = torch.tensor(self.probe.quantized_next_logprob, dtype=torch.float64)
            claims["max_abs_logprob_difference_from_export"] = self.largest(
                computed - before, allowed, "log-probabilities differ by up to {largest} from those at export"
            )
        return claims

    def full_logits(self, logits: Tensor, full: Tensor) -> Claims:
        allowed = TOLERANCE * self.probe.max_abs_logit
        difference = self.largest(logits - full, allowed, "logits differ by up to {largest}, allowed are {allowed}")
        return {
            "compared_with": "full logits of the network in memory",
            "max_abs_logit_difference": difference,
            "tolerance": allowed,
        }

    def probed(self, logits: Tensor, computed: Tensor, expected: Tensor) -> Claims:
        # A logit's tolerance moves a log-probability by at most twice as much; the probe is rounded to 7 digits.
        allowed = 2 * TOLERANCE * self.probe.max_abs_logit + 1e-7
        top = logits.double().log_softmax(-1).gather(-1, torch.tensor(self.probe.top_ids))
        expected_top = torch.tensor(self.probe.top_logprob, dtype=torch.float64)
        differences = torch.cat([(computed - expected).flatten(), (top - expected_top).flatten()])
        message = "log-probabilities differ by up to {largest}, allowed are {allowed}"
        difference = self.largest(differences, allowed, message)
        return {
            "compared_with": "the package's probe",
            "max_abs_logprob_difference": difference,
            "tolerance": allowed,
        }

    def padding(self, model: PreTrainedModel, logits: Tensor) -> Claims:
        """Sequences of different lengths, padded on the left, against each one alone."""
        padded, mask, kept = shorter_rows(self.ids, padding_token(model))
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            batch = model(input_ids=padded, attention_mask=mask, position_ids=positions, use_cache=False).logits
        compare_padded(self.folder, batch, logits, kept, self.slack(logits))
        return {"padding_equal": True}

    def cache(self, model: PreTrainedModel) -> Claims:
        """Greedy continuations with and without the key-value cache."""
        prompt = self.ids[:1, : max(1, self.ids.shape[1] // 2)]
        room = (getattr(model.config, "max_position_embeddings", None) or 10**9) - prompt.shape[1]
        cached, uncached = (
            model.generate(
                prompt,
                use_cache=use_cache,
                attention_mask=torch.ones_like(prompt),
                **GREEDY,
                max_new_tokens=min(NEW_TOKENS, room),
                pad_token_id=padding_token(model),
            )
            for use_cache in (True, False)
        )
        if not torch.equal(cached, uncached) and not self.tie(model, cached, uncached):
            raise self.fail(f"greedy generation with the cache gives {cached.tolist()}, without it {uncached.tolist()}")
        return {"cached_equals_uncached": True}

    def tie(self, model: PreTrainedModel, cached: Tensor, uncached: Tensor) -> bool:
        """Whether two greedy continuations [1, length] part where two tokens are equally likely."""
        length = min(cached.shape[1], uncached.shape[1])
        apart = (cached[0, :length] != uncached[0, :length]).nonzero()
        if not len(apart):
            return False
        at = int(apart[0])
        logits = logits_of(model, uncached[:, :at])[0, -1]
        gap = (logits[uncached[0, at]] - logits[cached[0, at]]).abs().item()
        return gap <= self.slack(logits)

    def slack(self, logits: Tensor) -> float:
        """What equal computations in another order may differ by.

        Where activations are rounded, one that lies between two codes may fall to either side.
        """
        factor = 1000 if self.scheme and self.scheme.dynamic else 1
        return factor * TOLERANCE * logits.abs().max().item()

    def tokenizer(self) -> Claims:
        fault = tokenizer_fault(load_tokenizer(self.folder), self.probe)
        if fault is not None:
            raise self.fail(fault)
        return {"tokenizer_equal": True} | self.vocabulary()

    def vocabulary(self) -> Claims:
        """Of a cut vocabulary: texts of kept tokens are split as before, and every text decodes to what it did."""
        if not self.probe.splits:
            return {}
        tokenizer = load_tokenizer(self.folder)
        for split in self.probe.splits:
            ids = tokenizer(split.text, verbose=False).input_ids
            if ids != split.ids:
                raise self.fail(f"its tokenizer splits {split.text!r} into {ids}, not into {split.ids}")
            if (decoded := tokenizer.decode(ids)) != split.decoded:
                raise self.fail(f"its tokenizer makes {decoded!r} of {split.text!r}, not {split.decoded!r}")
        before = sum(split.kept for split in self.probe.splits)
        return {"texts_split_as_before": before, "texts_decoded_as_before": len(self.probe.splits)}

    def reported_tasks(self) -> TaskSet | None:
        """The report's tasks, on the same documents; None where nothing is to be scored again."""
        if self.tasks is None or not self.entry.tasks:
            return None
        # lm-eval takes seconds to import, and most checks score nothing.
        from evals.scoring.encoding import Encoder
        from evals.scoring.tasks import TaskSet

        with self.step("reading configuration and tokenizer"):
            config = AutoConfig.from_pretrained(self.folder, local_files_only=True, trust_remote_code=self.trusted)
            tokenizer = load_tokenizer(self.folder)
        with contextlib.chdir(self.tasks.folder):  # what fails here is not the package's
            task_set = TaskSet.load(
                [f"{name}:{score.metric}" for name, score in self.entry.tasks.items()],
                encoder=Encoder(tokenizer, config),
                include_path=[self.tasks.include_path] if self.tasks.include_path else [],
            )
            for name, documents in self.documents.items():
                if task_set.fingerprint(name, self.entry.tasks[name].split) != documents:
                    raise self.fail(f"the documents of task {name} at hand are not those that the report scored")
        return task_set

    def scores(self, model: PreTrainedModel, task_set: TaskSet) -> Claims:
        """The report's scores, measured again on the same documents."""
        from evals.scoring.lm import NetworkLM  # as above
        from evals.scoring.scorer import Scorer

        recorded = self.entry.tasks
        # 1. Score.
        splits = {score.split for score in recorded.values()}
        scores = {split: Scorer(task_set, NetworkLM(model, task_set.encoder)).score(split) for split in splits}
        values = {name: scores[score.split][name].value for name, score in recorded.items()}
        # 2. Compare. One document may be answered either way, and a mean of many is rounded. A score that was computed
        #    on an accelerator, or not in float32, is another computation: within its own standard error.
        exact = self.entry.speed is None or self.entry.speed.dtype == "float32"
        for name, score in recorded.items():
            allowed = max(1 / score.n, 1e-4 * abs(score.value), 0 if exact else score.stderr or 0)
            if not abs(values[name] - score.value) <= allowed:
                raise self.fail(f"task {name} scores {values[name]:.4f}, the report says {score.value:.4f}")
        return {"task_scores": values, "task_scores_equal": True}

    def reload(self, saved: Path, logits: Tensor) -> Claims:
        """Saved by transformers and loaded again, quantized ones still quantized: the same logits."""
        if (read_json(saved / "config.json").get("quantization_config") is None) != (self.scheme is None):
            raise self.fail("saved again, its configuration says otherwise whether it is quantized")
        again = logits_of(self.load(saved), self.ids)
        self.largest(again - logits, self.slack(logits), "saved and loaded again, its logits differ by {largest}")
        return {"save_and_reload_equal": True}
