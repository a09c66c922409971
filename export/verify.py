"""Proof of a package: a fresh process that sees only the folder loads it and re-checks what it claims.

Nothing of the process that wrote the package is used: weights, code, configuration and tokenizer all come from the
folder, through transformers' Auto classes, offline. The process is `python -m export.verify JOBS RESULTS`.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from export.package_record import check_files, read_record, update_record
from export.quantization.schemes import SCHEMES
from export.shards import weight_bytes
from supernet.common.errors import RequestError, VerificationError
from supernet.common.files import read_json
from supernet.common.processes import fresh_environment, last_line
from supernet.common.versions import versions
from supernet.trust import check_code, load_tokenizer

TOLERANCE = 1e-5
"""Largest |Δ logit| as a share of the largest |logit|, float32, the stored weights on both sides."""

OWN = "quantized_next_logprob"
"""Key of the probe for what a quantized package itself said when it was first verified: later checks are exact."""

NEW_TOKENS = 12


@dataclass(frozen=True)
class TaskFiles:
    """The report's tasks are to be scored again: lm-eval's own, or those of the task files in `include_path`.

    Relative paths, of `include_path` and of the data that task files name, start at `folder`.
    """

    include_path: str | None = None
    folder: str = field(default_factory=os.getcwd)


def verify(
    package: Path, reference: Path | None = None, *, record: bool = False, tasks: TaskFiles | None = None
) -> dict[str, Any]:
    """Check one package in a fresh process; see `verify_all`."""
    return verify_all([(package, reference)], record=record, tasks=tasks)[0]


def verify_all(
    packages: Sequence[tuple[Path, Path | None]],
    *,
    record: bool = False,
    log: Path | None = None,
    tasks: TaskFiles | None = None,
) -> list[dict[str, Any]]:
    """Check packages in one fresh process. Returns what was proved of each, in order.

    Each comes with the full logits that export saved (`write_package(reference=…)`; the unquantized network's, for a
    quantized package), or None to compare with the compact probe inside the package. With `tasks`, every score that a
    package has in the report is measured again. With `record`, the result is written into each package's
    compression.json. The process's own output goes to `log`.

    Raises `VerificationError` naming the file or the first claim that does not hold, and `RequestError` where a folder
    is no package or the runtime that it is for is not installed.
    """
    for package, _ in packages:
        check_files(package)
    with tempfile.TemporaryDirectory(prefix="compressor-verify-") as scratch:
        jobs = Path(scratch) / "jobs.json"
        results = Path(scratch) / "results.json"
        pairs = [[str(p.resolve()), str(r.resolve()) if r else None] for p, r in packages]
        jobs.write_text(json.dumps({"packages": pairs, "tasks": tasks and asdict(tasks)}), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "export.verify", str(jobs), str(results)],
            env=fresh_environment(Path(scratch), max(weight_bytes(p) for p, _ in packages)),
            cwd=scratch,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        if log is not None:
            with log.open("a", encoding="utf-8") as stream:
                stream.write(done.stdout)
        found = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
    if "refused" in found:
        raise RequestError(found["refused"])
    if "error" in found:
        raise VerificationError(found["error"])
    if "results" not in found:
        raise VerificationError(f"{packages[0][0]}: the checking process died: {last_line(done.stdout)}")
    for (package, _), result in zip(packages, found["results"], strict=True):
        own = result.pop(OWN, None)
        if record:
            update_record(package, entry={"verified": result}, probe={} if own is None else {OWN: own})
    return found["results"]


def check(package: Path, reference: Path | None = None, tasks: TaskFiles | None = None) -> dict[str, Any]:
    """All checks of one package, in this process (which should be a fresh one)."""
    record = read_record(package)
    layout = record["entry"]["layout"]
    if layout == "gguf":
        from export.layouts.gguf.runtime import check_gguf

        return check_gguf(package, record)
    if layout in ("onnx", "openvino"):
        from export.layouts.graphs import check_graph

        return check_graph(package, record)
    return _Checker(package, record, reference, tasks).run()


class _Checker:
    """The checks of one Hugging Face package, in order; each raises `VerificationError` or adds to `result`."""

    def __init__(self, package: Path, record: dict[str, Any], reference: Path | None, tasks: TaskFiles | None) -> None:
        import torch

        self.package, self.record, self.reference, self.tasks = package, record, reference, tasks
        self.trusted = check_code(package)
        self.quantization: str | None = record["entry"]["quantization"]
        self.scheme = None
        if self.quantization is not None:
            if self.quantization not in SCHEMES:
                raise self.fail(f"its quantization is unknown: {self.quantization}")
            self.scheme = SCHEMES[self.quantization]
        self.ids = torch.tensor(record["probe"]["ids"])
        self.result: dict[str, Any] = {}
        self.own: Any = None  # next-token log-probabilities of a quantized network

    def fail(self, message: str) -> VerificationError:
        return VerificationError(f"{self.package}: {message}")

    def load(self, folder: Path) -> Any:
        import torch

        from supernet.loading import load_network

        model, info = self.step("loading", load_network, folder, torch.float32, self.trusted)
        wrong = {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        for key, names in wrong.items():
            if names:
                raise self.fail(f"{key.replace('_', ' ')} on loading: {', '.join(names[:3])}")
        return model.eval()

    def run(self) -> dict[str, Any]:
        from export.probe import logits_of

        model = self.load(self.package)
        with tempfile.TemporaryDirectory(prefix="compressor-verify-") as again:
            self.step("saving", model.save_pretrained, again)
            # A compressed network unpacks its weights in this first pass: it is saved before, as it was stored.
            logits = self.step("a forward pass", logits_of, model, self.ids)
            self.parameters(model)
            self.logits(logits)
            self.step("a padded batch", self.padding, model, logits)
            self.step("generation", self.cache, model)
            self.step("the tokenizer", self.tokenizer)
            if self.tasks is not None and self.record["entry"].get("tasks"):
                with contextlib.chdir(self.tasks.folder):
                    self.step("scoring", self.scores, model, self.tasks)
            del model  # or two networks in float32 would be in memory
            self.step("saving and loading again", self.reload, Path(again), logits)
        return {
            "layout": self.record["entry"]["layout"],
            "quantization": self.quantization,
            **self.result,
            "remote_code": self.trusted,
            "device": "cpu",
            "dtype": "float32",
            "versions": versions(("torch", "transformers", "tokenizers")),
            **({OWN: self.own.tolist()} if self.own is not None else {}),
        }

    def step(self, what: str, do: Callable[..., Any], *arguments: Any) -> Any:
        """Whatever a package makes transformers stumble over is a fault of the package, and to be told as one."""
        try:
            return do(*arguments)
        except (VerificationError, RequestError):
            raise
        except Exception as error:
            raise self.fail(f"{what} fails: {type(error).__name__}: {last_line(str(error))}") from error

    def parameters(self, model: Any) -> None:
        packing = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
        count = sum(p.numel() for name, p in model.named_parameters() if not name.endswith(packing))
        for layer in model.modules():
            if hasattr(layer, "qweight"):  # one of auto-round's, which holds nothing that torch counts
                count += layer.infeatures * layer.outfeatures + (0 if layer.bias is None else layer.bias.numel())
        claimed = self.record["entry"]["params"]
        if count != claimed:
            raise self.fail(f"has {count} parameters where compression.json says {claimed}")
        self.result["params"] = count

    def logits(self, logits: Any) -> None:
        import torch

        from export.probe import load_reference, next_log_probabilities

        probe = self.record["probe"]
        scale = probe["max_abs_logit"]
        expected = torch.tensor(probe["next_logprob"], dtype=torch.float64)
        if self.reference is not None:
            ids, full = load_reference(self.reference)
            if not torch.equal(ids, self.ids):
                raise self.fail("the reference logits are of other tokens than the probe")
            expected = next_log_probabilities(full, ids)
        found = next_log_probabilities(logits, self.ids)
        mean = (found - expected).abs().mean().item()
        if self.scheme is not None:
            bound = self.scheme.bound
            if not mean <= bound:
                raise self.fail(f"next-token log-probabilities are off by {mean:.4f} on average, allowed are {bound}")
            self.result |= {"compared_with": "the unquantized network", "bound": bound}
            self.own = found
            if OWN in probe:
                difference = (found - torch.tensor(probe[OWN], dtype=torch.float64)).abs().max().item()
                allowed = self.slack(logits)
                if not difference <= allowed:
                    raise self.fail(f"log-probabilities differ by up to {difference:.3g} from those at export")
                self.result["max_abs_logprob_difference_from_export"] = difference
        elif self.reference is not None:
            difference = (logits - full).abs().max().item()
            if not difference <= TOLERANCE * scale:
                raise self.fail(f"logits differ by up to {difference:.3g}, allowed are {TOLERANCE * scale:.3g}")
            self.result |= {
                "compared_with": "full logits of the network in memory",
                "max_abs_logit_difference": difference,
                "tolerance": TOLERANCE * scale,
            }
        else:
            # A logit's tolerance moves a log-probability by at most twice as much; the probe is rounded to 7 digits.
            allowed = 2 * TOLERANCE * scale + 1e-7
            log_probs = logits.double().log_softmax(-1)
            top = torch.tensor(probe["top_logprob"], dtype=torch.float64)
            top_found = log_probs.gather(-1, torch.tensor(probe["top_ids"]))
            difference = max((found - expected).abs().max().item(), (top_found - top).abs().max().item())
            if not difference <= allowed:
                raise self.fail(f"log-probabilities differ by up to {difference:.3g}, allowed are {allowed:.3g}")
            self.result |= {
                "compared_with": "the package's probe",
                "max_abs_logprob_difference": difference,
                "tolerance": allowed,
            }
        self.result["mean_abs_logprob_difference"] = mean

    def padding(self, model: Any, logits: Any) -> None:
        """Sequences of different lengths, padded on the left, against each one alone."""
        import torch

        from export.probe import shorter_rows

        padded, mask, kept = shorter_rows(self.ids, model.config.pad_token_id or 0)
        length = self.ids.shape[1]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            batch = model(input_ids=padded, attention_mask=mask, position_ids=positions, use_cache=False).logits
        allowed = self.slack(logits)
        for row, keep in enumerate(kept):
            difference = (batch[row, length - keep :] - logits[row, :keep]).abs().max().item()
            if not difference <= allowed:
                raise self.fail(f"a left-padded batch differs by {difference:.3g} from single sequences")
        self.result["padding_equal"] = True

    def cache(self, model: Any) -> None:
        """Greedy continuations with and without the key-value cache."""
        import torch

        prompt = self.ids[:1, : max(1, self.ids.shape[1] // 2)]
        room = (getattr(model.config, "max_position_embeddings", None) or 10**9) - prompt.shape[1]
        options = {
            "attention_mask": torch.ones_like(prompt),
            "do_sample": False,
            "max_new_tokens": min(NEW_TOKENS, room),
            "pad_token_id": model.config.pad_token_id or 0,
        }
        cached = model.generate(prompt, use_cache=True, **options)
        uncached = model.generate(prompt, use_cache=False, **options)
        if not torch.equal(cached, uncached):
            self.tie(model, cached, uncached)
        self.result["cached_equals_uncached"] = True

    def tie(self, model: Any, cached: Any, uncached: Any) -> None:
        """Two greedy continuations may part where two tokens are equally likely, and nowhere else."""
        from export.probe import logits_of

        length = min(cached.shape[1], uncached.shape[1])
        apart = (cached[0, :length] != uncached[0, :length]).nonzero()
        if len(apart):
            at = int(apart[0])
            logits = logits_of(model, uncached[:, :at])[0, -1]
            gap = (logits[uncached[0, at]] - logits[cached[0, at]]).abs().item()
            if gap <= self.slack(logits):
                return
        raise self.fail(f"greedy generation with the cache gives {cached.tolist()}, without it {uncached.tolist()}")

    def slack(self, logits: Any) -> float:
        """What equal computations in another order may differ by.

        Where activations are rounded, one that lies between two codes may fall to either side.
        """
        factor = 1000 if self.scheme and self.scheme.dynamic else 1
        return factor * TOLERANCE * logits.abs().max().item()

    def tokenizer(self) -> None:
        from export.probe import tokenizer_fault

        fault = tokenizer_fault(load_tokenizer(self.package), self.record["probe"])
        if fault is not None:
            raise self.fail(fault)
        self.result["tokenizer_equal"] = True

    def scores(self, model: Any, tasks: TaskFiles) -> None:
        """The report's scores, measured again on the same documents."""
        from evals.scoring.encoding import Encoder
        from evals.scoring.lm import NetworkLM
        from evals.scoring.scorer import Scorer
        from evals.scoring.tasks import TaskSet

        recorded = self.record["entry"]["tasks"]
        encoder = Encoder(load_tokenizer(self.package), model.config)
        include = [tasks.include_path] if tasks.include_path else []
        names = [f"{name}:{score['metric']}" for name, score in recorded.items()]
        task_set = TaskSet.load(names, encoder=encoder, include_path=include)
        for name, documents in self.record["lineage"].get("task_documents", {}).items():
            if task_set.fingerprint(name, recorded[name]["split"]) != documents:
                raise self.fail(f"the documents of task {name} at hand are not those that the report scored")
        splits = {score["split"] for score in recorded.values()}
        found = {split: Scorer(task_set, NetworkLM(model, encoder)).score(split) for split in splits}
        self.result["task_scores"] = {}
        for name, score in recorded.items():
            value = found[score["split"]][name].value
            # A document that is answered either way, and the rounding of a mean of many. A score that was computed on
            # an accelerator, or not in float32, is another computation: within its own standard error.
            allowed = max(1 / score["n"], 1e-4 * abs(score["value"]))
            if (self.record["entry"].get("speed") or {}).get("dtype", "float32") != "float32":
                allowed = max(allowed, score["stderr"] or 0)
            if not abs(value - score["value"]) <= allowed:
                raise self.fail(f"task {name} scores {value:.4f}, the report says {score['value']:.4f}")
            self.result["task_scores"][name] = value
        self.result["task_scores_equal"] = True

    def reload(self, saved: Path, logits: Any) -> None:
        """Saved by transformers and loaded again, quantized ones still quantized: the same logits."""
        from export.probe import logits_of

        if (read_json(saved / "config.json").get("quantization_config") is None) != (self.quantization is None):
            raise self.fail("saved again, its configuration says otherwise whether it is quantized")
        difference = (logits_of(self.load(saved), self.ids) - logits).abs().max().item()
        if not difference <= self.slack(logits):
            raise self.fail(f"saved and loaded again, its logits differ by {difference:.3g}")
        self.result["save_and_reload_equal"] = True


def _main(arguments: list[str]) -> int:
    jobs = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    found: dict[str, Any]
    try:
        tasks = None if jobs["tasks"] is None else TaskFiles(**jobs["tasks"])
        pairs = [(Path(package), Path(reference) if reference else None) for package, reference in jobs["packages"]]
        found = {"results": [check(*pair, tasks) for pair in pairs]}
    except VerificationError as error:
        found = {"error": str(error)}
    except RequestError as error:
        found = {"refused": str(error)}
    Path(arguments[1]).write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
