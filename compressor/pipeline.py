"""The whole job: the stages of a run in order, each resumed where it was done before."""

from __future__ import annotations

import functools
import shlex
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import torch

from compressor import demo as bundled
from compressor.checks import (
    check,
    check_bits,
    check_budgets,
    check_formats,
    check_group_size,
    check_targets,
    check_tasks,
    check_weights_by_size,
    say_what_is_repeated,
)
from compressor.costs import stage_costs
from compressor.early_checks import check_request
from compressor.inputs import text_fingerprint
from compressor.job import Job
from compressor.local_paths import remembered
from compressor.plan import Plan, adjust, make_plan, open_budgets, print_plan, read_plan, write_plan
from compressor.quiet import quiet_libraries
from compressor.recipe import Recipe
from compressor.recipe_file import read_recipe
from compressor.run import Run
from compressor.sizing import keep_smallest_share
from compressor.stages import comparing, control, exporting, finetuning, picking, searching
from compressor.stages.finetuning import check_same_base, check_unchanged
from compressor.stages.healing import blocks_to_heal_on, heal_picks
from compressor.stages.layer_timings import check_speedup
from compressor.stages.picking import NothingAlikeError
from compressor.stages.picks import PickRecord, is_uniform, read_picks
from compressor.stages.reporting import report
from compressor.stages.search_parts import further_search, named_in
from compressor.stages.searching import check_searching
from compressor.stages.subnet_scores import check_base
from compressor.stages.trimming import keep_base, scratch_folder, trim
from compressor.trackers import open_trackers
from export.package_record import PackageEntry
from export.report.schema import Comparison, Report
from supernet.common.errors import RequestError
from supernet.common.formatting import duration, shell_word
from supernet.common.metrics import send_to
from supernet.common.progress import counting_down, keep_lines, log_line, say, working
from supernet.common.versions import versions
from supernet.training.accelerator import processes

P = ParamSpec("P")
Result = TypeVar("Result")


@contextmanager
def explained_oom(job: Job, healing: bool = False) -> Iterator[None]:
    """Within, a lack of memory says which batch sizes to try, and with what command."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch on a CPU raises a plain RuntimeError; other RuntimeErrors are no lack of memory.
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        smaller = f"--set batch_tokens={max(64, job.batch_tokens // 2)}"
        rows = f" --set finetuning.batch_size={max(1, (job.recipe.finetuning.batch_size or 2) // 2)}"
        again = f"run again with {smaller}"
        if job.run.manifest(job.run.supernet) is None:  # what is trained depends on its batch, once it is
            again += rows
        elif healing:
            again = f"run compressor export {shell_word(job.run.path)} {smaller}{rows}"
        raise RequestError(f"out of memory; {again}; what was done is kept") from error


def explain_oom(
    stage: Callable[Concatenate[Job, P], Result], healing: bool = False
) -> Callable[Concatenate[Job, P], Result]:
    """A stage that, out of memory, says which batch sizes to try."""

    @functools.wraps(stage)
    def run(job: Job, *args: P.args, **kwargs: P.kwargs) -> Result:
        with explained_oom(job, healing), working("reading"):  # what is not part of a stage with a name of its own
            return stage(job, *args, **kwargs)

    return run


finetune = explain_oom(finetuning.finetune)
search = explain_oom(searching.search)
score_base = explain_oom(check_base)
measure_control = explain_oom(control.measure_control)
pick = explain_oom(picking.pick)


def _export(job: Job) -> list[PackageEntry]:
    """Heal every pick, then package, prove and score them: what rounding may cost is planned in between."""
    blocks = blocks_to_heal_on(job)
    healed = heal_picks(job, blocks)
    keep_time(job)
    return exporting.export(job, healed, blocks)


export = explain_oom(_export, healing=True)
check_proved = exporting.check_proved


REDONE_FROM = {"finetune": "ordering", "search": "search", "export": "quantizing"}
"""The first stage that is done again, by what `--redo` names."""


def start(recipe: Recipe, output: Path, *, redo: str | None = None, tasks_needed: bool = True) -> Job:
    """Check everything that can be checked before work begins, then create or continue the run at `output`.

    Raises `RequestError` without leaving anything behind where the request is wrong.
    """
    with scratch_folder(recipe, output) as scratch:
        job, plan = prepare(recipe, output, scratch, redo=redo, tasks_needed=tasks_needed)
        job.run = Run.create(output, job.given, provenance(job), job.paths)
        keep_base(job)
    if plan is not None:
        write_plan(job, plan)
    if recipe.tasks and job.run.writes:
        job.tasks.keep(job.run.requests)
    keep_records(job)
    job.run.log(f"started: {recipe.model}")
    return job


def keep_records(job: Job) -> None:
    """From here on, what is said goes to the run's log.txt too, and every number to its metrics.jsonl and trackers."""
    if job.run.writes:
        keep_lines(job.run.log)
        send_to(job.run.keep_metric, *(open_trackers(job.recipe, job.accelerator) if job.recipe.report_to else ()))


def prepare(
    asked: Recipe, output: Path, scratch: Path, *, redo: str | None = None, tasks_needed: bool = True, keep: bool = True
) -> tuple[Job, Plan | None]:
    """The job at `output`, checked, and its plan where the whole job is asked for or its budgets follow from a time.

    Where there is no run yet nothing is made: a base whose vocabulary is cut lies in the empty folder `scratch` then.
    In one that is there, `keep` says whether the time that this takes is counted. Raises `RequestError`.
    """
    recipe, run = asked.resolved(), Run(output)
    paths = run.local_paths() | remembered(recipe, output)  # what lies here wins over what lay elsewhere
    job = Job(run, recipe, redo, paths=paths)
    if not keep:
        job.schedule.file = None
    if tasks_needed and not recipe.tasks:
        raise RequestError("--tasks is missing; name at least one lm-eval task to search for")
    run.check_free()
    if run.recipe_file.is_file():
        run.lock()
    run.settle()
    check_request(job.recipe, redo)
    with job.schedule.stage("preparing"):
        trim(job, scratch)
        check(job)
        if redo is not None:
            job.schedule.redo(REDONE_FROM[redo])
        plan: Plan | None = None
        if open_budgets(asked) and (not recipe.tasks or processes() > 1):
            raise RequestError("time: plans the whole job in one process; name the tasks too, or set the budgets")
        if tasks_needed or open_budgets(asked):
            with explained_oom(job):
                plan = make_plan(job, asked)
        job.fill_in()
        if recipe.time is not None:  # which set them
            check_budgets(job)
            say_what_is_repeated(job)
        keep_smallest_share(job)
        check_unchanged(job)
        if recipe.tasks:
            check_searching(job)
        check_speedup(job)
    return job, plan


@contextmanager
def job_ends(output: Path) -> Iterator[None]:
    """Within, a job works in the run at `output`, which may keep what is said and measured. What comes afterwards is
    not its, and others may work in the run then. An error is its last line."""
    try:
        yield
    except BaseException as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        with suppress(OSError):  # a full disk, perhaps: the first cause is what the user needs to see
            log_line("interrupted" if isinstance(error, KeyboardInterrupt) else f"error: {reason}")
        raise
    finally:
        keep_lines()
        send_to()
        Run(output).unlock()


def check_alone() -> None:
    """Only the fine-tuning is for several processes."""
    if processes() > 1:
        raise RequestError(
            "several processes only fine-tune: run torchrun with compressor finetune, then go on in one process"
        )


@quiet_libraries()
def compress(recipe: Recipe, output: Path | str, *, redo: str | None = None) -> Report:
    """The whole job; returns its report, also where a package was refused: `check_proved` raises."""
    check_alone()
    with job_ends(Path(output)):
        job = start(recipe, Path(output), redo=redo)
        show_plan(job)
        with counting_down(job.schedule.left):
            with job.schedule.stage("preparing"):
                score_base(job)
            finetune(job)
            keep_time(job)
            search(job)
            pick(job)
            keep_time(job)
            export(job)
            result = report(job)
        if recipe.time is not None:
            say(f"took {duration(job.schedule.elapsed)} of the {recipe.time} that were named")
    return result


def show_plan(job: Job) -> None:
    """Print what is left to do of a planned job, stage by stage with minutes, memory and disk."""
    plan = read_plan(job.run.plan_file)
    assert plan is not None
    if left := [cost for cost in stage_costs(job, plan.rates) if not job.schedule.over(cost.name)]:
        print_plan(left, str(job.device))


@quiet_libraries()
def plan(recipe: Recipe, output: Path | None = None) -> dict[str, object]:
    """What `compress` would do, measured for some seconds and printed; nothing is written. Returns its stages."""
    check_alone()
    with tempfile.TemporaryDirectory(prefix="compressor-plan-") as nowhere:
        base = Path(nowhere) / "base"
        base.mkdir()
        job, made = prepare(recipe, output or Path(nowhere) / "run", base, keep=False)
        assert made is not None
        shown = print_plan(stage_costs(job, made.rates), str(job.device))
    return {"time": recipe.time, "rates": made.rates.model_dump(), "budgets": made.budgets, **shown}


def keep_time(job: Job) -> None:
    """After a stage: choose the budgets that are still open by the time that is left, and put them into recipe.yaml."""
    if adjust(job):
        job.run.remember(job.given, provenance(job), {})


BEFORE_THE_SEARCH = ("model", "revision", "data", "text_key", "space", "vocabulary", "finetuning", "seed")
"""Sections and keys of a recipe that the super-network depends on."""
ALSO_OF_HEALING = {
    f"finetuning.{key}" for key in ("batch_size", "gradient_accumulation", "gradient_checkpointing", "optimizer")
}
"""Keys among them that healing reads too, which may be changed for it."""


def resume(
    path: Path,
    given: Mapping[str, object],
    *,
    redo: str | None = None,
    replace_targets: bool = False,
    add: bool = False,
    keep: bool = True,
) -> Job:
    """An existing run, with the options of a stage command put into its recipe; `add`: formats and quantizations behind
    those that the run has. Without `keep` its recipe.yaml stays until `remember`."""
    check_alone()
    run = Run.open(path)
    overrides = {name: value for name, value in given.items() if value is not None}
    if add:
        overrides = added(run.recipe(), overrides)
    recipe = read_recipe(run.recipe_file, overrides, new_targets=replace_targets and bool(overrides)).resolved()
    here = remembered(recipe, path)  # of what is given now; the rest lies where the run knows it
    paths = here | run.local_paths() | {name: place for name, place in here.items() if is_given(name, overrides)}
    job = Job(run, recipe, redo, paths=paths)
    if redo != "finetune":
        check_same_base(job)
    check_targets(job)
    if overrides:  # whatever is wrong with them must not get into the run's recipe
        check_weights_by_size(job)
        check_bits(job)
        check_formats(job)
        check_group_size(job)
        if recipe.tasks:
            check_tasks(job)
            check_searching(job)
        if any(name.partition(".")[0] in BEFORE_THE_SEARCH and name not in ALSO_OF_HEALING for name in overrides):
            if redo == "finetune":
                raise RequestError("--redo finetune: run compressor finetune or compress, which fine-tune")
            check_unchanged(job)
        if keep:
            remember(job)
    if redo is not None:
        job.schedule.redo(REDONE_FROM[redo])
    keep_records(job)
    return job


def remember(job: Job) -> None:
    """Put the options that a run was resumed with into its recipe.yaml."""
    job.run.remember(job.given, provenance(job), job.paths)


def added(recipe: Recipe, overrides: Mapping[str, object]) -> dict[str, object]:
    """The options, with what the recipe has of formats and quantizations before what they name."""
    before: dict[str, list[str]] = {"formats": [*recipe.formats], "quantizing.schemes": [*recipe.quantizing.schemes]}
    more = {key: names for key, names in before.items() if key in overrides}
    for key, names in more.items():
        given = overrides[key]
        if isinstance(given, str):
            more[key] = list(dict.fromkeys([*names, *(part.strip() for part in given.split(",") if part.strip())]))
        elif isinstance(given, Iterable):
            more[key] = list(dict.fromkeys([*names, *given]))
    return {**overrides, **more}


def resume_search(path: Path, given: Mapping[str, object], *, redo: str | None = None) -> Job:
    """A run for `compressor search`. Of a run that was searched, another size or a further budget is searched from
    what was measured: `--evaluations` are then so many more."""
    further = further_search(Run(path), given) if redo is None else {}
    targets = names_targets(given)
    if targets:
        further |= {"key": ""}  # what was picked by its key is forgotten where targets are named
    return resume(path, {**given, **further}, redo=redo, replace_targets=targets)


def resume_pick(path: Path, given: Mapping[str, object]) -> tuple[Job, list[PickRecord]]:
    """A run for `compressor pick`, and what that picks. What the search looked for stays as it is; the options get into
    the run's recipe once something was picked by them."""
    run = Run(path)
    if given:
        given = {"key": "", **given}
    if targets := names_targets(given):
        run.check_exists()
        given = {**given, "searching.targets": named_in(run.recipe().resolved().searched_for.model_dump())}
    job = resume(path, given, replace_targets=targets, keep=False)
    picks = pick(job)
    if given:
        remember(job)
    return job, picks


def resume_export(path: Path, given: Mapping[str, object]) -> Job:
    """A run for `compressor export`. A format that wants layers that are alike is picked for first, where that was not
    done. Raises `RequestError` for options that are another command's."""
    if others := [name for name in given if names_targets([name]) or name in ("key", "prefer")]:
        raise RequestError(
            f"{others[0]}: what was picked is exported; run compressor pick {shlex.quote(str(path))} first"
        )
    job = resume(path, given, add=True, keep=False)
    picks, asked = read_picks(job), is_given("uniform", {"formats": given.get("formats")})
    if "uniform" in job.recipe.formats and not has_uniform(picks):
        try:
            if not has_uniform(pick(job, picks)) and asked:
                raise RequestError(
                    f"--format uniform holds only networks whose layers are alike, and those of {job.recipe.key} "
                    "differ; pick another, or export --format uneven"
                )
        except NothingAlikeError as error:  # of a format that the run was made with, the others are exported
            if asked:
                raise
            say(f"warning: {error}")
    if given:
        remember(job)
    return job


def has_uniform(picks: Iterable[PickRecord]) -> bool:
    """Whether one of the picks is for layouts that want layers that are alike."""
    return any(is_uniform(row["name"]) for row in picks)


def names_targets(names: Iterable[str]) -> bool:
    """Whether a target is among the options."""
    return any(name.startswith("targets.") for name in names)


def is_given(name: str, overrides: Mapping[str, object]) -> bool:
    """Whether one of the options is this name, or a list that holds it."""
    return any(name == value or (isinstance(value, str) and name in value.split(",")) for value in overrides.values())


def provenance(job: Job) -> dict[str, object]:
    """What a reader of recipe.yaml may want to know: versions, and fingerprints of model and data."""
    data = text_fingerprint(job, job.recipe.finetuning.tokens or 0)
    return {"versions": versions(), "model": job.untouched_fingerprint, "data": data}


def compare(
    job: Job, *, baselines: Sequence[str], sizes: Sequence[str], seeds: int, others: Sequence[str]
) -> list[Comparison]:
    """Put ours beside pruning baselines; returns the report's rows, and writes the report anew where there is one."""
    rows = explain_oom(comparing.compare)(job, baselines=baselines, sizes=sizes, seeds=seeds, others=others)
    if job.run.report.is_file():
        report(job)
    return rows


def demo(output: Path) -> Report:
    """The whole job on the bundled checkpoint, offline; its training text is generated into the run."""
    run = Run(output)
    run.check_free()
    output.mkdir(parents=True, exist_ok=True)
    bundled.training_text(run.demo_text, n_documents=6000, seed=1)
    given = {"model": str(bundled.MODEL), "include_path": str(bundled.TASKS), "data": str(run.demo_text)}
    return compress(read_recipe(bundled.RECIPE, given), output)
