"""Choose from what was measured, for the targets of the recipe: writes `search/picks.json`."""

from __future__ import annotations

from typing import Any

from compressor.job import Job
from compressor.schedule import stage
from compressor.sizing import byte_limit, parameter_limits, picks_bits, smallest_storage
from compressor.stages.front import read_front
from compressor.stages.joint_pick import pick_with_bits
from compressor.stages.subnet_scores import lowest_held_out_loss
from export.layouts.table import copies_hold
from search.objectives import Evaluation
from search.pareto import Target, contenders
from supernet.architecture import Architecture
from supernet.common.errors import RequestError, reading
from supernet.common.files import read_json, write_json
from supernet.common.progress import say
from supernet.slicing import fits_plain_class


def measured(job: Job) -> list[Evaluation]:
    """Everything that the search measured, with sizes, bytes as asked for, and the speed-up over the base.

    Raises `RequestError` where nothing was searched yet, or another super-network was.
    """
    if not job.run.front.is_file():
        raise RequestError(f"{job.run.path}: nothing was searched yet; run compressor search")
    front = read_front(job.run.front)
    if front["weights"] != job.run.supernet_weights:
        raise RequestError(f"{job.run.path}: the super-network is not the one that was searched; run compressor search")
    evaluations = []
    for row in front["evaluations"]:
        architecture = Architecture.from_dict(row["architecture"])
        values = row["values"] | {
            "parameters": job.structure.parameters(architecture),
            "bytes": job.structure.bytes(architecture, smallest_storage(job, architecture)),
        }
        if "decode_tps" in values:
            values["speedup"] = values["decode_tps"] / front["base_decode_tps"]
        evaluations.append(Evaluation(architecture, values, row["generation"], row["index"], row["full"]))
    return evaluations


def choose(job: Job, evaluations: list[Evaluation], target: Target) -> Evaluation:
    """The measured architecture for a target. Where tasks do not tell the best apart, held-out loss does: a mean over
    every token of some blocks, whose order healing keeps almost whole (docs/results.md, "is what is searched what
    ships?"), where a task's accuracy rests on few documents.

    Raises ValueError where nothing meets the target.
    """
    equals = contenders(evaluations, target)
    if len(equals) == 1:
        return equals[0]
    if 2 * len(equals) > len(evaluations):
        say(
            f"warning: the tasks do not tell {len(equals)} of the {len(evaluations)} measured sub-networks apart; more "
            "documents (--limit) would. Held-out loss decides"
        )
    return equals[lowest_held_out_loss(job, [e.architecture for e in equals])]


def read_picks(job: Job) -> list[dict[str, Any]]:
    """What `pick` left. Raises `RequestError` where that is nothing, or was picked in another super-network."""
    if not job.run.picks.is_file():
        raise RequestError(f"{job.run.path}: nothing was picked yet; run compressor pick")
    picks: list[dict[str, Any]] = read_json(job.run.picks)
    weights = job.run.supernet_weights
    with reading(f"{job.run.picks}: not what this version writes"):
        others = [row["name"] for row in picks if row["weights"] != weights]
    if others:
        raise RequestError(
            f"{job.run.path}: the super-network is not the one that was picked from; run compressor search and pick"
        )
    return picks


@stage("picking")
def pick(job: Job) -> list[dict[str, Any]]:
    """Choose from everything that was measured, for the recipe's targets; returns what picks.json holds."""
    recipe, run = job.recipe, job.run
    evaluations = measured(job)
    config = job.checkpoint.config
    plain = [e for e in evaluations if fits_plain_class(config, e.architecture)]
    plain = [e for e in plain if copies_hold(e.architecture, config, recipe.formats)]
    picks = []
    for name, size in parameter_limits(job):
        target = Target(
            max_params=size,
            max_bytes=byte_limit(job),
            min_speedup=recipe.targets.min_speedup,
            max_drop=recipe.targets.max_drop,
        )
        kinds = [False] if set(recipe.formats) - {"uniform"} else []
        for uniform in [*kinds, True] if "uniform" in recipe.formats else kinds:
            among, joint = plain if uniform else evaluations, None
            try:
                if picks_bits(job):
                    joint = pick_with_bits(job, among, target, uniform)
                chosen = choose(job, among, target) if joint is None else joint.candidate.evaluation
            except ValueError as error:
                raise RequestError(f"{error}; ask for less, or search more (--evaluations)") from error
            picks.append(
                {
                    "name": f"{name}-uniform" if uniform else name,
                    "target": str(target),
                    "architecture": chosen.architecture.to_dict(),
                    "key": chosen.architecture.key,
                    "weights": run.supernet_weights,
                    "values": dict(chosen.values) | ({} if joint is None else {"bytes": joint.candidate.bytes}),
                    "bits": None if joint is None else joint.to_json(),
                }
            )
            share = chosen.values["parameters"] / job.untouched_parameters
            say(
                f"picked {picks[-1]['name']}: {chosen.values['parameters']:,.0f} parameters ({share:.3f} of the base), "
                f"quality {chosen.values['quality']:.3f} on the search documents"
                + ("" if joint is None else f"; {joint}")
            )
    write_json(run.picks, picks)
    return picks
