"""Is there something to win and to lose on the bundled checkpoint? Base and untrained random sub-networks, by task.

    python -m benchmarks.demo_checkpoint [--share 0.67] [--networks 10]

Sub-networks are drawn at random from the `fine` space near `--share` of the parameters, cut from the ordered base
without any training, and scored on all documents of the bundled tasks.
"""

from __future__ import annotations

from statistics import mean

import numpy as np
import torch

from benchmarks.common import make_parser, print_header, print_row
from benchmarks.jobs import ordered_supernet, temporary_job
from compressor import demo
from compressor.inputs import calibration_batches, training_blocks
from compressor.sizing import draw_near


def main() -> None:
    arguments = make_parser(__doc__, share=0.67, networks=10).parse_args()
    torch.set_num_threads(1)
    with temporary_job(str(demo.MODEL), documents=1000, tasks=[*demo.TASK_NAMES], include_path=str(demo.TASKS)) as job:
        supernet = ordered_supernet(job, calibration_batches(job, training_blocks(job, 1)))
        scorer = job.scorer(supernet.model)
        full = job.structure.parameters(job.structure.base)
        rng = np.random.default_rng(0)
        print_header("network", "parameters", *demo.TASK_NAMES, "mean")
        means = []
        for number in range(arguments.networks + 1):
            architecture = draw_near(job, rng, arguments.share * full) if number else job.structure.base
            with supernet.activated(architecture), torch.no_grad():
                scores = [score.value for score in scorer.score("all").values()]
            means.append(mean(scores))
            name, count = f"random {number}" if number else "base", job.structure.parameters(architecture)
            print_row(name, f"{count:,}", *(f"{score:.3f}" for score in [*scores, means[-1]]))
    print(f"\nmean loss of a random sub-network: {100 * (means[0] - np.mean(means[1:])):.1f} points")


if __name__ == "__main__":
    main()
