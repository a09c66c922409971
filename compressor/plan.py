"""What a run will cost, shown before it begins; and budgets that make it end by the time that the user named.

`RUN/plan.json` keeps the rates that were measured and the budgets that were chosen, so that a run that goes on keeps
them. After a stage, the budgets of those that have not begun are chosen anew from the time that is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TypedDict

from rich import box
from rich.table import Table

from compressor.costs import StageCost, stage_costs
from compressor.job import Job
from compressor.memory_needs import without_room
from compressor.rates import Rates, measure_rates, tunes
from compressor.recipe import BUDGETS, OPEN, Recipe
from export.models import Model
from supernet.common.errors import RequestError, reading
from supernet.common.files import read_json, write_json
from supernet.common.formatting import duration, parse_duration, size
from supernet.common.progress import console, say
from supernet.device import device_name

RESERVE = 0.04
"""Share of the time that is not planned for: machines slow down."""
SEARCH_SHARE, ROUNDING_SHARE, CALIBRATION_SHARE = 0.25, 0.1, 0.1
"""Shares of the time beyond what every run needs, for the search, for tuning the rounding and for the text that cut
projections are refitted to; training has the rest."""
FEWEST = {
    "train_tokens": 0,
    "heal_tokens": 0,
    "evaluations": 24,
    "limit": 25,
    "rounding": 0,
    "samples": 16,
    "batch": 4,
    "calibration": 4096,
}
"""Least budgets; less is not worth a run."""
MOST = {"evaluations": 500, "limit": 2000, "rounding": 200, "samples": 64, "batch": 32, "calibration": 65536}
"""Budgets beyond which more was never seen to help."""
WORTHWHILE = {"rounding": 25}
"""Budgets of which fewer are no better than the least: with few steps AutoRound loses more than GPTQ, which takes none
(docs/results.md, "Quantization")."""
LIMIT_PER_EVALUATION = 200 / 72
"""Documents to sub-networks, in which a search's time is split."""
WORTH_TRAINING = 0.1
"""Tokens for each parameter, fine-tuning and healing together, from which on fine-tuning pays (docs/time.md). Below it
the base is searched as it is, and all tokens heal."""
TRAINED = 0.1
"""From there on, the share of the tokens that are for the fine-tuning."""
STEPS = 200
"""Least number of steps of the longer training, where that leaves batches of `FEWEST["batch"]` sequences or more."""
MADE_OF = {
    "ordering": ["teach"],
    "fine-tuning": ["train", "teach", "step"],
    "search": ["read"],
    "healing": ["train", "teach", "step"],
}
"""Stages whose seconds say how fast what comes later is, and the rates that they are made of."""
ALSO_SLOWED = {
    "search": ("teach", "train", "step", "rounding", "decode"),
    "healing": ("read", "rounding", "decode"),
}
"""Rates of what comes after a stage that no stage before may have told. One that took longer than expected says that
this machine is slower now; one that was faster says nothing of them, as documents may have been cheap."""
MOSTLY = 0.8
"""Share of a stage's seconds from which on how long it took says how fast what it is made of is."""
STAGE_OF = {
    "train_tokens": "fine-tuning",
    "batch": "fine-tuning",
    "evaluations": "search",
    "limit": "search",
    "calibration": "proposals",
    "heal_tokens": "healing",
    "rounding": "quantizing",
    "samples": "quantizing",
}
"""The stage that a budget is spent in first; once it has begun, the budget stays."""


class Plan(Model):
    """`plan.json`: how a run's budgets were chosen."""

    time: str | None
    """What the user named; None where the budgets follow from the effort."""
    open: list[str]
    """The budgets that the time sets; the others were set by the user."""
    rates: Rates
    budgets: dict[str, int | None]
    """All of them, by name."""
    expected: dict[str, float]
    """Seconds of each stage under these budgets."""
    made_on: str | None = None
    """Where the rates were measured; None in plans of an earlier version."""


def read_plan(file: Path) -> Plan | None:
    """The plan that a run keeps; None where it has none. Raises `RequestError` for a file that is none."""
    if not file.is_file():
        return None
    with reading(f"{file}: not what this version writes; remove it"):
        return Plan.model_validate(read_json(file))


def open_budgets(recipe: Recipe) -> list[str]:
    """The budgets that a recipe leaves to its time; none where it names no time."""
    return [] if recipe.time is None else [name for name in OPEN if recipe.budget(name) is None]


def make_plan(job: Job, asked: Recipe) -> Plan:
    """The plan of a run whose recipe was `asked` for: kept ones are taken up, so that the budgets stay as they were.

    Puts the budgets into the job's recipes. Raises `RequestError` where the time is too short for the least budgets.
    """
    kept, open_ = read_plan(job.run.plan_file), open_budgets(asked)
    # An earlier version knew fewer budgets: those stay as they are without a time.
    before = {} if kept is None else {name: kept.budgets.get(name, job.recipe.budget(name)) for name in OPEN}
    known = [name for name in open_ if kept is None or name in kept.budgets]
    same = kept is not None and (kept.time, kept.open) == (asked.time, known)
    rates = known_rates(job, kept)
    if kept is not None and same and rates is not None:
        put(job, {name: before[name] for name in open_})
        return current(job, kept)
    if rates is None:
        say("measuring how fast this network is here")
        rates = measure_rates(job)
    if open_:
        settled = {name: before[name] for name in open_ if name in before and is_settled(job, name)}
        put(job, settled)
        fit(job, rates, [name for name in open_ if name not in settled], strict=not same)
    return current(job, Plan(time=asked.time, open=open_, rates=rates, budgets={}, expected={}, made_on=made_on(job)))


def known_rates(job: Job, kept: Plan | None) -> Rates | None:
    """The rates of a kept plan; None where they are of another device, or without rounding, which is asked for now."""
    if kept is None or kept.made_on not in (None, made_on(job)) or (tunes(job) and not kept.rates.rounding):
        return None
    return kept.rates


def made_on(job: Job) -> str:
    """What rates are of: the device, what is computed in, and what trains."""
    return f"{device_name(job.device)}, {job.compute_dtype}, {job.optimizer}"


def current(job: Job, plan: Plan) -> Plan:
    """The plan with the budgets and stages of the job's recipe as it is now; the schedule expects them."""
    expected = {cost.name: cost.seconds for cost in stage_costs(job, plan.rates)}
    job.schedule.expected = expected
    budgets = {name: job.recipe.budget(name) for name in OPEN}
    return plan.model_copy(update={"budgets": budgets, "expected": expected})


def adjust(job: Job) -> bool:
    """After a stage ended: correct the kept plan's rates by how long it took, and choose the budgets of what has not
    begun anew from the time that is left. Returns whether a budget changed."""
    plan, done = read_plan(job.run.plan_file), job.schedule.newly_done()
    if plan is None or not done:
        return False
    # 1. Rates by the stages that are mostly made of them.
    factors: dict[str, float] = {}
    for stage, names in MADE_OF.items():
        if stage in done and plan.expected.get(stage) and share_of_rates(job, plan.rates, stage, names) > MOSTLY:
            factor = ratio(job, stage, plan.expected[stage])
            factors = dict.fromkeys(ALSO_SLOWED.get(stage, ()), max(1.0, factor)) | factors
            factors |= dict.fromkeys(names, factor)
    rates = plan.rates.times(**factors)
    if "writing text" in done:  # what it took beyond what these rates explain
        rates = rates.times(write=ratio(job, "writing text", expected_of(job, rates, "writing text")))
    plan = plan.model_copy(update={"rates": rates})
    # 2. Budgets.
    open_ = [name for name in plan.open if not is_settled(job, name)]
    before = {name: job.recipe.budget(name) for name in open_}
    if open_:
        fit(job, plan.rates, open_, strict=False)
    changed = {name: value for name, value in before.items() if value != job.recipe.budget(name)}
    if changed:
        steps = ", ".join(f"{name} {value} → {job.recipe.budget(name)}" for name, value in changed.items())
        job.run.log(f"budgets by the time that is left: {steps}")
    write_plan(job, current(job, plan))
    return bool(changed)


def share_of_rates(job: Job, rates: Rates, stage: str, names: Iterable[str]) -> float:
    """What share of a stage's expected seconds the named rates make up: by what it costs where they are 0."""
    with_them, without = (expected_of(job, tried, stage) for tried in (rates, rates.times(**dict.fromkeys(names, 0.0))))
    return 1 - without / with_them if with_them else 0.0


def expected_of(job: Job, rates: Rates, stage: str) -> float:
    """Seconds that a stage is expected to take; 0 where there is nothing to do in it."""
    return next((cost.seconds for cost in stage_costs(job, rates) if cost.name == stage), 0.0)


def ratio(job: Job, stage: str, expected: float) -> float:
    """By how much longer a stage took than expected, within a factor of three; 1 where nothing was expected."""
    return min(3.0, max(1 / 3, job.schedule.times[stage].seconds / expected)) if expected else 1.0


def is_settled(job: Job, budget: str) -> bool:
    """Whether the stage that a budget is spent in has begun, in whatever process, or what it makes is there."""
    made = {"fine-tuning": job.run.supernet / "manifest.json", "search": job.run.front}
    stage = STAGE_OF[budget]
    if budget == "heal_tokens" and "writing more text" in job.schedule.times:  # which is what healing will read
        return True
    return stage in job.schedule.times or job.schedule.over(stage) or (stage in made and made[stage].is_file())


def write_plan(job: Job, plan: Plan) -> None:
    """Keep the plan with the run."""
    if job.run.writes:
        write_json(job.run.plan_file, plan.model_dump(mode="json"))


def put(job: Job, budgets: dict[str, int | None]) -> None:
    """Put budgets into the recipe as it was given and as it is used."""
    for recipe in (job.given, job.recipe):
        for name, value in budgets.items():
            recipe.set_budget(name, value)


def fit(job: Job, rates: Rates, open_: Iterable[str], *, strict: bool) -> None:
    """Choose the `open_` budgets so that the stages still to run fit into the remaining time.

    The search, the rounding and the calibration get their shares of what the least budgets leave, training the rest.
    Where even the least budgets take longer, they are taken, or with `strict` it is refused: `RequestError`.
    """
    assert job.recipe.time is not None
    budgets = OpenBudgets(job, rates, open_)
    time = (1 - RESERVE) * (parse_duration(job.recipe.time) - job.schedule.elapsed)
    # 1. The least that a run takes.
    least = budgets.set(FEWEST)
    if least > time and strict:
        longest = sorted(stage_costs(job, rates), key=lambda cost: -cost.seconds)[:3]
        parts = ", ".join(f"{cost.name} {duration(cost.seconds)}" for cost in longest)
        raise RequestError(
            f"--time {job.recipe.time}: with the least budgets this job takes {duration(least)} here ({parts}); ask "
            f"for {duration(1.1 * least)} or more, for fewer tasks, or set budgets yourself"
        )
    spare = max(0.0, time - least)
    # 2. Search, rounding and calibration: their shares.
    budgets.spend(
        SEARCH_SHARE * spare, "evaluations", limit=lambda n: min(MOST["limit"], round(n * LIMIT_PER_EVALUATION))
    )
    budgets.spend(
        ROUNDING_SHARE * spare, "rounding", samples=lambda steps: min(MOST["samples"], FEWEST["samples"] + steps)
    )
    if job.repairs:
        budgets.spend(CALIBRATION_SHARE * spare, "calibration")
    # 3. Training: the rest.
    budgets.train_until(time)
    if not job.repairs:  # of so many tokens it is not; whoever turns it on later has what is usual
        budgets.set({"calibration": BUDGETS["standard"].calibration})


class OpenBudgets:
    """The budgets that a time sets, and what the stages still to run take under them."""

    def __init__(self, job: Job, rates: Rates, names: Iterable[str]) -> None:
        self.job, self.rates, self.names = job, rates, set(names)

    def set(self, values: Mapping[str, int]) -> float:
        """Put in those of these that are open; returns the seconds of all stages still to run."""
        put(self.job, {name: value for name, value in values.items() if name in self.names})
        return sum(cost.seconds for cost in stage_costs(self.job, self.rates) if not self.job.schedule.over(cost.name))

    def spend(self, seconds: float, name: str, **others: Callable[[int], int]) -> None:
        """Raise a budget as far as so many seconds more allow, and `others` with it, each a function of it."""
        if not self.names & {name, *others}:
            return
        before = self.set({})

        def taken(value: int) -> float:
            if name in self.names and value < WORTHWHILE.get(name, 0):
                value = FEWEST[name]
            return self.set({name: value, **{other: of(value) for other, of in others.items()}})

        largest(taken, before + seconds, FEWEST[name], MOST[name])

    def train_until(self, time: float) -> None:
        """Raise the tokens of fine-tuning and healing as far as all stages still end within so many seconds.

        Steps cost time too, so more tokens may fit in larger batches: the largest one that leaves enough steps, and
        that a GPU has memory for.
        """
        job, batch = self.job, MOST["batch"]
        if not self.names & {"train_tokens", "heal_tokens"}:
            return

        def taken(tokens: int) -> float:
            pays = tokens >= WORTH_TRAINING * job.structure.parameters(job.structure.base)
            train = round(TRAINED * tokens) if pays else 0
            heal = two_digits(tokens - train)
            return self.set({"train_tokens": two_digits(train), "heal_tokens": heal, "batch": batch})

        while True:
            largest(taken, time, 0, 10**11)
            tokens = max(job.recipe.finetuning.tokens or 0, job.recipe.healing.tokens or 0)
            enough = tokens >= STEPS * job.length * batch and not ("batch" in self.names and without_room(job))
            if batch <= FEWEST["batch"] or enough:
                break
            batch //= 2


def largest(seconds: Callable[[int], float], most: float, low: int, high: int) -> int:
    """The largest whole number in [low, high] whose seconds are at most `most`, or `low`; called with it at the end."""
    while low < high:
        middle = (low + high + 1) // 2
        if seconds(middle) <= most:
            low = middle
        else:
            high = middle - 1
    seconds(low)
    return low


def two_digits(number: int) -> int:
    """A number with all but its first two digits zero, which people can read."""
    scale = 10 ** max(0, len(str(number)) - 2)
    return number // scale * scale


class PlanShown(TypedDict):
    """A plan as plain JSON types."""

    stages: list[dict[str, object]]
    """Each a `StageCost`."""
    seconds: float
    """Seconds of all stages together."""
    memory: float
    """Bytes at most."""
    disk: float
    """Bytes in all."""


def print_plan(costs: list[StageCost], device: str) -> PlanShown:
    """Print the stages with their budgets, time, memory and disk on stderr. Returns them."""
    table = Table(box=box.SIMPLE)
    for column in ("stage", "budget", "time", "memory", "disk"):
        words = column in ("stage", "budget")
        table.add_column(column, justify="left" if words else "right", overflow="fold", no_wrap=not words)
    for cost in costs:
        disk = size(cost.disk) if cost.disk else ""
        table.add_row(cost.name, cost.budget, duration(cost.seconds), size(cost.memory), disk)
    seconds, disk_bytes = sum(cost.seconds for cost in costs), sum(cost.disk for cost in costs)
    most = max(cost.memory for cost in costs)
    table.add_section()
    table.add_row("all", "", duration(seconds), size(most), size(disk_bytes), style="bold")
    console.print(table)
    say(f"expected on {device}, from rates measured there")
    return {"stages": [asdict(cost) for cost in costs], "seconds": seconds, "memory": most, "disk": disk_bytes}
