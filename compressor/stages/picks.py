"""`search/picks.json`: what a pick is, and how the stages behind `pick` read it."""

from __future__ import annotations

from typing import Literal, NotRequired, TypedDict, cast

from compressor.job import Job
from compressor.stages.repairing import RoundingRecord, rounding_inputs
from export.quantization.schemes import EmbeddingBits, FormName
from search.preference import Preference
from supernet.architecture import Architecture, ArchitectureJSON
from supernet.common.errors import RequestError, reading
from supernet.common.files import read_json


class NetworkRecord(TypedDict):
    """A measured sub-network."""

    architecture: ArchitectureJSON
    key: str
    values: dict[str, float | None]
    """What the search measured, by name; None for what is not finite."""


class ChoiceNumbers(TypedDict):
    """What is known of a sub-network that may be picked."""

    key: str
    parameters: float
    quality: float
    held_out_loss: float | None
    """Nats per token, before healing; None where it was not looked at."""
    speedup: float | None
    """Decode speed over the base's, by the layers' timings; None where they were never timed."""


class OtherPick(ChoiceNumbers):
    """What another preference takes."""

    prefer: Preference


class BitsRecord(TypedDict):
    """Bits that were picked together with the size. `scheme` None: unquantized; `gguf-mixed`: in types of llama.cpp."""

    scheme: FormName | Literal["gguf-mixed"] | None
    embedding: EmbeddingBits | None
    bytes: int
    """Size of the weight files, headers too."""
    held_out_loss: float
    """As rounded to nearest, or as the llama.cpp file holds it, nats per token."""
    group_size: NotRequired[int]
    """Of a mixed pick, input channels that share a scale."""


class PickRecord(NetworkRecord, RoundingRecord):
    """One pick."""

    name: str
    """`best`, `best-0.67`, `best-0.67-uniform` and so on: its package's."""
    target: str
    weights: str
    """Fingerprint of the super-network that it was picked from."""
    bits: BitsRecord | None
    prefer: NotRequired[Preference]
    """This and what follows are not there for a pick by its key, or with bits."""
    others: NotRequired[list[OtherPick]]
    finalists: NotRequired[list[NetworkRecord]]
    """What may be healed beside it, itself first, by increasing loss."""


def read_picks(job: Job) -> list[PickRecord]:
    """What `pick` left. Raises `RequestError` where that is nothing, or was picked in another super-network."""
    if not job.run.picks.is_file():
        raise RequestError(f"{job.run.path}: nothing was picked yet; run compressor pick")
    picks = cast("list[PickRecord]", read_json(job.run.picks))
    weights = job.run.supernet_weights
    with reading(f"{job.run.picks}: not what this version writes"):
        others = [row["name"] for row in picks if row["weights"] != weights]
    if others:
        raise RequestError(
            f"{job.run.path}: the super-network is not the one that was picked from; run compressor search and pick"
        )
    for row in picks:
        check_rounding(job, row)
    return picks


def check_rounding(job: Job, found: RoundingRecord) -> None:
    """Raises `RequestError` where weights were rounded otherwise when this was found."""
    now = rounding_inputs(job).get("rounding")
    if found.get("rounding") != now:
        raise RequestError(
            f"{job.run.path}: was searched with a group size of {found.get('rounding')}, not {now}; say that one "
            "(--group-size), or run compressor search"
        )


def cut_out(picked: NetworkRecord) -> Architecture:
    """The sizes of a pick, which are what is cut out: bits that were searched with them come when it is packaged."""
    return Architecture.from_dict(picked["architecture"]).without_bits()


def is_uniform(name: str) -> bool:
    """Whether a pick of this name is for layouts that want layers that are alike: its packages have no code file."""
    return name.endswith("-uniform")
