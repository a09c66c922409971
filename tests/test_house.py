"""The house itself: imports point down, nothing is pickled, and a package that shadows a room is refused."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Lower rooms first; a module may import from its own room and from rooms before it.
ROOMS = [
    ("compressor.architecture", "compressor.errors", "compressor.figures", "compressor.progress"),
    ("compressor.families",),
    ("compressor.elastic",),
    ("compressor.finetune", "search"),
    ("evals",),
    ("export",),
    ("compressor.demo", "compressor.checkpoint", "compressor.recipe", "compressor.run", "compressor.speed_table"),
    ("compressor.job",),
    ("compressor.checks",),
    ("compressor.inspection", "compressor.stages"),
    ("compressor.pipeline",),
    ("compressor.cli",),
]
OURS = {"compressor", "search", "evals", "export"}
PICKLES = {"pickle", "joblib", "dill", "cloudpickle"}


def level(module: str) -> int:
    for number, rooms in enumerate(ROOMS):
        if any(module == room or module.startswith(room + ".") for room in rooms):
            return number
    raise AssertionError(f"{module} belongs to no room")


def modules() -> list[tuple[str, Path]]:
    found = []
    for top in sorted(OURS):
        for file in sorted((ROOT / top).rglob("*.py")):
            if "tasks" in file.parts:
                continue  # loaded by lm-eval, not imported
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            if name != "compressor":
                found.append((name, file))
    return found


def imported_by(node: ast.AST) -> set[str]:
    if isinstance(node, ast.ImportFrom) and node.module:
        return {f"{node.module}.{alias.name}" for alias in node.names}
    return {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()


def imports(file: Path) -> set[str]:
    names = {name for node in ast.walk(ast.parse(file.read_text())) for name in imported_by(node)}
    return {name for name in names if name.split(".")[0] in OURS and name not in ("compressor.__version__",)}


@pytest.mark.parametrize(("module", "file"), modules(), ids=[name for name, _ in modules()])
def test_imports_point_down(module: str, file: Path) -> None:
    for imported in imports(file):
        assert level(imported) <= level(module), f"{module} imports {imported}, which is above it"
        if module.startswith("search."):
            assert imported.startswith(("search.", "compressor.architecture")), f"{module} imports {imported}"


def test_importing_the_package_is_light() -> None:
    code = "import sys, compressor; sys.exit(any(m in sys.modules for m in ('torch', 'search', 'evals', 'export')))"
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
    for _, file in modules():
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert called not in ("torch.load", "torch.save"), file
            assert not {name.split(".")[0] for name in imported_by(node)} & PICKLES, file
