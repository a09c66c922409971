"""The command line. Every option lands in the recipe; every failure is one line.

Exit status: 0 done; 2 the request is wrong; 1 a fault of ours; 130 interrupted. Progress and messages go to stderr,
so that `--json` has stdout to itself.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.exceptions import Abort, Exit, TyperException

from export.quantization.schemes import SCHEMES
from supernet.common.errors import RequestError, VerificationError
from supernet.common.progress import console
from supernet.training.accelerator import is_main

if TYPE_CHECKING:
    from compressor.recipe import Recipe

INTERRUPTED = 130

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Turn a pre-trained checkpoint into smaller, quantized, proven ones.",
)

Model = Annotated[str, typer.Argument(help="a checkpoint: a folder or a hub name")]
RunDir = Annotated[Path, typer.Argument(help="a run directory made by compress or finetune", metavar="RUN")]
Data = Annotated[str | None, typer.Option(help="training text: .txt, .jsonl, .parquet, a folder, or a hub dataset")]
Tasks = Annotated[str | None, typer.Option(help="lm-eval tasks, comma-separated; T:METRIC names a task's metric")]
Output = Annotated[Path | None, typer.Option(help="the run directory")]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="a YAML recipe; options given here win over it")]
IncludePath = Annotated[str | None, typer.Option(help="folder of lm-eval task files")]
Space = Annotated[str | None, typer.Option(help="llama-nas, instatune, depth, uniform, fine, or a YAML file")]
Effort = Annotated[str | None, typer.Option(help="quick, standard or thorough: sets every budget")]
TrainTokens = Annotated[int | None, typer.Option(help="tokens for the one fine-tuning (0: none)")]
Evaluations = Annotated[int | None, typer.Option(help="sub-networks to measure in the search")]
HealTokens = Annotated[int | None, typer.Option(help="tokens to heal each chosen sub-network with (0: none)")]
Workers = Annotated[int | None, typer.Option(help="processes that measure sub-networks side by side")]
WarmStart = Annotated[
    str | None,
    typer.Option(help="what the search starts from: earlier runs, greedy, blockwise, superposition, comma-separated"),
]
Limit = Annotated[int | None, typer.Option(help="documents per task in the search")]
MaxParams = Annotated[str | None, typer.Option(help="0.67, 67%, 450M, or several with commas")]
MaxBytes = Annotated[str | None, typer.Option(help="of the smallest requested variant's weights, for example 2GiB")]
MinSpeedup = Annotated[float | None, typer.Option(help="decode tokens per second against the base")]
MaxDrop = Annotated[str | None, typer.Option(help="largest loss of quality, for example 1%")]
Quantize = Annotated[str | None, typer.Option(help=f"{', '.join(SCHEMES)}; comma-separated")]
GroupSize = Annotated[int | None, typer.Option(help="int4's group size; unset: the largest that divides all widths")]
Formats = Annotated[
    str | None,
    typer.Option("--format", help="uneven, uniform, padded, gguf (f16; or gguf-q8_0, gguf-q4_0, …), onnx, openvino"),
]
Seed = Annotated[int | None, typer.Option(help="the seed of everything random")]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda")]
Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16: what is computed in")]
Revision = Annotated[str | None, typer.Option(help="the hub revision of the model")]
Trust = Annotated[bool | None, typer.Option("--trust-remote-code", help="run code that the checkpoint brings")]
Json = Annotated[bool, typer.Option("--json", help="machine-readable result on stdout")]
Redo = Annotated[str | None, typer.Option(help="a stage to do again, although that throws measured work away")]


def overrides(**given: Any) -> dict[str, Any]:
    """Options by their dotted names in the recipe."""
    names = {
        "train_tokens": "finetuning.tokens",
        "evaluations": "searching.evaluations",
        "limit": "searching.limit",
        "warm_start": "searching.warm_start",
        "workers": "searching.workers",
        "heal_tokens": "healing.tokens",
        "max_params": "targets.max_params",
        "max_bytes": "targets.max_bytes",
        "min_speedup": "targets.min_speedup",
        "max_drop": "targets.max_drop",
        "quantize": "quantizing.schemes",
        "group_size": "quantizing.group_size",
    }
    return {names.get(name, name): value for name, value in given.items()}


def recipe_of(file: Path | None, options: dict[str, Any]) -> Recipe:
    """The recipe that the options ask for."""
    from compressor.recipe import read_recipe

    recipe = read_recipe(file, overrides(**options))
    offline_if_local(recipe)
    return recipe


def offline_if_local(recipe: Recipe) -> None:
    """Ask no network where everything that the recipe names lies on this machine: a look-up on the hub can hang for
    minutes behind a firewall."""
    local = Path(recipe.model).expanduser().is_dir() and recipe.data is not None and Path(recipe.data).exists()
    if local and tasks_are_local(recipe.tasks, recipe.include_path):
        stay_offline()


def look_at(run: Path) -> None:
    """Before a stage command imports anything: is this a run that needs the network?"""
    from compressor.recipe import read_recipe

    if (run / "recipe.yaml").is_file():
        offline_if_local(read_recipe(run / "recipe.yaml", {}))


def tasks_are_local(tasks: list[str], include_path: str | None) -> bool:
    """Whether every task is a file of `include_path`, and none of those files wants data from the hub."""
    if include_path is None:
        return not tasks
    text = "\n".join(file.read_text() for file in Path(include_path).rglob("*.yaml"))
    if set(re.findall(r"^dataset_path: *[\"']?([^\s\"']+)", text, re.M)) - {"json", "csv", "parquet", "text", "arrow"}:
        return False
    return all(re.search(rf"^(task|group): *{re.escape(name.partition(':')[0])} *$", text, re.M) for name in tasks)


def stay_offline() -> None:
    """Before any Hugging Face library is imported."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")


def emit(value: Any, as_json: bool) -> None:
    if as_json and is_main():
        print(json.dumps(value, indent=1))


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="the run directory")] = Path("runs/demo"), json: Json = False
) -> None:
    """The whole job on a bundled checkpoint: about three minutes."""
    stay_offline()
    from compressor import pipeline

    emit(pipeline.demo(output), json)


@app.command()
def inspect(
    model: Model,
    space: Space = None,
    effort: Effort = None,
    recipe: RecipeFile = None,
    revision: Revision = None,
    trust_remote_code: Trust = None,
    json: Json = False,
) -> None:
    """What a checkpoint holds, what may be cut, what it would cost.

    Trains nothing.
    """
    from compressor import pipeline
    from compressor.recipe import read_recipe

    given = overrides(model=model, space=space, effort=effort, revision=revision, trust_remote_code=trust_remote_code)
    emit(pipeline.inspect(read_recipe(recipe, given), quiet=json), json)


@app.command()
def compress(
    model: Annotated[str | None, typer.Argument(help="a checkpoint: a folder or a hub name")] = None,
    data: Data = None,
    tasks: Tasks = None,
    output: Output = None,
    recipe: RecipeFile = None,
    include_path: IncludePath = None,
    space: Space = None,
    effort: Effort = None,
    train_tokens: TrainTokens = None,
    evaluations: Evaluations = None,
    heal_tokens: HealTokens = None,
    limit: Limit = None,
    warm_start: WarmStart = None,
    workers: Workers = None,
    max_params: MaxParams = None,
    max_bytes: MaxBytes = None,
    min_speedup: MinSpeedup = None,
    max_drop: MaxDrop = None,
    quantize: Quantize = None,
    group_size: GroupSize = None,
    formats: Formats = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
    trust_remote_code: Trust = None,
    redo: Redo = None,
    json: Json = False,
) -> None:
    """Fine-tune once, search, slice, heal, quantize, prove, report.

    The whole job. Stopped and run again, it resumes.
    """
    options = {k: v for k, v in locals().items() if k not in ("output", "recipe", "redo", "json")}
    asked = recipe_of(recipe, options)
    from compressor import pipeline

    emit(pipeline.compress(asked, needed(output), redo=redo), json)


@app.command()
def finetune(
    model: Annotated[str | None, typer.Argument(help="a checkpoint: a folder or a hub name")] = None,
    data: Data = None,
    tasks: Tasks = None,
    output: Output = None,
    recipe: RecipeFile = None,
    include_path: IncludePath = None,
    space: Space = None,
    effort: Effort = None,
    train_tokens: TrainTokens = None,
    max_params: MaxParams = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
    trust_remote_code: Trust = None,
    redo: Redo = None,
    json: Json = False,
) -> None:
    """Create a run and fine-tune its super-network."""
    options = {k: v for k, v in locals().items() if k not in ("output", "recipe", "redo", "json")}
    asked = recipe_of(recipe, options)
    from compressor import pipeline

    job = pipeline.start(asked, needed(output), redo=redo, tasks_needed=False)
    emit(pipeline.finetune(job), json)


@app.command()
def search(
    run: RunDir,
    tasks: Tasks = None,
    include_path: IncludePath = None,
    evaluations: Evaluations = None,
    limit: Limit = None,
    max_params: MaxParams = None,
    warm_start: WarmStart = None,
    workers: Workers = None,
    redo: Redo = None,
    json: Json = False,
) -> None:
    """Search a fine-tuned run.

    Measured sub-networks are kept and never measured twice.
    """
    given = overrides(**{k: v for k, v in locals().items() if k not in ("run", "redo", "json")})
    look_at(run)
    from compressor import pipeline

    emit(pipeline.search(pipeline.resume(run, given, redo=redo, replace_targets=max_params is not None)), json)


@app.command()
def pick(
    run: RunDir,
    max_params: MaxParams = None,
    max_bytes: MaxBytes = None,
    min_speedup: MinSpeedup = None,
    max_drop: MaxDrop = None,
    json: Json = False,
) -> None:
    """Choose from what was measured, for new targets."""
    look_at(run)
    from compressor import pipeline

    given = overrides(max_params=max_params, max_bytes=max_bytes, min_speedup=min_speedup, max_drop=max_drop)
    emit(pipeline.pick(pipeline.resume(run, given, replace_targets=True)), json)


@app.command()
def export(
    run: RunDir,
    quantize: Quantize = None,
    group_size: GroupSize = None,
    formats: Formats = None,
    heal_tokens: HealTokens = None,
    json: Json = False,
) -> None:
    """Slice, heal, quantize, package and prove what was picked."""
    look_at(run)
    from compressor import pipeline

    given = overrides(quantize=quantize, group_size=group_size, formats=formats, heal_tokens=heal_tokens)
    emit(pipeline.export(pipeline.resume(run, given)), json)


@app.command()
def compare(
    run: RunDir,
    baselines: Annotated[
        str | None, typer.Option(help="methods to compare with, comma-separated; all by default")
    ] = None,
    max_params: Annotated[
        str | None, typer.Option(help="sizes, as in compress; the run's own picks by default")
    ] = None,
    seeds: Annotated[int, typer.Option(help="how often each method is drawn and healed")] = 1,
    others: Annotated[
        list[str] | None, typer.Option("--with", help="a checkpoint compressed elsewhere: a folder or a hub name")
    ] = None,
    json: Json = False,
) -> None:
    """Put the result beside pruning baselines.

    Same base, text, tokens, tasks, documents and size for all.
    """
    look_at(run)
    from compressor import pipeline

    rows = pipeline.compare(
        pipeline.resume(run, {}),
        baselines=_several(baselines),
        sizes=_several(max_params),
        seeds=seeds,
        others=others or [],
    )
    emit(rows, json)


def _several(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


@app.command()
def report(run: RunDir, json: Json = False) -> None:
    """Write report.json and report.html from what the run holds."""
    look_at(run)
    from compressor import pipeline

    emit(pipeline.report(pipeline.resume(run, {})), json)


@app.command()
def evaluate(
    path_or_repo: Annotated[str, typer.Argument(help="any checkpoint: a folder or a hub name")],
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, comma-separated")],
    output: Annotated[Path | None, typer.Option(help="where to write the results, in lm-eval's format")] = None,
    include_path: IncludePath = None,
    limit: Annotated[int | None, typer.Option(help="documents per task")] = None,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
    trust_remote_code: Trust = None,
    json: Json = False,
) -> None:
    """Score any checkpoint on lm-eval tasks.

    Ours or not, quantized or not, with the code that the search uses.
    """
    from compressor import pipeline

    results = pipeline.evaluate(
        path_or_repo,
        tasks,
        output=output,
        include_path=include_path,
        limit=limit,
        device=device or "auto",
        dtype=dtype or "auto",
        revision=revision,
        trust_remote_code=bool(trust_remote_code),
        quiet=json,
    )
    emit(results, json)


@app.command()
def verify(
    package: Annotated[Path, typer.Argument(help="a package folder")],
    scores: Annotated[bool, typer.Option("--scores", help="measure the reported task scores again, too")] = False,
    include_path: IncludePath = None,
    json: Json = False,
) -> None:
    """Check again, in a fresh process, what a package claims."""
    from compressor import pipeline

    emit(pipeline.verify(package, scores=scores, include_path=include_path, quiet=json), json)


@app.command()
def push(
    package: Annotated[Path, typer.Argument(help="a verified package folder")],
    repo_id: Annotated[str, typer.Argument(help="owner/name on the hub")],
    private: Annotated[bool, typer.Option("--private", help="make the repository private")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be uploaded")] = False,
    json: Json = False,
) -> None:
    """Upload a verified package to the hub."""
    from compressor import pipeline

    emit(pipeline.push(package, repo_id, private=private, dry_run=dry_run), json)


def needed(output: Path | None) -> Path:
    if output is None:
        raise RequestError("--output is missing; name the folder that will hold the run")
    return output


def main() -> None:
    """The entry point: run a command and turn whatever goes wrong into one line and an exit status."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    _quiet_libraries()
    try:
        status = app(arguments or ["--help"], standalone_mode=False)
        if status != INTERRUPTED:  # what typer makes of Ctrl-C
            return status if isinstance(status, int) else 0
    except RequestError as error:
        return _fail(2, str(error))
    except VerificationError as error:
        return _fail(1, str(error))
    except TyperException as error:
        return _fail(2, error.format_message())
    except Exit as error:
        return error.exit_code
    except (KeyboardInterrupt, Abort):
        pass
    except Exception as error:
        return _explain(error)
    return _fail(INTERRUPTED, "interrupted; what was done is kept: run the same command again to resume")


def _explain(error: Exception) -> int:
    """Conditions of the machine are the user's to mend (2); anything else is ours (1)."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return _fail(2, f"no disk space left ({error.filename or 'while writing'}); free some and run again to resume")
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return _fail(2, f"{error.filename}: {(error.strerror or 'not allowed').lower()}")
    log = Path("compressor-error.log")
    log.write_text(traceback.format_exc())
    reason = (str(error).strip().splitlines() or [""])[0]
    return _fail(1, f"a fault of ours: {type(error).__name__}: {reason} (the traceback is in {log})")


def _fail(status: int, line: str) -> int:
    console.print(f"error: {' '.join(line.split())}", markup=False, soft_wrap=True, style="red")
    return status


def _quiet_libraries() -> None:
    """Keep libraries' chatter off the terminal and idle threads from spinning. Before they are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    # Threads that spin while they wait slow a second process on the same cores down many times.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for name in ("torchao", "torch.utils._pytree", "datasets", "lm_eval", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
