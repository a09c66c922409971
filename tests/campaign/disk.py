"""Full disks: a run on a file system that is too small, which grows a little after every stop, until the run is done.

So there is no space at every place of a run at some time. The file systems are in memory and in a mount namespace of
this process alone, for which Linux lets any user ask (`unshare`).
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tests.campaign.good import Attempts, Before, Good, Tally, run_apart
from tests.campaign.kills import difference

PAGE = 4096
INSIDE = "CAMPAIGN_MAY_MOUNT"
"""Set in the process that may mount."""


def may_mount() -> None:
    """Begin this process anew where it may mount file systems."""
    if INSIDE not in os.environ:
        os.environ[INSIDE] = "1"
        os.execvp("unshare", ["unshare", "-Urm", sys.executable, "-m", "tests.campaign", *sys.argv[1:]])


def attempts(good: Good, scratch: Path, rng: random.Random, tally: Tally) -> Attempts:
    """One run after another, each on a disk that grows by some pages whenever it was full."""
    while True:
        copy = good.copy(scratch / "copy")
        shutil.rmtree(copy.run)
        copy.run.mkdir()
        step, pages = rng.choice([1, 2, 3, 5, 8, 13]), rng.randint(1, 40)
        mount(copy.run, pages)
        try:
            yield from grown(copy, good.result(), scratch, step, pages, rng, tally)
        finally:
            subprocess.run(["umount", copy.run], check=True)
            shutil.rmtree(copy.folder)


def grown(
    copy: Good, expected: dict[str, object], scratch: Path, step: int, pages: int, rng: random.Random, tally: Tally
) -> Attempts:
    """The run on its disk until it is done: after every stop all is kept, and in the end all is as expected."""
    rows: set[tuple[object, ...]] = set()
    while (ended := run_apart(copy.compress(), scratch / "output.txt", disk_of(copy, rng))).status != 0:
        fault = ended.fault()
        if fault is None and "disk space" not in ended.errors[0]:
            fault = "another reason"
        fault = fault or copy.half_written()
        rows |= copy.rows()
        tally.add("stopped in one line, everything kept", fault and f"{pages} pages: {fault}: {ended.last}")
        yield
        pages += step
        assert pages < 100_000, f"never done: {ended.last}"
        mount(copy.run, pages, "remount,")
    problem = difference(copy, expected, rows)
    tally.add("the same in the end", problem and f"grown to {pages} pages by {step}: {problem}")
    yield


def mount(folder: Path, pages: int, options: str = "") -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"{options}size={pages * PAGE}", "tmpfs", folder], check=True)


def disk_of(copy: Good, rng: random.Random) -> Before:
    """Mostly there seems to be space at first, as where other programs fill the disk: the writing itself must fail."""
    seems_free = rng.random() < 0.9

    def before() -> None:
        os.environ["TMPDIR"] = str(copy.folder)
        if seems_free:
            shutil.disk_usage = lambda path: DiskUsage(10**12, 0, 10**12)

    return before


class DiskUsage(NamedTuple):
    total: int
    used: int
    free: int
