"""Hostile folders: checkpoints and packages that would run code, or reach outside themselves, where a tool lets them.

Every piece of code in them would write one file, the canary. Nothing may, and a refusal names the file.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.campaign.good import Attempts, Good, Tally, run_apart
from tests.campaign.recipes import stops_at_work

Hostile = Callable[[Path, Path], str]
"""Makes the folder hostile, with code that would write the canary; the name of the file to be blamed."""

MAPS = {
    "config.json": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
    "tokenizer_config.json": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
    "generation_config.json": {"AutoModelForCausalLM": "evil.Evil"},
    "processor_config.json": {"AutoProcessor": "evil.Evil"},
    "preprocessor_config.json": {"AutoFeatureExtractor": "evil.Evil", "AutoImageProcessor": "evil.Evil"},
}
"""Every file in which transformers looks for code."""


class Reduced:
    """What runs a command when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.canary}'",)


def evil_code(file: Path, canary: Path) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(
        f"open({str(canary)!r}, 'w').write('ran')\n"
        "from transformers import LlamaForCausalLM as Evil\n"
        "def generate(*arguments, **options): return None\n"
    )


def change(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | values))


def mapped(name: str) -> Hostile:
    def hostile(folder: Path, canary: Path) -> str:
        evil_code(folder / "evil.py", canary)
        change(folder / name, auto_map=MAPS[name])
        return name

    return hostile


def mapped_under_an_own_type(folder: Path, canary: Path) -> str:
    evil_code(folder / "evil.py", canary)
    change(folder / "config.json", auto_map=MAPS["config.json"], model_type="evil")
    return "config.json"


def mapped_to_a_repository(folder: Path, canary: Path) -> str:
    change(folder / "config.json", auto_map={"AutoModelForCausalLM": "owner/name--evil.Evil"})
    return "config.json"


def mapped_above(folder: Path, canary: Path) -> str:
    evil_code(folder.parent / "evil.py", canary)
    change(folder / "config.json", auto_map={"AutoModelForCausalLM": "../evil.Evil"})
    return "config.json"


def tokenizer_class(folder: Path, canary: Path) -> str:
    evil_code(folder / "evil.py", canary)
    change(folder / "tokenizer_config.json", tokenizer_class="evil.Evil")
    return "tokenizer"


def custom_generate(folder: Path, canary: Path) -> str:
    evil_code(folder / "custom_generate" / "generate.py", canary)
    return "generate.py"


def code_of_uneven(folder: Path, canary: Path) -> str:
    for file in folder.glob("modeling_*.py"):
        file.write_text(f"open({str(canary)!r}, 'w').write('ran')\n{file.read_text()}")
        return file.name
    evil_code(folder / "modeling_llama.py", canary)
    return "modeling_llama.py"


def pickled(name: str, *, alone: bool) -> Hostile:
    """A pickle under a name, beside the weights or in their place."""

    def hostile(folder: Path, canary: Path) -> str:
        if alone:
            (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(pickle.dumps(Reduced(canary)))
        return name

    return hostile


def index_to(place: str) -> Hostile:
    """An index that names a file outside the folder."""

    def hostile(folder: Path, canary: Path) -> str:
        outside = folder.parent / "outside.safetensors"
        (folder / "model.safetensors").rename(outside)
        name = str(outside) if place == "absolute" else f"{place}outside.safetensors"
        index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return "model.safetensors.index.json"

    return hostile


def linked_folder(folder: Path, canary: Path) -> str:
    evil_code(folder.parent / "elsewhere" / "evil.py", canary)
    (folder / "more").symlink_to(folder.parent / "elsewhere")
    change(folder / "config.json", auto_map={"AutoModelForCausalLM": "more/evil.Evil"})
    return "config.json"


def hostile_template(folder: Path, canary: Path) -> str:
    (folder / "chat_template.jinja").write_text(
        "{% for c in ''.__class__.__mro__[1].__subclasses__() %}{% if c.__name__ == 'Popen' %}"
        f"{{{{ c(['touch', '{canary}']) }}}}{{% endif %}}{{% endfor %}}"
    )
    return "chat template"


def record_that_reaches_out(folder: Path, canary: Path) -> str:
    record = folder / "compression.json"
    if record.exists():
        record.write_text(record.read_text().replace('"model.safetensors"', '"../../../model/model.safetensors"'))
    return "compression.json" if record.exists() else ""


HOSTILE: dict[str, Hostile] = {
    **{f"auto_map in {name}": mapped(name) for name in MAPS},
    "auto_map under an own model_type": mapped_under_an_own_type,
    "auto_map to a repository": mapped_to_a_repository,
    "auto_map to the folder above": mapped_above,
    "a class of the folder as tokenizer": tokenizer_class,
    "custom_generate": custom_generate,
    "changed modelling code": code_of_uneven,
    **{f"a pickle as {n}": pickled(n, alone=True) for n in ("model.safetensors", "pytorch_model.bin", "model.pt")},
    **{
        f"a pickle beside, {n}": pickled(n, alone=False)
        for n in ("pytorch_model.bin", "training_args.bin", "tokenizer.model", "tokenizer.pkl", "adapter_model.bin")
    },
    "an index with an absolute path": index_to("absolute"),
    "an index with a parent path": index_to("../"),
    "an index with a parent path inside": index_to("./../"),
    "a linked folder with code": linked_folder,
    "a chat template that starts programs": hostile_template,
    "a record with a path outside": record_that_reaches_out,
}


def attempts(good: Good, scratch: Path, rng: random.Random, tally: Tally) -> Attempts:
    """Every hostile folder, as checkpoint and as package, under every command that reads it."""
    canary = scratch / "canary"
    chats = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]}] * 60
    for what, hostile in HOSTILE.items():
        for kind in ("checkpoint", "package"):
            for command in ("inspect", "compress", "evaluate", "verify", "push"):
                if (kind == "checkpoint") == (command in ("verify", "push")):
                    continue
                copy = good.copy(scratch / "copy")
                folder = copy.folder / "model" if kind == "checkpoint" else copy.package
                blamed = hostile(folder, canary)
                if what.startswith("a chat template"):
                    (copy.folder / "data.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
                made = copy.compress()
                made[1], made[11] = str(folder), str(copy.folder / "new")
                arguments = {
                    "inspect": ["inspect", str(folder)],
                    "compress": made,
                    "evaluate": ["evaluate", str(folder), *made[4:8]],
                    "verify": ["verify", str(folder), "--scores", *made[6:8]],
                    "push": ["push", str(folder), "owner/name", "--dry-run"],
                }[command]
                before = sorted(path for path in copy.folder.iterdir())
                ended = run_apart(arguments, scratch / "output.txt", stops_at_work)
                label = f"{command} of a {kind} with {what}"
                tally.add(*judged(label, ended.status, ended.fault(), ended.last, blamed, canary))
                if new := set(copy.folder.iterdir()) - {*before, copy.folder / "new"}:
                    tally.add("", f"{label}: wrote {new} outside its folder")
                canary.unlink(missing_ok=True)
                shutil.rmtree(copy.folder)
                yield


def judged(
    label: str, status: int | None, fault: str | None, last: str, blamed: str, canary: Path
) -> tuple[str, str | None]:
    """How it ended, and what is wrong with that or None."""
    if canary.exists():
        return "", f"{label}: its code ran"
    if fault is not None:
        return "", f"{label}: {fault}: {last}"
    if status == 2 and not any(part in last for part in (blamed, Path(blamed).stem, "evil.py", "model.safetensors")):
        return "", f"{label}: {blamed} is not named: {last}"
    return ("refused by the file's name" if status == 2 else "done, and nothing of it ran"), None
