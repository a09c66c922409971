"""What a search starts from beside chance: earlier fronts, greedy cuts, and the methods of `evals.warm_starts`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from compressor.inputs import LARGE, few_batches, few_blocks, few_inputs
from compressor.job import Job
from compressor.run import Run
from compressor.schedule import stage
from compressor.sizing import bits_group, byte_limit, sizes_asked_for, smallest_storage
from compressor.stages.bit_losses import in_groups_of, losses_by_bits
from compressor.stages.front import read_front
from compressor.stages.repairing import load_searched, search_repair_inputs
from evals.warm_starts import GREEDY, Shapes, WarmStart, warm_start_methods, warm_starts
from evals.warm_starts.blockwise import ROUNDS, passes_around, refined
from search.bit_assignment import spread_by_bytes, with_bits
from search.genes import BITS
from search.space import SearchSpace
from supernet.architecture import Architecture, LayerSizes
from supernet.common.errors import RequestError, did_you_mean
from supernet.common.files import kept_json, sha256
from supernet.common.progress import say

SHAPES_SHARE = 1 / 8
"""Share of the evaluations that shapes of the sizes asked for may take."""
SHAPES_SIZES = (0.9, 0.8, 0.7)
"""Sizes, as shares of the base, for which shapes are proposed where no size is asked for."""
METHOD = "2"
"""Part of a proposals file's fingerprint; another number where the methods propose otherwise from the same inputs."""


def sources(job: Job) -> dict[str, str]:
    """The warm start's sources by name, with a fingerprint of what each holds. Raises `RequestError` for one that is
    neither a searched run nor the name of a method."""
    methods = warm_start_methods()
    fingerprints = {}
    for name, place in zip(job.given.searching.warm_start, job.recipe.searching.warm_start, strict=True):
        front = Run(Path(place)).front
        if name in methods:
            fingerprints[name] = name
        elif front.is_file():
            fingerprints[name] = sha256(front)[:16]
        else:
            raise RequestError(
                f"--warm-start {name}: neither a run that was searched nor one of {', '.join(methods)}"
                f"{did_you_mean(name, methods)}"
            )
    return fingerprints


@stage("proposals")
def proposals(job: Job, above: int | None = None, most: int | None = None) -> list[Architecture]:
    """Architectures for the first generation to measure, a third of a population from each source (or at most `most`),
    spread over sizes: those asked for, or all `above` so many parameters; and shapes of the sizes asked for. Where bits
    are searched, a population of these and of the whole network, in bits.

    Raises `RequestError` where an earlier run has nothing to offer.
    """
    architectures: list[Architecture] = []
    for name in job.recipe.searching.warm_start:
        method = warm_starts().get(name)
        if isinstance(method, Shapes):
            share = int(SHAPES_SHARE * (job.recipe.searching.evaluations or 0))
            architectures += shapes(job, method)[:share] if above is None else []
        elif method is not None:
            architectures += spread_over_sizes(job, proposed(job, name), above, most)
        elif name != GREEDY:
            architectures += spread_over_sizes(job, earlier_front(job, Path(name)), above, most)
    if job.space.bits:
        # Fronts of earlier runs may have bits already.
        plain = [architecture for architecture in architectures if not architecture.has_bits]
        whole = [job.structure.base] if above is None else []
        architectures = [a for a in architectures if a.has_bits] + in_bits(job, [*plain, *whole])
    return list(dict.fromkeys(architectures))[:most]


def earlier_front(job: Job, path: Path) -> list[Architecture]:
    """What is on the front of another run, perhaps of another device, and in this run's space."""
    front = read_front(Run(path).front)
    measured = {row["key"]: Architecture.from_dict(row["architecture"]) for row in front["evaluations"]}
    architectures = [measured[key] for key in front["front"] if measured[key] in job.space]
    if not architectures:
        raise RequestError(f"--warm-start {path}: nothing on its front is in this run's search space")
    return architectures


def proposed(job: Job, name: str) -> list[Architecture]:
    """What a method proposes in this run's space; from `search/proposals-NAME.json` where it was asked before."""
    method, variants = warm_starts()[name], layer_variants(job.space)
    assert isinstance(method, WarmStart)
    if not variants:
        say(f"{name} has nothing to propose: this search space has no sizes of single layers to choose from")
        return []

    def propose() -> list[Architecture]:
        say(f"{name}: looking for architectures to start from")
        batches, supernet = few_batches(job), load_searched(job)
        found = method.propose(supernet, variants, batches)
        sizes, rounds = sizes_asked_for(job), rounds_of(job)
        path = found.path + refined(supernet, variants, batches, found.path, sizes, found.halves, rounds)
        return [architecture for _, architecture in path]

    of = [job.run.supernet_weights, job.space.to_dict(), *few_inputs(job), job.recipe.targets.model_dump()]
    architectures = kept_proposals(job, name, [*of, *search_repair_inputs(job).values(), METHOD], propose)
    return [architecture for architecture in architectures if architecture in job.space]


def kept_proposals(
    job: Job, name: str, inputs: Sequence[object], propose: Callable[[], Sequence[Architecture]]
) -> list[Architecture]:
    """What a method proposed from these inputs, as `search/proposals-NAME.json` holds it, or proposes now."""

    def make() -> dict[str, object]:
        return {"architectures": [architecture.to_dict() for architecture in propose()]}

    kept = kept_json(job.run.search / f"proposals-{name}.json", inputs, make)
    return [Architecture.from_dict(row) for row in kept["architectures"]]


def in_bits(job: Job, architectures: Sequence[Architecture]) -> list[Architecture]:
    """A population of them with bits, spread from the fewest bytes to the most that are allowed: of each, the bits that
    lose least by what every gene's bits alone lose in the whole network."""
    genes = [gene for gene in job.space.genes if gene.kind in BITS]
    losses = losses_by_bits(job, genes, in_groups_of(bits_group(job)))
    storage, most = smallest_storage(job), byte_limit(job)

    def bytes_of(architecture: Architecture) -> float:
        return job.structure.bytes(architecture, storage)

    found = [one for architecture in architectures for one in with_bits(architecture, losses, bytes_of)]
    fitting = [one for one in found if one in job.space and (most is None or bytes_of(one) <= most)]
    return spread_by_bytes(fitting, bytes_of, job.recipe.searching.population)


def shapes(job: Job, method: Shapes) -> list[Architecture]:
    """What a method proposes for the sizes asked for; from `search/proposals-NAME.json` where it was asked before."""
    whole = job.structure.parameters(job.structure.base)
    sizes = sizes_asked_for(job) or [round(share * whole) for share in SHAPES_SIZES]

    def propose() -> Sequence[Architecture]:
        say(f"{method.name}: what baselines would cut")
        batches = few_batches(job)
        return method.propose(load_searched(job), job.space, batches, sizes)

    of = [job.run.supernet_weights, job.space.to_dict(), *few_inputs(job), sizes]
    return kept_proposals(job, method.name, [*of, *search_repair_inputs(job).values()], propose)


def rounds_of(job: Job) -> int:
    """How often at most is measured around what is proposed."""
    return ROUNDS if job.structure.parameters(job.structure.base) <= LARGE else 2


def expected_passes(job: Job) -> tuple[float, int]:
    """Passes over the text that proposals take, at most, and the blocks of text in each."""
    methods = [warm_starts()[name] for name in job.recipe.searching.warm_start if name in warm_starts()]
    layers = len(job.structure.base.layers)
    around = rounds_of(job) * len(sizes_asked_for(job)) * passes_around(layers)
    passes = [method.passes(layers) for method in methods if isinstance(method, Shapes)]
    # Each value of a gene of bits once, in half of the layers on average: a cache has those before the change.
    passes.append(sum(len(gene.values) - 1 for gene in job.declared_space.genes if gene.kind in BITS) / 2)
    if layer_variants(job.declared_space):
        passes += [method.passes(layers) + around for method in methods if isinstance(method, WarmStart)]
    return sum(passes), few_blocks(job)


def layer_variants(space: SearchSpace) -> Sequence[tuple[int, LayerSizes]]:
    """(layer, its sizes) of every architecture of the space that differs from the base in one layer through one gene.

    Genes that change several layers at once, and genes of bits, have no such variants: the methods leave them whole.
    """
    variants = []
    whole = [len(gene.values) - 1 for gene in space.genes]
    for position, gene in enumerate(space.genes):
        for value in range(len(gene.values) - 1) if gene.kind not in BITS else ():
            cut = space.decode([*whole[:position], value, *whole[position + 1 :]])
            changed = [i for i, (a, b) in enumerate(zip(cut.layers, space.base.layers, strict=True)) if a != b]
            if len(changed) == 1 and cut.hidden_size == space.base.hidden_size:
                variants.append((changed[0], cut.layers[changed[0]]))
    return list(dict.fromkeys(variants))


def spread_over_sizes(
    job: Job, architectures: list[Architecture], above: int | None = None, most: int | None = None
) -> list[Architecture]:
    """A third of a population of them, or `most`: the largest within each size asked for, then even steps from the
    smallest to the largest that the targets allow. Or even steps of those `above` so many parameters, without the
    base."""
    n = job.recipe.searching.population // 3 if most is None else most
    parameters = job.structure.parameters
    ordered = sorted(architectures, key=lambda a: (parameters(a), a.key))
    if above is None:
        sizes = sizes_asked_for(job)
        allowed = [a for a in ordered if not sizes or parameters(a) <= max(sizes)] or ordered
        fitting = [few[-1] for size in sizes if (few := [a for a in allowed if parameters(a) <= size])]
    else:
        sizes, fitting = [], []
        allowed = [a for a in ordered if above < parameters(a) < parameters(job.structure.base)]
        if not allowed:
            return []
    steps = np.linspace(0, len(allowed) - 1, min(n, len(allowed))).round().astype(int)
    return list(dict.fromkeys([*fitting, *(allowed[i] for i in steps)]))[: max(n, len(sizes))]
