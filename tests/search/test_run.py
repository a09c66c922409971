"""Searches on landscapes by formula: they find the front, ask nothing twice, and resume where they were."""

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
from search.multi_fidelity import ScreeningFilter
from search.objectives import Constraint, Evaluation, Objective, choose, computed
from search.pareto import costs, front, hypervolume, non_dominated
from search.run import GenerationRecord, SearchResult, first_generation, greedy_path, search
from search.sampling import sample, uniform_members
from search.space import SearchSpace
from supernet.architecture import Architecture, LayerSizes, Structure
from tests.support import ROOT
from tests.support.search_helpers import PROSE, SMALL, quality

FINE = SearchSpace.preset("fine", PROSE)
LISTED = SearchSpace.from_dict({"ffn.*": [32, 64, 96, 128], "kv.*": [1, 2], "layer.*": [0, 1]}, SMALL)
"""4,096 genomes, 2,331 architectures: small enough to enumerate."""
PARAMETERS = computed(PROSE)["parameters"]
FULL = PROSE.parameters(PROSE.base)
RUNNABLE = [name for name in algorithms() if name != "age-moea" or importlib.util.find_spec("numba")]


@pytest.fixture(autouse=True)
def short_inner_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LINAS, "inner_generations", 12)


def objectives_of(structure: Structure, *names: str) -> list[Objective]:
    return choose(names or ("quality", "parameters"), computed(structure), {"quality": "max", "loss": "min"})


class FakeMeasure:
    """Measures by formula, remembers what it was asked for, and can be interrupted."""

    def __init__(
        self,
        structure: Structure,
        interrupted_at: int | None = None,
        scores: dict[Architecture, float] | None = None,
        score: Callable[[Structure, Architecture], float] = quality,
    ) -> None:
        self.structure, self.interrupted_at, self.score = structure, interrupted_at, score
        self.scores = {} if scores is None else scores
        self.requests: list[list[Architecture]] = []
        self.measured = 0

    def __call__(self, architectures: Sequence[Architecture]) -> Iterator[tuple[Architecture, dict[str, float]]]:
        self.requests.append(list(architectures))
        for a in reversed(architectures):  # the order of arrival must not matter
            if a not in self.scores:
                if self.measured == self.interrupted_at:
                    raise KeyboardInterrupt
                self.measured += 1
                self.scores[a] = self.score(self.structure, a)
            yield a, {"quality": self.scores[a], "loss": -math.log(max(self.scores[a], 1e-9))}

    @property
    def asked(self) -> list[Architecture]:
        return [a for request in self.requests for a in request]


def run(space: SearchSpace, measure: FakeMeasure | None = None, name: str = "linas", **options: Any) -> SearchResult:
    """A search for quality and parameters."""
    measure = measure or FakeMeasure(space.structure)
    return search(space, objectives_of(space.structure), measure, algorithm=name, **options)


def share_of_true_front(space: SearchSpace, result: SearchResult) -> float:
    """Hypervolume of what was measured as a share of the whole space's."""
    everything = [
        Evaluation(a, {"quality": quality(space.structure, a), "parameters": space.structure.parameters(a)})
        for a in space.architectures()
    ]
    truth = costs(everything, result.objectives)
    low, high = truth.min(0), truth.max(0)
    measured = (costs(result.evaluations, result.objectives) - low) / (high - low)
    return hypervolume(measured, [1, 1]) / hypervolume((truth - low) / (high - low), [1, 1])


def test_searches_find_the_brute_forced_front() -> None:
    shares = {}
    for name in ("linas", "nsga2", "random"):
        measure = FakeMeasure(SMALL)
        result = run(LISTED, measure, name, evaluations=120, population=20, seed=1)
        assert len(measure.asked) == len(set(measure.asked)) == len(result.evaluations) == 120
        shares[name] = share_of_true_front(LISTED, result)
    assert shares["linas"] > 0.99 and shares["nsga2"] > 0.94 and shares["random"] < shares["nsga2"] < shares["linas"]
    assert share_of_true_front(LISTED, run(LISTED, name="ehvi", evaluations=50, population=20, seed=1)) > 0.99


@pytest.mark.parametrize("name", ["linas", "nsga2"])
def test_a_whole_space_is_measured_once_and_gives_the_exact_front(name: str) -> None:
    space = SearchSpace.from_dict({"ffn.*": [32, 64, 128], "layer.1": [0, 1]}, SMALL)
    everything = list(space.architectures())
    measure = FakeMeasure(SMALL)
    result = run(space, measure, name, evaluations=500, population=8, seed=0)
    assert len(measure.asked) == len(everything) == 36 and set(measure.asked) == set(everything)
    values = np.array([[-quality(SMALL, a), SMALL.parameters(a)] for a in everything])
    assert {e.architecture for e in result.front} == {everything[i] for i in non_dominated(values)}


@pytest.mark.parametrize("name", RUNNABLE)
def test_nothing_is_asked_twice_and_everything_is_in_the_space(name: str) -> None:
    measure = FakeMeasure(PROSE)
    objectives = objectives_of(PROSE, "quality", "parameters", "macs")
    result = search(FINE, objectives, measure, algorithm=name, evaluations=60, population=12, seed=2)
    assert len(measure.asked) == len(set(measure.asked)) == len(result.evaluations)
    assert all(a in FINE for a in measure.asked)
    assert [e.architecture for e in result.evaluations] == measure.asked
    assert [e.index for e in result.evaluations] == list(range(len(measure.asked)))
    for e in result.evaluations:
        assert e.values["parameters"] == PROSE.parameters(e.architecture)
        assert e.values["macs"] == PROSE.macs(e.architecture)
    json.dumps(result.to_dict(), allow_nan=False)


@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.parametrize("interrupted_at", [3, 31])
def test_a_resumed_search_goes_on_as_an_uninterrupted_one(name: str, interrupted_at: int) -> None:
    limit = Constraint(PARAMETERS, maximum=6e6)
    options: dict[str, Any] = {"evaluations": 48, "population": 12, "seed": 3, "constraints": [limit]}
    uninterrupted, interrupted = FakeMeasure(PROSE), FakeMeasure(PROSE, interrupted_at)
    whole = run(FINE, uninterrupted, name, **options)
    with pytest.raises(KeyboardInterrupt):
        run(FINE, interrupted, name, **options)
    np.random.default_rng().random(5)
    resumed = FakeMeasure(PROSE, scores=interrupted.scores)
    again = run(SearchSpace.preset("fine", PROSE), resumed, name, **options)
    assert resumed.requests == uninterrupted.requests
    assert resumed.measured == len(uninterrupted.asked) - interrupted_at
    assert again.evaluations == whole.evaluations
    without_times = [[g | {"seconds": None} for g in result.generations] for result in (again, whole)]
    assert without_times[0] == without_times[1]


def test_different_seeds_differ() -> None:
    measures = [FakeMeasure(PROSE), FakeMeasure(PROSE)]
    for seed, measure in enumerate(measures):
        run(FINE, measure, evaluations=20, population=10, seed=seed)
    first, second = (measure.asked for measure in measures)
    assert first[:2] == second[:2] and first[2:] != second[2:]


def test_the_first_generation() -> None:
    uniform, wish = uniform_members(FINE, 4), FINE.decode(sample(FINE, np.random.default_rng(9))[0])
    measure = FakeMeasure(PROSE)
    run(FINE, measure, evaluations=30, population=15, include=uniform, warm_start=[wish, FINE.base])
    first = measure.requests[0]
    assert len(first) == 15 and [len(r) for r in measure.requests] == [15, 15]
    assert first[:2] == [FINE.base, FINE.smallest()] and {*uniform, wish} <= set(first)
    sizes = sorted(PROSE.parameters(a) for a in first)
    assert max(np.diff(sizes)) < 0.35 * (sizes[-1] - sizes[0])
    with pytest.raises(ValueError, match="does not hold"):
        first_generation(FINE, 5, np.random.default_rng(0), [Architecture(256, (LayerSizes(8, 4, 700),) * 8)])


@pytest.mark.parametrize("name", ["linas", "ehvi", "nsga2", "unsga3"])
def test_constraints_steer(name: str) -> None:
    counts = []
    for constraints in ([], [Constraint(PARAMETERS, minimum=0.6 * FULL, maximum=0.67 * FULL)]):
        measure = FakeMeasure(PROSE)
        result = run(FINE, measure, name, evaluations=90, population=15, constraints=constraints)
        counts.append(sum(0.6 <= PROSE.parameters(a) / FULL <= 0.67 for a in measure.asked[15:]))
        assert not constraints or all(0.6 <= e.values["parameters"] / FULL <= 0.67 for e in result.front)
    assert counts[1] > 60 > 30 > counts[0]


def test_a_bound_on_quality_steers_too() -> None:
    floor = Constraint(objectives_of(PROSE)[0], minimum=0.85)
    result = run(FINE, evaluations=90, population=15, constraints=[floor])
    good = [e.values["quality"] >= 0.85 for e in result.evaluations]
    assert np.mean(good[45:]) > 0.6 > np.mean(good[:15])
    assert min(e.values["quality"] for e in result.front) >= 0.85


def test_constraints_out_of_reach() -> None:
    space = SearchSpace.preset("llama-nas", PROSE)
    with pytest.raises(ValueError, match=r"parameters at most 1,000 is out of reach: .* goes down to 5,049,600"):
        run(space, constraints=[Constraint(PARAMETERS, maximum=1000)])
    with pytest.raises(ValueError, match="goes up to"):
        run(space, constraints=[Constraint(PARAMETERS, minimum=1e9)])


@pytest.mark.parametrize(("name", "evaluations"), [("linas", 100), ("ehvi", 48)])
def test_predictors_that_rank_noise_are_set_aside(name: str, evaluations: int) -> None:
    """Also where a generation alone has too few to judge by."""
    noise = FakeMeasure(PROSE, score=lambda structure, a: np.random.default_rng(int(a.key, 16)).random())
    generations = run(FINE, noise, name, evaluations=evaluations, population=20, seed=4).generations
    set_aside = [g["predictors"]["quality"]["set_aside"] for g in generations]
    assert any(len(kinds) >= 3 for kinds in set_aside[2:])
    for kinds, after in zip(set_aside[1:], generations[2:], strict=False):
        assert after["chosen"]["quality"]["chosen"] not in kinds


def test_generations_report_predictors_before_training_on_the_newest() -> None:
    records: list[GenerationRecord] = []
    result = run(FINE, evaluations=80, population=20, seed=5, on_generation=records.append)
    assert records == result.generations and [g["evaluations"] for g in records] == [20, 40, 60, 80]
    assert records[0]["predictors"]["quality"] == {"used": None, "newest": {}, "set_aside": []}
    last = records[-1]["predictors"]["quality"]
    assert last["used"] == records[-1]["chosen"]["quality"]["chosen"]
    assert last["newest"][last["used"]]["kendall"] > 0.5 and last["newest"][last["used"]]["n"] == 20
    volumes = [g["hypervolume"] for g in records]
    assert volumes == sorted(volumes) and volumes[-1] > volumes[0] > 0
    assert all(g["seconds"]["overhead"] >= 0 and g["seconds"]["evaluation"] >= 0 for g in records)


def test_hypervolume_is_scaled_by_the_first_generation_or_a_given_reference() -> None:
    full = SMALL.parameters(SMALL.base)
    result = run(LISTED, name="random", evaluations=30, population=10, reference=[0.0, full])
    assert result.reference == [0, full]
    first = result.evaluations[:10]
    low = min(e.values["parameters"] for e in first)
    box = [[1 - e.values["quality"], (e.values["parameters"] - low) / (full - low)] for e in first]
    assert result.generations[0]["hypervolume"] == pytest.approx(hypervolume(np.array(box), [1, 1]))
    default = run(LISTED, name="random", evaluations=10, population=10)
    assert default.reference == [min(e.values["quality"] for e in default.evaluations), full]


def test_callbacks_come_in_order() -> None:
    events: list[tuple[str, int, int]] = []
    run(
        LISTED,
        name="random",
        evaluations=12,
        population=6,
        on_evaluation=lambda e: events.append(("evaluation", e.generation, e.index)),
        on_generation=lambda record: events.append(("generation", record["generation"], record["new"])),
    )
    first = [*(("evaluation", 0, i) for i in reversed(range(6))), ("generation", 0, 6)]
    second = [*(("evaluation", 1, i) for i in reversed(range(6, 12))), ("generation", 1, 6)]
    assert events == first + second


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["linas", "ehvi", "nsga2", "unsga3", "greedy"])
def test_a_score_that_is_no_number_does_no_harm(name: str, broken: float) -> None:
    measure = FakeMeasure(SMALL, score=lambda structure, a: broken if len(a.kept) < 2 else quality(structure, a))
    result = run(LISTED, measure, name, evaluations=60, population=12, seed=6)
    assert any(not math.isfinite(e.values["quality"]) for e in result.evaluations)
    assert all(math.isfinite(e.values["quality"]) for e in result.front)
    assert all(math.isfinite(g["hypervolume"]) for g in result.generations)


def test_greedy_makes_the_cut_that_degrades_least_until_the_target_is_met() -> None:
    space = SearchSpace.from_dict({"ffn.*": [32, 64, 96, 128]}, SMALL)
    target = SMALL.parameters(SMALL.base) - 5 * 32 * 16 * 3
    limit = Constraint(computed(SMALL)["parameters"], maximum=target)
    measure = FakeMeasure(SMALL)
    result = run(space, measure, "greedy", evaluations=200, population=2, constraints=[limit])
    current = space.base
    while SMALL.parameters(current) > target:
        cuts = []
        for i, layer in enumerate(current.layers):
            if layer.intermediate_size > 32:
                rows = list(current.layers)
                rows[i] = LayerSizes(4, 2, layer.intermediate_size - 32)
                cuts.append(Architecture(16, tuple(rows)))
        assert set(cuts) <= set(measure.asked)
        current = max(cuts, key=lambda a: quality(SMALL, a))
    assert current in {e.architecture for e in result.front}
    assert len(result.evaluations) < 25, "it stops when the target is met"


def test_greedy_keeps_within_a_small_budget() -> None:
    measure = FakeMeasure(PROSE)
    limit = Constraint(PARAMETERS, maximum=0.7 * FULL)
    result = run(FINE, measure, "greedy", evaluations=100, population=10, constraints=[limit])
    assert len(measure.asked) <= 100
    assert result.front and result.front[0].values["quality"] > 0.6


def test_gene_counts_of_the_front() -> None:
    result = run(LISTED, evaluations=40, population=10, seed=7)
    counts = result.gene_counts()
    assert sum(counts["layer.0"].values()) == len(result.front)
    assert sum(counts["ffn.0"].values()) == counts["layer.0"].get(1, 0)
    assert result.front == front(result.evaluations, result.objectives)


@pytest.mark.parametrize(
    ("measure", "kind", "message"),
    [
        (lambda asked: [(a, {"loss": 1.0}) for a in asked], ValueError, "lacks quality; it has loss"),
        (lambda asked: [(a, {"quality": 1.0}) for a in asked[1:]], RuntimeError, "1 of 4 .* without a measurement"),
        (lambda asked: [(asked[0], {"quality": 1.0})] * 2, ValueError, "not asked for"),
    ],
)
def test_measurements_are_checked(measure: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        run(LISTED, measure, evaluations=8, population=4)


def test_requests_that_cannot_be_met(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"unknown search algorithm 'annealing'; valid are .*linas"):
        algorithm("annealing")
    with pytest.raises(ValueError, match="at least two evaluations"):
        run(LISTED, evaluations=1)
    with pytest.raises(ValueError, match="greedy needs a size"):
        search(LISTED, objectives_of(SMALL, "quality", "loss"), FakeMeasure(SMALL), algorithm="greedy")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="age-moea needs numba"):
        run(LISTED, name="age-moea")


def test_mutation_reaches_every_value_of_every_gene() -> None:
    space = SearchSpace.preset("llama-nas", PROSE)
    problem = type("Bounds", (), {"xu": space.upper})()
    rows = np.zeros((2000, len(space.genes)), dtype=np.int64)
    mutated = StepMutation()._do(problem, rows, random_state=np.random.default_rng(0))
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


def screening(asked: Sequence[Architecture]) -> Iterator[tuple[Architecture, dict[str, float]]]:
    """Off by a bias and by noise, the same for the same architecture."""
    for a in asked:
        noise = np.random.default_rng(int(a.key[:8], 16)).normal() * 0.01
        yield a, {"quality": quality(SMALL, a) - 0.1 + noise}


@pytest.mark.parametrize("name", ["linas", "nsga2", "random"])
def test_screening_spares_what_cannot_matter(name: str) -> None:
    measure = FakeMeasure(SMALL)
    result = run(LISTED, measure, name, evaluations=60, population=15, screening=screening, share=0.25)
    predicted = [e for e in result.evaluations if not e.full]
    full = [e for e in result.evaluations if e.full]
    assert predicted and {e.architecture for e in full} == set(measure.asked)
    assert 58 <= len(full) + 0.25 * (len(result.evaluations) - 15) <= 60 < len(result.evaluations)
    assert [e.index for e in result.evaluations] == list(range(len(result.evaluations)))
    for e in predicted:
        assert e.values["quality"] == pytest.approx(quality(SMALL, e.architecture), abs=0.05)  # the bias is gone
    # Next to nothing that would have been on the front was given up.
    values = [[-quality(SMALL, e.architecture), e.values["parameters"]] for e in [*full, *predicted]]
    assert sum(i >= len(full) for i in non_dominated(np.array(values))) <= 1
    assert all(e.full for e in result.front)


def test_a_screening_is_dominated_by_what_meets_the_constraints_only() -> None:
    objectives = objectives_of(SMALL, "quality", "parameters")
    (loss,) = (o for o in objectives_of(SMALL, "quality", "loss") if o.name == "loss")
    filter_ = ScreeningFilter(objectives, [Constraint(loss, maximum=2.0)])
    for _ in range(8):
        filter_.learn({"quality": 0.5, "loss": 1.0}, {"quality": 0.5, "loss": 1.0})
    screened = Evaluation(SMALL.base, {"quality": 0.5, "loss": 1.5, "parameters": 100})
    better = {"quality": 0.9, "parameters": 50}
    assert not filter_.rules_out(screened, [Evaluation(SMALL.base, better | {"loss": 2.5})])
    assert filter_.rules_out(screened, [Evaluation(SMALL.base, better | {"loss": 1.5})])


def test_known_evaluations_count_and_are_not_asked_for_again() -> None:
    before, after = FakeMeasure(SMALL), FakeMeasure(SMALL)
    known = greedy_path(LISTED, objectives_of(SMALL), before, evaluations=20, population=7)
    n = len(known)
    assert 10 < n == len(before.asked) <= 20 and known[0].architecture == LISTED.base
    result = run(LISTED, after, evaluations=50, population=10, known=known, seed=1)
    assert result.evaluations[:n] == known and len(result.evaluations) == 50
    assert len(after.asked) == 50 - n and not set(after.asked) & set(before.asked)


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_search_goes_on_from_another(name: str) -> None:
    first = run(
        FINE, name=name, evaluations=30, population=10, seed=1, constraints=[Constraint(PARAMETERS, 0.6 * FULL)]
    )
    measure, start = FakeMeasure(PROSE), uniform_members(FINE, 4)
    larger, within = [Constraint(PARAMETERS, minimum=0.8 * FULL)], [Constraint(PARAMETERS, minimum=0.3 * FULL)]
    options: dict[str, Any] = {"evaluations": 42, "population": 10, "seed": 1, "constraints": larger, "within": within}
    options |= {"known": first.evaluations, "generations": first.generations, "warm_start": start}
    result = run(FINE, measure, name, **options)
    # What was known stays and is not asked for again; what is new begins with the warm start, and nothing at random.
    n = len(first.evaluations)
    assert result.evaluations[:n] == first.evaluations and not set(measure.asked) & {
        e.architecture for e in first.evaluations
    }
    assert len(result.evaluations) == n + len(measure.asked) == 42
    new = [a for a in start if a not in {e.architecture for e in first.evaluations}]
    assert set(measure.requests[0]) == set(new)
    records = result.generations
    assert records[: len(first.generations)] == first.generations
    assert [record["generation"] for record in records] == list(range(len(records)))
    assert [e.index for e in result.evaluations[n:]] == list(range(n, 42))
    # The front lies within its own bounds, not within those that steered.
    sizes = [PROSE.parameters(e.architecture) / FULL for e in result.front]
    assert min(sizes) >= 0.3 and min(sizes) < 0.8
    again = run(FINE, FakeMeasure(PROSE), name, **options)
    assert [e.architecture for e in again.evaluations] == [e.architecture for e in result.evaluations]
