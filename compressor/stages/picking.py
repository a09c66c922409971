"""Choose from what was measured, for the targets of the recipe: writes `search/picks.json`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from compressor.job import Job
from compressor.schedule import stage
from compressor.sizing import byte_limit, parameter_limits, picks_bits, picks_types, smallest_storage
from compressor.stages.choosing import Choice, Choices, by_key, choices, decode_speeds
from compressor.stages.front import read_front, scored_weights
from compressor.stages.joint_pick import pick_with_bits
from compressor.stages.layer_timings import speed_table, untouched_decode_tps
from compressor.stages.llama_types import pick_with_types
from compressor.stages.picks import ChoiceNumbers, NetworkRecord, PickRecord, check_rounding
from compressor.stages.repairing import rounding_inputs, searched_weights
from compressor.stages.requalify import current_front
from export.layouts.table import GGUF_MIXED, copies_hold, needs_uniform
from export.report.alternatives import in_words
from search.objectives import Evaluation
from search.pareto import Target
from supernet.common.errors import RequestError
from supernet.common.files import write_json
from supernet.common.formatting import percent, shell_word
from supernet.common.progress import say
from supernet.slicing import fits_plain_class

MEND_ALIKE = "search more (--evaluations), use --space uniform, or leave the format out"
"""What to do where nothing whose layers are alike can be picked."""
GAP = 0.05
"""Share of a size by which a pick may be smaller without a word."""
POOR = 0.5
"""Quality on the search's documents below which a pick is said to be poor, before anything is spent on it."""


class NothingAlikeError(RequestError):
    """Nothing whose layers are alike can be picked."""


def measured(job: Job) -> list[Evaluation]:
    """Everything that the search measured, with sizes, bytes as asked for, and the speed-up over the base.

    Raises `RequestError` where nothing was searched yet, or another super-network was.
    """
    if not job.run.front.is_file():
        raise RequestError(f"{job.run.path}: nothing was searched yet; run compressor search")
    front = current_front(job)
    if front["weights"] != job.run.supernet_weights:
        raise RequestError(f"{job.run.path}: the super-network is not the one that was searched; run compressor search")
    check_rounding(job, front)
    evaluations = []
    speed = None
    if job.recipe.targets.min_speedup is not None and any(
        "decode_tps" not in row["values"] for row in front["evaluations"]
    ):
        speed = speed_table(job, lambda: job.load_supernet().model)  # a search that had no need of it
    for row in front["evaluations"]:
        found = Evaluation.from_dict(row)
        architecture = found.architecture
        values = {
            **found.values,
            "parameters": job.structure.parameters(architecture),
            "bytes": job.structure.bytes(architecture, smallest_storage(job, architecture)),
        }
        if speed is not None:
            values |= {"decode_tps": speed.predict(architecture)["decode_tps"]}
        if "decode_tps" in values:
            of_base = front["base_decode_tps"] if speed is None else untouched_decode_tps(job, speed.predict)
            values["speedup"] = values["decode_tps"] / of_base
        evaluations.append(replace(found, values=values))
    return evaluations


@stage("picking")
def pick(job: Job, beside: Sequence[PickRecord] = ()) -> list[PickRecord]:
    """Choose from all that was measured, for the recipe's targets or by its key; returns what picks.json holds.

    `beside` picks stay as they are: then only those for layouts that want layers that are alike are chosen. Such a pick
    is left out where nothing can be it; raises `NothingAlikeError` where no other is wanted.
    """
    recipe, run = job.recipe, job.run
    evaluations = measured(job)
    if scored_weights(job, read_front(run.front)) != searched_weights(job):
        say(
            "warning: the search scored networks that were repaired otherwise; held-out losses are of today's repair: "
            f"compressor search {shell_word(run.path)} --redo search makes them one"
        )
    # 1. What can be picked: for a uniform package, only networks whose layers are alike.
    config = job.checkpoint.config
    plain = [as_plain_class(job, e) for e in evaluations if fits_plain_class(config, e.architecture)]
    plain = [e for e in plain if copies_hold(e.architecture, config, recipe.formats)]
    kinds = [False] if set(recipe.formats) - {"uniform"} else []
    kinds += [True] if "uniform" in recipe.formats else []
    if beside:
        kinds = [True]
    # 2. By the key, or for every size.
    picks = [*beside]
    if recipe.key is not None:
        chosen = by_key(evaluations, recipe.key)
        alike = chosen.architecture in [e.architecture for e in plain]
        if kinds == [True] and not beside and not alike:
            raise RequestError(
                f"--key {recipe.key}: its layers differ, and --format uniform holds only networks whose layers are "
                "alike; pick another, or export --format uneven"
            )
        if True in kinds and not alike:
            say("  not for --format uniform: its layers differ")
            kinds.remove(True)
        picks += [picked_by_key(job, chosen, uniform) for uniform in kinds]
    else:
        for name, size in parameter_limits(job):
            for uniform in kinds:
                own = f"{name}-uniform" if uniform else name
                try:
                    picks.append(picked_for(job, own, size, evaluations, plain if uniform else None))
                except NothingAlikeError as error:
                    if False not in kinds:
                        raise
                    say(f"warning: {own} is left out: {error}")
    if recipe.formats and all(layout.startswith("gguf") for layout in recipe.formats):
        say("  (these speeds are of layers in transformers; llama.cpp's will be measured of the packages)")
    write_json(run.picks, picks)
    return picks


def as_plain_class(job: Job, evaluation: Evaluation) -> Evaluation:
    """The same sub-network with the bytes of weights in a package of the family's plain class, which holds an embedding
    in fewer forms."""
    architecture = evaluation.architecture
    bytes_ = job.structure.bytes(architecture, smallest_storage(job, architecture, uniform=True))
    return replace(evaluation, values={**evaluation.values, "bytes": bytes_})


def picked_by_key(job: Job, chosen: Evaluation, uniform: bool) -> PickRecord:
    """The pick of the sub-network that the recipe's key names, which is also said."""
    speed = decode_speeds(job, [chosen])[0]
    choice = Choice(as_plain_class(job, chosen) if uniform else chosen, None, speed)
    return pick_row(job, "best-uniform" if uniform else "best", f"key {choice.key}", choice, None)


def picked_for(
    job: Job, name: str, size: int | None, measured: list[Evaluation], plain: list[Evaluation] | None
) -> PickRecord:
    """The pick called `name` of the most parameters `size` and the recipe's other targets, which is also said: of all
    that was measured or, where they are given, of the networks that a uniform package holds (`plain`). Raises
    `RequestError` where nothing meets them, `NothingAlikeError` where none of the latter does."""
    uniform, evaluations = plain is not None, measured if plain is None else plain
    targets = job.recipe.targets
    target = Target(
        max_params=size, max_bytes=byte_limit(job), min_speedup=targets.min_speedup, max_drop=targets.max_drop
    )
    try:
        if picks_bits(job):
            if picks_types(job):
                joint = pick_with_types(job, evaluations, target, f"{name}-{GGUF_MIXED}")
            else:
                joint = pick_with_bits(job, evaluations, target, uniform)
            if job.recipe.prefer != "quality":
                say(f"note: size and bits are picked together by loss; --prefer {job.recipe.prefer} changes nothing")
            candidate = joint.candidate
            choice = Choice(candidate.evaluation, None, decode_speeds(job, [candidate.evaluation])[0])
            row = pick_row(job, name, str(target), choice, None, f"; {joint}")
            row["architecture"] = candidate.architecture.to_dict()
            row["values"]["bytes"], row["bits"] = candidate.bytes, joint.to_json()
            return row
        found = choices(job, evaluations, target)
    except ValueError as error:
        if plain is not None:
            raise NothingAlikeError(why_nothing_alike(job, size, measured, plain, str(error))) from error
        raise RequestError(f"{error}; ask for less, or search more (--evaluations)") from error
    row = pick_row(job, name, str(target), found.by_preference[job.recipe.prefer], found)
    if size is not None:
        picked = found.by_preference[job.recipe.prefer].evaluation
        say_what_is_nearest(job, size, picked.values["parameters"], evaluations)
    return row


def why_nothing_alike(
    job: Job, size: int | None, measured: list[Evaluation], plain: list[Evaluation], missed: str
) -> str:
    """Why no uniform package can be picked of these: none is alike, or those that are miss the other targets."""

    def of_size(evaluations: list[Evaluation]) -> int:
        return sum(e.full and (size is None or e.values["parameters"] <= size) for e in evaluations)

    small = "" if size is None else f" of at most {size:,} parameters"
    held = (
        " as llama.cpp needs them" if any(needs_uniform(f, job.checkpoint.config) for f in job.recipe.formats) else ""
    )
    if of_size(measured) and not of_size(plain):
        why = f"none of the {of_size(measured)} measured networks{small} has layers that are alike{held}"
    else:
        why = f"of networks whose layers are alike{held}, {missed}"
    return f"--format uniform: {why}; {MEND_ALIKE}"


def pick_row(job: Job, name: str, target: str, chosen: Choice, found: Choices | None, bits: str = "") -> PickRecord:
    """A pick as picks.json holds it, with what the other preferences take; says both, and `bits` behind the first."""
    row: PickRecord = {
        "name": name,
        "target": target,
        **network_of(chosen),
        "weights": job.run.supernet_weights,
        **rounding_inputs(job),
        "bits": None,
    }
    base_tps = read_front(job.run.front)["base_decode_tps"]
    say(f"picked {name}: {described(job, numbers(chosen, base_tps))} (key {chosen.key[:8]}){bits}")
    if (quality := chosen.evaluation.values["quality"]) < POOR:
        say(
            f"warning: {name} keeps {percent(quality)} of the base's quality on the search's documents; "
            f"compressor front {shell_word(job.run.path)} lists what larger ones keep"
        )
    if found is None:
        return row
    row["prefer"] = job.recipe.prefer
    row["others"], run = [], shell_word(job.run.path)
    for preference, other in found.by_preference.items():
        if other.key != chosen.key:
            known = numbers(other, base_tps)
            row["others"].append({"prefer": preference, **known})
            say(
                f"  by {preference} it would be {described(job, known)}: compressor pick {run} "
                f"--prefer {preference}, then compressor export {run}"
            )
    row["finalists"] = [network_of(choice) for choice in finalists(job, chosen, found)]
    return row


def finalists(job: Job, chosen: Choice, found: Choices) -> list[Choice]:
    """What may be healed beside a pick: first itself, then the nearest by held-out loss or, where speed is preferred,
    what is faster and may come near by healing."""
    others = [choice for choice in found.nearest if choice.key != chosen.key]
    return [chosen, *(others if job.recipe.prefer == "quality" else found.faster)]


def network_of(choice: Choice) -> NetworkRecord:
    """The network of a choice and what was measured of it, as picks.json holds them."""
    record = choice.evaluation.to_dict()
    values = record["values"] if choice.decode_tps is None else {**record["values"], "decode_tps": choice.decode_tps}
    return {"architecture": record["architecture"], "key": record["key"], "values": values}


def numbers(choice: Choice, base_tps: float) -> ChoiceNumbers:
    """What is known of a choice, as picks.json holds it; `base_tps`: the base's decode speed by its layers' timings."""
    return {
        "key": choice.key,
        "parameters": choice.evaluation.values["parameters"],
        "quality": choice.evaluation.values["quality"],
        "held_out_loss": None if choice.loss is None else choice.loss.value,
        "speedup": None if choice.decode_tps is None else choice.decode_tps / base_tps,
    }


def described(job: Job, row: ChoiceNumbers) -> str:
    """What `numbers` knows, in words."""
    return in_words(row["parameters"], job.untouched_parameters, row["quality"], row["held_out_loss"], row["speedup"])


def say_what_is_nearest(job: Job, size: int, picked: float, evaluations: list[Evaluation]) -> None:
    """Where a pick is smaller than what was asked for by more than `GAP`: whether nothing nearer was measured, and how
    to measure there, or that something was, which is no better."""
    if picked >= (1 - GAP) * size:
        return
    nearest = max(e.values["parameters"] for e in evaluations if e.full and e.values["parameters"] <= size)
    missing = f"{1 - picked / size:.0%} below the {size:,} that were asked for"
    if nearest >= (1 - GAP) * size:
        say(f"  that is {missing}; the nearest that was measured has {nearest:,.0f}, and was not found better")
        return
    command = f"compressor search {shell_word(job.run.path)} --max-params {size / job.untouched_parameters:.3g}"
    say(
        f"  that is {missing}, and nothing nearer than {nearest:,.0f} was measured: {command} "
        "--evaluations 30 measures there, from what is known, and picks again"
    )
