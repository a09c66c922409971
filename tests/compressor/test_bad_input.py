"""Every wrong request gets one line that says what is wrong and how to mend it, status 2, and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.cli import run
from supernet.checkpoint import open_checkpoint
from tests.support import tiny
from tests.support.scoring_helpers import WRITING, write_task


class Bench:
    """A good request in a folder of its own; tests spoil one part of it."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.model = folder / "model"
        shutil.copytree(model, self.model)
        self.data = tiny.data(folder / "data.jsonl")
        self.tasks = tiny.task(folder / "tasks")
        self.output = folder / "run"
        self.options: dict[str, str] = {"--max-params": "0.67", "--tasks": "tiny_choice", "--effort": "quick"}

    def compress(self) -> int:
        options = [part for pair in self.options.items() for part in pair]
        return run(
            [
                "compress",
                str(self.model),
                *("--data", str(self.data)),
                *("--include-path", str(self.tasks)),
                *("--output", str(self.output)),
                *options,
            ]
        )

    def edit_config(self, **values: object) -> None:
        file = self.model / "config.json"
        config = json.loads(file.read_text()) | values
        file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def bench(tmp_path: Path, tiny_model: Path) -> Bench:
    return Bench(tmp_path, tiny_model)


def no_such_model(b: Bench) -> None:
    b.model = b.folder / "nowhere"


def not_causal(b: Bench) -> None:
    b.edit_config(architectures=["LlamaForSequenceClassification"])


def multimodal(b: Bench) -> None:
    b.edit_config(text_config={"model_type": "llama"}, vision_config={})


def adapter(b: Bench) -> None:
    (b.model / "config.json").rename(b.model / "adapter_config.json")


def quantized(b: Bench) -> None:
    b.edit_config(quantization_config={"quant_method": "gptq"})


def unsupported(b: Bench) -> None:
    b.edit_config(model_type="mamba", architectures=["MambaForCausalLM"])


def pickled(b: Bench) -> None:
    (b.model / "model.safetensors").rename(b.model / "pytorch_model.bin")


def missing_shard(b: Bench) -> None:
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    (b.model / "model.safetensors").rename(b.model / shards[0])
    index = {"metadata": {}, "weight_map": dict(zip("ab", shards, strict=True))}
    (b.model / "model.safetensors.index.json").write_text(json.dumps(index))


def outside_shard(b: Bench) -> None:
    missing_shard(b)
    file = b.model / "model.safetensors.index.json"
    file.write_text(file.read_text().replace("model-00002", "../model-00002"))


def original_weights_only(b: Bench) -> None:
    (b.model / "model.safetensors").rename(b.model / "consolidated.safetensors")


def adapter_beside(b: Bench) -> None:
    (b.model / "adapter_config.json").write_text("{}")


def rewritten(b: Bench, **weights: torch.Tensor | None) -> None:
    """The weights with some replaced, added, or (None) left out."""
    stored = load_file(b.model / "model.safetensors") | {k.replace("__", "."): v for k, v in weights.items()}
    save_file({k: v for k, v in stored.items() if v is not None}, b.model / "model.safetensors", {"format": "pt"})


def unknown_bias(b: Bench) -> None:
    rewritten(b, model__layers__0__mlp__up_proj__bias=torch.zeros(64))


def one_layer_more(b: Bench) -> None:
    rewritten(b, model__layers__3__input_layernorm__weight=torch.ones(32))


def missing_weight(b: Bench) -> None:
    rewritten(b, model__layers__1__mlp__up_proj__weight=None)


def another_shape(b: Bench) -> None:
    rewritten(b, model__layers__1__mlp__up_proj__weight=torch.zeros(60, 32))


def more_tokens(b: Bench, *tokens: str, **special: str) -> None:
    tokenizer = tiny.byte_tokenizer()
    tokenizer.add_tokens(list(tokens))
    tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(b.model)


def tokens_in_the_tasks(b: Bench) -> None:
    more_tokens(b, "house")


def end_mark_without_row(b: Bench) -> None:
    more_tokens(b, eos_token="<end>")


def cut_off(b: Bench) -> None:
    file = b.model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def nan_weights(b: Bench) -> None:
    weights = load_file(b.model / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, b.model / "model.safetensors", {"format": "pt"})


def no_tokenizer(b: Bench) -> None:
    (b.model / "tokenizer.json").unlink()


def mistyped_generated(b: Bench) -> None:
    b.data = Path("Generated:70k")


def no_data(b: Bench) -> None:
    b.data = b.folder / "nowhere.jsonl"


def empty_data(b: Bench) -> None:
    b.data.write_text("")


def bad_json(b: Bench) -> None:
    lines = b.data.read_text().splitlines()
    lines[6] = '{"text": '
    b.data.write_text("\n".join(lines))


def no_text(b: Bench) -> None:
    b.data.write_text('{"text": "fine"}\n{"words": "what"}\n')


def unknown_task(b: Bench) -> None:
    b.options["--tasks"] = "tiny_chioce"


def unreachable(b: Bench) -> None:
    b.options["--max-params"] = "0.01"


def contradictory(b: Bench) -> None:
    b.options |= {"--max-params": "0.8,0.67", "--max-drop": "1%"}


def same_size_twice(b: Bench) -> None:
    b.options["--max-params"] = "0.67,67%"


def not_smaller(b: Bench) -> None:
    b.options["--max-params"] = "5M"


def not_a_size(b: Bench) -> None:
    b.options["--max-params"] = "1.5"


def group_size(b: Bench) -> None:
    b.options |= {"--quantize": "int4", "--group-size": "48"}


def odd_widths(b: Bench) -> None:
    b.model = tiny.checkpoint(b.folder / "odd", hidden_size=40)
    b.options["--quantize"] = "int8,int4"


def occupied(b: Bench) -> None:
    b.output.mkdir()
    (b.output / "thesis.txt").write_text("mine")


def below_a_file(b: Bench) -> None:
    (b.folder / "file").write_text("")
    b.output = b.folder / "file" / "run"


def no_percentage(b: Bench) -> None:
    b.options = {"--max-drop": "5%%", "--tasks": "tiny_choice"}


def unknown_key(b: Bench) -> None:
    recipe = b.folder / "recipe.yaml"
    recipe.write_text("finetuning:\n  learning_rte: 0.1\n")
    b.options["--recipe"] = str(recipe)


def unknown_stage(b: Bench) -> None:
    b.options["--redo"] = "finetuen"


def speed_of_another(b: Bench) -> None:
    recipe = b.folder / "recipe.yaml"
    recipe.write_text(f"speed_table: {b.folder / 'nowhere.json'}\n")
    b.options["--recipe"] = str(recipe)


def unknown_algorithm(b: Bench) -> None:
    recipe = b.folder / "recipe.yaml"
    recipe.write_text("searching:\n  algorithm: linsa\n")
    b.options["--recipe"] = str(recipe)


def impossible_space(b: Bench) -> None:
    recipe = b.folder / "recipe.yaml"
    recipe.write_text("space: {preset: fine, ffn.1: [64, 96]}\n")
    b.options["--recipe"] = str(recipe)


def broken_space(b: Bench) -> None:
    space = b.folder / "space.yaml"
    space.write_text("ffn.*: [32, 64\n")
    b.options["--space"] = str(space)


def prompt_without_completion(b: Bench) -> None:
    b.data.write_text('{"text": "fine"}\n{"prompt": "what"}\n')


def unknown_ordering(b: Bench) -> None:
    recipe = b.folder / "recipe.yaml"
    recipe.write_text("finetuning:\n  ordering: wnada\n")
    b.options["--recipe"] = str(recipe)


def searching(b: Bench, text: str) -> None:
    recipe = b.folder / "recipe.yaml"
    recipe.write_text(f"searching: {{{text}}}\n")
    b.options["--recipe"] = str(recipe)


def unknown_objective(b: Bench) -> None:
    searching(b, "objectives: [quality, energy]")


def metric_of_no_task(b: Bench) -> None:
    searching(b, "objectives: ['tiny_choice:bleu', parameters]")


def five_objectives(b: Bench) -> None:
    searching(b, "objectives: [quality, parameters, bytes, macs, latency]")


def warm_start_from_nothing(b: Bench) -> None:
    searching(b, "warm_start: [runs/nowhere]")


def too_long(b: Bench) -> None:
    rows = [{"context": text[:9], "choices": [" b" * 100, " c"], "gold": 0} for text in tiny.sentences(12, 3)]
    (b.tasks / "tiny_choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


CASES: list[tuple[Callable[[Bench], None], list[str]]] = [
    (no_such_model, ["nowhere", "no such folder"]),
    (not_causal, ["not a causal language model", "LlamaForSequenceClassification"]),
    (multimodal, ["multimodal"]),
    (adapter, ["adapter", "merge"]),
    (quantized, ["already quantized", "gptq"]),
    (unsupported, ["mamba", "llama"]),
    (pickled, ["pytorch_model.bin", "model.safetensors", "save_pretrained"]),
    (outside_shard, ["../model-00002-of-00002.safetensors", "outside"]),
    (original_weights_only, ["consolidated.safetensors", "model.safetensors"]),
    (adapter_beside, ["adapter_config.json", "merge"]),
    (unknown_bias, ["model.layers.0.mlp.up_proj.bias", "config.json"]),
    (one_layer_more, ["model.layers.3.input_layernorm.weight", "config.json"]),
    (tokens_in_the_tasks, ["'house'", "no row in the embedding"]),
    (end_mark_without_row, ["'<end>'", "no row in the embedding"]),
    (missing_weight, ["lack", "model.layers.1.mlp.up_proj.weight"]),
    (another_shape, ["model.layers.1.mlp.up_proj.weight", "[60, 32]", "[64, 32]"]),
    (missing_shard, ["model-00002-of-00002.safetensors", "missing"]),
    (cut_off, ["model.safetensors", "cut off"]),
    (nan_weights, ["model.norm.weight", "NaN"]),
    (no_tokenizer, ["tokenizer"]),
    (no_data, ["nowhere.jsonl", "no such file"]),
    (mistyped_generated, ["--data", "Generated:70k", "did you mean generated:70k"]),
    (empty_data, ["empty"]),
    (bad_json, ["line 7", "JSON"]),
    (no_text, ["row 2", "'text'", "'messages'"]),
    (unknown_task, ["tiny_chioce", "tiny_choice"]),
    (unreachable, ["cannot be reached", "smallest"]),
    (contradictory, ["--max-drop", "--max-params"]),
    (same_size_twice, ["0.67,67%", "twice"]),
    (not_smaller, ["5,000,000", "base"]),
    (not_a_size, ["1.5", "0.67"]),
    (group_size, ["48", "width"]),
    (odd_widths, ["int4", "multiples of 32", "is 40", "int8"]),
    (occupied, ["something else"]),
    (below_a_file, ["file/run", "cannot be made"]),
    (no_percentage, ["5%%", "such as 1%"]),
    (unknown_key, ["learning_rte", "learning_rate"]),
    (unknown_stage, ["finetuen", "finetune"]),
    (unknown_algorithm, ["linsa", "linas"]),
    (impossible_space, ["ffn.1: 96", "valid are 0 to 64"]),
    (speed_of_another, ["speed_table", "nowhere.json", "no such file"]),
    (broken_space, ["space.yaml", "YAML"]),
    (prompt_without_completion, ["row 2", "'completion'"]),
    (unknown_ordering, ["wnada", "wanda"]),
    (unknown_objective, ["energy", "quality", "tiny_choice", "kl_to_base", "kv_cache_bytes"]),
    (metric_of_no_task, ["tiny_choice", "bleu", "acc"]),
    (five_objectives, ["two to four"]),
    (warm_start_from_nothing, ["runs/nowhere", "greedy"]),
    (too_long, ["tiny_choice", "64"]),
]


@pytest.mark.parametrize(("spoil", "words"), CASES, ids=[case[0].__name__ for case in CASES])
def test_one_line_status_two_and_nothing_left(
    bench: Bench, capsys: pytest.CaptureFixture[str], spoil: Callable[[Bench], None], words: list[str]
) -> None:
    spoil(bench)
    before = sorted(bench.output.rglob("*")) if bench.output.exists() else None
    status = bench.compress()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert status == 2, lines
    assert len(lines) == 1
    for word in words:
        assert word in lines[0]
    after = sorted(bench.output.rglob("*")) if bench.output.exists() else None
    assert after == before


def test_no_command_is_answered_with_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    assert "compress " in capsys.readouterr().out


def test_a_checkpoint_that_says_it_is_not_quantized_is_not(bench: Bench) -> None:
    file = bench.model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": None}))
    model = open_checkpoint(str(bench.model)).load_model(torch.float32, "cpu")
    assert model.config.model_type == "llama"


def test_a_fault_of_ours_is_status_1_and_leaves_the_traceback(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise ArithmeticError("an oddity\nand more")

    monkeypatch.chdir(bench.folder)  # where the traceback goes
    monkeypatch.setattr("compressor.stages.finetuning.finetune_supernet", fail)
    assert bench.compress() == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "a fault of ours: ArithmeticError: an oddity (the traceback is in compressor-error.log)" in line
    log = bench.folder / "compressor-error.log"
    assert log.read_text().startswith("Traceback") and "in fail" in log.read_text()
    log.unlink()
    log.mkdir()  # the traceback cannot be written here
    monkeypatch.setattr("tempfile.tempdir", str(bench.folder))
    assert bench.compress() == 1
    assert "ArithmeticError: an oddity (its traceback could not be written" in capsys.readouterr().err


def test_workers_that_cannot_be_had_are_refused_before_anything_is_trained(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise ValueError("ray is not installed")

    monkeypatch.setattr("compressor.stages.subnet_scores.check_ray", missing)
    bench.options["--set"] = "searching.executor=ray"
    assert bench.compress() == 2
    assert "error: searching.executor: ray is not installed" in capsys.readouterr().err
    assert not bench.output.exists()


def test_a_task_that_the_base_scores_nothing_on_is_refused_before_anything_is_trained(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"question": f"what {i}", "word": "no network writes this"} for i in range(12)]
    bench.tasks = write_task(bench.folder / "more", "hopeless", rows, **WRITING)
    bench.options |= {"--tasks": "hopeless", "--train-tokens": "4000"}
    assert bench.compress() == 2
    assert "error: task hopeless: the base scores 0, so nothing can be measured" in " ".join(
        capsys.readouterr().err.split()
    )
    assert not (bench.output / "supernet").exists()


def test_what_helps_where_memory_is_short_depends_on_what_is_done(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another batch than was trained with would be refused, but healing may have one of its own."""

    def fail(*args: object, **kwargs: object) -> None:
        raise MemoryError

    bench.options |= {"--train-tokens": "0", "--heal-tokens": "64", "--evaluations": "8"}
    with monkeypatch.context() as patched:
        patched.setattr("compressor.stages.searching.run_search", fail)
        assert bench.compress() == 2
    assert "run again with --set batch_tokens=2048; what" in capsys.readouterr().err
    with monkeypatch.context() as patched:
        patched.setattr("compressor.stages.picking.measured", fail)
        assert bench.compress() == 2
    assert "run again with --set batch_tokens=2048; what" in capsys.readouterr().err
    with monkeypatch.context() as patched:
        patched.setattr("compressor.stages.healing.heal", fail)
        assert bench.compress() == 2
    command = capsys.readouterr().err.split("out of memory; run compressor ")[1].split(";")[0]
    assert run(command.split()) == 0


def test_a_tool_that_is_not_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["search", str(tmp_path)]) == 2
    assert "not a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "weights"), ["no disk space", "weights"]),
        (PermissionError(errno.EACCES, "Permission denied", "weights"), ["weights: permission denied"]),
        (MemoryError(), ["out of memory", "--set batch_tokens=2048 --set finetuning.batch_size=2"]),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), ["out of memory", "--set batch_tokens=2048"]),
    ],
)
def test_a_machine_that_is_too_small_is_said_in_one_line(
    bench: Bench,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fault: Exception,
    words: list[str],
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise fault

    monkeypatch.setattr("compressor.stages.finetuning.finetune_supernet", fail)
    assert bench.compress() == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    for word in words:
        assert word in lines[0]
    assert not (bench.output / "supernet").exists()
