"""The job from Python: keywords are the command's options, and what is wrong with them is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compressor import Recipe, Result, compress, pipeline
from supernet.common.errors import RequestError


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Recipe]:
    """The recipes that `compress` asks for; nothing is computed."""
    recipes: list[Recipe] = []

    def run_all(recipe: Recipe, output: Path, redo: str | None = None) -> None:
        recipes.append(recipe)
        output.mkdir()
        (output / "report.json").write_text("{}")

    monkeypatch.setattr(pipeline, "compress", run_all)
    return recipes


def test_keywords_are_the_options_of_the_command(asked: list[Recipe], tmp_path: Path) -> None:
    compress(
        "some/model",
        tmp_path / "run",
        data=tmp_path / "text.jsonl",
        tasks=["a", "b:acc"],
        max_params=0.67,
        quantize="int8,int4",
        format=["uneven", "gguf"],
        heal_tokens=1000,
        repair=True,
        settings={"searching.population": 10, "seed": 3},
    )
    (recipe,) = asked
    assert (recipe.model, recipe.data) == ("some/model", str(tmp_path / "text.jsonl"))
    assert recipe.tasks == ["a", "b:acc"] and recipe.targets.max_params == ["0.67"]
    assert recipe.quantizing.schemes == ["int8", "int4"] and recipe.formats == ["uneven", "gguf"]
    assert recipe.healing.tokens == 1000 and recipe.repair.enabled is True
    assert recipe.searching.population == 10 and recipe.seed == 3


def test_a_recipe_that_comes_with_the_program(asked: list[Recipe], tmp_path: Path) -> None:
    compress(tmp_path, tmp_path / "run", recipe="smollm2-135m", tasks="a", time="1h")
    assert asked[0].time == "1h" and asked[0].model == str(tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_parms": 0.5}, "did you mean max_params"),
        ({"max_params": "huge"}, "max_params"),
        ({"settings": {"healing.tokenz": 1}}, "healing.tokenz"),
        ({"recipe": "no-such-recipe"}, "no such file"),
    ],
)
def test_what_is_wrong_is_one_line(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=said) as refused:
        compress("some/model", tmp_path / "run", **options)
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()


def test_a_whole_recipe_takes_no_options(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="put the options into it"):
        compress(Recipe(model="some/model"), tmp_path / "run", data="text.jsonl")


def test_a_folder_without_a_report(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no report yet"):
        Result(tmp_path)
