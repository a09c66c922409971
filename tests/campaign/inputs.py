"""Spoilt inputs: every file that a command reads, changed in every way that a file can be wrong."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.campaign.good import Attempts, Ended, Good, Tally, run_apart

Spoil = Callable[[Path, random.Random], str]
"""Changes a file in place, and says how."""

OTHERS: tuple[Any, ...] = (None, True, 0, -1, 10**30, 1.5, "", "x", [], [None], {}, {"a": 1})
"""Values of other types and sizes."""


def truncated(file: Path, rng: random.Random) -> str:
    size = rng.randrange(file.stat().st_size)
    os.truncate(file, size)
    return f"cut to {size} bytes"


def flipped(file: Path, rng: random.Random) -> str:
    """A few bits near the front, where headers are."""
    content = bytearray(file.read_bytes())
    places = [rng.randrange(min(len(content), 2000)) for _ in range(rng.randint(1, 3))]
    for place in places:
        content[place] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return f"bits flipped at {places}"


def emptied(file: Path, rng: random.Random) -> str:
    file.write_bytes(b"")
    return "emptied"


def removed(file: Path, rng: random.Random) -> str:
    file.unlink()
    return "removed"


def a_folder(file: Path, rng: random.Random) -> str:
    file.unlink()
    file.mkdir()
    return "a folder"


def a_loose_link(file: Path, rng: random.Random) -> str:
    file.unlink()
    file.symlink_to("nowhere")
    return "a link to nothing"


def a_pipe(file: Path, rng: random.Random) -> str:
    file.unlink()
    os.mkfifo(file)
    return "a pipe"


def another_file(file: Path, rng: random.Random) -> str:
    others = [other for other in sorted(file.parents[1].rglob("*")) if other.is_file() and other != file]
    other = rng.choice(others)
    shutil.copyfile(other, file)
    return f"replaced by {other.name}"


def another_encoding(file: Path, rng: random.Random) -> str:
    file.write_bytes(file.read_bytes().decode("utf-8").encode("utf-16"))
    return "in UTF-16"


ANY: tuple[Spoil, ...] = (truncated, flipped, emptied, removed, a_folder, a_loose_link, a_pipe, another_file)


def json_changed(file: Path, rng: random.Random) -> str:
    """One key of a JSON object, anywhere in it, dropped or given another value."""
    value = json.loads(file.read_text())
    path, place = ["$"], value
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = rng.choice(keys)
        path.append(str(key))
        inner = place[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.5:
            place = inner
            continue
        break
    if rng.random() < 0.3:
        del place[key]
        how = "dropped"
    else:
        place[key] = rng.choice(OTHERS)
        how = f"made {place[key]!r}"
    file.write_text(json.dumps(value))
    return f"{'.'.join(path)} {how}"


def json_repeated(file: Path, rng: random.Random) -> str:
    text = file.read_text().strip()
    key = rng.choice(list(json.loads(text)))
    file.write_text(text[:-1] + f', "{key}": {json.dumps(rng.choice(OTHERS))}}}')
    return f"{key} repeated"


def line_changed(file: Path, rng: random.Random) -> str:
    lines = file.read_text().splitlines()
    number = rng.randrange(len(lines))
    lines[number] = rng.choice(["{", "", "null", "[]", '{"text": null}', '{"text": 3}', "\x00", lines[number][:-3]])
    file.write_text("\n".join(lines) + "\n")
    return f"line {number + 1} made {lines[number]!r}"


def tensor_changed(file: Path, rng: random.Random) -> str:
    weights = load_file(file)
    name = rng.choice(sorted(weights))
    tensor = weights[name]
    changes: Mapping[str, Callable[[], torch.Tensor | None]] = {
        "dropped": lambda: None,
        "one row less": lambda: tensor[:-1].clone(),
        "transposed": lambda: tensor.T.contiguous() if tensor.dim() > 1 else tensor[None],
        "integers": lambda: tensor.to(torch.int32),
        "infinite": lambda: tensor * float("inf"),
        "empty": lambda: tensor[:0].clone(),
    }
    how = rng.choice(list(changes))
    changed = changes[how]()
    del weights[name]
    if changed is not None:
        weights[name] = changed
    save_file(weights, file, {"format": "pt"})
    return f"{name} {how}"


CHECKPOINT = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")


KINDS = ("checkpoint", "checkpoint", "data", "task", "package", "run")


def targets(good: Good, rng: random.Random, kinds: Sequence[str]) -> tuple[Path, list[str]]:
    """A file of one of the kinds to spoil, and a command that reads it."""
    folder, kind = good.folder, rng.choice(kinds)
    if kind == "checkpoint":
        shutil.rmtree(folder / "run")
        return folder / "model" / rng.choice(CHECKPOINT), good.compress()
    if kind == "data":
        shutil.rmtree(folder / "run")
        return folder / "data.jsonl", good.compress()
    if kind == "task":
        shutil.rmtree(folder / "run")
        return rng.choice(
            [folder / "tasks" / "tiny_choice.yaml", folder / "tasks" / "tiny_choice.jsonl"]
        ), good.compress()
    if kind == "package":
        return rng.choice(sorted(f for f in good.package.iterdir() if f.is_file())), ["verify", str(good.package)]
    run_folder = str(folder / "run")
    commands = [
        ["report", run_folder],
        ["export", run_folder],
        ["pick", run_folder, "--max-params", "0.8"],
        ["search", run_folder, "--evaluations", "9"],
        good.compress(),
    ]
    files = [file for file in sorted((folder / "run").rglob("*")) if file.is_file() and not file.name.startswith(".")]
    return rng.choice(files), rng.choice(commands)


def ways(file: Path) -> list[Spoil]:
    """The ways in which this kind of file can be wrong."""
    own: dict[str, list[Spoil]] = {
        ".json": [json_changed, json_changed, json_changed, json_repeated, another_encoding],
        ".jsonl": [line_changed, line_changed, another_encoding],
        ".yaml": [another_encoding, flipped],
        ".safetensors": [tensor_changed, tensor_changed],
    }
    return [*ANY, *own.get(file.suffix, [])]


def attempts(good: Good, scratch: Path, rng: random.Random, tally: Tally, kinds: Sequence[str] = KINDS) -> Attempts:
    """Spoil one file of a copy, run the command, look at how it ended."""
    expected = good.result()
    while True:
        copy = good.copy(scratch / "copy")
        file, command = targets(copy, rng, kinds)
        what = rng.choice(ways(file))(file, rng)
        ended = run_apart(command, scratch / "output.txt")
        label = f"{command[0]}: {file.relative_to(copy.folder)} {what}"
        judge(label, ended, copy, expected, command[0], tally)
        shutil.rmtree(copy.folder)
        yield


def judge(label: str, ended: Ended, copy: Good, expected: dict[str, object], command: str, tally: Tally) -> None:
    """Count it: refused in one line, or done, with the good one's result or (another input) another."""
    if fault := ended.fault():
        last = (ended.errors or ended.output.strip().splitlines() or [""])[-1]
        tally.add("", f"{label}: {fault}: {last[:300]}")
    elif ended.status == 2:
        tally.add("refused in one line")
    elif command == "compress" and copy.result() != expected:
        tally.add("done with another result")
        print(f"  another result: {label}", flush=True)
    else:
        tally.add("done with the same result")
    leftovers = [p for p in copy.folder.rglob("*.tmp-*") if p.exists()]
    if leftovers:
        tally.add("", f"{label}: left {leftovers[0]}")
