"""Options that several commands share, each with the recipe key that it sets, and the decorator that adds them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from export.quantization.schemes import SCHEMES

Model = Annotated[str, typer.Argument(help="a checkpoint: a folder or a hub name")]
RunFolder = Annotated[Path, typer.Argument(help="a run directory made by compress or finetune", metavar="RUN")]
Output = Annotated[Path | None, typer.Option(help="the run directory")]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="a YAML recipe; options given here win over it")]
IncludePath = Annotated[str | None, typer.Option(help="folder of lm-eval task files")]
Json = Annotated[bool, typer.Option("--json", help="machine-readable result on stdout")]
Redo = Annotated[str | None, typer.Option(help="a stage to do again, although that throws measured work away")]


Given = dict[str, Any]
"""{key of the recipe: value}, of the options that were given."""


@dataclass(frozen=True)
class RecipeOption:
    """An option that sets a key of the recipe. `flag` is its name where that is not its name in the table."""

    key: str
    kind: type
    help: str
    flag: str | None = None

    @property
    def annotation(self) -> Any:
        flags = () if self.flag is None else (self.flag,)
        return Annotated[self.kind | None, typer.Option(*flags, help=self.help)]


RECIPE_OPTIONS = {
    "data": RecipeOption(
        "data",
        str,
        "training text: .txt, .jsonl, .parquet, a folder, a hub dataset; generated: the model's own",
    ),
    "tasks": RecipeOption("tasks", str, "lm-eval tasks, comma-separated; T:METRIC names a task's metric"),
    "text_key": RecipeOption("text_key", str, "the column of the data with the text, where it is not called 'text'"),
    "include_path": RecipeOption("include_path", str, "folder of lm-eval task files"),
    "space": RecipeOption("space", str, "llama-nas, instatune, depth, uniform, fine, or a YAML file"),
    "time": RecipeOption("time", str, "how long the whole job may take here, such as 3h or 90m: sets every budget"),
    "effort": RecipeOption("effort", str, "quick, standard or thorough: sets every budget, without a clock"),
    "train_tokens": RecipeOption("finetuning.tokens", int, "tokens for the one fine-tuning (0: none)"),
    "evaluations": RecipeOption("searching.evaluations", int, "sub-networks to measure in the search"),
    "heal_tokens": RecipeOption("healing.tokens", int, "tokens to heal each chosen sub-network with (0: none)"),
    "repair": RecipeOption("repair.enabled", str, "on or off: refit what was cut by least squares, without training"),
    "limit": RecipeOption("searching.limit", int, "documents per task in the search"),
    "warm_start": RecipeOption(
        "searching.warm_start",
        str,
        "what the search starts from: earlier runs, greedy, blockwise, published, superposition, comma-separated",
    ),
    "workers": RecipeOption("searching.workers", int, "processes that measure sub-networks side by side"),
    "max_params": RecipeOption("targets.max_params", str, "0.67, 67%, 450M, or several with commas"),
    "max_bytes": RecipeOption(
        "targets.max_bytes", str, "of the smallest requested variant's weights, for example 2GiB"
    ),
    "min_speedup": RecipeOption("targets.min_speedup", float, "decode tokens per second against the base"),
    "max_drop": RecipeOption("targets.max_drop", str, "largest loss of quality, for example 1%"),
    "prefer": RecipeOption("prefer", str, "of those as good as equal: quality, speed or balanced"),
    "key": RecipeOption("key", str, "a measured sub-network by its key, or the beginning of it (compressor front)"),
    "quantize": RecipeOption("quantizing.schemes", str, f"{', '.join(SCHEMES)}; comma-separated"),
    "group_size": RecipeOption(
        "quantizing.group_size", int, "int4's group size; unset: the largest that divides all widths"
    ),
    "formats": RecipeOption(
        "formats",
        str,
        "uneven, uniform, padded, gguf (f16; or gguf-q8_0, gguf-q4_0, …), onnx, openvino",
        flag="--format",
    ),
    "seed": RecipeOption("seed", int, "the seed of everything random"),
    "device": RecipeOption("device", str, "auto, cpu or cuda"),
    "dtype": RecipeOption("dtype", str, "auto, float32, bfloat16 or float16: what is computed in"),
    "revision": RecipeOption("revision", str, "the hub revision of the model"),
    "trust_remote_code": RecipeOption(
        "trust_remote_code", bool, "run code that the checkpoint brings", flag="--trust-remote-code"
    ),
}

KEYWORD_ONLY = inspect.Parameter.KEYWORD_ONLY
TARGETS = ("max_params", "max_bytes", "min_speedup", "max_drop")


def recipe_options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of these names; it receives what was given as `given`, {recipe key: value}.

    They stand in the help before the command's own options, behind its arguments.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def run(**values: Any) -> None:
            shared = {RECIPE_OPTIONS[name].key: values.pop(name) for name in names}
            command(given={key: value for key, value in shared.items() if value is not None}, **values)

        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "given"]
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
