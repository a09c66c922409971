"""The recipe: what the user asks for, every default filled in. Read from YAML, overridden by the command line.

The resolved recipe stands in `RUN/recipe.yaml`; with the same seed and the same `speed.json` it gives the same run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from export.quantization.schemes import SchemeName
from supernet.common.errors import RequestError, did_you_mean
from supernet.common.files import write_text
from supernet.common.formatting import parse_bytes, parse_parameters

Layout = Literal[
    "uneven", "uniform", "padded", "gguf", "gguf-f32", "gguf-bf16", "gguf-q8_0", "gguf-q4_0", "onnx", "openvino"
]

BUDGETS: dict[str, dict[str, Any]] = {
    # tokens are read from the data; evaluations are measured sub-networks; limit is documents per task in the search;
    # batch is sequences in a training step; rounding is AutoRound's steps for each block
    "quick": {
        "train_tokens": 100_000,
        "evaluations": 72,
        "heal_tokens": 500_000,
        "limit": 200,
        "batch": 4,
        "rounding": 50,
    },
    "standard": {
        "train_tokens": 10_000_000,
        "evaluations": 250,
        "heal_tokens": 10_000_000,
        "limit": 500,
        "batch": 16,
        "rounding": 200,
    },
    "thorough": {
        "train_tokens": 100_000_000,
        "evaluations": 500,
        "heal_tokens": 50_000_000,
        "limit": None,
        "batch": 32,
        "rounding": 200,
    },
}


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class Targets(Section):
    """What the compressed model must reach. `max_params` may hold several sizes, one package set for each."""

    max_params: list[str] = Field(default_factory=list)
    max_bytes: str | None = None
    min_speedup: float | None = Field(default=None, gt=0)
    max_drop: float | None = Field(default=None, ge=0, lt=1)

    @field_validator("max_params", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        if isinstance(value, int | float):
            value = str(value)
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        return [str(part) for part in value] if isinstance(value, list) else [] if value is None else value

    @field_validator("max_drop", mode="before")
    @classmethod
    def _percent(cls, value: Any) -> Any:
        if isinstance(value, str) and value.strip().endswith("%"):
            try:
                return float(value.strip().removesuffix("%")) / 100
            except ValueError:
                raise ValueError(f"{value}: no percentage, such as 1%") from None
        return value

    @model_validator(mode="after")
    def _readable(self) -> Targets:
        for size in self.max_params:
            parse_parameters(size, 1_000_000)
        if self.max_bytes is not None:
            parse_bytes(self.max_bytes)
        return self

    @property
    def empty(self) -> bool:
        return not self.max_params and self.max_bytes is None and self.min_speedup is None and self.max_drop is None


class Finetuning(Section):
    """One fine-tuning of the super-network. `tokens` 0 searches the base as it is. An unset `learning_rate` follows
    the residual width (`learning_rate_for`); `smallest_share` is the small end of the sizes that are trained;
    `ordering` is a criterion of importance, or the `ordering.safetensors` of another run of the same model.

    `loss` is a name or weights by name, say `{ce: 0.3, kl: 0.7}`. `strong_teacher` is the share of the steps, from the
    first, in which the frozen base teaches; after them each step's largest sub-network does. `parameters` are what is
    trained: `all` weights, or `lora`, adapters of rank `lora_rank` beside frozen weights. `shard` shares the weights of
    the layers, with gradients and moments, among all processes (FSDP2).
    """

    tokens: int | None = Field(default=None, ge=0)
    ordering: str = "wanda"
    sampler: str = "sandwich"
    random_members: int = Field(default=1, ge=0)
    draw: str = "cuts"
    loss: str | dict[str, float] = Field(default_factory=lambda: {"ce": 0.3, "kl": 0.7})
    temperature: float = Field(default=1.0, gt=0)
    strong_teacher: float = Field(default=1.0, ge=0, le=1)
    parameters: str = "all"
    lora_rank: int = Field(default=32, ge=1)
    learning_rate: float | None = Field(default=None, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_share: float = Field(default=0.03, ge=0, le=1)
    tail_share: float = Field(default=0.0, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, gt=0)
    move_idle: bool = False
    optimizer: str = "adamw"
    batch_size: int | None = Field(default=None, ge=1)
    gradient_accumulation: int = Field(default=1, ge=1)
    gradient_checkpointing: bool = False
    shard: bool = False
    sequence_length: int = Field(default=256, ge=8)
    smallest_share: float | None = Field(default=None, gt=0, lt=1)

    @field_validator("loss")
    @classmethod
    def _weighted(cls, value: Any) -> Any:
        if isinstance(value, dict) and (not value or min(value.values()) <= 0):
            raise ValueError("weights must be above 0, one at least")
        return value

    @property
    def losses(self) -> dict[str, float]:
        """Weights by name."""
        return {self.loss: 1.0} if isinstance(self.loss, str) else self.loss


class Searching(Section):
    """`warm_start` names what the first generation also measures: other runs' folders (their fronts) and proposers.
    `first_look` is the share of the documents that candidates are scored on first; unset, all at once. `workers`
    measure side by side: processes of this machine, or Ray actors (`executor: ray`)."""

    algorithm: str = "linas"
    evaluations: int | None = Field(default=None, ge=1)
    population: int = Field(default=18, ge=4)
    limit: int | None = Field(default=None, ge=1)
    objectives: list[str] = Field(default_factory=lambda: ["quality", "parameters", "decode_tps"])
    first_look: float | None = Field(default=None, gt=0, le=0.5)
    warm_start: list[str] = Field(default_factory=lambda: ["blockwise"])
    workers: int = Field(default=1, ge=1)
    executor: Literal["processes", "ray"] = "processes"

    @field_validator("objectives", "warm_start", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        return value


class Healing(Section):
    """A short distillation from the base after slicing. `tokens` 0 leaves the sub-network as cut out."""

    tokens: int | None = Field(default=None, ge=0)
    learning_rate: float | None = Field(default=None, gt=0)


class Quantizing(Section):
    """`group_size` is for 4 bits; unset, the largest of 128, 64, 32 that divides all widths. `iterations` is how long
    AutoRound tunes the rounding of each block; 0 rounds to nearest."""

    schemes: list[SchemeName] = Field(default_factory=list)
    group_size: int | None = Field(default=None, ge=8)
    iterations: int | None = Field(default=None, ge=0)
    samples: int = Field(default=64, ge=1)

    @field_validator("schemes", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        return value


class Recipe(Section):
    """Everything a run depends on. Relative paths are relative to the current directory.

    `speed_table`: a speed.json measured on the device to search for, where that is not this one.
    """

    model: str
    data: str | None = None
    tasks: list[str] = Field(default_factory=list)
    include_path: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    space: str | dict[str, Any] = "fine"
    effort: Literal["quick", "standard", "thorough"] = "standard"
    targets: Targets = Field(default_factory=Targets)
    finetuning: Finetuning = Field(default_factory=Finetuning)
    searching: Searching = Field(default_factory=Searching)
    healing: Healing = Field(default_factory=Healing)
    quantizing: Quantizing = Field(default_factory=Quantizing)
    formats: list[Layout] = Field(default=["uneven"])
    batch_tokens: int = Field(default=4096, ge=64)
    speed_table: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    seed: int = Field(default=0, ge=0)

    @field_validator("tasks", "formats", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        return value

    def resolved(self) -> Recipe:
        """The same recipe with the budgets of its effort filled in where nothing else was said."""
        budget = BUDGETS[self.effort]
        recipe = self.model_copy(deep=True)
        if recipe.finetuning.tokens is None:
            recipe.finetuning.tokens = budget["train_tokens"]
        if recipe.finetuning.batch_size is None:
            recipe.finetuning.batch_size = budget["batch"]
        if recipe.searching.evaluations is None:
            recipe.searching.evaluations = budget["evaluations"]
        if recipe.searching.limit is None:
            recipe.searching.limit = budget["limit"]
        if recipe.healing.tokens is None:
            recipe.healing.tokens = budget["heal_tokens"]
        if recipe.quantizing.iterations is None:
            recipe.quantizing.iterations = budget["rounding"]
        if recipe.targets.empty:
            recipe.targets.max_drop = 0.01
        return recipe


def learning_rate_for(hidden_size: int, healing: bool, adapters: bool = False) -> float:
    """Peak learning rate by residual width: at 64, 3e-3 to heal and 1.6e-3 to fine-tune; at 4096, 5e-5 and 2.4e-5.
    Adapters alone, whose products start at zero, bear three times what whole weights do.

    The inverse of the width is how the best rate of an Adam-like step falls for hidden weights (Yang et al.,
    arXiv 2203.03466). The constants were found on stories260K and prose-7m: a network that was cut needs, and bears, a
    rate that would undo much of what a whole one knows (`docs/results.md`).
    """
    return (0.2 if healing else 0.3 if adapters else 0.1) / hidden_size


def read_recipe(file: Path | None, overrides: dict[str, Any], *, new_targets: bool = False) -> Recipe:
    """A recipe from a YAML file (or nothing) and overrides by dotted name; `new_targets` forgets the file's targets.

    Raises `RequestError` in one line.
    """
    values: dict[str, Any] = {}
    where = "the command line"
    if file is not None:
        where = str(file)
        if not file.is_file():
            raise RequestError(f"--recipe {file}: no such file")
        try:
            loaded = yaml.safe_load(file.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RequestError(f"--recipe {file}: not valid YAML ({' '.join(str(error).split())})") from error
        if not isinstance(loaded, dict):
            raise RequestError(f"--recipe {file}: expected keys and values")
        values = {name: value for name, value in loaded.items() if value is not None}  # no value says nothing
    if new_targets:
        values.pop("targets", None)
    for name, value in overrides.items():
        if value is None:
            continue
        section, _, key = name.rpartition(".")
        target = values.setdefault(section, {}) if section else values
        if not isinstance(target, dict):
            raise RequestError(f"{where}: '{section}': expected keys and values (got {target!r})")
        target[key or name] = value
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RequestError(f"{where}: {explain(error)}") from error


def explain(error: ValidationError) -> str:
    """The first problem of a validation error in one line, with the nearest known key for an unknown one."""
    problem = error.errors()[0]
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        section: Any = Recipe
        for part in problem["loc"][:-1]:
            section = section.model_fields[part].annotation if part in section.model_fields else section
        known = list(getattr(section, "model_fields", Recipe.model_fields))
        return (
            f"unknown key '{path}'{did_you_mean(str(problem['loc'][-1]), known) or '; known are ' + ', '.join(known)}"
        )
    if problem["type"] == "missing":
        return f"'{path}' is missing"
    return f"'{path}': {problem['msg'].removeprefix('Value error, ')} (got {problem['input']!r})"


def write_recipe(recipe: Recipe, path: Path, extra: dict[str, Any]) -> None:
    """`recipe.yaml`: the resolved recipe, with versions and fingerprints under `provenance` for the reader."""
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    provenance = yaml.safe_dump({"provenance": extra}, sort_keys=False)
    commented = "".join(f"# {line}\n" for line in provenance.splitlines())
    write_text(path, text + "\n# Written for the reader; not part of the recipe:\n" + commented)
