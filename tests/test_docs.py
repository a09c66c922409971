"""The documentation is true: its commands parse, its links lead somewhere, its generated pages are fresh."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.dom.minidom import parseString

import pytest
import typer
import yaml

from compressor.cli import app
from compressor.cli.reference import reference
from compressor.early_checks import check_names
from compressor.names import BASELINES, WARM_STARTS, recipes
from compressor.recipe_file import read_recipe
from tests.support import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
SEPARATORS = {"&&", "||", "|", ";", ">", "2>", "&"}
FENCED = re.compile(r"^( *)```[^\n]*\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?:^(?: {4}|\t)\S.*\n?)+", re.MULTILINE)
SPAN = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")
pages = pytest.mark.parametrize("page", [str(page.relative_to(ROOT)) for page in PAGES])


def code(text: str) -> Iterator[tuple[str, bool]]:
    """Lines of code of a page, each with whether it stands in running text, where a command is named without its
    arguments."""
    rest = FENCED.sub("", text)
    for block in [*(found[2] for found in FENCED.finditer(text)), *INDENTED.findall(rest)]:
        without_comments = re.sub(r"[ \t]+#[ \t].*", "", block)
        yield from ((line.strip(), False) for line in re.sub(r"\\[ \t]*\n", " ", without_comments).splitlines())
    yield from ((" ".join(span.split()), True) for span in SPAN.findall(rest))


def commands(text: str) -> Iterator[tuple[list[str], bool]]:
    """The words behind every `compressor` of a page's code."""
    for line, running in code(text):
        if not re.search(r"(^|\s)compressor [a-z-]", line) or line.startswith("from "):
            continue
        words = shlex.split(line)
        while "compressor" in words:
            words = words[words.index("compressor") + 1 :]
            end = next((at for at, word in enumerate(words) if word in SEPARATORS), len(words))
            yield words[:end], running


def refusal(words: list[str], running: bool = False) -> str:
    """Why the command line refuses these words; empty where it takes them."""
    name, *rest = words
    if name not in COMMANDS:
        return f"no command {name}"
    try:
        COMMANDS[name].make_context(name, [word for word in rest if word != "[OPTIONS]"])
    except typer.exceptions.TyperException as error:
        message: str = error.format_message()
        return "" if running and message.startswith("Missing argument") else message
    return ""


@pages
def test_every_command_of_a_page_is_a_true_one(page: str) -> None:
    found = {" ".join(words): refusal(words, running) for words, running in commands((ROOT / page).read_text())}
    assert {words: why for words, why in found.items() if why} == {}


def rows_without_header(text: str) -> list[str]:
    """Table rows that a blank line cut off from their table: Markdown shows their bars as text."""
    lines = FENCED.sub("", text).splitlines()
    first = [at for at, line in enumerate(lines) if line.startswith("|") and not lines[at - 1].startswith("|")]
    return [lines[at] for at in first if not re.match(r"\|[ :]*--", [*lines, ""][at + 1])]


@pages
def test_no_blank_line_cuts_a_table(page: str) -> None:
    assert rows_without_header((ROOT / page).read_text()) == []


def test_rows_without_a_header_are_found() -> None:
    table = "\n| a | b |\n|---|--:|\n| 1 | 2 |\n"
    assert rows_without_header(table) == []
    assert rows_without_header(table + "\n| 3 | 4 |\n") == ["| 3 | 4 |"]


def test_false_commands_are_found() -> None:
    text = "\n".join(
        [
            "```",
            "compressor pick runs/mine \\   # of this run",
            "    --sizes 0.8 && compressor export runs/mine",
            "compressor polish runs/mine",
            "```",
            "",
            "    compressor evaluate",
            "",
            "and `compressor evaluate`, `compressor pick RUN --min-speedup fast`",
        ]
    )
    found = [(" ".join(words), refusal(words, running)) for words, running in commands(text)]
    assert [words for words, _ in found] == [
        "pick runs/mine --sizes 0.8",
        "export runs/mine",
        "polish runs/mine",
        "evaluate",
        "evaluate",
        "pick RUN --min-speedup fast",
    ]
    assert ["No such option" in found[0][1], found[1][1], found[2][1]] == [True, "", "no command polish"]
    assert "Missing argument" in found[3][1] and not found[4][1] and "--min-speedup" in found[5][1]


def slugs(text: str) -> set[str]:
    """Anchors of a page's headings, as mkdocs and GitHub both write them for these."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", text), re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", re.sub(r"\]\([^)]*\)", "", heading)).strip().lower() for heading in headings]
    return {re.sub(r"[\s-]+", "-", heading) for heading in plain}


@pages
def test_every_link_of_a_page_leads_somewhere(page: str) -> None:
    text = FENCED.sub("", (ROOT / page).read_text())
    lost = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = ROOT / page if not path else (ROOT / page).parent / path
        if not file.exists() or (anchor and anchor not in slugs(file.read_text())):
            lost.append(target)
        if page.startswith("docs/") and not file.resolve().is_relative_to(DOCS):
            lost.append(f"{target} lies outside of the site")
    assert lost == []


def table_rows(page: str) -> Iterator[dict[str, str]]:
    """Every row of a page's tables, its cells by column."""
    columns: list[str] = []
    for line in (DOCS / page).read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if not line.startswith("|"):
            columns = []
        elif not columns:
            columns = cells
        elif set(line) - set("|-:"):
            yield dict(zip(columns, (cell.strip("| ") for cell in cells), strict=True))


METHODS = list(table_rows("methods.md"))


@pytest.mark.parametrize("row", METHODS, ids=[row["method"].split(" (")[0] for row in METHODS])
def test_every_method_is_where_its_page_says(row: dict[str, str]) -> None:
    """Its files are there, its options are taken, and what is not built says so."""
    files, options = SPAN.findall(row["file"]), SPAN.findall(row["option"])
    assert all((ROOT / file).is_file() for file in files)
    assert files or "not built" in row["left out"]
    for option in options:
        key, _, value = option.partition(": ")
        if key.startswith("--"):
            flag, _, name = option.partition(" ")
            assert flag in " ".join(
                f"{opts}" for command in COMMANDS.values() for p in command.params for opts in p.opts
            )
            assert not name or name in BASELINES or name in recipes()
            continue
        recipe = read_recipe(None, {"model": "some/model", key: yaml.safe_load(value)})
        check_names(recipe)
        assert set(recipe.searching.warm_start) <= set(WARM_STARTS)


def test_the_site_lists_every_page_once() -> None:
    def listed(entry: object) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, dict):
            for value in entry.values():
                yield from listed(value)
        elif isinstance(entry, list):
            for value in entry:
                yield from listed(value)

    files = list(listed(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(files) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_the_page_of_commands_is_fresh() -> None:
    assert (DOCS / "commands.md").read_text() == reference()


def test_every_picture_of_the_site_is_whole_and_loads_nothing() -> None:
    pictures = sorted(DOCS.rglob("*.svg"))
    shown = " ".join(page.read_text() for page in DOCS.rglob("*.md"))
    for picture in pictures:
        text = picture.read_text()
        parseString(text)
        assert not re.search(r"""(?:href|src)=["'](?!#)|url\(["']?http|@import""", text), picture
        assert f"{picture.parent.name}/{picture.name}" in shown or f"({picture.name})" in shown, picture


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="the extra 'docs' is not installed")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "site" / "index.html").is_file()
