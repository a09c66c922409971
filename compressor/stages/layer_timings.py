"""How fast sub-networks are on this device, from layers that are timed once: fills `speed.json`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from compressor.job import Job
from compressor.schedule import stage
from evals.speed.table import SpeedTable
from supernet.architecture import Architecture, Structure
from supernet.common.errors import RequestError
from supernet.common.progress import bar
from supernet.slicing import extract


@stage("timing the layers")
def speed_table(job: Job, load_model: Callable[[], Any]) -> SpeedTable:
    """speed.json: layer timings on this device, in what is computed in and on these threads, measured once per run on
    networks cut out of what `load_model` gives.

    Timings do not depend on what the weights are, so the base serves as well as the super-network. A table that the
    recipe names, of another device, takes its place.
    """
    job.threads(scoring=True)
    if job.recipe.speed_table is not None:
        job.speed = job.given_speed_table()
    elif job.speed is None and job.run.speed_table.is_file():
        kept = SpeedTable.load(job.run.speed_table)
        job.speed = kept if kept.made_on(job.device, job.compute_dtype) else None
    if job.speed is None:
        model = load_model()
        with bar("timing the layers", SpeedTable.steps(job.structure, job.device)) as progress:
            job.speed = SpeedTable.measure(
                lambda architecture: extract(model, job.structure, architecture),
                job.structure,
                on_step=progress.advance,
            )
    if job.run.recipe_file.is_file():
        job.speed.save(job.run.speed_table)
    return job.speed


def untouched_decode_tps(job: Job, predict: Callable[[Architecture], dict[str, float]]) -> float:
    """Decode tokens per second of the untouched base, in tokens of the base, so that a ratio to it is one of text.

    Where the vocabulary is cut, the untouched base is taken to be slower by as much as it reads more weights for each
    token, and each of its tokens stands for more text. The report measures both.
    """
    tps = predict(job.structure.base)["decode_tps"]
    if job.vocabulary is None:
        return tps
    record = job.vocabulary.record
    read, read_by_untouched = (weights_read(structure) for structure in (job.structure, job.untouched.structure))
    return tps * read / read_by_untouched * record.base_bytes_per_token / record.bytes_per_token


def weights_read(structure: Structure) -> int:
    """Weights that a base reads for each token: all but an embedding that is not the head too."""
    looked_up = [tensor for tensor in structure.tensors if tensor.role == "embedding" and not structure.tied]
    shapes = (structure.shape(tensor, structure.base) or (0,) for tensor in looked_up)
    return structure.parameters(structure.base) - sum(map(math.prod, shapes))


def check_speedup(job: Job) -> None:
    """Refuse a speed-up that not even the smallest sub-network of the space reaches on this device."""
    wanted = job.recipe.targets.min_speedup
    if wanted is None:
        return
    table = speed_table(job, job.load_base)
    smallest, base = table.predict(job.space.smallest())["decode_tps"], untouched_decode_tps(job, table.predict)
    if smallest < wanted * base:
        raise RequestError(
            f"--min-speedup: {wanted:g} cannot be reached; the smallest sub-network of this space is "
            f"{smallest / base:.2f} times as fast as the base"
        )
