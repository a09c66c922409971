"""Names that are known without torch are those of the tables that give them a meaning."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from compressor import names
from compressor.cli.offline import tasks_are_local
from compressor.front_table import ORDERS
from evals.baselines import baselines
from evals.warm_starts import warm_start_methods
from export.layouts.table import LAYOUTS
from search.algorithms import algorithms
from search.presets import PRESETS
from supernet.importance import IMPORTANCES
from supernet.training.adapters import PARAMETERS
from supernet.training.losses import LOSSES
from supernet.training.optimizers import OPTIMIZERS
from supernet.training.samplers import DRAWS, SAMPLERS
from tests.support import ROOT


def test_names_are_those_of_the_tables() -> None:
    assert set(names.SPACES) == set(PRESETS)
    assert set(names.ORDERINGS) == set(IMPORTANCES)
    assert set(names.SAMPLERS) == set(SAMPLERS)
    assert set(names.DRAWS) == set(DRAWS)
    assert set(names.LOSSES) == set(LOSSES)
    assert set(names.TRAINED) == set(PARAMETERS)
    assert set(names.OPTIMIZERS) == set(OPTIMIZERS)
    assert set(names.ALGORITHMS) == set(algorithms())
    assert set(names.WARM_STARTS) == set(warm_start_methods())
    assert set(names.BASELINES) == set(baselines())
    assert tuple(ORDERS) == names.FRONT_ORDERS
    assert set(names.FORMATS) == set(LAYOUTS)


def test_lm_evals_tasks_are_found_without_lm_eval() -> None:
    found = names.lm_eval_tasks()
    assert {"arc_easy", "hellaswag", "mmlu", "winogrande", "piqa"} <= set(found)
    assert names.in_lm_eval("arc_easy") and not names.in_lm_eval("arc_eezy")


def test_names_need_no_heavy_library() -> None:
    heavy = ("torch", "transformers", "lm_eval", "pymoo", "sklearn")
    code = (
        f"import sys, compressor.early_checks, compressor.cli; sys.exit(any(name in sys.modules for name in {heavy}))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("files", "local"),
    [
        ({"a": "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: x.jsonl}}\n"}, True),
        ({"a": "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: 'https://x/y.jsonl'}\n"}, False),
        ({"a": "task: mine\ndataset_path: squad\n"}, False),
        ({"a": "task: mine\ninclude: other.yaml\n"}, False),
        ({"a": "group: mine\ntask: [arc_easy, piqa]\n"}, False),
        ({"a": "group: mine\ntask: [one]\n", "b": "task: one\ndataset_path: json\nprocess: !function f.g\n"}, True),
        ({"a": "group: mine\ntask:\n  - task: one\n    dataset_path: squad\n"}, False),
        ({"a": "group: mine\ntask: [\n"}, False),
    ],
)
def test_tasks_are_local_where_all_their_data_are_files(tmp_path: Path, files: dict[str, str], local: bool) -> None:
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    assert tasks_are_local(["mine"], str(tmp_path)) is local


def test_the_bundled_tasks_are_local() -> None:
    folder = ROOT / "compressor" / "demo" / "tasks"
    assert tasks_are_local(["world_grammar", "world_facts"], str(folder))
