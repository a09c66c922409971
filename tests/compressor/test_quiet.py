"""The library is as quiet as the command, and leaves the program that calls it as it was."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub.utils import are_progress_bars_disabled
from tqdm import tqdm

from compressor import Recipe, compress, pipeline
from compressor.quiet import ENVIRONMENT, LOGGERS
from supernet.common.errors import RequestError
from tests.support import ROOT


def test_importing_the_library_prints_nothing() -> None:
    code = "from compressor import Recipe, compress"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_call_is_quiet_from_its_first_import_on(tmp_path: Path) -> None:
    """Torch is imported by the first call, and sets the levels of loggers of its own then."""
    code = f"""
from compressor import compress
try:
    compress({str(tmp_path / "none")!r}, {str(tmp_path / "run")!r}, data="x", tasks="y")
except Exception as error:
    print(type(error).__name__)
"""
    exporting = """
from compressor.quiet import quiet_libraries
with quiet_libraries():
    from torch.onnx._internal.exporter import _registration
    _registration.logger.warning("noise")
"""
    for run, out in ((code, "RequestError\n"), (exporting, "")):
        done = subprocess.run([sys.executable, "-c", run], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, out, "")


def test_that_no_network_is_asked_can_be_said_after_the_command_line_was_imported() -> None:
    code = (
        "import compressor.cli; from compressor.cli.offline import stay_offline; stay_offline(); "
        "from huggingface_hub import constants; assert constants.HF_HUB_OFFLINE"
    )
    variables = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_the_host_had_set_is_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def state() -> list[object]:
        levels = [logging.getLogger(name).level for name in LOGGERS]
        return [levels, dict(os.environ), are_progress_bars_disabled(), tqdm.__init__]

    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    before = state()

    def noisy() -> None:
        list(tqdm(range(3)))
        logging.getLogger("datasets").warning("noise")
        assert are_progress_bars_disabled() and os.environ["TRANSFORMERS_VERBOSITY"] == "info"
        raise RequestError("as wanted")

    monkeypatch.setattr(pipeline, "check_alone", noisy)
    with pytest.raises(RequestError, match="as wanted"):
        compress(Recipe(model="m"), tmp_path)
    assert capsys.readouterr().err == ""
    assert state() == before
    list(tqdm(range(3)))
    assert "3/3" in capsys.readouterr().err
