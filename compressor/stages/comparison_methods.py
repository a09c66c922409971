"""What a comparison compares: the methods, and all that they have in common at one size."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from compressor.job import Job
from compressor.run import Run
from compressor.sizing import draw_near
from compressor.stages.choosing import choose
from compressor.stages.comparison_rows import documents_scored
from compressor.stages.finetuning import finetune, finetuning_inputs, hidden_is_ordered
from compressor.stages.picking import measured
from compressor.stages.repairing import calibration_text, pick_variants, repair_inputs, trained_variants
from compressor.stages.searching import search
from evals.baselines import Baseline, Cut, PruningContext, baselines
from export.report.comparison import OURS
from search.pareto import Target
from supernet.activation import SuperNetwork
from supernet.architecture import Architecture
from supernet.common.errors import RequestError
from supernet.common.files import fingerprint
from supernet.common.versions import versions
from supernet.repair import repair_in_sequence
from supernet.slicing import extract, placed
from supernet.training.data import Blocks
from supernet.variants import Variants

TOLERANCE = 0.01
"""Sizes count as the same within this share."""


@dataclass(frozen=True)
class SizeComparison:
    """One size: what ours is there, and what every method starts from."""

    job: Job
    size: str
    architecture: Architecture
    supernet: SuperNetwork
    base: Any
    calibration: tuple[torch.Tensor, ...]
    text: Blocks
    """What the methods heal on that do not start from the fine-tuned super-network; ours reads the first of it."""

    @property
    def parameters(self) -> int:
        return self.job.structure.parameters(self.architecture)

    def supernet_of(self, architecture: Architecture) -> SuperNetwork:
        """The super-network that a sub-network is cut out of: where bands of sizes have their own, that of its band."""
        if self.job.supernet_folder(architecture) == self.job.run.supernet:
            return self.supernet
        return self.job.load_supernet(architecture)

    @cached_property
    def inputs(self) -> str:
        """Fingerprint of all that the rows of this size depend on; rows of another one are not compared with them."""
        job = self.job
        read = {
            "base": job.base_fingerprint,
            "supernet": job.run.supernet_weights,
            "ours": self.architecture.key,
            "finetuning": job.recipe.finetuning.tokens,
            "healing": asdict(job.train_settings(job.recipe.healing, self.text.length, job.recipe.seed)),
            "dtype": str(job.compute_dtype),
            "data": self.text.fingerprint,
            "documents": documents_scored(job),
            "seed": job.recipe.seed,
            **repair_inputs(job),
        }
        return fingerprint(read)

    @cached_property
    def pruning(self) -> PruningContext:
        return PruningContext(self.base, self.job.structure, self.calibration, self.parameters)

    @cached_property
    def repairing(self) -> PruningContext:
        """The same, for a method whose cut is refitted on the text and by the way that ours is."""
        text = calibration_text(self.job)
        return replace(self.pruning, repair=lambda supernet, cut: repair_in_sequence(supernet, cut, text))


@dataclass(frozen=True)
class Method:
    """A way to a network of the size: its name, where it comes from, and how it is made for a seed.

    `trained` methods start from the fine-tuned super-network, so that healing is all they still get; the others heal
    with the tokens of the fine-tuning too. `drawn` ones differ by seed before they are healed. `repaired` ones were
    refitted, where the run does so, and are healed gently.
    """

    name: str
    about: str
    make: Callable[[SizeComparison, int], Cut]
    trained: bool = False
    drawn: bool = False
    repaired: bool = False


def ours(comparison: SizeComparison, seed: int) -> Cut:
    job, architecture = comparison.job, comparison.architecture
    supernet = comparison.supernet_of(architecture)
    variants = pick_variants(job, architecture, supernet)
    return extract(supernet.model, job.structure, architecture, variants), architecture


def ours_unrepaired(comparison: SizeComparison, seed: int) -> Cut:
    job, architecture = comparison.job, comparison.architecture
    return extract(comparison.supernet.model, job.structure, architecture), architecture


def random_subnetwork(comparison: SizeComparison, seed: int) -> Cut:
    """The first draw of the super-network's space that has the size; refitted where what was searched was."""
    job = comparison.job
    rng = np.random.default_rng([job.recipe.seed, seed])
    for _ in range(1000):
        architecture = draw_near(job, rng, comparison.parameters)
        if same_size(job.structure.parameters(architecture), comparison.parameters):
            supernet = comparison.supernet_of(architecture)
            variants: Variants | None = trained_variants(job, architecture, supernet)
            if variants is None and job.repairs:
                variants = repair_in_sequence(supernet, architecture, calibration_text(job))
            return extract(supernet.model, job.structure, architecture, variants), architecture
    raise RequestError(f"no random sub-network of {comparison.parameters:,} parameters came up in 1,000 draws")


def untrained_search(comparison: SizeComparison, seed: int) -> Cut:
    """What the same search finds in the base as it is: a run of its own beside the comparison, without fine-tuning."""
    job = comparison.job
    recipe = job.recipe.model_copy(deep=True)
    recipe.finetuning.tokens, recipe.finetuning.bands = 0, 1
    plain = Job(Run.create(job.run.comparison / "untrained-search", recipe, {"versions": versions()}), recipe)
    if job.vocabulary is not None:  # the same base, however the tasks may have changed since it was cut
        shutil.copytree(job.run.base, plain.run.base, dirs_exist_ok=True)
    if job.run.speed_table.is_file():  # the same device, and timings do not depend on what the weights are
        shutil.copy(job.run.speed_table, plain.run.speed_table)
    # Where the data, say, changed since, it is of no use any more.
    whole = plain.run.whole(plain.run.supernet, finetuning_inputs(plain)) and hidden_is_ordered(plain)
    plain.redo = None if whole or plain.run.manifest(plain.run.supernet) is None else "finetune"
    finetune(plain)
    search(plain)
    evaluations = [e for e in measured(plain) if same_size(e.values["parameters"], comparison.parameters)]
    if not evaluations:
        raise RequestError(f"the search without fine-tuning measured nothing of {comparison.parameters:,} parameters")
    target = Target(max_params=math.ceil(comparison.parameters * (1 + TOLERANCE)))
    best = choose(plain, evaluations, target).architecture.without_bits()
    return extract(plain.load_supernet().model, job.structure, best, pick_variants(plain, best)), best


def from_scratch(comparison: SizeComparison, seed: int) -> Cut:
    """The shape of ours with random weights, to be distilled from the base like all others."""
    network, architecture = ours(comparison, seed)
    torch.manual_seed(comparison.job.recipe.seed + seed)
    fresh: Any = type(network)(network.config)
    fresh.generation_config = copy.deepcopy(network.generation_config)
    return placed(fresh, comparison.job.device, comparison.job.compute_dtype).eval(), architecture


def published(baseline: Baseline) -> Method:
    return Method(baseline.name, baseline.paper, lambda comparison, seed: baseline.cut(comparison.pruning))


def repaired(baseline: Baseline) -> Method:
    about = f"{baseline.paper}; refitted as ours is"
    cut = partial(_repaired_cut, baseline)
    return Method(f"{baseline.name}-repaired", about, cut, repaired=True)


def _repaired_cut(baseline: Baseline, comparison: SizeComparison, seed: int) -> Cut:
    return baseline.cut(comparison.repairing)


def methods(repair: bool = False) -> dict[str, Method]:
    """Ours first, then what it is compared with. Where ours is repaired, also ours without that, and what the same
    repair makes of the baselines that it suits: so that everybody sees what comes from what."""
    own = [
        Method(OURS, "searched in the fine-tuned super-network", ours, trained=True, repaired=True),
        Method(
            "random",
            "a random sub-network of the same super-network",
            random_subnetwork,
            trained=True,
            drawn=True,
            repaired=True,
        ),
        Method("untrained-search", "the same search in the base, not fine-tuned", untrained_search, repaired=True),
        Method("scratch", "the shape of ours, distilled from random weights", from_scratch, drawn=True),
    ]
    beside = list(map(published, baselines().values()))
    if repair:
        own.insert(1, Method("ours-unrepaired", "ours, sliced plainly", ours_unrepaired, trained=True))
        beside += [repaired(baseline) for baseline in baselines().values() if baseline.repairable]
    return {method.name: method for method in [*own, *beside]}


def same_size(parameters: float, wanted: int) -> bool:
    return abs(parameters / wanted - 1) <= TOLERANCE
