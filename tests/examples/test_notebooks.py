"""The notebooks run from the first cell to the last, offline, and make what they say. Budgets are smaller here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

RUNNER = """
import json, sys
names = {"__name__": "__main__"}
for cell in json.load(open(sys.argv[1], encoding="utf-8"))["cells"]:
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
        if "parameters" in cell["metadata"].get("tags", []):
            names |= {"EVALUATIONS": 10, "LIMIT": 8, "HEAL_TOKENS": 1000, "WARM_START": []}
json.dump({"front": len(names["front"]), "shares": list(names["front"]["share"])} if "front" in names else
          {"dots": len(names["dots"].get_offsets())}, open("found.json", "w"))
"""


def execute(notebook: str, folder: Path) -> dict[str, object]:
    """What the cells of a notebook left, run in one namespace within `folder`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    command = [sys.executable, "-c", RUNNER, str(ROOT / "examples" / notebook)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, object] = json.loads((folder / "found.json").read_text())
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("notebooks")


def test_the_whole_job_and_then_its_report(folder: Path) -> None:
    found = execute("whole_job.ipynb", folder)
    run = folder / "runs" / "notebook"
    report = json.loads((run / "report.json").read_text())
    assert found["dots"] == len(report["search"]["points"]) == 10
    assert (run / "packages" / "best" / "model.safetensors").is_file()
    assert report["packages"][0]["params"] <= 0.7 * report["base"]["params"]

    found = execute("read_report.ipynb", folder)
    assert found["shares"] == sorted(found["shares"]) and found["front"]  # type: ignore[call-overload]
