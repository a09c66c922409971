"""Tokenizers that cannot be read: what is said of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from supernet.common.errors import RequestError
from supernet.tokens import read_tokenizer


def test_a_tokenizer_without_its_json_is_said(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(RequestError, match=r"its tokenizer cannot be used; it has no tokenizer\.json: save it"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(RequestError, match=r"its tokenizer cannot be used \("):
        read_tokenizer(tmp_path)
