"""The sizes of an elastic package: the front's architectures, named by their share of the base's parameters."""

from __future__ import annotations

from collections.abc import Mapping

from compressor.job import Job
from compressor.stages.requalify import current_front
from export.layouts.elastic import ElasticSource, size_name
from export.package_record import ElasticSize
from supernet.architecture import Architecture


def elastic_source(job: Job, picked: Architecture) -> ElasticSource:
    """The run's super-network with its sizes: the pick, the whole, and of the front the best for each hundredth of the
    parameters. Largest first."""
    full = job.structure.parameters(job.structure.base)
    front = current_front(job)
    on_front = set(front["front"])
    rows = sorted(front["evaluations"], key=lambda row: -(row["values"]["quality"] or 0.0))
    measured = {row["key"]: row["values"] for row in rows if row["full"]}
    architectures = [picked, job.structure.base]
    architectures += [Architecture.from_dict(row["architecture"]) for row in rows if row["key"] in on_front]
    sizes: dict[str, ElasticSize] = {}
    for architecture in architectures:
        params = job.structure.parameters(architecture)
        size = _size(size_name(params / full), architecture, params, measured.get(architecture.key, {}))
        sizes.setdefault(size.name, size)
    ordered = sorted(sizes.values(), key=lambda size: -size.params)
    return ElasticSource(job.run.supernet, job.checkpoint.config, job.structure, ordered)


def _size(name: str, architecture: Architecture, params: int, values: Mapping[str, float | None]) -> ElasticSize:
    return ElasticSize(
        name=name,
        architecture=architecture,
        params=params,
        quality=values.get("quality"),
        quality_stderr=values.get("quality_stderr"),
        held_out_loss=values.get("held_out_loss"),
        decode_tps=values.get("decode_tps"),
    )
