"""Options that several commands share, each with the recipe key that it sets, and the decorator that adds them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from compressor.names import FORMATS, SPACES, TRACKERS, WARM_STARTS
from export.quantization.schemes import SCHEMES
from supernet.common.errors import RequestError
from supernet.common.files import load_yaml

Model = Annotated[str, typer.Argument(help="a checkpoint: a folder or a hub name")]
RunFolder = Annotated[Path, typer.Argument(help="a run directory made by compress or finetune", metavar="RUN")]
Output = Annotated[Path | None, typer.Option(help="the run directory")]
RecipeFile = Annotated[
    Path | None,
    typer.Option("--recipe", help="a YAML recipe, or the name of one (compressor list recipes); options win over it"),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="KEY=VALUE for any key of a recipe, such as healing.learning_rate=1e-4; repeatable"),
]
IncludePath = Annotated[str | None, typer.Option(help="folder of lm-eval task files")]
Json = Annotated[bool, typer.Option("--json", help="machine-readable result on stdout")]
Redo = Annotated[
    str | None, typer.Option(help="finetune, search or export: do it again, although that throws measured work away")
]


Given = dict[str, Any]
"""{key of the recipe: value}, of the options that were given."""


@dataclass(frozen=True)
class RecipeOption:
    """An option that sets a key of the recipe. `flag` is its name where that is not its name in the table, `default`
    what holds where nothing is said, in words where it follows from something else. `int` may be written `1e6`, `0.5M`.
    """

    key: str
    kind: type
    help: str
    flag: str | None = None
    default: str = ""

    @property
    def annotation(self) -> Any:
        flags = () if self.flag is None else (self.flag,)
        text = f"{self.help} [default: {self.default}]" if self.default else self.help
        if self.kind is int:
            return Annotated[str | None, typer.Option(*flags, help=text, metavar="NUMBER")]
        return Annotated[self.kind | None, typer.Option(*flags, help=text)]


BY_EFFORT = "by --effort or --time"
RECIPE_OPTIONS = {
    "data": RecipeOption(
        "data",
        str,
        "training text: .txt, .jsonl, .parquet, a folder, a hub dataset; generated: the model's own",
    ),
    "tasks": RecipeOption("tasks", str, "lm-eval tasks, comma-separated; T:METRIC names a task's metric"),
    "text_key": RecipeOption(
        "text_key", str, "the column of the data to read", default="the columns that have a meaning, such as text"
    ),
    "include_path": RecipeOption("include_path", str, "folder of lm-eval task files", default="lm-eval's own tasks"),
    "space": RecipeOption("space", str, f"{', '.join(SPACES)}, or a YAML file", default="fine"),
    "vocabulary": RecipeOption(
        "vocabulary.size", str, "tokens to keep: 0.5, 24k, auto, or a text to choose by", default="all"
    ),
    "vocabulary_text": RecipeOption("vocabulary.text", str, "text that tokens are counted in", default="the data"),
    "time": RecipeOption("time", str, "how long the whole job may take here, such as 3h or 90m: sets every budget"),
    "effort": RecipeOption(
        "effort", str, "quick, standard or thorough: sets every budget, without a clock", default="standard"
    ),
    "train_tokens": RecipeOption(
        "finetuning.tokens", int, "tokens for the one fine-tuning; 0: none", default=BY_EFFORT
    ),
    "evaluations": RecipeOption(
        "searching.evaluations", int, "sub-networks to measure in the search", default=BY_EFFORT
    ),
    "heal_tokens": RecipeOption(
        "healing.tokens", int, "tokens to heal each chosen sub-network with; 0: none", default=BY_EFFORT
    ),
    "repair": RecipeOption(
        "repair.enabled", str, "on or off: refit what was cut by least squares", default="on where little is trained"
    ),
    "limit": RecipeOption("searching.limit", int, "documents per task in the search", default=BY_EFFORT),
    "warm_start": RecipeOption(
        "searching.warm_start",
        str,
        f"what the search starts from: {', '.join(WARM_STARTS)}, earlier runs; comma-separated",
        default="blockwise,published",
    ),
    "workers": RecipeOption("searching.workers", int, "processes that measure sub-networks side by side", default="1"),
    "max_params": RecipeOption("targets.max_params", str, "0.67, 67%, 450M, or several with commas"),
    "max_bytes": RecipeOption(
        "targets.max_bytes", str, "of the smallest requested variant's weights, for example 2GiB"
    ),
    "min_speedup": RecipeOption("targets.min_speedup", float, "decode tokens per second against the base, such as 1.3"),
    "max_drop": RecipeOption(
        "targets.max_drop", str, "largest loss of quality, for example 1%", default="1% where no target is named"
    ),
    "prefer": RecipeOption(
        "prefer", str, "of those whose scores are as good: quality, speed or balanced", default="quality"
    ),
    "key": RecipeOption("key", str, "a measured sub-network by its key, or the beginning of it (compressor front)"),
    "quantize": RecipeOption("quantizing.schemes", str, f"{', '.join(SCHEMES)}; comma-separated", default="none"),
    "bits": RecipeOption(
        "quantizing.bits",
        str,
        "joint: pick size and bits together, for --max-bytes; asked: only what --quantize names",
        default="joint with --max-bytes",
    ),
    "group_size": RecipeOption(
        "quantizing.group_size", int, "int4's group size", default="the largest of 128, 64, 32 that divides all widths"
    ),
    "rounding_steps": RecipeOption(
        "quantizing.iterations", int, "steps that tune each block's rounding; 0: round by GPTQ", default=BY_EFFORT
    ),
    "formats": RecipeOption(
        "formats", str, f"{', '.join(FORMATS)}; comma-separated", flag="--format", default="uneven"
    ),
    "report_to": RecipeOption(
        "report_to",
        str,
        f"{', '.join(TRACKERS)} or none: who gets every measured number beside RUN/metrics.jsonl",
        default="none",
    ),
    "seed": RecipeOption("seed", int, "the seed of everything random", default="0"),
    "device": RecipeOption("device", str, "auto, cpu or cuda", default="auto"),
    "dtype": RecipeOption("dtype", str, "auto, float32, bfloat16 or float16: what is computed in", default="auto"),
    "revision": RecipeOption("revision", str, "the hub revision of the model", default="main"),
    "trust_remote_code": RecipeOption(
        "trust_remote_code", bool, "run code that the checkpoint brings", flag="--trust-remote-code"
    ),
}

KEYWORD_ONLY = inspect.Parameter.KEYWORD_ONLY
TARGETS = ("max_params", "max_bytes", "min_speedup", "max_drop")


def recipe_options(*names: str, any_key: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of these names; it receives what was given as `given`, {recipe key: value}.

    They stand in the help before the command's own options, behind its arguments. With `any_key`, there is `--set` too.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def run(**values: Any) -> None:
            shared = {RECIPE_OPTIONS[name].key: values.pop(name) for name in names}
            shared |= _settings(values.pop("set_", None) or [])
            command(given={key: value for key, value in shared.items() if value is not None}, **values)

        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "given"]
        if any_key:
            own.append(inspect.Parameter("set_", KEYWORD_ONLY, default=None, annotation=Set))
        arguments = [p for p in own if _is_argument(p)]
        options = [
            inspect.Parameter(name, KEYWORD_ONLY, default=None, annotation=RECIPE_OPTIONS[name].annotation)
            for name in names
        ]
        ordered = [*arguments, *options, *(p for p in own if not _is_argument(p))]
        run.__signature__ = inspect.Signature([p.replace(kind=KEYWORD_ONLY) for p in ordered])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in ordered}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


def _is_argument(parameter: inspect.Parameter) -> bool:
    marks = getattr(parameter.annotation, "__metadata__", ())
    return any(isinstance(mark, typer.models.ArgumentInfo) for mark in marks)


def _settings(pairs: list[str]) -> Given:
    """What `--set key=value` says, values as YAML reads them. Raises `RequestError` for what is no such pair."""
    given: Given = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.strip():
            raise RequestError(f"--set {pair}: expected KEY=VALUE, such as healing.tokens=2M")
        try:
            given[key.strip()] = load_yaml(text)
        except yaml.YAMLError:
            given[key.strip()] = text
    return given
