"""How a search goes, shown while it runs and in the log."""

from __future__ import annotations

import math

from compressor.job import Job
from compressor.sizing import sizes_asked_for
from compressor.stages.subnet_scores import SubnetEvaluator
from search.objectives import Evaluation
from search.run import GenerationRecord
from supernet.common.metrics import record
from supernet.common.progress import Bar, say


class SearchProgress:
    """Shows how the search goes: the best so far on the bar, each generation in the log, predictors that fail."""

    def __init__(self, job: Job, bar: Bar, evaluator: SubnetEvaluator) -> None:
        self._job, self._bar = job, bar
        self._evaluator, self._stored = evaluator, evaluator.stored
        self._largest = max(sizes_asked_for(job), default=None)
        self._best = (-math.inf, 0)
        """Quality, and parameters; of those as good, the fewest."""
        self._best_stderr = 0.0
        self._set_aside: dict[str, list[str]] = {}

    def evaluated(self, evaluation: Evaluation) -> None:
        """Move the bar by one measured sub-network. The best is of those that were scored on all documents of the
        search, by the quality that a pick has."""
        values = {name: value for name, value in evaluation.values.items() if value is not None}
        record(
            "candidate",
            int(self._bar.done) + 1,
            key=evaluation.architecture.key,
            generation=evaluation.generation,
            **values,
        )
        structure = self._job.structure
        parameters = structure.parameters(evaluation.architecture)
        asked = evaluation.full and (self._largest is None or parameters <= self._largest)
        quality, best = evaluation.values["quality"], self._best
        if asked and (quality, -parameters) > (best[0], -best[1]):
            self._best = quality, parameters
            self._best_stderr = evaluation.values.get("quality_stderr", 0.0)
        share = self._best[1] / self._job.untouched_parameters
        self._bar.before = self._evaluator.stored - self._stored
        self._bar.advance(note=f"best quality {self._best[0]:.3f} at {share:.2f} of the parameters")

    @property
    def outcome(self) -> str:
        """The best that was measured, and how what is picked may differ from it."""
        quality, parameters = self._best
        share = parameters / self._job.untouched_parameters
        line = (
            f"best quality {quality:.3f} ± {self._best_stderr:.3f} on the search documents, at {share:.2f} of the "
            "parameters"
        )
        if self._job.recipe.targets.max_drop is None:
            line += "; of all that this does not tell from it, held-out loss and --prefer pick one"
        return line

    def generation(self, made: GenerationRecord) -> None:
        """Log a generation; say which predictors were set aside in it."""
        self._job.run.log(generation_line(made))
        record("generation", made["generation"], evaluations=made["evaluations"], hypervolume=made["hypervolume"])
        for name, predictors in made.get("predictors", {}).items():
            for kind in set(predictors["set_aside"]) - set(self._set_aside.get(name, [])):
                say(f"predictor {kind} of {name} ranked the newest sub-networks no better than chance: set aside")
            self._set_aside[name] = predictors["set_aside"]


def generation_line(record: GenerationRecord) -> str:
    """A generation in one line of the log, with how the predictors in use ranked its newcomers beforehand."""
    parts = [f"generation {record['generation']}: {record['evaluations']} measured"]
    if record["full"] < record["new"]:
        parts.append(f"{record['new'] - record['full']} of {record['new']} ruled out by screening")
    parts.append(f"hypervolume {record['hypervolume']:.4f}")
    for name, predictors in record.get("predictors", {}).items():
        if judged := predictors["newest"].get(predictors["used"] or ""):
            parts.append(
                f"{name} by {predictors['used']}: tau {judged['kendall']:.2f}, rho {judged['spearman']:.2f}, "
                f"error {judged['mae']:.3g}"
            )
    return ", ".join(parts)
