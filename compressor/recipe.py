"""The recipe: what the user asks for, every default filled in. `compressor.recipe_file` reads it from YAML and options.

The resolved recipe stands in `RUN/recipe.yaml`; with the same seed and the same `speed.json` it gives the same run on
the same kind of machine. `docs/recipe.md` is made from the sentences at the keys (`compressor.recipe_reference`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from compressor.names import FORMATS
from export.quantization.schemes import EmbeddingBits, SchemeName
from search.preference import Preference
from supernet.common.errors import did_you_mean
from supernet.common.formatting import parse_bytes, parse_count, parse_duration, parse_parameters
from supernet.training.sources import generated_limit, is_generated
from supernet.vocabulary import AUTO, is_size, parse_size

Tracker = Literal["tensorboard", "wandb", "trackio"]

FEW_TOKENS = 0.01
"""Tokens for each parameter, of fine-tuning and healing together, below which cut projections are repaired: what is
healed on more than that ends as well without (docs/results.md)."""


class Budget(BaseModel):
    """What an `effort` sets where nothing else was said."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    train_tokens: int
    """Tokens read in the one fine-tuning."""
    evaluations: int
    """Sub-networks measured in the search."""
    heal_tokens: int
    """Tokens read in healing each pick."""
    limit: int | None
    """Documents per task in the search; None: all."""
    batch: int
    """Sequences in a training step."""
    rounding: int
    """AutoRound's steps for each block."""
    samples: int = 64
    """Sequences that weights of fewer than 8 bits are rounded on."""
    calibration: int = 16384
    """Tokens that cut projections are refitted to."""


BUDGETS = {
    "quick": Budget(train_tokens=100_000, evaluations=72, heal_tokens=500_000, limit=200, batch=4, rounding=50),
    "standard": Budget(
        train_tokens=10_000_000, evaluations=250, heal_tokens=10_000_000, limit=500, batch=16, rounding=200
    ),
    "thorough": Budget(
        train_tokens=100_000_000, evaluations=500, heal_tokens=50_000_000, limit=None, batch=32, rounding=200
    ),
}

OPEN = {
    "train_tokens": "finetuning.tokens",
    "evaluations": "searching.evaluations",
    "heal_tokens": "healing.tokens",
    "limit": "searching.limit",
    "batch": "finetuning.batch_size",
    "rounding": "quantizing.iterations",
    "samples": "quantizing.samples",
    "calibration": "repair.tokens",
}
"""The recipe's key of each budget."""

FORMER_NAMES = {"move_inactive": "move_idle", "screening": "first_look"}
"""Keys that had another name once, which is still read, and still stands in fingerprints: runs begun then go on."""


def former_names(values: Mapping[str, object]) -> dict[str, object]:
    """Values of a section, for a fingerprint: under the names that the keys had when fingerprints were first made."""
    return {FORMER_NAMES.get(name, name): value for name, value in values.items()}


def _listed(value: Any) -> Any:
    """Lists may be written as text with commas."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def _sizes(value: Any) -> Any:
    """Sizes may be written as a number, or as text with commas."""
    value = _listed(str(value) if isinstance(value, int | float) else value)
    return [str(part) for part in value] if isinstance(value, list) else [] if value is None else value


def _share(value: Any) -> Any:
    """A share may be written as a percentage."""
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            return float(value.strip().removesuffix("%")) / 100
        except ValueError:
            raise ValueError(f"{value}: no percentage, such as 1%") from None
    return value


def _trackers(value: Any) -> Any:
    """`none` names no tracker."""
    return [] if value == "none" else _listed(value)


Names = Annotated[list[str], BeforeValidator(_listed)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _counted(cls, value: Any, info: ValidationInfo) -> Any:
        """Whole numbers may be written as `1e6`, `0.5M` or `10_000`."""
        kinds = get_args(cls.model_fields[str(info.field_name)].annotation)
        if isinstance(value, str) and (cls.model_fields[str(info.field_name)].annotation is int or int in kinds):
            return parse_count(value)
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML's yes, on and true are no 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation not in (bool, bool | None):
            raise ValueError("true or false is no value of it")
        return value


class Targets(Section):
    """What the compressed model must reach. Without any: `max_drop` 1 %."""

    max_params: Annotated[list[str], BeforeValidator(_sizes)] = Field(default_factory=list)
    """Most parameters: a share of the base's (`0.67`, `67%`) or a number (`450M`); several give a package set each."""
    max_bytes: str | None = None
    """Most bytes of the smallest requested variant's weights, such as `2GiB`; of its file where bits are picked too."""
    min_speedup: float | None = Field(default=None, gt=0)
    """Least decode tokens per second, as a multiple of the base's."""
    max_drop: Annotated[float | None, BeforeValidator(_share)] = Field(default=None, ge=0, lt=1)
    """Largest loss of quality (docs/quality.md) on the search documents, before healing and quantization: `1%` keeps
    0.99."""

    @field_validator("max_params")
    @classmethod
    def _parameters(cls, sizes: list[str]) -> list[str]:
        for size in sizes:
            parse_parameters(size, 1_000_000)
        return sizes

    @field_validator("max_bytes")
    @classmethod
    def _bytes(cls, size: str | None) -> str | None:
        if size is not None:
            parse_bytes(size)
        return size

    @property
    def empty(self) -> bool:
        return not self.max_params and self.max_bytes is None and self.min_speedup is None and self.max_drop is None


class Vocabulary(Section):
    """Which tokens stay, chosen before anything else. Without a size, all do."""

    size: str | None = None
    """Tokens to keep: a share (`0.5`, `50%`), a number (`24k`), `auto` (those that cover 99.9 % of text that was not
    counted, and 98 % of the tasks' search documents), or a text, which means `auto` on that text."""
    text: str | None = None
    """The text to count tokens in, of the kinds that `data` can be. Unset: `data`."""

    @model_validator(mode="before")
    @classmethod
    def _text_as_size(cls, values: Any) -> Any:
        """A size that is the name of a text means auto on that text."""
        size = values.get("size") if isinstance(values, dict) and values.get("text") is None else None
        if isinstance(size, str) and not is_size(size) and ("/" in size or "." in size or Path(size).exists()):
            return {**values, "size": AUTO, "text": size}
        return values

    @model_validator(mode="after")
    def _text_of_a_size(self) -> Vocabulary:
        if self.text is not None and self.size is None:
            raise ValueError("a text to choose tokens by, but no size; say --vocabulary auto too")
        return self

    @field_validator("size", mode="before")
    @classmethod
    def _numbers(cls, size: Any) -> Any:
        return str(size) if isinstance(size, int | float) and not isinstance(size, bool) else size

    @field_validator("size")
    @classmethod
    def _size(cls, size: str | None) -> str | None:
        if size is not None:
            parse_size(size, 1_000_000)
        return size


class Finetuning(Section):
    """The one fine-tuning of the super-network."""

    tokens: int | None = Field(default=None, ge=0)
    """Tokens to read; 0 searches the base as it is. Unset: by `effort`."""
    ordering: str | None = None
    """The criterion by which units are ordered, or the `ordering.safetensors` of another run of the same model. Unset:
    `wanda`, and `surgeon` where what is cut is repaired."""
    sampler: str = "sandwich"
    """Who takes part in a step: `sandwich` (largest, random, smallest), `joint` or `alternate`."""
    random_members: int = Field(default=1, ge=0)
    """Random sub-networks in a step."""
    draw: str = "cuts"
    """Where random sub-networks come from: `sizes`, `cuts`, `genes` or `shift`."""
    loss: str | dict[str, float] = Field(default_factory=lambda: {"ce": 0.3, "kl": 0.7})
    """The loss by name (`ce`, `kl`, `relations`, `hidden`), or weights by name such as `{ce: 0.3, kl: 0.7}`."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of the distributions that `kl` compares."""
    strong_teacher: float = Field(default=1.0, ge=0, le=1)
    """Share of the steps, from the first, in which the frozen base teaches; then each step's largest member does."""
    parameters: str = "all"
    """What is trained: `all` weights; `lora`, adapters beside frozen weights; or `routed`, all weights and changes of
    FFN matrices that depend on a layer's sizes (Mixture-of-Supernets; not with a repair or `format: elastic`)."""
    lora_rank: int = Field(default=32, ge=1)
    """Rank of the adapters, or of all changes of a matrix together."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate. Unset: 0.1 / residual width, for adapters 0.3 / residual width; less where weights are small
    (a hundredth of their root mean square, for adapters three)."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls."""
    warmup_share: float = Field(default=0.03, ge=0, le=1)
    """Share of the steps in which the learning rate rises."""
    tail_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of the steps, at the end, with a constant learning rate (BigNAS)."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of matrices."""
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of a step's gradient."""
    move_inactive: bool = Field(default=False, validation_alias=AliasChoices("move_inactive", "move_idle"))
    """Whether weight decay and momentum move slices that took no part in a step."""
    optimizer: str | None = None
    """Of fine-tuning and healing: `muon` (AdamW for what is no matrix), `adamw` (fused), or `adamw-8bit` (bitsandbytes,
    GPU only). Unset: `muon` up to a residual width of 1,024, `adamw` beyond."""
    batch_size: int | None = Field(default=None, ge=1)
    """Sequences in a step, of fine-tuning and healing. Unset: by `effort`."""
    gradient_accumulation: int | None = Field(default=None, ge=1)
    """Parts that a batch is computed in, of fine-tuning and healing. Unset: one on a GPU; on a CPU as many as keep what
    a part's backward pass needs within 3 GiB."""
    gradient_checkpointing: bool = False
    """Whether layers are computed again in the backward pass, to save memory."""
    shard: bool = False
    """Whether all processes share the layers' weights, gradients and moments (FSDP2)."""
    sequence_length: int = Field(default=256, ge=8)
    """Tokens in a sequence, of fine-tuning and healing."""
    smallest_share: float | None = Field(default=None, gt=0, lt=1)
    """Smallest size that is trained, as a share of the base. Unset: 0.85 of the smallest size asked for."""
    largest_share: float | None = Field(default=None, gt=0, le=1)
    """Largest size that is trained, as a share of the base; the base teaches it. Unset: the base itself."""
    bands: int = Field(default=1, ge=1, le=8)
    """Super-networks, each for its band of these sizes and trained on its part of the tokens (AutoDistil); sub-networks
    are cut out of that of their size. Not with a repair, `format: elastic`, `shard` or `parameters: routed`."""

    @field_validator("loss")
    @classmethod
    def _weighted(cls, value: Any) -> Any:
        if isinstance(value, dict) and (not value or min(value.values()) <= 0):
            raise ValueError("weights must be above 0, one at least")
        return value

    @property
    def weights_by_size(self) -> str | None:
        """The choice that gives sub-networks weights by their sizes, as a recipe has it; None where there is none."""
        if self.parameters == "routed":
            return "finetuning.parameters: routed"
        return f"finetuning.bands: {self.bands}" if self.bands > 1 else None

    @property
    def losses(self) -> dict[str, float]:
        """Weights by name."""
        return {self.loss: 1.0} if isinstance(self.loss, str) else self.loss


class EarlierSearch(Section):
    """A search that came before the one of the present targets."""

    targets: Targets
    """What it looked for."""
    evaluations: int = Field(ge=2)
    """Sub-networks that it measured."""


class Searching(Section):
    """The search."""

    algorithm: str = "linas"
    """`linas`, `ehvi` (LINAS two at a time, by expected hypervolume; it thinks for half a second and more about every
    two, so it is for sub-networks that take longer to measure), `nsga2`, `age-moea`, `unsga3`, `random` or `greedy`."""
    evaluations: int | None = Field(default=None, ge=2)
    """Sub-networks to measure; of sizes asked for, a seventh of them between the largest and the base. Unset: by
    `effort`."""
    earlier: list[EarlierSearch] = Field(default_factory=list)
    """Searches for other targets that it goes on from, each with its `targets` and `evaluations`; `compressor search`
    writes them here."""
    targets: Targets | None = None
    """What it looks for, where others are picked for; `compressor pick` writes it here. Unset: the recipe's targets."""
    population: int = Field(default=18, ge=4)
    """Sub-networks in a generation."""
    limit: int | None = Field(default=None, ge=1)
    """Documents per task in the search. Unset: by `effort`."""
    objectives: Names = Field(default_factory=lambda: ["quality", "parameters", "decode_tps"])
    """Two to four of `quality`, a task, `TASK:METRIC`, `held_out_loss`, `kl_to_base`, `parameters`, `bytes`, `macs`,
    `kv_cache_bytes`, `decode_tps`, `prefill_tps`, `latency`."""
    screening: float | None = Field(
        default=None, gt=0, le=0.5, validation_alias=AliasChoices("screening", "first_look")
    )
    """Share of the documents that candidates are scored on first. Unset: all documents at once."""
    warm_start: Names = Field(default_factory=lambda: ["blockwise", "published"])
    """What the first generation also measures: earlier runs' folders (their fronts), `blockwise`, `superposition`,
    `router`, `greedy`, and `published`: what depth and width baselines would cut."""
    workers: int = Field(default=1, ge=1)
    """Processes or Ray actors that measure side by side."""
    executor: Literal["processes", "ray"] = "processes"
    """Where workers run: processes of this machine, or Ray actors."""


class Healing(Section):
    """A short distillation from the base after slicing."""

    tokens: int | None = Field(default=None, ge=0)
    """Tokens to read; 0 leaves the sub-network as cut out. Unset: by `effort`."""
    finalists: int = Field(default=1, ge=1, le=8)
    """The nearest picks that are healed on a share of the tokens, the better half on more, and so on to the one that
    ships: of as many tokens in all."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate. Unset: 0.2 / residual width, half of it for a repaired network; less where weights are small
    (two hundredths of their root mean square)."""


class Repair(Section):
    """Output projections of cut half-blocks refitted by least squares, without training."""

    enabled: bool | None = None
    """Whether the search scores repaired sub-networks, and picks are sliced with a repair in sequence. Unset: where
    fine-tuning and healing together read fewer tokens than a hundredth of the parameters, and no elastic package is
    asked for."""
    tokens: int | None = Field(default=None, ge=256)
    """Tokens of the fine-tuning's text that projections are fitted to; better ten times the FFN width than less. Unset:
    16,384, or by `time`."""
    memory: str = "1GiB"
    """Bytes of repaired weights that a search keeps, such as `1GiB`, and as much of what they are made from; those
    dropped are made again."""

    @field_validator("memory")
    @classmethod
    def _bytes(cls, size: str) -> str:
        parse_bytes(size)
        return size


class Quantizing(Section):
    """Quantized packages beside the unquantized one."""

    schemes: Annotated[list[SchemeName], BeforeValidator(_listed)] = Field(default_factory=list)
    """Any of `int8`, `int8-dynamic`, `int4`, `int3`, `int2`, `int8-auto-round`, `int4-auto-round`."""
    bits: Literal["asked", "joint"] | None = None
    """`joint` picks the size together with the bits of weights and embedding: the lowest loss that fits `max_bytes`,
    the whole network among the candidates; `asked` writes only the schemes that are named. Unset: `joint` where
    `max_bytes` is set."""
    embedding: EmbeddingBits | None = None
    """Bits of the embedding, and of a head of its own, in quantized packages: 16, 8 or 4. Those of a tied network need
    the code file of an uneven package (or a gguf file): where a number is given, a network whose layers are alike is
    written as one too, in the layout `uneven`, but for `--format uniform`, whose embedding then stays in 16 bits.
    Unset: 8 where the package can hold it."""
    group_size: int | None = Field(default=None, ge=8)
    """Input channels that share a scale, for fewer than 8 bits. Unset: the largest of 128, 64, 32 that divides all
    widths."""
    iterations: int | None = Field(default=None, ge=0)
    """Steps for which AutoRound tunes the rounding of each block, for fewer than 8 bits (8 gain nothing by it); 0
    rounds by GPTQ, which makes up for each weight's rounding by those behind it. Unset: by `effort`."""
    samples: int | None = Field(default=None, ge=1)
    """Sequences of text that weights of fewer than 8 bits are rounded on. Unset: by `effort`."""


class Recipe(Section):
    """Everything a run depends on. Relative paths are relative to the current directory."""

    model: str
    """The checkpoint: a folder or a hub name."""
    data: str | None = None
    """Training text: a `.txt`, `.jsonl`, `.json`, `.parquet` or `.arrow` file (text and JSON also as `.gz`, `.zst` or
    `.bz2`), a folder of them, or a hub dataset; or `generated`, text that the model writes itself (`generated:2M`: at
    most so many tokens)."""
    text_key: str | None = None
    """The one column of the data to read. Without it, a row has `text`; `prompt` and `completion`; `messages`;
    `conversations` (ShareGPT); or `instruction`, `input` and `output` (Alpaca)."""
    tasks: Names = Field(default_factory=list)
    """lm-eval tasks that the search maximises; `T:METRIC` names a task's metric."""
    include_path: str | None = None
    """A folder of lm-eval task files."""
    revision: str | None = None
    """The hub revision of the model."""
    trust_remote_code: bool = False
    """Whether code that the checkpoint brings may run."""
    space: str | dict[str, Any] = "fine"
    """The search space: `llama-nas`, `instatune`, `depth`, `uniform`, `fine`, `simq` (with bits), a YAML file, or genes
    spelled out."""
    time: str | None = None
    """How long the whole job may take on this machine, such as `3h`, `90m` or `1h30m`: sets every budget that is not
    set by itself (`docs/time.md`)."""
    effort: Literal["quick", "standard", "thorough"] = "standard"
    """Without a time, sets every budget that is not set by itself."""
    vocabulary: Vocabulary = Field(default_factory=Vocabulary)
    targets: Targets = Field(default_factory=Targets)
    prefer: Preference = "quality"
    """Of those that meet the targets and whose scores are as good as the best: the lowest held-out loss (`quality`),
    the fastest whose loss is near it (`speed`), or the least loss of both together (`balanced`)."""
    key: str | None = None
    """The measured sub-network to pick instead, by its key in `compressor front` or the beginning of it."""
    finetuning: Finetuning = Field(default_factory=Finetuning)
    searching: Searching = Field(default_factory=Searching)
    repair: Repair = Field(default_factory=Repair)
    healing: Healing = Field(default_factory=Healing)
    quantizing: Quantizing = Field(default_factory=Quantizing)
    formats: Names = Field(default=["uneven"])
    """Layouts of the packages: `uneven`, `uniform`, `padded`, `elastic`, `gguf` (f16; or `gguf-` and one of `f32`,
    `bf16`, `q8_0`, `q6_k`, `q5_k`, `q5_1`, `q4_k`, `iq4_nl`, `q4_0`, `q3_k`, `q2_k`, or `mixed`: a type for every
    half-block, chosen to fit `targets.max_bytes`), `onnx`, `openvino`."""
    batch_tokens: int | None = Field(default=None, ge=64)
    """Tokens scored in one pass. Unset: 4096 on a CPU, 16384 on a GPU."""
    speed_table: str | None = None
    """A file of `compressor speed-table`, measured on the device to search for where that is not this one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where networks are computed."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What networks are computed in; `auto` is float32 on a CPU, bfloat16 on a GPU."""
    seed: int = Field(default=0, ge=0)
    """The seed of everything random."""

    report_to: Annotated[list[Tracker], BeforeValidator(_trackers)] = Field(default_factory=list)
    """Trackers that get every measured number beside `metrics.jsonl`: `tensorboard`, `wandb`, `trackio`."""

    @field_validator("time")
    @classmethod
    def _time(cls, text: str | None) -> str | None:
        if text is not None:
            parse_duration(text)
        return text

    @property
    def searched_for(self) -> Targets:
        """The targets of the search."""
        return self.searching.targets or self.targets

    def budget(self, name: str) -> int | None:
        """The budget of this name (`OPEN`); None where it is not set."""
        section, _, key = OPEN[name].partition(".")
        return getattr(getattr(self, section), key)

    def set_budget(self, name: str, value: int | None) -> None:
        """Set the budget of this name (`OPEN`)."""
        section, _, key = OPEN[name].partition(".")
        setattr(getattr(self, section), key, value)

    @field_validator("formats")
    @classmethod
    def _known(cls, formats: list[str]) -> list[str]:
        for name in formats:
            if name not in FORMATS:
                raise ValueError(
                    f"'{name}' is unknown{did_you_mean(name, FORMATS, 1) or '; see compressor list formats'}"
                )
        return formats

    @field_validator("key")
    @classmethod
    def _named(cls, key: str | None) -> str | None:
        return key or None

    @field_validator("data")
    @classmethod
    def _readable(cls, source: str | None) -> str | None:
        if source is not None and is_generated(source):
            generated_limit(source)
        return source

    def trains_little(self, parameters: int) -> bool:
        """Whether so few tokens are read for so many parameters that repair gains more than it gets in the way of."""
        tokens = (self.finetuning.tokens or 0) + (self.healing.tokens or 0)
        return self.data is not None and tokens < FEW_TOKENS * parameters

    def resolved(self) -> Recipe:
        """The same recipe with the budgets of its effort filled in where nothing else was said."""
        budget = BUDGETS[self.effort]
        recipe = self.model_copy(deep=True)
        for name in OPEN:
            if recipe.budget(name) is None:
                recipe.set_budget(name, getattr(budget, name))
        if recipe.targets.empty:
            recipe.targets.max_drop = 0.01
        if recipe.searching.targets == recipe.targets:
            recipe.searching.targets = None
        return recipe
