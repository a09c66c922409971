"""Times a file in llama.cpp: `python -m export.layouts.gguf.speed_child JOB.json`, for `runtime.measure_speed`.

Writes `runs.json` beside the job: for each run, the seconds to read the prompt and to write each token. Nothing here
imports torch, whose threads would be in llama.cpp's way.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from export.layouts.gguf.server import LlamaCpp


def main() -> None:
    file = Path(sys.argv[1])
    job = json.loads(file.read_text(encoding="utf-8"))
    ids, new = job["ids"], job["new"]
    server = LlamaCpp(Path(job["file"]), len(ids) + new + 8, job["threads"])
    runs = [server.timed(ids, new) for _ in range(job["repeats"] + 1)][1:]  # the first is for warming up
    file.with_name("runs.json").write_text(json.dumps(runs), encoding="utf-8")


if __name__ == "__main__":
    main()
