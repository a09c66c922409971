"""The reference page of the commands, made from the command line itself.

python -m compressor.cli.reference > docs/commands.md
"""

from __future__ import annotations

import inspect
from typing import Any

import typer

from compressor.cli import app
from compressor.cli.options import RECIPE_OPTIONS

KEYS = {"--" + name.replace("_", "-"): option.key for name, option in RECIPE_OPTIONS.items()}
KEYS |= {option.flag: option.key for option in RECIPE_OPTIONS.values() if option.flag}


def reference() -> str:
    """`docs/commands.md`: every command with its arguments and options, their defaults and what they set."""
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    lines = [
        "# Every command",
        "",
        str(app.info.help),
        "",
        "Exit status: 0 done; 2 the request is wrong, in one line; 1 a fault of ours; 130 interrupted: what was",
        "done is kept, and the same command goes on. Progress goes to stderr, so that `--json` has stdout to itself.",
        "Where an option sets a key of the [recipe](recipe.md), the key is named. This page is made from the code",
        "(`python -m compressor.cli.reference`).",
    ]
    for name, command in commands.items():
        lines += ["", f"## {name}", "", *_command(name, command)]
    return "\n".join(lines) + "\n"


def _command(name: str, command: Any) -> list[str]:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    needed = [f"{p.opts[0]} {p.name.upper()}" for p in options if p.required]
    usage = [f"compressor {name}", *map(_argument, arguments), *needed, *(["[OPTIONS]"] if options else [])]
    lines = [inspect.cleandoc(command.help or ""), "", "```text", " ".join(usage), "```"]
    if not arguments and not options:
        return lines
    lines += ["", "| | default | |", "|---|---|---|"]
    lines += [f"| `{_argument(p).strip('[]')}` | {'required' if p.required else ''} | {p.help} |" for p in arguments]
    return lines + [_option(p) for p in options]


def _argument(parameter: Any) -> str:
    name = (parameter.metavar or parameter.name).upper()
    return name if parameter.required else f"[{name}]"


def _option(parameter: Any) -> str:
    flags = ", ".join(f"`{flag}`" for flag in [*parameter.opts, *parameter.secondary_opts])
    key = next((KEYS[flag] for flag in parameter.opts if flag in KEYS), None)
    sentence = " ".join((parameter.help or "").split()).replace("|", "\\|")
    again = "; may be given again" if parameter.multiple else ""
    return f"| {flags} | {_default(parameter)} | {sentence}{again}{f' (`{key}`)' if key else ''} |"


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    if parameter.default is None or parameter.default is False or parameter.default == ():
        return ""
    return f"`{parameter.default}`"


if __name__ == "__main__":
    print(reference(), end="")
