"""A table of speeds recovers the times of parts and predicts without torch; measured networks take turns."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from evals.speed import measured as timing
from evals.speed.beside import layer_times_beside
from evals.speed.measured import REPLAYED, Speed, compare_speed, runs_within, speed_beside
from evals.speed.table import PartTimes, SpeedTable, Timed, designed, mixtures, sizes_to_time, times_layers
from supernet.activation import SuperNetwork
from supernet.architecture import Architecture, LayerSizes, Structure
from supernet.common.errors import RequestError
from supernet.families import describe
from supernet.slicing import extract
from tests.support import ROOT, tiny


def structure(**sizes: object) -> Structure:
    return describe(LlamaConfig(**tiny.SIZES | sizes))


def true_seconds(architecture: Architecture) -> float:
    """A machine on which time is a sum: a fixed part, and for heads and neurons a constant and a price for each."""
    total = 0.004
    for layer in architecture.layers:
        heads, width = layer.num_attention_heads, layer.intermediate_size
        total += (0.001 + 0.0003 * heads) * bool(heads) + (0.0005 + 2e-6 * width) * bool(width)
    return total


def fitted(base: Structure) -> PartTimes:
    timed = [Timed(architecture, true_seconds(architecture)) for architecture in designed(base, 0)]
    return PartTimes.fit(timed, *sizes_to_time(base), base.base.hidden_size)


def fitted_by_layer(base: Structure) -> PartTimes:
    timed = []
    for architecture in mixtures(base, 0):
        layers = [Architecture(32, (architecture.layers[i],)) for i in architecture.kept]
        timed += [Timed(layer, true_seconds(layer) - 0.004, rest=False) for layer in layers]
        timed.append(Timed(Architecture(32, ()), 0.004))
    return PartTimes.fit(timed, *sizes_to_time(base), base.base.hidden_size)


def random_architectures(base: Structure, count: int) -> list[Architecture]:
    rng = np.random.default_rng(1)

    def sizes(full: LayerSizes) -> LayerSizes:
        groups = int(rng.integers(0, full.num_key_value_heads + 1))
        width = int(rng.integers(0, 9)) * full.intermediate_size // 8
        return LayerSizes(groups * (full.num_attention_heads // full.num_key_value_heads), groups, width)

    return [Architecture(base.base.hidden_size, tuple(map(sizes, base.base.layers))) for _ in range(count)]


@pytest.mark.parametrize("fitted", [fitted, fitted_by_layer])
def test_additive_times_are_recovered_exactly(fitted: Callable[[Structure], PartTimes]) -> None:
    base = structure(num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4, intermediate_size=256)
    table = fitted(base)
    for architecture in random_architectures(base, 30):
        assert table.seconds(architecture, 32) == pytest.approx(true_seconds(architecture), rel=1e-6)
    assert table.fixed == pytest.approx(0.004, rel=1e-4)


def test_a_size_between_two_is_interpolated_and_a_narrower_residual_costs_its_share() -> None:
    table = PartTimes(1.0, [0, 6], [0.0, 3.0], [0, 100, 200], [0.0, 4.0, 6.0])
    layer = LayerSizes(4, 2, 150)
    assert table.seconds(Architecture(32, (layer, layer)), 32) == pytest.approx(1 + 2 * (3 + 5))
    assert table.seconds(Architecture(16, (layer,)), 32) == pytest.approx(1 + 1.5 + 3)
    assert table.seconds(Architecture(32, (LayerSizes(0, 0, 0),)), 32) == 1.0


@pytest.mark.parametrize(("designed", "device"), [(designed, "cuda"), (mixtures, "cpu")])
def test_the_design_tells_all_parts_apart(
    designed: Callable[[Structure, int], list[Architecture]], device: str
) -> None:
    base = structure(num_hidden_layers=2)
    design = designed(base, 0)
    assert len(set(design)) == len(design) == SpeedTable.steps(base, torch.device(device))
    assert all(a.fits(base.base) and any(layer.num_key_value_heads for layer in a.layers) for a in design)
    assert base.base in design
    assert designed(base, 0) == design


def test_predictions_and_round_trip(tmp_path: Path) -> None:
    base = structure()
    parts, errors = fitted(base), {"prefill_median_error": 0.0}
    table = SpeedTable("transformers", "cpu", 1, "float32", 2, 100, 11, 32, parts, parts, errors)
    seconds = parts.seconds(base.base, 32)
    expected = {"prefill_tps": 200 / seconds, "decode_tps": 2 / seconds, "latency": 11 * seconds}
    assert table.predict(base.base) == pytest.approx(expected)
    table.save(tmp_path / "speed.json")
    assert SpeedTable.load(tmp_path / "speed.json") == table
    assert table.fits(base) and not table.fits(structure(intermediate_size=128))
    code = (
        "import sys, pathlib; from evals.speed.table import SpeedTable; from supernet.architecture import *;"
        f"t = SpeedTable.load(pathlib.Path({str(tmp_path / 'speed.json')!r}));"
        f"print(t.predict(Architecture.from_dict({base.base.to_dict()}))['decode_tps']);"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) == table.predict(base.base)["decode_tps"]


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 0}', '{"schema": 1}'])
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "speed.json").write_text(text)
    with pytest.raises(RequestError, match=r"not a speed table|not valid JSON"):
        SpeedTable.load(tmp_path / "speed.json")


def test_measured_table_of_a_real_network(tmp_path: Path) -> None:
    supernet = SuperNetwork(tiny.llama())
    built: list[Architecture] = []
    steps: list[int] = []
    cpu = torch.device("cpu")

    def build(architecture: Architecture) -> torch.nn.Module:
        built.append(architecture)
        return extract(supernet.model, supernet.structure, architecture)

    measured = SpeedTable.measure(build, supernet.structure, rounds=1, prompt=8, new=4, on_step=lambda: steps.append(1))
    assert len(steps) == SpeedTable.steps(supernet.structure, cpu) == len(built) - 1
    assert (measured.batch, measured.prompt, measured.new, measured.dtype) == (1, 8, 4, "float32")
    assert all(value > 0 for value in measured.predict(supernet.base).values())
    assert measured.fits(supernet.structure) and measured.fits(structure(num_hidden_layers=5))
    assert not measured.fits(structure(vocab_size=300))
    assert measured.made_on(cpu, torch.float32) and not measured.made_on(cpu, torch.bfloat16)
    assert not replace(measured, threads=99).made_on(cpu, torch.float32)
    assert not replace(measured, device="elsewhere").made_on(cpu, torch.float32)
    measured.save(tmp_path / "speed.json")
    check = json.loads((tmp_path / "speed.json").read_text())["check"]
    assert check.keys() == {"prefill_median_error", "decode_median_error"}


def test_layers_are_timed_each_for_itself() -> None:
    supernet = SuperNetwork(tiny.llama(num_hidden_layers=3, hidden_size=64, intermediate_size=2048))
    base = supernet.base
    small = LayerSizes(0, 0, 32)
    mixed = Architecture(base.hidden_size, (base.layers[0], small, base.layers[2]))
    network, reference = (extract(supernet.model, supernet.structure, a) for a in (mixed, base))
    times = layer_times_beside(network, reference, batch=1, prompt=24, new=8, rounds=3)
    for layers, rest in ((times.prefill_layers, times.prefill_rest), (times.decode_layers, times.decode_rest)):
        assert len(layers) == 3 and min(*layers, rest) > 0
    assert times.reference.prefill > 0 and times.reference.decode > 0
    layer = network.get_submodule("model.layers.0")
    assert not layer._forward_pre_hooks and not layer._forward_hooks


def test_where_layers_cannot_be_told_by_their_sizes_networks_are_timed_as_wholes() -> None:
    base = structure()
    hybrid = replace(base, base=Architecture(32, (LayerSizes(0, 0, 64), *base.base.layers[1:])))
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert times_layers(base, cpu) and not times_layers(base, cuda) and not times_layers(hybrid, cpu)
    assert SpeedTable.steps(hybrid, cpu) == len(designed(hybrid, 0))


def test_speeds_are_measured_side_by_side() -> None:
    models = {str(n): tiny.llama(num_hidden_layers=n) for n in (1, 2)}
    order: list[str] = []
    for name, model in models.items():
        model.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    speeds = compare_speed(models, prompt=8, new=3, repeats=2, warmup=1, threads=1)
    assert set(speeds) == {"1", "2"}
    assert "".join(order[6:]) == "111222" + "222111" + "111222"  # after the passes that measure memory
    for speed in speeds.values():
        assert isinstance(speed, Speed) and (speed.threads, speed.prompt, speed.new, speed.repeats) == (1, 8, 3, 2)
        assert speed.decode_tps > 0 and speed.prefill_tps > 0 and speed.ttft_ms <= speed.latency_ms
        assert speed.warmup == 1 and speed.prefill_spread >= 0 and speed.decode_spread >= 0
        assert speed.throughput_tps == pytest.approx(3 / speed.latency_ms * 1e3)


def test_fewer_runs_are_timed_of_networks_that_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [runs_within(seconds, 7) for seconds in (0.0, 1.0, 10.0, 100.0)] == [7, 7, 4, 3]
    assert runs_within(100.0, 2) == 2
    assert [runs_within(seconds, 7, REPLAYED) for seconds in (0.1, 1.0, 2.0)] == [7, 4, 3]
    monkeypatch.setattr(timing, "TIMED", 0.0)
    assert compare_speed({"": tiny.llama()}, prompt=4, new=2)[""].repeats == 3


def test_a_network_timed_later_is_stated_at_the_base_s_first_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    network, other, base = tiny.llama(), tiny.llama(), tiny.llama()
    speed, known = speed_beside(network, base, prompt=8, new=3, repeats=1)
    assert speed.decode_tps > 0 and known.prompt == 8

    def on_a_slower_machine(models: dict[str, Any], **_: Any) -> dict[str, Speed]:
        assert list(models.values()) == [other, base]
        slow = known.model_copy(update={"decode_tps": known.decode_tps / 4, "prefill_tps": known.prefill_tps / 2})
        faster = slow.model_copy(update={"decode_tps": 1.5 * slow.decode_tps, "peak_memory_bytes": 1})
        return {"model": faster, "base": slow}

    monkeypatch.setattr(timing, "compare_speed", on_a_slower_machine)
    speed, base_speed = speed_beside(other, base, known)
    assert base_speed == known
    assert speed.decode_tps == pytest.approx(1.5 * known.decode_tps)
    assert speed.prefill_tps == pytest.approx(known.prefill_tps) and speed.peak_memory_bytes == 1


def test_peak_memory_counts_weights_and_what_a_run_needs() -> None:
    model = tiny.llama()
    weights = 4 * sum(p.numel() for p in model.parameters())
    small = compare_speed({"": model}, prompt=4, new=2, repeats=1)[""].peak_memory_bytes
    large = compare_speed({"": model}, prompt=32, new=2, repeats=1)[""].peak_memory_bytes
    assert weights < small < large < 4 * weights
    a_token = 2 * 4 * model.config.num_hidden_layers * model.config.num_key_value_heads * model.config.head_dim
    longest = compare_speed({"": model}, prompt=32, new=32, repeats=1)[""].peak_memory_bytes
    assert longest is not None and longest >= weights + 28 * a_token


def test_a_workload_is_cut_to_the_context() -> None:
    speed = compare_speed({"": tiny.llama()}, repeats=1)[""]
    assert speed.prompt == 32 and speed.new == 32
