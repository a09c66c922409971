"""The house itself: imports point down, nothing is pickled, and a package that shadows a room is refused."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.support import ROOT

FLOORS = ("compressor", "export", "evals", "search", "supernet")  # from the top down: imports point right, never left
PICKLES = {"pickle", "joblib", "dill", "cloudpickle"}


def modules() -> dict[str, Path]:
    """Every module of ours by its dotted name. Files that lm-eval loads by their path are not imported."""
    files = [file for top in FLOORS for file in sorted((ROOT / top).rglob("*.py")) if "tasks" not in file.parts]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imported_by(node: ast.AST) -> set[str]:
    if isinstance(node, ast.ImportFrom) and node.module:
        return {f"{node.module}.{alias.name}" for alias in node.names}
    return {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()


def imports(file: Path) -> set[str]:
    """Our modules that a file imports, at its top, within functions and for type checkers."""
    known = modules()
    named = {name for node in ast.walk(ast.parse(file.read_text())) for name in imported_by(node)}
    # `from package import name` names a module of the package, or something that the package holds.
    found = {name if name in known else name.rpartition(".")[0] for name in named}
    return {name for name in found if name in known}


@pytest.mark.parametrize(("module", "file"), modules().items(), ids=modules())
def test_imports_point_down(module: str, file: Path) -> None:
    floor = FLOORS.index(module.split(".")[0])
    for imported in imports(file):
        assert FLOORS.index(imported.split(".")[0]) >= floor, f"{module} imports {imported}, which is above it"


def test_no_circle_of_files() -> None:
    graph = {module: imports(file) - {module} for module, file in modules().items()}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"these import one another in a circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("floor", FLOORS)
def test_the_architecture_names_every_room(floor: str) -> None:
    """The row of a package in docs/architecture.md names the files and folders that are directly in it."""
    text = (ROOT / "docs/architecture.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith(f"| `{floor}/` |"))
    rooms = {path.stem for path in (ROOT / floor).iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert rooms - {"__init__"} <= set(re.findall(r"\w+", row))


def test_search_needs_no_torch() -> None:
    """Neither `search` nor anything that it imports names torch, transformers or lm-eval."""
    known, seen = modules(), set()
    waiting = [module for module in known if module.split(".")[0] == "search"]
    while waiting:
        module = waiting.pop()
        seen.add(module)
        named = {name for node in ast.walk(ast.parse(known[module].read_text())) for name in imported_by(node)}
        assert not {name.split(".")[0] for name in named} & {"torch", "transformers", "lm_eval"}, module
        waiting += imports(known[module]) - seen


def test_importing_the_package_is_light() -> None:
    code = f"import sys, compressor; sys.exit(any(name in sys.modules for name in {('torch', *FLOORS[1:])}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_shadowed_room_is_named(tmp_path: Path) -> None:
    (tmp_path / "search.py").write_text("")
    assert str(tmp_path / "search.py") in refusal(tmp_path, f"{tmp_path}:{ROOT}")


def test_a_folder_that_shadows_a_room_is_named(tmp_path: Path) -> None:
    (tmp_path / "search").mkdir()  # no package, and yet found before one that is installed as editable
    assert str(tmp_path / "search") in refusal(tmp_path, str(tmp_path))


def refusal(folder: Path, path: str) -> str:
    """What `import compressor` says in a folder, where it fails."""
    command = [sys.executable, "-c", "import compressor"]
    env = {"PYTHONPATH": path, "PATH": ""}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env)
    assert done.returncode != 0 and "shadowed" in done.stderr
    return done.stderr


def test_no_pickle_anywhere() -> None:
    for file in modules().values():
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert called not in ("torch.load", "torch.save"), file
            assert not {name.split(".")[0] for name in imported_by(node)} & PICKLES, file
