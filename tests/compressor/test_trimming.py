"""A run that cuts the vocabulary first: its base is small, the untouched one is what everything is compared with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from compressor.checks import hint_at_vocabulary
from compressor.cli import run
from compressor.front_table import front_rows
from compressor.job import Job
from compressor.recipe import Recipe
from compressor.recipe_file import read_recipe
from compressor.run import Run
from compressor.stages import trimming
from compressor.stages.layer_timings import untouched_decode_tps, weights_read
from compressor.stages.report_text import learnt_tokens, split_again
from export.package_record import read_record, update_record
from export.verify import verify
from supernet.checkpoint import open_checkpoint
from supernet.common.errors import RequestError, VerificationError
from supernet.common.formatting import percent
from supernet.families import describe
from supernet.training.data import pack
from tests.support import tiny
from tests.support.tiny_tokenizers import KINDS, fast, texts

RECIPE = """
finetuning: {tokens: 640, batch_size: 4, sequence_length: 32}
searching: {evaluations: 6, population: 4, limit: 8}
healing: {tokens: 320}
space: {ffn.*: [32, 64], kv.*: [1, 2], layer.1: [0, 1]}
targets: {max_params: [0.7]}
vocabulary: {size: 0.8}
formats: [uneven, gguf-q8_0]
"""


def checkpoint(folder: Path, kind: str = "byte-level", **sizes: Any) -> Path:
    """A tiny Llama with a tokenizer that can be cut, and a chat template."""
    tokenizer = fast(KINDS[kind]())
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + '\n' + m.content }}</s>{% endfor %}"
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    tiny.llama(vocab_size=len(tokenizer), **(ids | sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def data(file: Path, documents: int = 1600, odd: float = 0.02) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(documents, 5, odd)))
    return file


def narrow(file: Path) -> Path:
    """Text of some of the words only."""
    rows = [" ".join(text.split()[:1]) + " sees the red dog and the old cat" for text in ["a cat", "the sun"] * 800]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return file


class Made:
    """A finished run and how it was asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "run"
        self.model = checkpoint(folder / "model")
        self.data = data(folder / "data.jsonl")
        self.tasks = tiny.task(folder / "tasks", documents=40)
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(RECIPE)

    def arguments(self, *more: str) -> list[str]:
        return [
            "compress", str(self.model), "--recipe", str(self.recipe), "--data", str(self.data),
            "--tasks", "tiny_choice", "--include-path", str(self.tasks), "--output", str(self.run), *more,
        ]  # fmt: skip

    def job(self) -> Job:
        return Job(Run(self.run), read_recipe(self.run / "recipe.yaml", {}))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    made = Made(tmp_path_factory.mktemp("cut"))
    assert run(made.arguments()) == 0
    return made


def test_the_base_is_small_and_the_untouched_one_is_compared_with(made: Made) -> None:
    job = made.job()
    assert job.vocabulary is not None
    rows, whole = job.structure.vocab_size, job.untouched.structure.vocab_size
    assert rows == 384 < whole and rows == job.vocabulary.record.rows
    assert json.loads((made.run / "supernet" / "config.json").read_text())["vocab_size"] == rows
    report = json.loads((made.run / "report.json").read_text())
    assert report["base"]["params"] == job.untouched_parameters > job.structure.parameters(job.structure.base)
    assert report["packages"][0]["params"] <= 0.7 * job.untouched_parameters
    assert report["packages"][0]["vocabulary"] == job.vocabulary.record.model_dump()
    assert report["base"]["bytes_per_token"] > report["packages"][0]["vocabulary"]["bytes_per_token"]
    assert job.vocabulary.logit_difference < 1e-4


def test_every_package_is_proved_with_its_splits(made: Made) -> None:
    packages = sorted(folder for folder in (made.run / "packages").iterdir() if folder.is_dir())
    cut = [folder for folder in packages if read_record(folder).probe.splits]
    assert [folder.name for folder in cut] == ["best", "best-gguf-q8_0"]
    for folder in set(packages) - set(cut):  # the untouched base in few bits
        assert folder.name.startswith("base-") and read_record(folder).entry.vocabulary is None
    record = read_record(made.run / "packages" / "best")
    assert record.entry.verified is not None
    assert 0 < record.entry.verified["texts_split_as_before"] < record.entry.verified["texts_decoded_as_before"]
    loaded, whole = (AutoTokenizer.from_pretrained(folder) for folder in (cut[0], made.model))
    for text in texts(40, 9, odd=0.3):
        assert loaded.decode(loaded(text).input_ids) == whole.decode(whole(text).input_ids)


def test_the_front_is_of_the_cut_network(made: Made) -> None:
    """Its sizes are those of the packages, and shares of the untouched base."""
    job = made.job()
    picked = read_record(made.run / "packages" / "best").entry
    (row,) = (row for row in front_rows(made.run) if row.picked)
    assert row.parameters == picked.params and row.key == picked.architecture.key
    assert row.share == pytest.approx(picked.params / job.untouched_parameters)


def test_a_tokenizer_that_was_changed_is_found_out(made: Made, tmp_path: Path) -> None:
    package = shutil.copytree(made.run / "packages" / "best", tmp_path / "best")
    splits = [split.model_dump() for split in read_record(package).probe.splits]
    splits[0]["ids"] = splits[0]["ids"][:-1]
    update_record(package, probe={"splits": splits})
    with pytest.raises(VerificationError, match="its tokenizer splits"):
        verify(package)


def test_run_again_it_does_nothing_anew_and_another_size_is_refused(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (made.run / "base" / "model.safetensors").stat().st_mtime_ns
    assert run(made.arguments()) == 0
    assert (made.run / "base" / "model.safetensors").stat().st_mtime_ns == before
    capsys.readouterr()
    assert run(made.arguments("--vocabulary", "0.9")) == 0  # rounded, it is the same size
    assert run(made.arguments("--vocabulary", "1")) == 2
    assert "fine-tuned from another recipe" in capsys.readouterr().err
    assert made.job().structure.vocab_size == 384


def test_baselines_get_the_same_base(made: Made) -> None:
    assert run(["compare", str(made.run), "--baselines", "flap,untrained-search"]) == 0
    rows = json.loads((made.run / "report.json").read_text())["comparison"]
    assert {row["method"] for row in rows} == {"ours", "flap", "untrained-search"}
    for row in rows:
        config = json.loads((made.run / row["path"] / "config.json").read_text())
        assert config["vocab_size"] == 384
        assert read_record(made.run / row["path"]).entry.vocabulary is not None


def test_a_speedup_is_one_of_text_over_the_untouched_base(made: Made) -> None:
    job = made.job()
    assert job.vocabulary is not None
    record = job.vocabulary.record
    expected = job.structure.parameters(job.structure.base) / job.untouched_parameters
    expected *= record.base_bytes_per_token / record.bytes_per_token
    assert untouched_decode_tps(job, lambda _: {"decode_tps": 10.0}) == pytest.approx(10 * expected)
    assert weights_read(job.structure) == job.structure.parameters(job.structure.base)  # tied
    untied = checkpoint(made.folder / "untied", tie_word_embeddings=False)
    structure = open_checkpoint(str(untied)).structure
    assert weights_read(structure) == structure.parameters(structure.base) - 32 * structure.vocab_size


def test_the_base_teaches_by_its_kept_logits(made: Made) -> None:
    job = made.job()
    cut, whole = job.tokenizer, job.untouched_tokenizer
    teacher, untouched = job.load_base(torch.float32), AutoModelForCausalLM.from_pretrained(made.model)
    new = {number: cut.convert_tokens_to_ids(token) for token, number in whole.get_vocab().items()}
    rows = {new[number]: number for number in new if whole.convert_ids_to_tokens(number) in cut.get_vocab()}
    text = next(t for t in texts(50, 11) if set(whole(t).input_ids) <= set(rows.values()))
    with torch.no_grad():
        taught = teacher(torch.tensor([cut(text).input_ids])).logits
        said = untouched(torch.tensor([whole(text).input_ids])).logits[..., [rows[row] for row in range(len(rows))]]
    assert (taught.log_softmax(-1) - said.log_softmax(-1)).abs().max() <= 1e-4


def test_losses_are_of_the_same_text_in_both_tokens(made: Made) -> None:
    job = made.job()
    blocks = pack(str(made.data), job.tokenizer, 32, rows=job.structure.vocab_size).part(0, 6)
    again = split_again(job, blocks)
    for block, other in zip(blocks.table, again.table, strict=True):
        kept = other[0][other[2].new_tensor(range(other.shape[1])) < int((other[1] != -100).nonzero().max()) + 1]
        assert job.untouched_tokenizer.decode(kept) == job.tokenizer.decode(block[0])
    assert learnt_tokens(again) < learnt_tokens(blocks)


def trimmed(tmp_path: Path, model: Path, file: Path, **vocabulary: str) -> Job:
    recipe = Recipe.model_validate({"model": str(model), "data": str(file), "vocabulary": vocabulary})
    job = Job(Run(tmp_path / "run"), recipe.resolved())
    (tmp_path / "scratch").mkdir()
    trimming.trim(job, tmp_path / "scratch")
    return job


@pytest.mark.parametrize("kind", ["byte-fallback", "unigram-byte-fallback"])
def test_auto_covers_what_was_not_counted(kind: str, tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", kind, tie_word_embeddings=False)
    job = trimmed(tmp_path, model, narrow(tmp_path / "data.jsonl"), size="auto")
    assert job.vocabulary is not None
    assert job.vocabulary.record.coverage >= 0.999
    assert job.vocabulary.record.rows < job.untouched.structure.vocab_size


@pytest.mark.parametrize(
    ("vocabulary", "problem"),
    [
        ({"size": "64"}, "must stay"),
        ({"size": "auto", "text": "short.jsonl"}, "--vocabulary-text .*too few to choose tokens by"),
        ({"size": "auto", "text": "missing.jsonl"}, "--vocabulary-text .*no such file"),
    ],
)
def test_bad_requests_are_refused(
    vocabulary: dict[str, str], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data(tmp_path / "short.jsonl", 20)
    with pytest.raises(RequestError, match=problem):
        trimmed(tmp_path, checkpoint(tmp_path / "model"), data(tmp_path / "data.jsonl"), **vocabulary)


def test_other_tokenizers_and_generated_text_are_refused(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model")
    file = json.loads((model / "tokenizer.json").read_text())
    file["model"] = {"type": "WordLevel", "vocab": file["model"]["vocab"], "unk_token": "<unk>"}
    (model / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(RequestError, match="type WordLevel cannot be cut, only BPE and Unigram"):
        trimmed(tmp_path, model, data(tmp_path / "data.jsonl"), size="auto")
    recipe = Recipe.model_validate({"model": str(model), "data": "generated", "vocabulary": {"size": "auto"}})
    with pytest.raises(RequestError, match="name one with --vocabulary-text"):
        trimming.trim(Job(Run(tmp_path / "other"), recipe.resolved()), tmp_path)


def test_a_token_without_a_row_is_refused(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(model)
    with pytest.raises(RequestError, match=r"'<more>'.*has no row in the embedding"):
        trimmed(tmp_path, model, data(tmp_path / "data.jsonl"), size="auto")


def test_a_text_as_size_means_auto_on_it() -> None:
    recipe = read_recipe(None, {"model": "m", "vocabulary.size": "texts/mine.jsonl"})
    assert (recipe.vocabulary.size, recipe.vocabulary.text) == ("auto", "texts/mine.jsonl")
    with pytest.raises(RequestError, match="'autoo' is no size of a vocabulary"):
        read_recipe(None, {"model": "m", "vocabulary.size": "autoo"})
    with pytest.raises(RequestError, match="is no size of a vocabulary"):
        read_recipe(None, {"model": "m", "vocabulary.size": "0"})
    with pytest.raises(RequestError, match="no size; say --vocabulary auto too"):
        read_recipe(None, {"model": "m", "vocabulary.text": "mine.jsonl"})


def test_a_run_without_its_base_says_so(made: Made, tmp_path: Path) -> None:
    moved = shutil.copytree(made.run, tmp_path / "run", ignore=shutil.ignore_patterns("base", ".lock"))
    with pytest.raises(RequestError, match="the base of this run is missing"):
        _ = Job(Run(moved), read_recipe(moved / "recipe.yaml", {})).checkpoint
    assert run(made.arguments("--output", str(moved))) == 0  # it is the same base, and everything else was there
    assert made.job().base_fingerprint == Job(Run(moved), read_recipe(moved / "recipe.yaml", {})).base_fingerprint


def test_no_run_is_left_where_the_request_is_wrong(made: Made, tmp_path: Path) -> None:
    other = tmp_path / "other"
    arguments = ["--output", str(other), "--vocabulary", "0.8", "--max-params", "0.99"]
    assert run(made.arguments(*arguments)) == 2
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    recipe = Recipe.model_validate({"model": "m", "vocabulary": {"size": "auto"}})
    left = tmp_path / ".run.base-999999999"
    left.mkdir()
    with trimming.scratch_folder(recipe, tmp_path / "run") as scratch:
        assert list(tmp_path.iterdir()) == [scratch] and not list(scratch.iterdir())
    assert not list(tmp_path.iterdir())
    with trimming.scratch_folder(Recipe(model="m"), tmp_path / "run"):
        assert not list(tmp_path.iterdir())


def test_inspect_shows_sizes_beforehand(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["inspect", str(made.model), "--vocabulary", "0.8", "--data", str(made.data), "--json"]
    assert run(arguments) == 0
    rows = {row["size"]: row for row in json.loads(capsys.readouterr().out)["vocabulary"]}
    assert rows["1"]["parameters_saved"] == 0 and rows["1"]["coverage"] == 1
    assert rows["0.8"]["tokens"] == 384
    assert rows["0.8"]["tokens_per_byte"] > rows["1"]["tokens_per_byte"]
    assert rows["0.8"]["parameters_saved"] == 32 * (made.job().untouched.structure.vocab_size - 384)


@pytest.mark.parametrize(("tokens", "size", "said"), [(64, None, False), (4096, None, True), (4096, "auto", False)])
def test_a_large_vocabulary_that_nobody_asked_to_cut_is_pointed_out(
    tokens: int, size: str | None, said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    structure = describe(
        LlamaConfig(**{**tiny.SIZES, "vocab_size": tokens, "pad_token_id": 0, "tie_word_embeddings": True})
    )
    job: Any = SimpleNamespace(
        run=Run(Path("new")),
        structure=structure,
        recipe=Recipe.model_validate({"model": "m", "vocabulary": {"size": size}}),
    )
    hint_at_vocabulary(job)
    share = tokens * structure.base.hidden_size / structure.parameters(structure.base)
    line = f"note: the vocabulary holds {percent(share)} of the parameters; --vocabulary auto drops"
    assert (line in " ".join(capsys.readouterr().err.split())) is said
