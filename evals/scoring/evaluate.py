"""Score any checkpoint, ours or not, quantized or not, and give lm-eval's result format."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_eval
import torch
import transformers
from lm_eval.evaluator_utils import _collect_results, aggregate_groups
from lm_eval.utils import handle_non_serializable

from evals.scoring.documents import Prompting
from evals.scoring.encoding import Encoder
from evals.scoring.lm import NetworkLM
from evals.scoring.scorer import BOOTSTRAP_ITERATIONS, Answers, RawMetrics, Scorer, aggregated, raw_metrics
from evals.scoring.tasks import Subtask, TaskSet
from supernet.common.errors import RequestError, VerificationError, reading
from supernet.common.processes import available_cores
from supernet.common.progress import say
from supernet.device import prepare
from supernet.loading import check_fit, checkpoint_folder, load_network, unpack
from supernet.tokens import read_tokenizer
from supernet.trust import brings_code, check_code, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def evaluate(
    path_or_model: str | Path | PreTrainedModel,
    tasks: Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    include_path: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    prompting: Prompting = Prompting(),  # noqa: B008 - immutable
    max_length: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Scores of a checkpoint by path or hub name, or of a model in memory with its `tokenizer`, on whole tasks.

    All documents count (`limit`: so many of each task), few-shot examples are lm-eval's own; so the numbers compare
    with other people's. Returns lm-eval's results (`results`, `groups`, `configs`, `versions`, `n-shot`,
    `higher_is_better`, `n-samples`, `config`), and in `scores` each task's chosen metric with its value, standard
    error, number of documents and chance level. Raises RequestError for a request that cannot be met.
    """
    # 1. The network and its tasks.
    began = time.time()
    if isinstance(path_or_model, (str, Path)):
        name = str(path_or_model)
        model, tokenizer = load_checkpoint(name, device, dtype, revision, trust_remote_code)
    else:
        model, name = path_or_model, str(getattr(path_or_model.config, "_name_or_path", "")) or "model"
        if tokenizer is None:
            raise ValueError("a model in memory needs its tokenizer")
    encoder = Encoder(tokenizer, model.config, max_length)
    task_set = TaskSet.load(
        tasks,
        encoder=encoder,
        include_path=[include_path] if include_path else [],
        num_fewshot=num_fewshot,
        prompting=prompting,
        holdout=False,
    )

    # 2. Its answers to all requests.
    lm = NetworkLM(model.eval(), encoder)
    lm.tune(task_set.requests("all", limit).spans, available_cores())
    scorer = Scorer(task_set, lm)
    answers = scorer.ask("all", limit)
    check_numbers(name, answers)

    # 3. lm-eval's results and our scores from them.
    source = {"pretrained": name, "revision": revision or "main", "trust_remote_code": trust_remote_code}
    return _harness_results(task_set, limit, answers) | {
        "config": {"model": "hf", "model_args": source, **_settings(lm, limit, prompting)},
        "scores": {
            task: score.model_dump(exclude={"split"}) | {"near_chance": score.near_chance}
            for task, score in scorer.scores("all", limit, answers).items()
        },
        "date": began,
        "total_evaluation_time_seconds": time.time() - began,
        "lm_eval_version": lm_eval.__version__,
        "transformers_version": transformers.__version__,
        "torch_version": torch.__version__,
    }


def check_numbers(name: str, answers: Answers) -> None:
    """Raise `RequestError` where log-probabilities are no numbers: as scores they would be wrong answers."""
    for responses in answers.values():
        for response in responses:
            said = response[0] if isinstance(response, tuple) else response
            if isinstance(said, float) and math.isnan(said):
                raise RequestError(f"{name}: its log-probabilities are no numbers; a wider --dtype may give some")


def _harness_results(task_set: TaskSet, limit: int | None, answers: Answers) -> dict[str, Any]:
    """What lm-eval 0.4.13 reports of the answers: every metric of every task and group, with standard errors."""
    collected: dict[str, dict[str, Any]] = {}
    ours: dict[str, dict[str, float]] = {}  # values and standard errors beside lm-eval's, by subtask
    for subtasks in task_set.requests("all", limit).documents.values():
        for subtask, documents in subtasks:
            if documents:
                metrics = raw_metrics(subtask, documents, answers)
                sound, ours[subtask.name] = _aggregates(subtask, metrics)
                collected[subtask.name] = {"task": subtask.task, "raw_metrics": sound, "logged_samples": []}
    accumulated = _collect_results(collected, task_set.groups, bootstrap_iters=0)
    for name, values in ours.items():
        accumulated.metrics[name].update(values)
    results = aggregate_groups(accumulated)._to_eval_results()
    # As lm-eval's own files hold them: a task's functions, as of its few-shot examples, by their text.
    return dict(json.loads(json.dumps(results, default=handle_non_serializable)))


def _aggregates(subtask: Subtask, metrics: RawMetrics) -> tuple[RawMetrics, dict[str, float]]:
    """The metrics that lm-eval can aggregate, and what it does not state: standard errors, and infinity where its
    perplexities overflow. One that the task's own aggregation fails on is left out, and said."""
    sound, beside = dict(metrics), dict[str, float]()
    for (metric, filter_name), items in metrics.items():
        try:
            value, error = aggregated(subtask, metric, items, everywhere=False)
        except RequestError as reason:
            say(f"warning: {reason}; left out")
            del sound[metric, filter_name]
            continue
        if error is not None:
            beside[f"{metric}_stderr,{filter_name}"] = error
        if math.isinf(value):
            del sound[metric, filter_name]
            beside[f"{metric},{filter_name}"] = value
    return sound, beside


def _settings(lm: NetworkLM, limit: int | None, prompting: Prompting) -> dict[str, object]:
    """What was scored and how, under lm-eval's names."""
    parameter = next(lm.model.parameters())
    return {
        "model_num_parameters": sum(p.numel() for p in lm.model.parameters()),
        "model_dtype": str(parameter.dtype),
        "device": str(parameter.device),
        "limit": limit,
        "max_length": lm.max_length,
        "bootstrap_iters": BOOTSTRAP_ITERATIONS,
        "chat_template": prompting.chat,
        "system_instruction": prompting.system,
        "fewshot_as_multiturn": prompting.multiturn,
    }


def load_checkpoint(
    name: str, device: str, dtype: str, revision: str | None, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder or a hub repository.

    Code files are run only if they are exactly what this version writes, or with `trust_remote_code`. Raises
    RequestError for a checkpoint that cannot be had, loaded or trusted, and for a GPU that is not there.
    """
    folder = checkpoint_folder(name, revision)
    trusted = trust_remote_code or _is_own_code(name, folder)
    if device == "cuda" and not torch.cuda.is_available():
        raise RequestError("--device cuda: torch sees no GPU here; use --device cpu or install a GPU build of torch")
    place = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if dtype == "auto" and place.type == "cpu":
        dtype = "float32"  # as everywhere in this tool: half precision is slow on most CPUs, and less exact
    if not (folder / "config.json").is_file() and any(folder.glob("*.gguf")):
        raise RequestError(
            f"{name}: a file of llama.cpp, which transformers does not load; evaluate what it was made of"
        )
    try:
        with reading(f"{name}: cannot be loaded as a causal language model"):
            tokenizer = read_tokenizer(folder, trust_remote_code=True) if trust_remote_code else load_tokenizer(folder)
            model, info = load_network(folder, dtype, trusted)
    except VerificationError as error:  # here a folder is the user's, whoever wrote it
        raise RequestError(str(error)) from error
    check_fit(name, info)
    for weight, parameter in model.named_parameters():
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            raise RequestError(f"{name}: the weight {weight} has NaN or infinite values; fetch it again")
    prepare(place)
    model = model.to(place).eval()
    unpack(model)
    return model, tokenizer


def _is_own_code(name: str, folder: Path) -> bool:
    """Whether the folder brings code, all of it written by this version. Raises RequestError for other code."""
    if not brings_code(folder):
        return False
    try:
        return check_code(folder)
    except VerificationError as error:
        raise RequestError(f"{name}: contains code ({error}); say --trust-remote-code if you trust it") from error
