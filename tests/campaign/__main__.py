"""`python -m tests.campaign PART`"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.campaign import code, disk, inputs, kills, recipes
from tests.campaign.good import Attempts, Good, Tally, make_good

PARTS: dict[str, Callable[[Good, Path, random.Random, Tally], Attempts]] = {
    "inputs": inputs.attempts,
    "runs": partial(inputs.attempts, kinds=["run"]),
    "kills": kills.attempts,
    "recipes": recipes.attempts,
    "disk": disk.attempts,
    "code": code.attempts,
}


def campaign(part: str, seconds: float, seed: int, most: int) -> Tally:
    """Attempts of one part until the time is over, `most` at the most."""
    tally, began = Tally(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="campaign-") as name:
        good = make_good(Path(name) / "good")
        scratch = Path(name) / "scratch"
        scratch.mkdir()
        for _ in PARTS[part](good, scratch, random.Random(seed), tally):
            if time.monotonic() - began > seconds or tally.tried >= most:
                break
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.campaign")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most", type=int, default=10**9, help="attempts, where that comes first")
    arguments = parser.parse_args()
    if arguments.part == "disk":
        disk.may_mount()
    tally = campaign(arguments.part, 60 * arguments.minutes, arguments.seed, arguments.most)
    print(f"{arguments.part}: {tally}")
    return 1 if tally.faults else 0


if __name__ == "__main__":
    sys.exit(main())
