"""Which code that lies in a folder may run: the one file that this version writes, and none other.

`trust_remote_code=True` of transformers trusts a whole folder: whatever file its `auto_map` names, in sub-folders too,
and `custom_generate/generate.py`. So all of it is looked at before that is said. Needs no torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from supernet.common.errors import VerificationError

UNEVEN_PREFIX = "uneven_"


def check_code(folder: Path) -> bool:
    """Whether the folder needs its own code file, all code in it being what this version writes.

    False for a folder without code. Raises `VerificationError` naming the file where there is other code: neither
    `verify` nor `evaluate` runs that.
    """
    from supernet.families import families
    from supernet.uneven import auto_map, modeling_file_name, modeling_source

    config = _config(folder)
    named = config.get("auto_map")
    if named is None and not brings_code(folder):
        return False
    family = families().get(str(config.get("model_type")).removeprefix(UNEVEN_PREFIX))
    if family is None or config["model_type"] == family.model_type or named != auto_map(family):
        raise VerificationError(f"{folder / 'config.json'}: its auto_map is not what this version writes")
    expected = folder / modeling_file_name(family)
    for file in sorted(folder.rglob("*")):
        if file.suffix == ".py" and file != expected:
            raise VerificationError(f"{file}: a code file that this version does not write")
        if file.is_symlink() and file.is_dir():
            raise VerificationError(f"{file}: a link to a folder, whose code would be trusted too")
    if not expected.is_file():
        raise VerificationError(f"{expected}: the code file is missing")
    if expected.read_bytes() != modeling_source(family).encode():
        raise VerificationError(f"{expected}: the code file differs from what this version writes")
    return True


def brings_code(folder: Path) -> bool:
    """Whether there is Python code anywhere in the folder."""
    return any(folder.rglob("*.py"))


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a package or checkpoint folder, without running any code from it."""
    from transformers import AutoConfig, AutoTokenizer

    model_type = str(_config(folder).get("model_type"))
    if not model_type.startswith(UNEVEN_PREFIX):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # The uneven configuration would lead AutoTokenizer to the code file, which a tokenizer does not need.
    plain = AutoConfig.for_model(model_type.removeprefix(UNEVEN_PREFIX))
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, config=plain)


def _config(folder: Path) -> dict[str, Any]:
    """config.json, empty where there is none: a graph's folder has none."""
    file = folder / "config.json"
    if not file.exists():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise VerificationError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise VerificationError(f"{file}: expected a JSON object")
    return config
