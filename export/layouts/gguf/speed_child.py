"""Times a file in llama.cpp: `python -m export.layouts.gguf.speed_child JOB.json`, for `runtime.measure_speed`.

Writes `timed.json` beside the job: for each run, the seconds to read the prompt and to write each token; and of how
many tokens, where the file's context holds fewer than it was to be. Nothing here imports torch, whose threads would be
in llama.cpp's way.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from evals.speed.passes import fitting
from export.layouts.gguf.server import LlamaCpp


def main() -> None:
    file = Path(sys.argv[1])
    job = json.loads(file.read_text(encoding="utf-8"))
    ids, new = job["ids"], job["new"]
    server = LlamaCpp(Path(job["file"]), len(ids) + new + 8, job["threads"])
    prompt, new = fitting(len(ids), new, server.context)
    runs = [server.timed(ids[:prompt], new) for _ in range(job["repeats"] + 1)][1:]  # the first is for warming up
    timed = {"runs": runs, "prompt": prompt, "new": new}
    file.with_name("timed.json").write_text(json.dumps(timed), encoding="utf-8")


if __name__ == "__main__":
    main()
