"""Files: what is kept of the same inputs, and made again of others."""

from __future__ import annotations

from pathlib import Path

from supernet.common.files import fingerprint, kept_json, read_json


def test_what_is_kept_is_made_once_for_the_same_inputs(tmp_path: Path) -> None:
    file, made = tmp_path / "kept.json", list[int]()

    def make() -> dict[str, object]:
        made.append(len(made))
        return {"value": made[-1]}

    assert kept_json(file, ["a", 1], make) == {"inputs": fingerprint(["a", 1]), "value": 0}
    assert kept_json(file, ["a", 1], make)["value"] == 0
    assert kept_json(file, ["a", 2], make)["value"] == 1
    assert read_json(file) == {"inputs": fingerprint(["a", 2]), "value": 1} and made == [0, 1]
