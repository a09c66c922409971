"""A short form of each part of the campaign against the whole tool (`python -m tests.campaign`)."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("part", "most"),
    [("inputs", 8), ("runs", 8), ("kills", 2), ("recipes", 40), ("disk", 12), ("code", 12)],
)
def test_a_short_campaign(part: str, most: int) -> None:
    if part == "disk" and not may_mount():
        pytest.skip("this machine lets no user mount a file system in memory")
    command = [sys.executable, "-m", "tests.campaign", part, "--most", str(most), "--minutes", "4"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def may_mount() -> bool:
    """Whether Linux gives this process a mount namespace of its own."""
    try:
        mount = ["unshare", "-Urm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
        return subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False
