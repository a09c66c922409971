"""Fuzzed recipes and command lines: each is done, or refused in a line that names the key.

What is accepted stops where its work would begin; one in a hundred is done to its end.
"""

from __future__ import annotations

import os
import random
import shutil
import types
import typing
from pathlib import Path
from typing import Any

import click
import typer
import yaml
from pydantic import BaseModel

from compressor import pipeline
from compressor.cli import app
from compressor.cli.options import RECIPE_OPTIONS
from compressor.recipe import Recipe
from tests.campaign.good import Attempts, Before, Good, Tally, run_apart

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 10**30, -(10**30), 0.5, 1.5, -0.1, 1e300, float("inf"), float("nan"),
    "", " ", "x", "nan", "1e", "0.5", "67%", "1%", "450M", "2GiB", "0", "-1", "1,2", ",", "é", "\u200b", "a b", "../x",
    "/dev/null", "/", "~", "none", "auto", "cpu", "int8", "int4", "gguf", "onnx", "uneven,padded", "wanda", "fine",
    "generated", "generated:", "generated:1",
    "depth", "ce", "random", "nsga2", "greedy", "blockwise", "quality", "parameters", "parameters,bytes",
    [], [None], [1], ["x"], ["int8", "int8"], ["quality", "parameters"], [[]], {}, {"a": 1}, {"ce": 1}, {"ce": -1},
    {1: 2}, {"kl": "x"},
)  # fmt: skip
"""Values of all types, some of which are good for some key."""


def keys(model: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """All keys of the recipe, those of its sections with a dot."""
    found = []
    for name, field in model.model_fields.items():
        listed = typing.get_origin(field.annotation) is list  # what is in a list has no dotted key
        kinds = [] if listed else [field.annotation, *typing.get_args(field.annotation)]
        sections = [kind for kind in kinds if isinstance(kind, type) and not isinstance(kind, types.GenericAlias)]
        section = next((kind for kind in sections if issubclass(kind, BaseModel)), None)
        found += [prefix + name, *(keys(section, f"{prefix}{name}.") if section else [])]
    return found


def names_of(key: str) -> list[str]:
    """How a refusal may name a key: as it stands in a recipe, or its option."""
    name = key.rpartition(".")[2]
    flags = [
        option.flag or f"--{flag.replace('_', '-')}" for flag, option in RECIPE_OPTIONS.items() if option.key == key
    ]
    return [name, *flags]


def fuzzed_recipe(good: Good, rng: random.Random) -> tuple[list[str], list[str], str]:
    """A command with a recipe that has some keys changed; the names that a refusal may give; what was done."""
    recipe: dict[str, Any] = yaml.safe_load((good.folder / "recipe.yaml").read_text())
    changed, names = [], []
    for key in rng.sample(keys(), rng.choice([1, 1, 1, 2, 3])):
        if rng.random() < 0.05:
            key = key[:-1] or "x"
        section, _, name = key.rpartition(".")
        value = rng.choice(VALUES)
        place = recipe.setdefault(section, {}) if section else recipe
        if not isinstance(place, dict):  # the section was changed itself
            continue
        place[name] = value
        changed.append(f"{key}: {value!r}")
        names += names_of(key)
    text = yaml.safe_dump(recipe, allow_unicode=True)
    if rng.random() < 0.03:
        place_at = rng.randrange(len(text))
        text = (
            text[:place_at]
            + rng.choice(["\t", "{", ":", "!!python/object:os.system", "&a *a", "\x00"])
            + text[place_at:]
        )
        names.append("")  # whatever it says: the text itself is broken
    (good.folder / "recipe.yaml").write_text(text)
    command = rng.choice(
        [good.compress(), good.compress(), ["inspect", str(good.folder / "model"), *good.compress()[8:10]]]
    )
    return command, names, "; ".join(changed)


def good_commands(good: Good) -> dict[str, list[str]]:
    """A good command line of each command that needs no hub and no minutes."""
    made, run = good.compress(), str(good.run)
    tasks = made[4:8]
    return {
        "compress": made,
        "finetune": ["finetune", *made[1:4], *made[8:]],
        "inspect": ["inspect", made[1]],
        "search": ["search", run],
        "pick": ["pick", run],
        "export": ["export", run],
        "report": ["report", run],
        "compare": ["compare", run],
        "evaluate": ["evaluate", made[1], *tasks],
        "verify": ["verify", str(good.package)],
        "push": ["push", str(good.package), "owner/name", "--dry-run"],
        "speed-table": ["speed-table", made[1], str(good.folder / "table.json")],
    }


def fuzzed_command(good: Good, rng: random.Random) -> tuple[list[str], list[str], str]:
    """A good command line with options added, repeated, given other values, or an argument taken away."""
    commands = good_commands(good)
    name = rng.choice([*commands, *["compress"] * 8, *["finetune"] * 3])
    command = list(commands[name])
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    parameters = group.commands[name].params
    options = [option for option in parameters if option.param_type_name == "option" and "--help" not in option.opts]
    names = ["unexpected extra argument", "o such option"]  # an option without its value takes the next one's name
    before = list(command)
    for _ in range(rng.choice([1, 1, 2])):
        way = rng.random()
        if way < 0.85 and options:
            option = rng.choice(options)
            flag = option.opts[0]
            command.append(flag if rng.random() > 0.03 else flag[:-1])
            if not getattr(option, "is_flag", False) and rng.random() > 0.03:
                command.append(str(rng.choice(VALUES)))
            recipe_key = RECIPE_OPTIONS[key].key if (key := flag[2:].replace("-", "_")) in RECIPE_OPTIONS else key
            names += [flag[:-1], recipe_key, *(["--include-path"] if flag == "--scores" else [])]
        elif way < 0.93 and len(command) > 1:
            taken = command.pop(rng.randrange(1, len(command)))
            names += [taken, "issing", "--", "requires an argument", "unexpected", "no such"]
        else:
            extra = str(rng.choice(VALUES))
            command.insert(rng.randrange(1, len(command) + 1), extra)
            names += [extra, "unexpected", "--", "o such option"]
    return command, names, f"{' '.join(before[:1])} {command[1:]}"


def stops_at_work() -> None:
    """In a command's process: what would take long ends it, as done."""

    def accepted(*_: Any, **__: Any) -> None:
        os._exit(0)

    pipeline.finetune = pipeline.search = pipeline.export = accepted
    pipeline.compare = pipeline.demo = accepted


def attempts(good: Good, scratch: Path, rng: random.Random, tally: Tally) -> Attempts:
    """A fuzzed recipe or command line on a copy, again and again."""
    copy = good.copy(scratch / "copy")
    while True:
        made = fuzzed_recipe if rng.random() < 0.6 else fuzzed_command
        command, names, label = made(copy, rng)
        shutil.rmtree(copy.run, ignore_errors=True)
        if command[0] not in ("compress", "finetune"):
            shutil.copytree(good.run, copy.run)
        whole = rng.random() < 0.01
        before: Before | None = None if whole else stops_at_work
        ended = run_apart(command, scratch / "output.txt", before)
        fault = ended.fault()
        if whole and fault == "it hangs":
            tally.add("done for as long as we waited")
        elif fault is not None:
            tally.add("", f"{command[0]}: {label}: {fault}: {ended.last}")
        elif ended.status == 2 and not any(name in ended.errors[0] for name in names):
            tally.add("", f"{command[0]}: {label}: the key is not named: {ended.last}")
        else:
            tally.add("refused by the key's name" if ended.status == 2 else "done" if whole else "accepted")
        (copy.folder / "recipe.yaml").write_text((good.folder / "recipe.yaml").read_text())
        yield
