"""The search itself on landscapes by formula: finds the front, asks nothing twice, and resumes where it was."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from search.algorithms import algorithm, algorithms
from search.algorithms.evolution import StepMutation
from search.algorithms.linas import LINAS
from search.objectives import Constraint, Evaluation, Objective, choose, computed
from search.pareto import costs, front, hypervolume, non_dominated
from search.run import first_generation, greedy_path, search
from search.sampling import sample, uniform_members
from search.space import SearchSpace
from supernet.architecture import Architecture, LayerSizes, Structure
from tests.support import ROOT
from tests.support.search_helpers import SMALL, llama, quality

PROSE = llama(8, 256, 768, 8, 4, 32, 4096)
RUNNABLE = [name for name in algorithms() if name != "age-moea" or importlib.util.find_spec("numba")]


@pytest.fixture(autouse=True)
def short_inner_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LINAS, "inner_generations", 12)


def small_space() -> SearchSpace:
    """4,096 genomes, 2,331 architectures: small enough to enumerate."""
    return SearchSpace.from_dict({"ffn.*": [32, 64, 96, 128], "kv.*": [1, 2], "layer.*": [0, 1]}, SMALL)


def objectives_of(structure: Structure, *names: str) -> list[Objective]:
    return choose(names or ("quality", "parameters"), computed(structure), {"quality": "max", "loss": "min"})


class Bench:
    """Measures by formula, remembers what it was asked for, and can die on the way."""

    def __init__(
        self,
        structure: Structure,
        dies_at: int | None = None,
        known: dict[Architecture, float] | None = None,
        score: Callable[[Structure, Architecture], float] = quality,
    ) -> None:
        self.structure, self.dies_at, self.score = structure, dies_at, score
        self.known = {} if known is None else known
        self.requests: list[list[Architecture]] = []
        self.measured = 0

    def __call__(self, architectures: Sequence[Architecture]) -> Iterator[tuple[Architecture, dict[str, float]]]:
        self.requests.append(list(architectures))
        for a in reversed(architectures):  # the order of arrival must not matter
            if a not in self.known:
                if self.measured == self.dies_at:
                    raise KeyboardInterrupt
                self.measured += 1
                self.known[a] = self.score(self.structure, a)
            yield a, {"quality": self.known[a], "loss": -math.log(max(self.known[a], 1e-9))}

    @property
    def asked(self) -> list[Architecture]:
        return [a for request in self.requests for a in request]


def share_of_true_front(
    space: SearchSpace, evaluations: Sequence[Evaluation], objectives: Sequence[Objective]
) -> float:
    """Hypervolume of what was measured as a share of the whole space's."""
    everything = list(space.architectures())
    values = [[quality(space.structure, a), space.structure.parameters(a)] for a in everything]
    truth = np.array([[o.cost(v) for o, v in zip(objectives, row, strict=True)] for row in values])
    low, high = truth.min(0), truth.max(0)
    measured = (costs(evaluations, objectives) - low) / (high - low)
    return hypervolume(measured, [1, 1]) / hypervolume((truth - low) / (high - low), [1, 1])


def test_searches_find_the_brute_forced_front() -> None:
    space = small_space()
    objectives = objectives_of(SMALL)
    shares = {}
    for name in ("linas", "nsga2", "random"):
        bench = Bench(SMALL)
        result = search(space, objectives, bench, algorithm=name, evaluations=120, population=20, seed=1)
        assert len(bench.asked) == len(set(bench.asked)) == len(result.evaluations) == 120
        shares[name] = share_of_true_front(space, result.evaluations, objectives)
    assert shares["linas"] > 0.99 and shares["nsga2"] > 0.94 and shares["random"] < shares["nsga2"] < shares["linas"]


@pytest.mark.parametrize("name", ["linas", "nsga2"])
def test_a_whole_space_is_measured_once_and_gives_the_exact_front(name: str) -> None:
    space = SearchSpace.from_dict({"ffn.*": [32, 64, 128], "layer.1": [0, 1]}, SMALL)
    everything = list(space.architectures())
    bench = Bench(SMALL)
    result = search(space, objectives_of(SMALL), bench, algorithm=name, evaluations=500, population=8, seed=0)
    assert len(bench.asked) == len(everything) == 36 and set(bench.asked) == set(everything)
    values = np.array([[-quality(SMALL, a), SMALL.parameters(a)] for a in everything])
    assert {e.architecture for e in result.front} == {everything[i] for i in non_dominated(values)}


@pytest.mark.parametrize("name", RUNNABLE)
def test_nothing_is_asked_twice_and_everything_is_in_the_space(name: str) -> None:
    space = SearchSpace.preset("fine", PROSE)
    bench = Bench(PROSE)
    objectives = objectives_of(PROSE, "quality", "parameters", "macs")
    result = search(space, objectives, bench, algorithm=name, evaluations=60, population=12, seed=2)
    assert len(bench.asked) == len(set(bench.asked)) == len(result.evaluations)
    assert all(a in space for a in bench.asked)
    assert [e.architecture for e in result.evaluations] == bench.asked
    assert [e.index for e in result.evaluations] == list(range(len(bench.asked)))
    for e in result.evaluations:
        assert e.values["parameters"] == PROSE.parameters(e.architecture)
        assert e.values["macs"] == PROSE.macs(e.architecture)
    json.dumps(result.to_dict(), allow_nan=False)


@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.parametrize("dies_at", [3, 31])
def test_a_resumed_search_goes_on_as_the_unbroken_one_would_have(name: str, dies_at: int) -> None:
    space = SearchSpace.preset("fine", PROSE)
    arguments: dict[str, Any] = {
        "algorithm": name,
        "evaluations": 48,
        "population": 12,
        "seed": 3,
        "constraints": [Constraint(computed(PROSE)["parameters"], maximum=6e6)],
    }
    unbroken = Bench(PROSE)
    whole = search(space, objectives_of(PROSE), unbroken, **arguments)
    broken = Bench(PROSE, dies_at=dies_at)
    with pytest.raises(KeyboardInterrupt):
        search(space, objectives_of(PROSE), broken, **arguments)
    np.random.default_rng().random(5)
    resumed = Bench(PROSE, known=broken.known)
    again = search(SearchSpace.preset("fine", PROSE), objectives_of(PROSE), resumed, **arguments)
    assert resumed.requests == unbroken.requests
    assert resumed.measured == len(unbroken.asked) - dies_at
    assert again.evaluations == whole.evaluations
    for one, other in zip(again.generations, whole.generations, strict=True):
        assert {k: v for k, v in one.items() if k != "seconds"} == {k: v for k, v in other.items() if k != "seconds"}


def test_different_seeds_differ() -> None:
    runs = []
    for seed in (0, 1):
        bench = Bench(PROSE)
        search(
            SearchSpace.preset("fine", PROSE),
            objectives_of(PROSE),
            bench,
            evaluations=20,
            population=10,
            seed=seed,
        )
        runs.append(bench.asked)
    assert runs[0][:2] == runs[1][:2] and runs[0][2:] != runs[1][2:]


def test_the_first_generation() -> None:
    space = SearchSpace.preset("fine", PROSE)
    uniform, wish = uniform_members(space, 4), space.decode(sample(space, np.random.default_rng(9))[0])
    bench = Bench(PROSE)
    search(
        space,
        objectives_of(PROSE),
        bench,
        evaluations=30,
        population=15,
        include=uniform,
        warm_start=[wish, space.base],
    )
    first = bench.requests[0]
    assert len(first) == 15 and [len(r) for r in bench.requests] == [15, 15]
    assert first[:2] == [space.base, space.smallest()] and {*uniform, wish} <= set(first)
    sizes = sorted(PROSE.parameters(a) for a in first)
    assert max(np.diff(sizes)) < 0.35 * (sizes[-1] - sizes[0])
    with pytest.raises(ValueError, match="does not hold"):
        first_generation(space, 5, np.random.default_rng(0), [Architecture(256, (LayerSizes(8, 4, 700),) * 8)])


@pytest.mark.parametrize("name", ["linas", "nsga2", "unsga3"])
def test_constraints_steer(name: str) -> None:
    space = SearchSpace.preset("fine", PROSE)
    full = PROSE.parameters(space.base)
    size = computed(PROSE)["parameters"]
    within = [Constraint(size, minimum=0.6 * full, maximum=0.67 * full)]
    counts = {}
    for constraints in ((), within):
        bench = Bench(PROSE)
        result = search(
            space,
            objectives_of(PROSE),
            bench,
            algorithm=name,
            evaluations=90,
            population=15,
            constraints=constraints,
        )
        sizes = [PROSE.parameters(a) / full for a in bench.asked[15:]]
        counts[len(constraints)] = sum(0.6 <= s <= 0.67 for s in sizes)
        assert not constraints or all(0.6 <= e.values["parameters"] / full <= 0.67 for e in result.front)
    assert counts[1] > 60 > 30 > counts[0]


def test_a_bound_on_quality_steers_too() -> None:
    space = SearchSpace.preset("fine", PROSE)
    objectives = objectives_of(PROSE)
    bench = Bench(PROSE)
    floor = Constraint(objectives[0], minimum=0.85)
    result = search(space, objectives, bench, evaluations=90, population=15, constraints=[floor])
    found = [e.values["quality"] for e in result.evaluations]
    assert np.mean([q >= 0.85 for q in found[45:]]) > 0.6 > np.mean([q >= 0.85 for q in found[:15]])
    assert min(e.values["quality"] for e in result.front) >= 0.85


def test_constraints_out_of_reach() -> None:
    space = SearchSpace.preset("llama-nas", PROSE)
    size = computed(PROSE)["parameters"]
    with pytest.raises(ValueError, match=r"parameters at most 1,000 is out of reach: .* goes down to 5,049,600"):
        search(space, objectives_of(PROSE), Bench(PROSE), constraints=[Constraint(size, maximum=1000)])
    with pytest.raises(ValueError, match="goes up to"):
        search(space, objectives_of(PROSE), Bench(PROSE), constraints=[Constraint(size, minimum=1e9)])


def test_predictors_that_rank_noise_are_set_aside() -> None:
    space = SearchSpace.preset("fine", PROSE)

    def noise(structure: Structure, a: Architecture) -> float:
        return np.random.default_rng(int(a.key, 16)).random()

    result = search(space, objectives_of(PROSE), Bench(PROSE, score=noise), evaluations=100, population=20, seed=4)
    aside = [g["predictors"]["quality"]["set_aside"] for g in result.generations[2:]]
    assert any(len(kinds) >= 3 for kinds in aside)
    for before, after in zip(result.generations[1:], result.generations[2:], strict=False):
        assert after["chosen"]["quality"]["chosen"] not in before["predictors"]["quality"]["set_aside"]


def test_generations_report_predictors_before_training_on_the_newest() -> None:
    space = SearchSpace.preset("fine", PROSE)
    records: list[dict[str, Any]] = []
    result = search(
        space,
        objectives_of(PROSE),
        Bench(PROSE),
        evaluations=80,
        population=20,
        seed=5,
        on_generation=records.append,
    )
    assert records == result.generations and [g["evaluations"] for g in records] == [20, 40, 60, 80]
    assert records[0]["predictors"]["quality"] == {"used": None, "newest": {}, "set_aside": []}
    last = records[-1]["predictors"]["quality"]
    assert last["used"] == records[-1]["chosen"]["quality"]["chosen"]
    assert last["newest"][last["used"]]["kendall"] > 0.5 and last["newest"][last["used"]]["n"] == 20
    volumes = [g["hypervolume"] for g in records]
    assert volumes == sorted(volumes) and volumes[-1] > volumes[0] > 0
    assert all(g["seconds"]["overhead"] >= 0 and g["seconds"]["evaluation"] >= 0 for g in records)


def test_hypervolume_is_scaled_by_the_first_generation_or_a_given_reference() -> None:
    space = small_space()
    objectives = objectives_of(SMALL)
    full = SMALL.parameters(SMALL.base)
    result = search(
        space,
        objectives,
        Bench(SMALL),
        algorithm="random",
        evaluations=30,
        population=10,
        reference=[0.0, full],
    )
    assert result.reference == [0, full]
    first = result.evaluations[:10]
    low = min(e.values["parameters"] for e in first)
    box = [[1 - e.values["quality"], (e.values["parameters"] - low) / (full - low)] for e in first]
    assert result.generations[0]["hypervolume"] == pytest.approx(hypervolume(np.array(box), [1, 1]))
    default = search(space, objectives, Bench(SMALL), algorithm="random", evaluations=10, population=10)
    assert default.reference == [min(e.values["quality"] for e in default.evaluations), full]


def test_callbacks_come_in_order() -> None:
    space = small_space()
    events: list[tuple[str, int, int]] = []
    search(
        space,
        objectives_of(SMALL),
        Bench(SMALL),
        evaluations=12,
        population=6,
        algorithm="random",
        on_evaluation=lambda e: events.append(("evaluation", e.generation, e.index)),
        on_generation=lambda record: events.append(("generation", record["generation"], record["new"])),
    )
    one = [*[("evaluation", 0, i) for i in reversed(range(6))], ("generation", 0, 6)]
    two = [*[("evaluation", 1, i) for i in reversed(range(6, 12))], ("generation", 1, 6)]
    assert events == one + two


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["linas", "nsga2", "unsga3", "greedy"])
def test_a_sub_network_that_scores_no_number_does_no_harm(name: str, broken: float) -> None:
    space = small_space()

    def score(structure: Structure, a: Architecture) -> float:
        return broken if len(a.kept) < 2 else quality(structure, a)

    bench = Bench(SMALL, score=score)
    result = search(space, objectives_of(SMALL), bench, algorithm=name, evaluations=60, population=12, seed=6)
    assert any(not math.isfinite(e.values["quality"]) for e in result.evaluations)
    assert all(math.isfinite(e.values["quality"]) for e in result.front)
    assert all(math.isfinite(g["hypervolume"]) for g in result.generations)


def test_greedy_cuts_what_harms_least_until_the_target_is_met() -> None:
    structure = SMALL
    space = SearchSpace.from_dict({"ffn.*": [32, 64, 96, 128]}, structure)
    target = structure.parameters(structure.base) - 5 * 32 * 16 * 3
    constraint = Constraint(computed(structure)["parameters"], maximum=target)
    bench = Bench(structure)
    result = search(
        space,
        objectives_of(structure),
        bench,
        algorithm="greedy",
        evaluations=200,
        population=2,
        constraints=[constraint],
    )
    current = space.base
    while structure.parameters(current) > target:
        cuts = []
        for i, layer in enumerate(current.layers):
            if layer.intermediate_size > 32:
                rows = list(current.layers)
                rows[i] = LayerSizes(4, 2, layer.intermediate_size - 32)
                cuts.append(Architecture(16, tuple(rows)))
        assert set(cuts) <= set(bench.asked)
        current = max(cuts, key=lambda a: quality(structure, a))
    assert current in {e.architecture for e in result.front}
    assert len(result.evaluations) < 25, "it stops when the target is met"


def test_greedy_keeps_within_a_small_budget() -> None:
    space = SearchSpace.preset("fine", PROSE)
    target = Constraint(computed(PROSE)["parameters"], maximum=0.7 * PROSE.parameters(PROSE.base))
    bench = Bench(PROSE)
    result = search(
        space,
        objectives_of(PROSE),
        bench,
        algorithm="greedy",
        evaluations=100,
        population=10,
        constraints=[target],
    )
    assert len(bench.asked) <= 100
    assert result.front and result.front[0].values["quality"] > 0.6


def test_gene_counts_of_the_front() -> None:
    space = small_space()
    result = search(space, objectives_of(SMALL), Bench(SMALL), evaluations=40, population=10, seed=7)
    counts = result.gene_counts()
    assert sum(counts["layer.0"].values()) == len(result.front)
    assert sum(counts["ffn.0"].values()) == counts["layer.0"].get(1, 0)
    assert result.front == front(result.evaluations, result.objectives)


def test_what_measure_gives_is_checked() -> None:
    space, objectives = small_space(), objectives_of(SMALL)
    cases = [
        (lambda asked: [(a, {"loss": 1.0}) for a in asked], ValueError, "lacks quality; it has loss"),
        (
            lambda asked: [(a, {"quality": 1.0}) for a in asked[1:]],
            RuntimeError,
            "1 of 4 .* without a measurement",
        ),
        (lambda asked: [(asked[0], {"quality": 1.0})] * 2, ValueError, "not asked for"),
    ]
    for measure, kind, message in cases:
        with pytest.raises(kind, match=message):
            search(space, objectives, measure, evaluations=8, population=4)


def test_requests_that_cannot_be_met(monkeypatch: pytest.MonkeyPatch) -> None:
    space, objectives = small_space(), objectives_of(SMALL)
    with pytest.raises(ValueError, match=r"unknown search algorithm 'annealing'; valid are .*linas"):
        algorithm("annealing")
    with pytest.raises(ValueError, match="at least two evaluations"):
        search(space, objectives, Bench(SMALL), evaluations=1)
    with pytest.raises(ValueError, match="greedy needs a size"):
        search(space, objectives_of(SMALL, "quality", "loss"), Bench(SMALL), algorithm="greedy")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="age-moea needs numba"):
        search(space, objectives, Bench(SMALL), algorithm="age-moea")


def test_mutation_reaches_every_value_of_every_gene() -> None:
    space = SearchSpace.preset("llama-nas", PROSE)
    searcher = LINAS(space, objectives_of(PROSE))
    problem = type("Bounds", (), {"xu": space.upper})()
    rows = np.zeros((2000, len(space.genes)), dtype=np.int64)
    mutated = StepMutation()._do(problem, rows, random_state=searcher.rng)
    assert (mutated.max(0) == space.upper).all() and (mutated.min(0) == 0).all()
    assert 0.3 < (mutated != rows).sum(1).mean() < 1  # one gene is chosen, but a step down or a redraw may stay at 0


def test_search_loads_neither_torch_nor_anything_above_it() -> None:
    code = (
        "import sys, search.run, search.store\n"
        "loaded = {name.split('.')[0] for name in sys.modules} & {'torch', 'compressor', 'export', 'evals'}\n"
        "assert not loaded, loaded"
    )
    root = str(ROOT)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env={**os.environ, "PYTHONPATH": root})


def first_look(asked: Sequence[Architecture]) -> Iterator[tuple[Architecture, dict[str, float]]]:
    """Off by a bias and by noise, the same for the same architecture."""
    for a in asked:
        noise = np.random.default_rng(int(a.key[:8], 16)).normal() * 0.01
        yield a, {"quality": quality(SMALL, a) - 0.1 + noise}


@pytest.mark.parametrize("name", ["linas", "nsga2", "random"])
def test_a_first_look_spares_what_cannot_matter(name: str) -> None:
    space, objectives, bench = small_space(), objectives_of(SMALL), Bench(SMALL)
    result = search(
        space, objectives, bench, algorithm=name, evaluations=60, population=15, screening=first_look, share=0.25
    )
    partial = [e for e in result.evaluations if not e.full]
    full = [e for e in result.evaluations if e.full]
    assert partial and {e.architecture for e in full} == set(bench.asked)
    assert 58 <= len(full) + 0.25 * (len(result.evaluations) - 15) <= 60 < len(result.evaluations)
    assert [e.index for e in result.evaluations] == list(range(len(result.evaluations)))
    for e in partial:
        assert e.values["quality"] == pytest.approx(quality(SMALL, e.architecture), abs=0.05)  # the bias is gone
    # Next to nothing that would have been on the front was given up.
    missed = non_dominated(
        np.array([[-quality(SMALL, e.architecture), e.values["parameters"]] for e in [*full, *partial]])
    )
    assert sum(i >= len(full) for i in missed) <= 1
    assert all(e.full for e in result.front)


def test_what_is_known_counts_and_is_not_asked_for_again() -> None:
    space, objectives, bench = small_space(), objectives_of(SMALL), Bench(SMALL)
    known = greedy_path(space, objectives, bench, evaluations=20, population=7)
    n = len(known)
    assert 10 < n == len(bench.asked) <= 20 and known[0].architecture == space.base
    after = Bench(SMALL)
    result = search(space, objectives, after, evaluations=50, population=10, known=known, seed=1)
    assert result.evaluations[:n] == known and len(result.evaluations) == 50
    assert len(after.asked) == 50 - n and not set(after.asked) & set(bench.asked)
