"""What the pages show of loading a package does what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.support import ROOT
from tests.support.export_networks import UNEVEN, cut, tiny_llama, write_tiny


def test_the_lines_that_load_a_package_ask_no_question(tmp_path: Path) -> None:
    package = write_tiny(tmp_path / "package", UNEVEN, cut(tiny_llama(), UNEVEN), layout="uneven")
    (lines,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "packages.md").read_text(), re.S)
        if "Auto" in block
    )
    code = (
        lines.replace("runs/mine/packages/best", str(package.folder)) + "print(type(model).__name__, len(tokenizer))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "Llama" in done.stdout and "trust_remote_code" not in done.stdout + done.stderr  # as the question says
