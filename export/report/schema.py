"""The report's data: what `report.json` holds, key by key.

The pipeline assembles the dictionary from what the stages left on disk; the models here type it. `verdict` makes
sentences of it, `table` a table, `page` the HTML page, and `card` a package's model card.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from evals.quality import QualityScale
from evals.speed.measured import Speed
from export.models import JSONArchitecture, Model, first_error
from export.package_record import PackageEntry
from search.control_records import Control, Likeness
from search.scores import Score

SCHEMA = 2
"""1, until 0.1.0: qualities in which chance was not subtracted."""


def _finite_or_none(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _finite_scores(tasks: dict[str, Score]) -> dict[str, Score]:
    """Without the scores that JSON cannot hold, such as the perplexity of a collapsed network."""
    return {task: score for task, score in tasks.items() if math.isfinite(score.value)}


def _all_finite(tasks: dict[str, Score]) -> dict[str, Score]:
    for task, score in tasks.items():
        if not math.isfinite(score.value):
            raise ValueError(f"the score of {task} is not finite ({score.value})")
    return tasks


Scores = Annotated[dict[str, Score], AfterValidator(_all_finite)]
"""Scores by task, all of them finite."""
FiniteScores = Annotated[dict[str, Score], AfterValidator(_finite_scores)]
"""Scores by task, without those that are not."""


class BaseCard(Model):
    """What the base's model card states and the packages' cards repeat; every key as on the hub."""

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: list[str] = Field(default_factory=list)
    datasets: list[str] = Field(default_factory=list)


class Base(Model):
    """The checkpoint that was compressed."""

    name: str
    path: str
    """Path or hub name, as the user gave it."""
    hub_id: str | None = None
    """Its name on the hub, if it was loaded from there; only then can a card link to it."""
    params: int
    """Embeddings counted, tied ones once."""
    bytes: int
    """Size of the safetensors files."""
    dtype: str
    architecture: JSONArchitecture
    tasks: Scores
    """Scores on the report split."""
    bytes_per_token: float | None = None
    """Bytes of text that a token stands for; None where packages have the same tokens."""
    held_out_loss: float | None = None
    """Nats per token on some of the user's text that was not trained on; None if it was not measured."""
    speed: Speed | None = None
    quality: float = 1.0
    """1.0 by definition."""
    card: BaseCard = BaseCard()


class Difference(Model):
    """Of two scores or qualities over the same documents, and its central 95 % by paired bootstrap; positive is better,
    also where a lower score is."""

    value: float
    low: float
    """Lower end of the central 95 % of the resamples."""
    high: float
    """Upper end of it."""

    @property
    def meaning(self) -> Literal["better", "worse", "unclear"]:
        """`better`: better by more than the choice of documents explains."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else "unclear"


class PairedChange(Model):
    """How a package differs from another network over the same documents of the report split."""

    tasks: dict[str, Difference]
    quality: Difference | None = None
    """None where no task counts."""


class QualityBasis(Model):
    """What qualities rest on (`evals.quality`)."""

    counted: list[str]
    """Names of the tasks that count."""
    left_out: list[str]
    """Names of those on which the base is not above chance by two standard errors."""
    remark: str = ""
    """That, and what stands in where no task counts, in a sentence; empty where all count."""

    @classmethod
    def of(cls, scale: QualityScale) -> QualityBasis:
        return cls(counted=scale.counted, left_out=scale.left_out, remark=scale.remark)


class Package(PackageEntry):
    """One folder that was written, reloaded, measured and checked."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    quality: float
    tasks: FiniteScores
    verified: dict[str, object] | None
    change: PairedChange | None = None
    """From the base; None where scores by document are not known, as in runs of earlier versions."""
    change_by_quantization: PairedChange | None = None
    """From the package that it was quantized from."""

    @property
    def label(self) -> str:
        """The name as a table shows it: `best-0.67-int4` is `compressed 0.67 INT4`."""
        label = re.sub(r"^best\b", "compressed", self.name)
        label = re.sub(r"-int(\d)", lambda match: f" INT{match[1]}", label)
        return re.sub("-(?!round)", " ", label)


class MeasuredNetwork(Model):
    """A measured sub-network of the search. Its scores are those of the search split, before healing."""

    key: str
    """`Architecture.key`."""
    architecture: JSONArchitecture
    params: int
    quality: float
    decode_tps: float | None = None
    """Computed from speed.json."""
    tasks: FiniteScores = Field(default_factory=dict)
    """A score that is not finite, such as the perplexity of a collapsed network, is left out: JSON cannot hold it."""
    further: dict[str, float] = Field(default_factory=dict)
    """Other measurements of the search, such as `held_out_loss`."""


class Point(MeasuredNetwork):
    """The same with its place in the search."""

    generation: int
    on_front: bool
    full: bool = True
    """False if only part of the documents were scored: scores are then what these predict."""


class PredictorScore(Model):
    """How well a predictor predicted the newest measurements before it was trained on them."""

    name: str
    kendall: Annotated[float | None, BeforeValidator(_finite_or_none)] = None
    """Rank correlation tau; None if all measurements are equal."""
    spearman: Annotated[float | None, BeforeValidator(_finite_or_none)] = None
    mae: Annotated[float | None, BeforeValidator(_finite_or_none)] = None
    """Mean absolute error, in the objective's unit."""
    used: bool
    """False if it ranked no better than chance and was set aside."""


class Generation(Model):
    """One generation of the search."""

    generation: int
    evaluations: int
    """Measured so far, this generation included."""
    hypervolume: float
    predictor: PredictorScore | None = None
    """None in generations without one, such as the first."""
    seconds_evaluating: float
    seconds_other: float


class Gene(Model):
    """One choice of the search space: a size of one layer, or of all."""

    name: str
    values: list[Any]


class Space(Model):
    """The search space; without a name where it was spelled out."""

    name: str | None = None
    genes: list[Gene]


class Search(Model):
    """What the search measured."""

    algorithm: str
    evaluations: int
    generations: list[Generation]
    points: list[Point]
    """Every measured sub-network."""
    space: Space
    quality: QualityBasis | None = None
    """What qualities on the search documents rest on."""
    base_decode_tps: float | None = None
    """Of the base, computed from speed.json as for the points; None in reports of earlier versions."""
    control: Control | None = None
    """Beside a random search of as many evaluations; None in reports of earlier versions."""
    likeness: Likeness | None = None
    """Whether the search could learn anything."""
    targets: dict[str, object] = Field(default_factory=dict)
    """As resolved in the recipe: `max_params`, `max_bytes`, `min_speedup`, `max_drop`."""


class CurvePoint(Model):
    """Held-out losses at one step, nats per token."""

    step: int
    tokens: int
    largest: float | None = None
    middle: float | None = None
    """A uniform cut between the two."""
    smallest: float | None = None
    asked: float | None = None
    """Mean over uniform cuts of the sizes that were asked for."""
    loss: float | None = None
    """Loss of the one network that is healed."""


class Training(Model):
    """A training: of the super-network, or of a sub-network that is healed."""

    curve: list[CurvePoint]
    learning_rate: float | None = None
    """The peak, as it was before it was halved."""
    tokens: int
    seconds: float
    measuring: float = 0.0
    """Seconds of them in which held-out losses were measured and the best state was written."""
    kept: int | None = None
    """The step whose state was kept, being the best; 0: the untrained one."""
    halved: list[int] = Field(default_factory=list)
    """Steps after which training went back to the best state and halved its rate."""
    outcome: str = ""
    """The same as a sentence, with the losses before and after."""


class Finetune(Training):
    """The fine-tuning of the super-network."""

    sampler: str
    loss: str
    data: str | None = None
    """The user's data, as given."""
    bands: list[Training] = Field(default_factory=list)
    """The trainings of further super-networks, where each band of sizes has one: that of smaller sizes comes later."""


class Sample(Model):
    """One prompt of the user's data and how each network continues it."""

    prompt: str
    continuations: dict[str, str]
    """Greedy continuations, by package name and `base`."""


class Alternative(Model):
    """What another preference would have picked in the place of a package's network."""

    name: str
    """Name of the package."""
    prefer: str
    key: str
    params: int
    quality: float
    """On the search split, before healing."""
    held_out_loss: float | None = None
    """Nats per token on held-out text, before healing."""
    speedup: float | None = None
    """Decode speed over the base's, by the layers' timings."""
    command: str
    """What makes it."""


class Comparison(Model):
    """One method at one size and seed, healed and scored as ours."""

    method: str
    about: str
    """The paper that defines it, or what it is."""
    size: str | None
    """As asked for, such as `0.67`; None for an external checkpoint."""
    seed: int | None
    path: str
    architecture: JSONArchitecture | None = None
    params: int
    bytes: int | None = None
    tokens: int | None = None
    """Read in healing; None if that is not known."""
    quality: float
    """On the report split, as for packages."""
    quality_stderr: float | None = None
    """One standard error over documents, bootstrapped."""
    quality_before_healing: float | None = None
    """As published: cut, but not trained."""
    tasks: FiniteScores = Field(default_factory=dict)
    speed: Speed | None = None
    base_speed: Speed | None = None
    """The base's, measured alternately with this one's."""
    text_per_token: float = 1.0
    """Text that a token stands for, as a share of what one of the base's does; 1 where no vocabulary was cut."""
    ours_minus_this: Difference | None = None
    """Difference of qualities over all seeds of this method and size; None for ours."""


class Again(Model):
    """How to get the same again, and what it took."""

    command: str
    """One line for a shell."""
    run: str
    """The name of the folder of the run, whose recipe `compressor recipe` prints."""
    seconds: float
    """That all stages took together, in every process that worked on them."""
    machine: str
    device: str
    """The GPU's name, or `cpu`."""


class Report(Model):
    """`report.json`."""

    schema_: int = Field(SCHEMA, alias="schema")
    """Version of this schema."""
    versions: dict[str, str]
    """Of Python and of the packages that matter."""
    recipe: dict[str, Any]
    """recipe.yaml: every default filled in, seeds, fingerprints of model, data and tasks."""
    base: Base
    quality: QualityBasis | None = None
    """What qualities on the report split rest on."""
    front: list[MeasuredNetwork]
    """The Pareto front of fully measured sub-networks."""
    packages: list[Package]
    quantized_base: list[Package] = Field(default_factory=list)
    """The base itself in few bits, measured as packages are."""
    left_out: dict[str, str] = Field(default_factory=dict)
    """Why packages that were asked for were not made, by name."""
    comparison: list[Comparison] = Field(default_factory=list)
    search: Search | None = None
    finetune: Finetune | None = None
    repaired: dict[str, int] | None = None
    """Tokens that what was sliced was refitted on by least squares, 0 where it was not, by the name of the package;
    None in reports of versions that did not say."""
    healing: dict[str, Training] = Field(default_factory=dict)
    """By the name of the package that was healed."""
    hub_dataset: str | None = None
    """Name of the data set that was fine-tuned or healed on, if it was loaded from the hub."""
    samples: list[Sample] = Field(default_factory=list)
    alternatives: list[Alternative] = Field(default_factory=list)
    """What other preferences would have picked."""
    again: Again | None = None

    @field_validator("schema_")
    @classmethod
    def _of_this_version(cls, schema: int) -> int:
        if schema != SCHEMA:
            raise ValueError(
                f"{schema} is of another version, whose qualities are defined otherwise; make the report anew with "
                "compressor report RUN"
            )
        return schema

    @property
    def scale(self) -> QualityScale:
        """What qualities on the report split are measured against."""
        return QualityScale(self.base.tasks, self.base.held_out_loss)

    def unquantized(self, package: Package) -> Package | None:
        """The package that `package` was quantized from, if it is here; None for an unquantized one."""
        if package.quantization is None:
            return None
        same = [p for p in self.packages if p.quantization is None and p.architecture == package.architecture]
        return next((p for p in same if p.layout == package.layout), same[0] if same else None)

    @property
    def tasks(self) -> list[str]:
        """Names of all tasks, in the base's order."""
        return list(dict.fromkeys(task for row in self.rows for task in row.tasks))

    @property
    def rows(self) -> list[Base | Package]:
        """The base, the base in few bits, then the packages: the rows of every table."""
        return [self.base, *self.quantized_base, *self.packages]

    def package(self, name: str) -> Package:
        """The package called `name`. Raises KeyError where there is none."""
        for package in self.packages:
            if package.name == name:
                return package
        raise KeyError(f"no package {name!r} in the report; there are {[package.name for package in self.packages]}")


def validate_report(data: Mapping[str, Any]) -> Report:
    """The typed report. Raises ValueError with one line that names the first wrong key, as in `report.json: base.params
    is missing`."""
    try:
        return Report.model_validate(data)
    except ValidationError as error:
        keys = {field.alias or name for model in _models() for name, field in model.model_fields.items()}
        raise ValueError(f"report.json: {first_error(error, keys)}") from None


def _models() -> Iterator[type[Model]]:
    waiting = [Model]
    while waiting:
        model = waiting.pop()
        waiting += model.__subclasses__()
        yield model
