"""`compression.json`: what a package is, how it was made, a probe of its outputs, and a hash of every other file.

Reading and checking it needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError, field_validator

from evals.speed.measured import Speed
from export.models import JSONArchitecture, Model, first_error
from export.quantization.schemes import FormName
from export.shards import FileRecord, weight_bytes
from export.vocabulary_record import SplitText, VocabularyRecord
from search.scores import Score
from supernet.common.errors import RequestError, VerificationError
from supernet.common.files import read_json, sha256, write_json, write_text
from supernet.common.versions import versions
from supernet.trust import check_code

SCHEMA = 1
RECORD = "compression.json"
CARD = "README.md"
FORBIDDEN = {".bin", ".pt", ".pth", ".pkl", ".ckpt", ".pickle"}

Layout = Literal["uneven", "uniform", "padded", "elastic", "gguf", "onnx", "openvino"]
Quantization = Literal[FormName, "q8_0", "q6_k", "q5_k", "q5_1", "q4_k", "iq4_nl", "q4_0", "q3_k", "q2_k"]


class QuantizationReport(Model):
    """What the quantizer did to a package."""

    scheme: Quantization
    group_size: int
    """Input channels that share a scale; -1: all of an output channel's. Of a llama.cpp file of several types, the
    weights in their smallest block."""
    iterations: int
    """Steps of tuning of each block; 0: none."""
    rounding: Literal["nearest", "gptq", "autoround"] | None = None
    """How the blocks' weights were rounded; None: as a llama.cpp type is, or by a version that did not say."""
    bits_per_weight: float
    """Stored bits (codes, scales, shapes) for each weight of the linear layers inside blocks."""
    embedding: float = 16
    """Bits of the embedding's codes; in gguf files those stored for each weight."""
    head: float = 16
    """The same of an output head that has its own weight."""
    bits_per_parameter: float
    """Stored bits of the whole file for each parameter, embeddings counted."""
    exceptions: dict[str, str] = Field(default_factory=dict)
    """Linear layers and embeddings that are not under the scheme, and what became of each."""
    bits: JSONArchitecture | None = None
    """Of a `mixed` package, the sizes with the bits of every half-block, as they were searched or picked."""


class GraphCache(Model):
    """The key-value cache that a graph takes and gives."""

    key_value_heads: list[int]
    """Number of heads, of every layer with attention."""
    head_dim: int


class SizeProof(Model):
    """What one size of an elastic package says about the probe's token ids."""

    next_logprob: list[list[float]]
    """As in `Probe`."""
    max_abs_logit: float


class ElasticSize(Model):
    """One size of an elastic package, and what the search measured of it, before any healing."""

    name: str
    """Its share of the base's parameters, such as `0.67`."""
    architecture: JSONArchitecture
    params: int
    quality: float | None = None
    """On the search documents."""
    quality_stderr: float | None = None
    held_out_loss: float | None = None
    decode_tps: float | None = None
    """Tokens per second, by its layers' timings."""
    tasks: dict[str, Score] = Field(default_factory=dict)
    """Scores on the report split, of the three sizes that are proved."""
    report_quality: float | None = None
    """Quality on the report split, of these."""
    proof: SizeProof | None = None
    """None where the size is not among the three that are proved."""


class PackageEntry(Model):
    """What a package is, and what was measured and proved of it so far.

    Keys that another version of this tool wrote are kept.
    """

    model_config = ConfigDict(extra="allow", allow_inf_nan=True)

    name: str
    """Folder name: `best`, `best-0.67`, `best-int4` and so on."""
    path: str
    """The folder as seen from the run directory."""
    layout: Layout
    quantization: Quantization | None = None
    architecture: JSONArchitecture
    params: int
    bytes: int
    """Size of the weight files as they are on disk."""
    quality: float | None = None
    """What it keeps of the base's scores on the report split (`evals.quality`)."""
    tasks: dict[str, Score] = Field(default_factory=dict)
    """Scores on the report split."""
    held_out_loss: float | None = None
    """Nats per token of the base on some of the user's text that was not trained on; None where it was not measured."""
    speed: Speed | None = None
    verified: dict[str, object] | None = None
    """What was proved in a fresh process: checks by name with true, false or a number (`max_abs_logit_difference`,
    `bound`), nested where that helps; None where nothing was yet, or it was refused."""
    refused: str | None = None
    """Why its proof failed; it is not to be shipped then."""
    quantization_report: QuantizationReport | None = None
    """None for an unquantized package."""
    file: str | None = None
    """The one file of a gguf package."""
    cache: GraphCache | None = None
    """What a graph caches; None where there is no graph."""
    vocabulary: VocabularyRecord | None = None
    """What the base's vocabulary was cut to; None where it was not."""
    sizes: list[ElasticSize] = Field(default_factory=list)
    """Of an elastic package, every size that it has a name for."""
    default_size: str | None = None
    """Of these, the one that architecture, parameters and scores are of."""


class Lineage(Model):
    """What a package was made from. Stages and layouts add keys: `base`, `supernet`, `target`, `quantized_from`, …"""

    model_config = ConfigDict(extra="allow")

    inputs: str | None = None
    """Fingerprint of all that the package depends on."""
    copy_of: str | None = None
    """Name of the package that this one holds in another layout."""
    task_documents: dict[str, str] = Field(default_factory=dict)
    """Fingerprint of the documents of each task that was scored."""
    scored_weights: str | None = None
    """Fingerprint of the weights that were scored: the run keeps what they score on every document under it."""
    base_speed: Speed | None = None
    """The base's speed, beside which the package's was measured."""


class Greedy(Model):
    """A greedy continuation of one prompt, in token ids."""

    prompt: list[int]
    ids: list[int]
    lead: list[float]
    """By how much (nats) each token was ahead of the next best."""


class Probe(Model):
    """What the network says about a few token sequences, to compare with when the package is loaded elsewhere.

    Lists are [sequences, positions] and, for the top tokens, [sequences, positions, top].
    """

    model_config = ConfigDict(extra="allow", allow_inf_nan=True)

    ids: list[list[int]] = Field(min_length=1)
    next_logprob: list[list[float]]
    """log p(token t+1 | tokens up to t), one position less than `ids`; for a quantized package those of the
    unquantized one."""
    top_ids: list[list[list[int]]]
    top_logprob: list[list[list[float]]]
    max_abs_logit: float
    text: str
    text_ids: list[int]
    text_decoded: str
    tokenization: list[tuple[str, list[int]]] = Field(default_factory=list)
    """Texts and their token ids, where another runtime has its own tokenizer."""
    composed: bool = False
    """Whether the texts were composed (NFC) first."""
    splits: list[SplitText] = Field(default_factory=list)
    """Texts as the tokenizer must split them, where the base's vocabulary was cut."""
    greedy: Greedy | None = None
    exact_to: str | None = None
    """The number format that a gguf file is as exact as; None: its own."""
    rounding: float = 0.0
    """By how much the top tokens' log-probabilities change where a runtime rounds activations as the weights' format
    does: nats, the most of several ways to round."""
    quantized_next_logprob: list[list[float]] | None = None
    """What a quantized package itself said when it was first verified: later checks are exact."""


class PackageRecord(Model):
    """`compression.json` of the package in `folder`."""

    model_config = ConfigDict(extra="allow")

    folder: Path
    """Where it was read; not in the file."""
    schema_: Literal[1] = Field(alias="schema")
    versions: dict[str, str] = Field(default_factory=dict)
    """Of Python and of the packages that matter, when the package was written."""
    entry: PackageEntry
    lineage: Lineage
    probe: Probe
    files: dict[str, FileRecord]
    """Every other file, by its path in the folder."""

    @field_validator("files")
    @classmethod
    def _inside(cls, files: dict[str, FileRecord]) -> dict[str, FileRecord]:
        for name in files:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(f"names a file outside the package, {name}")
        return files


def read_record(package: Path) -> PackageRecord:
    """What the package in this folder says of itself.

    Raises `RequestError` where the folder is no package, or its record is broken, by the key that is wrong.
    """
    return _validated(package, _read(package))


def _read(package: Path) -> dict[str, Any]:
    """compression.json as it is on disk. Raises `RequestError` where there is none, or something else."""
    file = package / RECORD
    if not package.is_dir():
        raise RequestError(f"{package}: no such folder")
    if not file.exists():
        raise RequestError(f"{package}: not a package of nas-compressor ({RECORD} is missing)")
    data = read_json(file)
    if not isinstance(data, dict):
        raise RequestError(f"{file}: expected a JSON object")
    return data


def _validated(package: Path, data: dict[str, Any]) -> PackageRecord:
    """The record in `data`. Raises `RequestError` that names the wrong key."""
    try:
        return PackageRecord.model_validate({**data, "folder": package})
    except ValidationError as error:
        raise RequestError(f"{package / RECORD}: {first_error(error)}") from None


def write_record(
    folder: Path,
    *,
    entry: Mapping[str, object],
    lineage: Mapping[str, object],
    probe: Probe,
    hashed: Mapping[str, FileRecord],
) -> None:
    """Write compression.json over the files that are in the folder now; those in `hashed` are not hashed again."""
    names = sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file() and f.name != RECORD)
    files = {name: hashed.get(name) or FileRecord.of(folder / name) for name in names}
    data = {
        "schema": SCHEMA,
        "versions": versions(),
        "entry": {**entry, "verified": None},
        "lineage": dict(lineage),
        "probe": probe.model_dump(exclude_unset=True),
        "files": {name: record.model_dump() for name, record in files.items()},
    }
    _validated(folder, data)
    write_json(folder / RECORD, data)


def update_record(package: Path, **sections: Mapping[str, object]) -> None:
    """Add to sections of compression.json: `update_record(package, entry={"quality": 0.98})`.

    The rest stays as it is, with keys of other versions. Raises as `read_record` does.
    """
    data = _read(package)
    _validated(package, data)
    for name, values in sections.items():
        data[name] |= values
    _validated(package, data)
    write_json(package / RECORD, data)


def write_card(package: Path, text: str) -> None:
    """Write the model card and record its hash. Raises as `read_record` does."""
    read_record(package)
    write_text(package / CARD, text)
    update_record(package, files={CARD: FileRecord.of(package / CARD).model_dump()})


def check_files(package: Path) -> PackageRecord:
    """The package's record, where every recorded file is there and unchanged, and no other that a loader would read.

    Raises `VerificationError` that names the file that is not so.
    """
    record = read_record(package)
    for name, recorded in record.files.items():
        file = package / name
        if not file.is_file():
            raise VerificationError(f"{file}: the file is missing")
        if file.stat().st_size != recorded.bytes:
            raise VerificationError(f"{file}: {file.stat().st_size} bytes where {recorded.bytes} were written")
        if sha256(file) != recorded.sha256:
            raise VerificationError(f"{file}: its content is not what was written (SHA-256 differs)")
    for file in sorted(package.rglob("*")):
        loadable = file.suffix in FORBIDDEN | {".py", ".safetensors", ".gguf", ".onnx", ".xml"}
        if file.is_file() and loadable and file.relative_to(package).as_posix() not in record.files:
            raise VerificationError(f"{file}: the file was not part of the package when it was written")
    if record.entry.bytes != (stored := weight_bytes(package)):
        raise VerificationError(
            f"{package / RECORD}: it says {record.entry.bytes:,} bytes of weights, where there are {stored:,}"
        )
    check_code(package)
    return record
