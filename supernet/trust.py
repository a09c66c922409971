"""Which code in a package's folder may run: the one code file that this version writes, or an earlier one wrote, and no
other.

`trust_remote_code=True` of transformers trusts a whole folder: the files that its `auto_map` names, in sub-folders too,
and `custom_generate/generate.py`. So the whole folder is checked first. Needs no torch.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from supernet.common.errors import RequestError, VerificationError
from supernet.common.files import read_json
from supernet.earlier_code import EARLIER_CODE
from supernet.elastic import ELASTIC_PREFIX, elastic_auto_map, elastic_file_name, elastic_source
from supernet.families import families
from supernet.tokens import read_tokenizer
from supernet.uneven import UNEVEN_PREFIX, auto_map, modeling_file_name, modeling_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_code(folder: Path) -> bool:
    """True where the folder's only code is the file that this version writes, or an earlier one wrote; False where it
    has no code.

    Raises `VerificationError` naming the file where there is other code. Neither `verify` nor `evaluate` runs that.
    """
    config = _config(folder)
    mapped = config.get("auto_map")
    code = sorted(folder.rglob("*.py"))
    if mapped is None and code:
        raise VerificationError(f"{code[0]}: a code file that this version does not write")
    if mapped is None:
        return False
    model_type = str(config.get("model_type"))
    family = families().get(plain_type(model_type))
    if family is not None and model_type == ELASTIC_PREFIX + family.model_type:
        wanted, name, source = elastic_auto_map(family), elastic_file_name(family), elastic_source(family)
    elif family is not None and model_type == UNEVEN_PREFIX + family.model_type:
        wanted, name, source = auto_map(family), modeling_file_name(family), modeling_source(family)
    else:
        wanted, name, source = {}, "", ""
    if not wanted or mapped != wanted:
        raise VerificationError(f"{folder / 'config.json'}: its auto_map is not what this version writes")
    expected = folder / name
    for file in sorted(folder.rglob("*")):
        if file.suffix == ".py" and file != expected:
            raise VerificationError(f"{file}: a code file that this version does not write")
        if file.is_symlink() and file.is_dir():
            raise VerificationError(f"{file}: a link to a folder, whose code would be trusted too")
    if not expected.is_file():
        raise VerificationError(f"{expected}: the code file is missing")
    written = expected.read_bytes()
    if written != source.encode() and sha256(written).hexdigest() not in EARLIER_CODE:
        raise VerificationError(f"{expected}: the code file differs from what this version writes")
    return True


def plain_type(model_type: str) -> str:
    """The family's `model_type` behind that of an uneven or elastic package."""
    return model_type.removeprefix(ELASTIC_PREFIX).removeprefix(UNEVEN_PREFIX)


def brings_code(folder: Path) -> bool:
    """Whether there is Python code anywhere in the folder."""
    return any(folder.rglob("*.py"))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a package or checkpoint folder. Runs no code from it."""
    model_type = str(_config(folder).get("model_type"))
    if plain_type(model_type) == model_type:
        return read_tokenizer(folder)
    from transformers import AutoConfig

    # With these configurations AutoTokenizer would ask for the code file, which a tokenizer does not need.
    return read_tokenizer(folder, config=AutoConfig.for_model(plain_type(model_type)))


def _config(folder: Path) -> dict[str, object]:
    """The content of config.json; empty where there is none, as beside a graph. Raises `VerificationError`."""
    file = folder / "config.json"
    if not file.exists():
        return {}
    try:
        config = read_json(file)
    except RequestError as error:
        raise VerificationError(str(error)) from None
    if not isinstance(config, dict):
        raise VerificationError(f"{file}: expected a JSON object")
    return config
