"""Size and bits picked together: what is compared, what is picked and packaged, and the base in few bits beside it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from compressor import pipeline
from compressor.job import Job
from compressor.recipe_file import read_recipe
from compressor.stages.exporting import say_what_is_too_large
from compressor.stages.joint_pick import Bits, RoundedLosses, candidates, pick_with_bits, sizes_within, whole_network
from compressor.stages.layer_timings import speed_table
from compressor.stages.llama_types import pick_with_types
from compressor.stages.picking import measured, pick
from compressor.stages.picks import read_picks
from compressor.stages.quantized_base import base_schemes, tunes
from compressor.stages.reporting import report
from export.package_record import read_record
from search.pareto import Target
from supernet.architecture import Architecture
from supernet.common.errors import RequestError
from supernet.slicing import fits_plain_class
from supernet.training.data import HELD_OUT_BLOCKS
from tests.support import tiny
from tests.support.export_networks import tiny_tokenizer


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("joint")
    model = tiny.checkpoint(folder / "model", vocab_size=320, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    tiny_tokenizer().save_pretrained(model)  # of a kind that llama.cpp knows
    given = {
        "model": str(model),
        "data": str(tiny.data(folder / "data.jsonl", 300)),
        "tasks": "tiny_choice",
        "include_path": str(tiny.task(folder / "tasks", documents=40)),
        "space": {"ffn.*": [32, 64], "layer.1": [0, 1]},
        "finetuning": {"tokens": 0, "sequence_length": 32, "batch_size": 4},
        "searching": {"evaluations": 10, "population": 5, "limit": 12, "objectives": ["quality", "parameters"]},
        "healing": {"tokens": 0},
        "quantizing": {"iterations": 0, "samples": 4},
        "targets": {"max_params": [0.9]},
        "device": "cpu",
    }
    job = pipeline.start(read_recipe(None, given), folder / "run")
    pipeline.finetune(job)
    speed_table(job, lambda: job.load_supernet().model)
    pipeline.search(job)
    return folder / "run"


def resumed(searched: Path, folder: Path, **given: Any) -> Job:
    shutil.copytree(searched, folder)
    given = {f"targets.{name}" if name.startswith("max_") else name: value for name, value in given.items()}
    return pipeline.resume(folder, given, replace_targets=True)


def test_candidates_are_every_way_to_store_a_network_once(searched: Path, tmp_path: Path) -> None:
    job = resumed(searched, tmp_path / "run", max_bytes="1MB")
    whole = whole_network(job)
    rows = candidates(job, whole, uniform=False)
    assert [str(row.bits) for row in rows][:2] == ["unquantized", "int8, embedding in 8 bits"]
    assert len(rows) == 1 + 4 * 2 and len({row.bytes for row in rows}) == len(rows)
    asked = resumed(searched, tmp_path / "asked", max_bytes="1MB", **{"quantizing.embedding": 8})
    assert len(candidates(asked, whole, uniform=False)) == 1 + 4
    # The plain class of a tied network holds no quantized embedding, so its bits are no choice.
    assert len(candidates(job, whole, uniform=True)) == 1 + 4


def test_the_lowest_loss_that_fits_is_picked(searched: Path, tmp_path: Path) -> None:
    job = resumed(searched, tmp_path / "run", max_bytes="1MB")
    whole = whole_network(job)
    rows = {row.bits: row.bytes for row in candidates(job, whole, uniform=False)}
    losses = RoundedLosses(job)
    # 1. Where all fits, nothing is rounded.
    everything = pick_with_bits(job, measured(job), Target(max_bytes=10**9), uniform=False)
    assert everything.loss <= min(losses(row, HELD_OUT_BLOCKS) for row in candidates(job, whole, uniform=False)) + 1e-6
    # 2. Where the whole network fits in 8 bits only, nothing above the limit is picked, and nothing of a higher loss
    #    than the whole network in 8 bits.
    limit = rows[Bits("int8", 8)]
    picked = pick_with_bits(job, measured(job), Target(max_bytes=limit), uniform=False)
    eight = next(row for row in candidates(job, whole, uniform=False) if row.bits == Bits("int8", 8))
    assert picked.candidate.bytes <= limit and picked.loss <= losses(eight, HELD_OUT_BLOCKS)
    # 3. What else was asked for holds too.
    smaller = Target(max_bytes=limit, max_params=job.structure.parameters(job.structure.base) - 1)
    assert pick_with_bits(job, measured(job), smaller, uniform=False).candidate.architecture != job.structure.base
    # 4. Less than everything is refused, with the smallest that there is.
    with pytest.raises(ValueError, match=r"fits 100 bytes; the smallest file has [\d,]+ \(int2, embedding in 4 bits\)"):
        pick_with_bits(job, measured(job), Target(max_bytes=100), uniform=False)


def test_what_was_picked_is_packaged_beside_the_base_in_few_bits(
    searched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("xllamacpp")
    given = {"quantizing.schemes": "int8", "formats": "uneven,gguf-q8_0,gguf-mixed"}
    job = resumed(searched, tmp_path / "run", max_bytes="60kB", **given)
    (picked,) = pick(job)
    assert picked["bits"]["bytes"] <= 60_000 and picked["bits"]["scheme"] == "mixed"
    gguf, mixed = pipeline.export(job)[-2:]
    capsys.readouterr()
    say_what_is_too_large(job, [gguf, mixed])
    assert gguf.name == "best-gguf-q8_0" and mixed.bytes <= 60_000 and not capsys.readouterr().err
    assert mixed.quantization_report is not None and mixed.quantization_report.bits is not None
    assert mixed.quantization_report.bits.without_bits() == gguf.architecture
    larger = [entry.model_copy(update={"bytes": 60_001}) for entry in (gguf, mixed)]
    for entries in (larger[:1], [larger[0], mixed], larger):
        say_what_is_too_large(job, entries)
    alone, beside, both, smallest = capsys.readouterr().err.splitlines()
    assert "best-gguf-q8_0 takes 60,001 bytes, and 60,000 were asked for; --format gguf-mixed chooses" in alone
    assert beside.endswith("best-gguf-mixed fits") and both.endswith("pick with fewer bytes")
    assert "best-gguf-mixed takes 60,001 bytes, and 60,000 were asked for; none of its types takes less" in smallest
    shown = report(job).model_dump(mode="json", by_alias=True)
    names = [package["name"] for package in shown["packages"]]
    assert names == ["best", "best-int8", "best-mixed", "best-gguf-q8_0", "best-gguf-mixed"]
    package = next(row for row in shown["packages"] if row["name"] == "best-mixed")
    assert package["quantization_report"]["bits"] == picked["architecture"] != package["architecture"]
    assert package["quantization_report"]["group_size"] == picked["bits"]["group_size"]
    assert package["bytes"] <= picked["bits"]["bytes"] + 1024  # headers are estimated
    assert package["bytes"] <= 60_000
    assert package["quantization_report"]["embedding"] == picked["bits"]["embedding"]
    bases = {row["name"]: row for row in shown["quantized_base"]}
    assert {"base-int8", "base-int4", "base-gguf-q8_0", "base-gguf-q4_0"} <= set(bases)
    for name, row in bases.items():
        assert row["params"] == shown["base"]["params"] and row["bytes"] < shown["base"]["bytes"]
        assert row["speed"]["decode_tps"] > 0
        assert ("mean_abs_logprob_difference" if "gguf" in name else "save_and_reload_equal") in row["verified"]
        assert row["tasks"]["tiny_choice"]["split"] == "report" and row["held_out_loss"] > 0
    page = (job.run.path / "report.html").read_text()
    assert "base INT8" in page and "base INT4" in page
    # Done again, nothing is made anew.
    files = [file for name in [*names, *bases] for file in (job.run.packages / name).glob("model[.-]*")]
    stamps = [file.stat().st_mtime_ns for file in files]
    pipeline.export(job)
    assert len(files) == len(names) + len(bases) and [file.stat().st_mtime_ns for file in files] == stamps


def test_where_only_llama_cpp_files_are_asked_for_the_size_is_picked_with_their_types(
    searched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What compressed-tensors would take says nothing then: its 2 bits fit a larger network than any type does."""
    pytest.importorskip("xllamacpp")
    job = resumed(searched, tmp_path / "run", max_bytes="1MB", formats="gguf-mixed")
    everything = pick_with_types(job, measured(job), Target(max_bytes=10**9), "best-gguf-mixed")
    assert everything.candidate.harm == 0  # where all fits, nothing is rounded
    largest = everything.candidate.bytes
    with pytest.raises(ValueError, match=r"fits 1,000 bytes .* the smallest file has [\d,]+$") as no:
        pick_with_types(job, measured(job), Target(max_bytes=1000), "best-gguf-mixed")
    smallest = int(str(no.value).rpartition("has ")[2].replace(",", ""))
    assert smallest < largest
    # Just above the smallest file only the smallest networks are left; half way there are more, and the best is taken.
    few = pick_with_types(job, measured(job), Target(max_bytes=smallest), "best-gguf-mixed")
    assert few.candidate.bytes == smallest and few.candidate.sizes != job.structure.base
    assert few.to_json()["scheme"] == "gguf-mixed" and "types of llama.cpp" in str(few)
    with pytest.raises(RequestError, match=rf"the smallest sub-network of this space takes {smallest:,} bytes"):
        resumed(searched, tmp_path / "none", max_bytes=str(smallest - 1), formats="gguf-mixed")
    job = resumed(searched, tmp_path / "half", max_bytes=str((smallest + largest) // 2), formats="gguf-mixed")
    (picked,) = pick(job)
    assert picked["bits"] is not None and picked["bits"]["held_out_loss"] <= few.loss + 1e-6
    capsys.readouterr()
    own, file = pipeline.export(job)
    assert "warning" not in capsys.readouterr().err
    assert (own.name, own.quantization, file.name) == ("best", None, "best-gguf-mixed")
    assert file.bytes == picked["bits"]["bytes"] <= (smallest + largest) // 2
    assert file.held_out_loss == pytest.approx(picked["bits"]["held_out_loss"], abs=0.02)  # repaired in sequence since
    report(job)
    # A layout that wants layers that are alike is picked for beside it, and nothing that was made is made anew.
    stamp = (job.run.packages / file.name / file.file).stat().st_mtime_ns
    again = pipeline.resume_export(job.run.path, {"formats": "uniform"})
    kept, uniform = read_picks(again)
    assert kept == picked and uniform["name"] == "best-uniform"
    assert [entry.name for entry in pipeline.export(again)][:2] == ["best", "best-gguf-mixed"]
    assert (job.run.packages / file.name / file.file).stat().st_mtime_ns == stamp


def test_what_was_made_and_not_yet_proved_is_not_made_again(
    searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = resumed(searched, tmp_path / "run", max_bytes="60kB", **{"quantizing.schemes": "int8"})
    pick(job)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("compressor.stages.exporting.prove_all", interrupted)
        pipeline.export(job)
    files = sorted(job.run.packages.glob("*/model*.safetensors"))
    assert {file.parent.name for file in files} >= {"best", "best-int8", "best-mixed", "base-int8", "base-int4"}
    assert not any(read_record(file.parent).entry.verified for file in files)
    stamps = [file.stat().st_mtime_ns for file in files]
    pipeline.export(job)
    assert [file.stat().st_mtime_ns for file in files] == stamps
    assert all(read_record(file.parent).entry.verified for file in files)


def test_a_plain_class_holds_mixed_bits_and_the_base_is_tuned_beside_them(searched: Path, tmp_path: Path) -> None:
    job = resumed(searched, tmp_path / "run", max_bytes="60kB", formats="uneven,uniform")
    uneven, uniform = pick(job)
    measured_once = (job.run.search / "bits.json").stat().st_mtime_ns
    pick(job)
    assert (job.run.search / "bits.json").stat().st_mtime_ns == measured_once
    assert [row["name"] for row in (uneven, uniform)] == ["best", "best-uniform"]
    assert uniform["bits"] is not None and uniform["bits"]["scheme"] == "mixed" and uniform["bits"]["embedding"] == 16
    network = Architecture.from_dict(uniform["architecture"])
    assert network.has_bits and not network.embedding_bits
    assert fits_plain_class(job.checkpoint.config, network.without_bits())
    # The base is tuned as these are, and there in the scheme that takes no more bytes, or in the smallest.
    assert tunes(job, [uniform]) and not tunes(job, [{**uniform, "bits": None}])
    assert uneven["bits"] is not None
    for stored, beside in ((1, {"int2"}), (10**6, set())):
        other = {**uneven, "bits": {**uneven["bits"], "bytes": stored}}
        assert set(base_schemes(job, [other])) == {"int8", "int4"} | beside


def test_a_quantized_plain_class_stays_one_and_is_picked_by_its_own_bytes(
    searched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"quantizing.schemes": "int8", "quantizing.embedding": 8, "formats": "uneven,uniform"}
    job = resumed(searched, tmp_path / "run", max_params=[0.9], **given)
    uneven, uniform = pick(job)
    packages = {entry.name: entry for entry in pipeline.export(job)}
    plain, with_code = packages["best-uniform-int8"], packages["best-int8"]
    assert plain.layout == "uniform" and not list((job.run.packages / plain.name).glob("*.py"))
    assert plain.quantization_report is not None and plain.quantization_report.embedding == 16
    assert with_code.layout == "uneven" and with_code.quantization_report is not None
    assert with_code.quantization_report.embedding == 8
    assert "best-uniform-int8: the embedding stays in 16 bits" in capsys.readouterr().err
    for picked, entry in ((uneven, with_code), (uniform, plain)):
        weights = load_file(job.run.packages / entry.name / "model.safetensors")
        assert picked["values"]["bytes"] == sum(tensor.nbytes for tensor in weights.values())


def test_a_plain_class_says_what_it_holds(searched: Path, tmp_path: Path) -> None:
    job = resumed(searched, tmp_path / "run", max_bytes="1MB", formats="uniform")
    rows = candidates(job, whole_network(job), uniform=True)
    assert [str(row.stored) for row in rows[1:3]] == ["int8, embedding in 16 bits", "int4, embedding in 16 bits"]


def test_the_whole_network_is_compared_also_where_a_smaller_one_seems_better(searched: Path, tmp_path: Path) -> None:
    job = resumed(searched, tmp_path / "run", max_bytes="1MB")
    lucky = [
        replace(row, values={**row.values, "quality": 1.5}, index=100 + n)
        for n in range(30)
        for row in measured(job)[1:2]
    ]
    found = sizes_within(job, [*measured(job), *lucky], Target(max_bytes=10**9))
    assert job.structure.base in [row.architecture for row in found] and lucky[0] in found


def test_the_whole_network_has_the_quality_that_was_measured(searched: Path, tmp_path: Path) -> None:
    """A fine-tuned one is not the base. Where it was not measured, nothing is known to be lost."""
    job = resumed(searched, tmp_path / "run", max_bytes="1MB")
    unmeasured = whole_network(job)
    trained = replace(unmeasured, values={**unmeasured.values, "quality": 0.6}, index=200)
    for rows, quality in (([trained], 0.6), ([], 1.0)):
        found = sizes_within(job, [*measured(job)[1:2], *rows], Target(max_bytes=10**9))
        (whole,) = [row for row in found if row.architecture == job.structure.base]
        assert whole.values["quality"] == quality


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (
            {"max_bytes": "43kB", "quantizing.embedding": 4, "formats": "uniform"},
            "quantizing.embedding: 4 bits, but a plain class holds no quantized embedding that is the head too",
        ),
        ({"quantizing.embedding": 8, "max_params": [0.8]}, "8 bits, but nothing is quantized; say --quantize int4"),
        (
            {"quantizing.schemes": "int4", "quantizing.embedding": 4, "formats": "uniform", "max_params": [0.8]},
            "quantizing.embedding: 4 bits, but a plain class holds no quantized embedding that is the head too",
        ),
        (
            {"quantizing.schemes": "int8-auto-round", "quantizing.embedding": 8, "max_params": [0.8]},
            "quantizing.embedding: 8 bits, but auto-round's own form holds none; layouts that hold",
        ),
        ({"quantizing.embedding": 5}, "'quantizing.embedding': Input should be 16, 8 or 4"),
        ({"quantizing.bits": "joint", "max_params": [0.8]}, "--bits joint: picks what fits a number of bytes; name it"),
        (
            {"max_bytes": "900"},
            "--max-bytes: 900 bytes cannot be reached; the smallest sub-network of this space",
        ),
    ],
)
def test_bad_requests(searched: Path, tmp_path: Path, given: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        resumed(searched, tmp_path / "run", **given)
