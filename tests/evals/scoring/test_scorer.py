"""Scores are lm-eval's: every answer equals HFLM's, every value, standard error and group simple_evaluate's."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3_5TextConfig,
    Qwen3Config,
)

from evals.scoring import lm as lm_module
from evals.scoring.documents import Prompting
from evals.scoring.encoding import Encoder
from evals.scoring.evaluate import evaluate
from evals.scoring.lm import NetworkLM
from evals.scoring.scorer import Scorer, score_of, standard_error
from evals.scoring.tasks import TaskSet
from export.package import write_package
from search.scores import Score
from supernet.activation import SuperNetwork
from supernet.architecture import Architecture, LayerSizes
from supernet.common.errors import RequestError
from supernet.common.processes import available_cores
from supernet.families import describe
from supernet.slicing import extract
from tests.support import tiny, tiny_families
from tests.support.scoring_helpers import (
    CHOICE,
    LAST_WORD,
    ROLLING,
    WRITING,
    Row,
    assert_same_answer,
    assert_same_answers,
    documents,
    hflm,
    load,
    requests,
    scorer_of,
    write_task,
)

ASSETS = os.environ.get("COMPRESSOR_ASSETS")
needs_assets = pytest.mark.skipif(ASSETS is None, reason="COMPRESSOR_ASSETS is not set")
SIZES: dict[str, Any] = tiny.SIZES | {"initializer_range": 0.3}


def network(config: PreTrainedConfig) -> PreTrainedModel:
    """A random network whose answers differ clearly from one another."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One task of each kind; some documents exceed the tiny networks' context of 64 characters."""
    folder = tmp_path_factory.mktemp("tasks")
    write_task(folder, "choice", documents(12), **CHOICE)
    write_task(folder, "choice_long", documents(9, longest=150), **CHOICE)
    write_task(folder, "no_context", documents(8), **CHOICE | {"doc_to_text": ""})
    write_task(folder, "few_shot", documents(8, 3), shots=documents(4, 4), num_fewshot=1, **CHOICE)
    write_task(folder, "last_word", documents(9, longest=150), **LAST_WORD)
    write_task(folder, "rolling", documents(9, longest=300), **ROLLING)
    write_task(folder, "writing", documents(9, longest=150), **WRITING)
    group = "group: both\ntask: [choice, choice_long]\naggregate_metric_list:\n  - {metric: acc, weight_by_size: %s}\n"
    (folder / "both.yaml").write_text(group % "true")
    (folder / "alike.yaml").write_text((group % "false").replace("both", "alike"))
    return folder


ALL = ("choice", "choice_long", "no_context", "few_shot", "last_word", "rolling", "writing")


@pytest.fixture
def llama() -> PreTrainedModel:
    return network(LlamaConfig(**SIZES))


@pytest.mark.parametrize("task", ALL)
def test_answers_equal_hflm(llama: PreTrainedModel, tasks: Path, task: str) -> None:
    scorer = scorer_of(llama, tasks, task)
    # A batch of one: in HFLM, where a document's generation stops depends on the rest of its batch.
    theirs = hflm(llama, batch=1 if task == "writing" else 4)
    assert_same_answers(scorer.lm, theirs, requests(scorer.tasks))
    assert scorer.lm._as_tree is (None if task == "writing" else True)


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SIZES, sliding_window=16),
        Qwen3Config(**SIZES, head_dim=8),
        GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=259, bos_token_id=256, eos_token_id=257),
        LlamaConfig(**SIZES | {"num_key_value_heads": 4}, attn_implementation="eager"),
    ],
    ids=["sliding-window", "qk-norm", "learned-positions", "eager"],
)
def test_answers_equal_hflm_in_other_networks(config: PreTrainedConfig, tasks: Path) -> None:
    model = network(config)
    scorer = scorer_of(model, tasks, *ALL[1:4], "rolling")
    assert_same_answers(scorer.lm, hflm(model), requests(scorer.tasks))


@pytest.mark.parametrize(("max_tokens", "workers"), [(1, 1), (40, 1), (100_000, 1), (400, 3)])
def test_budgets_change_nothing(llama: PreTrainedModel, tasks: Path, max_tokens: int, workers: int) -> None:
    settings = {"max_tokens": max_tokens, "max_logits": max_tokens * 100, "workers": workers}
    scorer = scorer_of(llama, tasks, "choice_long", "rolling", **settings)
    assert_same_answers(scorer.lm, hflm(llama), requests(scorer.tasks))


def test_a_network_that_cannot_read_trees_is_detected(llama: PreTrainedModel, tasks: Path) -> None:
    """Attention that looks beyond the mask gives other answers as a tree; batches must be read instead."""
    attention = llama.model.layers[1].self_attn
    own = attention.forward

    def absolute(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        place = torch.arange(hidden_states.shape[1])[None, :, None] / 8
        return own(hidden_states * (1 + place.to(hidden_states.dtype)), *args, **kwargs)

    attention.forward = absolute
    scorer = scorer_of(llama, tasks, "choice_long")
    assert_same_answers(scorer.lm, hflm(llama), requests(scorer.tasks))
    assert scorer.lm._as_tree is False


def test_whole_articles_are_read_once_and_not_to_compare_both_ways(
    llama: PreTrainedModel, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_module, "COMPARED", 40)
    scorer = scorer_of(llama, tasks, "choice_long", "rolling")
    read: list[int] = []
    padded = NetworkLM._read_padded

    def counted(self: NetworkLM, plan: Any, beside: int = 0) -> Any:
        read.extend(len(span.tokens) for span in plan.distinct)
        return padded(self, plan, beside)

    monkeypatch.setattr(NetworkLM, "_read_padded", counted)
    assert_same_answers(scorer.lm, hflm(llama), requests(scorer.tasks))
    asked = scorer.lm.plan(scorer.tasks.requests("report").spans).distinct
    assert max(len(span.tokens) for span in asked) > 40
    assert scorer.lm._as_tree and read and max(read) <= 40


def test_shared_prefixes_are_read_once(llama: PreTrainedModel, tasks: Path) -> None:
    scorer = scorer_of(llama, tasks, "few_shot")
    spans = scorer.tasks.requests("all").spans
    distinct = {span.tokens[:i] for span in spans for i in range(1, len(span.tokens))}
    assert scorer.lm.plan(spans * 2).tokens == len(distinct) < sum(len(span.tokens) - 1 for span in spans)


def test_the_last_layer_is_computed_where_a_token_is_scored(llama: PreTrainedModel, tasks: Path) -> None:
    scorer = scorer_of(llama, tasks, "few_shot")
    scorer.ask("all")  # the first call also compares both ways of reading
    sizes: list[int] = []
    for module in (*(layer.mlp for layer in llama.model.layers), llama.lm_head):
        module.register_forward_hook(lambda module, args, out: sizes.append(out.shape[1]))
    scorer.ask("all")
    plan = scorer.lm.plan(scorer.tasks.requests("all").spans)
    rows = len(plan.packs[0].rows)
    assert sizes == [plan.tokens, plan.tokens, rows, rows] and rows < plan.tokens


@pytest.mark.parametrize(("readings", "workers"), [((0, 1, 0, 2), 1), ((0, 2, 0, 1), 2)])
def test_passes_run_as_is_fastest(
    llama: PreTrainedModel, tasks: Path, monkeypatch: pytest.MonkeyPatch, readings: tuple[int, ...], workers: int
) -> None:
    """`readings` of the clock: before and after one pass on both cores, then before and after a pass on each."""
    scorer = scorer_of(llama, tasks, "choice")
    threads = torch.get_num_threads()
    clock = iter(readings)
    monkeypatch.setattr(lm_module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    try:
        scorer.lm.tune(scorer.tasks.requests("all").spans, cores=2)
        assert scorer.lm.workers == workers and workers * torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_a_perplexity_beyond_all_numbers_is_infinite(
    llama: PreTrainedModel, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = scorer_of(llama, tasks, "rolling:word_perplexity")
    monkeypatch.setattr(scorer.lm, "answer", lambda plan, architecture=None: [(-1e6, False)] * len(plan.index))
    score = scorer.score("all")["rolling"]
    assert score.value == math.inf and score.stderr is None
    monkeypatch.setattr(NetworkLM, "answer", lambda lm, plan, architecture=None: [(-1e6, False)] * len(plan.index))
    results = evaluate(llama, ["rolling"], tokenizer=tiny.byte_tokenizer(), include_path=tasks)["results"]["rolling"]
    assert results["word_perplexity,none"] == math.inf and math.isfinite(results["bits_per_byte,none"])


@pytest.mark.parametrize(("asked", "cores"), [("3", 3), ("2,1", 2), ("", None), ("many", None)])
def test_cores_are_those_asked_for_or_bound_to(monkeypatch: pytest.MonkeyPatch, asked: str, cores: int | None) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {1, 4, 5, 6, 7}, raising=False)
    assert available_cores() == (cores or 5)


def test_a_prompt_that_brings_its_own_bos_gets_no_second_one(llama: PreTrainedModel) -> None:
    encoder = Encoder(tiny.byte_tokenizer(), llama.config)
    theirs = hflm(llama)
    for text in ("<s>the cat", "the cat", " the cat "):
        assert encoder.encode([text]) == [theirs.tok_encode(text)]
    pairs = [("<s>the", " cat"), ("the ", "cat"), ("", "cat"), ("", "<s>cat")]
    for pair, (context, continuation) in zip(pairs, encoder.pairs(pairs), strict=True):
        if pair[0]:
            assert (context, continuation) == theirs._encode_pair(*pair)
        else:
            assert context == [256] and bytes(continuation)  # the prefix token is never scored
    assert encoder.pairs([("", "<s>cat")])[0][1] == encoder.encode(["cat"], special=False)[0]


@pytest.fixture(autouse=True)
def no_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval bootstraps in a pool of processes unless this says otherwise."""
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")


def simply_evaluated(model: PreTrainedModel, folder: Path, *names: str, tokenizer: Any = None, **settings: Any) -> Any:
    """All that lm-eval's own evaluation returns."""
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return simple_evaluate(
        model=hflm(model, tokenizer), tasks=list(names), task_manager=manager, bootstrap_iters=100, **settings
    )


def test_scores_equal_simple_evaluate(llama: PreTrainedModel, tasks: Path) -> None:
    names = ["no_context", "last_word:perplexity", "rolling:word_perplexity", "both"]
    scores = scorer_of(llama, tasks, *names, holdout=False).score("all")
    expected = simply_evaluated(llama, tasks, "no_context", "last_word", "rolling", "both")["results"]
    assert [score.metric for score in scores.values()] == ["acc_norm", "perplexity", "word_perplexity", "acc"]
    for name, score in scores.items():
        assert score.value == pytest.approx(expected[name][f"{score.metric},none"], rel=1e-5)
        assert score.n == expected[name]["sample_len"]
        wanted = expected[name][f"{score.metric}_stderr,none"]
        if wanted == "N/A":
            assert name == "rolling" and score.stderr is not None and score.stderr > 0
        else:
            assert score.stderr == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("name", ["both", "alike"])
def test_groups_add_up_as_their_file_says(llama: PreTrainedModel, tasks: Path, name: str) -> None:
    scores, values = scorer_of(llama, tasks, name, holdout=False).score_with_documents("all")
    expected = simply_evaluated(llama, tasks, name)["results"][name]
    assert scores[name].value == pytest.approx(expected["acc,none"])
    assert scores[name].stderr == pytest.approx(expected["acc_stderr,none"])
    assert scores[name].n == 21 and list(map(len, values[name])) == [12, 9]


def test_a_subtask_without_documents_takes_no_part(llama: PreTrainedModel, tasks: Path) -> None:
    task = scorer_of(llama, tasks, "both").tasks.tasks["both"]
    (first, documents), (second, _) = task.documents("report")
    empty = [(first, documents), (second, [])]
    assert score_of(task, empty, [[1.0, 0.0], []], "report").value == 0.5
    assert math.isnan(score_of(task, empty, [[], []], "report").value)


def test_evaluate_gives_lm_evals_results(llama: PreTrainedModel, tasks: Path, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path / "model")
    tiny.byte_tokenizer().save_pretrained(tmp_path / "model")
    names = ["choice", "both:acc", "last_word", "rolling", "few_shot", "writing"]
    with pytest.raises(RequestError, match="choice is asked for twice"):
        evaluate(tmp_path / "model", names, include_path=tasks, device="cpu")
    names.remove("choice")
    ours = evaluate(tmp_path / "model", names, include_path=tasks, device="cpu")
    theirs = simply_evaluated(llama, tasks, "both", "last_word", "rolling", "few_shot", "writing")
    for key in ("group_subtasks", "versions", "n-shot", "higher_is_better", "n-samples"):
        assert ours[key] == theirs[key]
    assert ours["results"].keys() == theirs["results"].keys() and ours["groups"].keys() == theirs["groups"].keys()
    for name, row in theirs["results"].items():
        # HFLM's texts depend on the batch; here no text is right either way.
        numbers = {key: pytest.approx(value, rel=1e-4) for key, value in row.items() if isinstance(value, float)}
        assert ours["results"][name] == row | numbers
    assert ours["scores"]["both"]["n"] == 21 and ours["scores"]["both"]["chance"] == pytest.approx(0.4206, abs=1e-3)
    with pytest.raises(RequestError, match="no such folder"):
        evaluate(str(tmp_path / "models"), names, include_path=tasks)


def test_a_network_that_gives_no_numbers_is_refused(llama: PreTrainedModel, tasks: Path, tmp_path: Path) -> None:
    """As scores they would be wrong answers: 0, without a word."""
    broken = copy.deepcopy(llama)
    with torch.no_grad():
        broken.get_parameter("model.layers.1.mlp.up_proj.weight")[0, 0] = torch.nan
    for name in ("choice", "rolling"):
        with pytest.raises(RequestError, match="its log-probabilities are no numbers"):
            evaluate(broken, [name], tokenizer=tiny.byte_tokenizer(), include_path=tasks, device="cpu")
    broken.save_pretrained(tmp_path)
    tiny.byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(RequestError, match=r"the weight model\.layers\.1\.mlp\.up_proj\.weight has NaN"):
        evaluate(tmp_path, ["writing"], include_path=tasks, device="cpu")


def test_a_task_may_bring_functions_of_its_own(
    llama: PreTrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As lm-eval's own tasks do; the results are JSON all the same, and one metric that fails takes none along."""
    rows = [{"question": f"what {i}", "word": "x"} for i in range(5)]
    write_task(tmp_path, "own", rows, **WRITING)
    (tmp_path / "own_functions.py").write_text(
        "def docs(dataset): return dataset.select(range(4))\n"
        "def results(doc, answers): return {'length': len(answers[0]), 'odd': 1.0}\n"
        "def fails(items): return 1 / 0\n"
    )
    file = tmp_path / "own.yaml"
    settings = json.loads(file.read_text())
    del settings["metric_list"]
    file.write_text(
        json.dumps(settings).removesuffix("}")
        + ",\nprocess_docs: !function own_functions.docs,\nprocess_results: !function own_functions.results,\n"
        "metric_list: [{metric: length, aggregation: mean, higher_is_better: true},\n"
        "{metric: odd, aggregation: !function own_functions.fails, higher_is_better: true}]}"
    )
    tokenizer = tiny.byte_tokenizer()
    ours = evaluate(llama, ["own:length"], tokenizer=tokenizer, include_path=tmp_path, device="cpu")
    assert ours == json.loads(json.dumps(ours))
    assert "def docs" in ours["configs"]["own"]["process_docs"]
    assert "warning: task own: its metric odd cannot be computed of 4 documents (division by zero)" in " ".join(
        capsys.readouterr().err.split()
    )
    results = ours["results"]["own"]
    assert results["length,none"] == ours["scores"]["own"]["value"] and "odd,none" not in results
    with pytest.raises(RequestError, match=r"task own: its metric odd cannot be computed of 4 documents"):
        evaluate(llama, ["own:odd"], tokenizer=tokenizer, include_path=tmp_path, device="cpu")


@pytest.mark.parametrize("planted", ["modeling_uneven_llama.py", "sub/evil.py", "custom_generate/generate.py"])
def test_foreign_code_is_not_run(llama: PreTrainedModel, tasks: Path, tmp_path: Path, planted: str) -> None:
    llama.save_pretrained(tmp_path)
    tiny.byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / planted).parent.mkdir(exist_ok=True)
    (tmp_path / planted).write_text("raise SystemExit('ran')\n")
    with pytest.raises(RequestError, match="contains code"):
        evaluate(tmp_path, ["choice"], include_path=tasks, device="cpu")


@pytest.mark.parametrize("place", ["config.json", "tokenizer_config.json", "custom_generate"])
def test_code_beside_our_own_is_not_run(llama: PreTrainedModel, tasks: Path, tmp_path: Path, place: str) -> None:
    """Our own code file is there, unchanged, and trusted; a file that names other code, or is other code, is not."""
    structure = describe(llama.config)
    layers = list(structure.base.layers)
    layers[0] = replace(layers[0], intermediate_size=32)
    architecture = Architecture(structure.base.hidden_size, tuple(layers))
    write_package(
        extract(llama, structure, architecture),
        tmp_path / "package",
        tokenizer=tiny.byte_tokenizer(),
        entry={"name": "package", "architecture": architecture.to_dict()},
        dtype=torch.float32,
    )
    folder = tmp_path / "package"
    assert evaluate(folder, ["choice"], include_path=tasks, device="cpu")["scores"]
    (folder / "sub").mkdir()
    if place == "custom_generate":
        (folder / "sub").rename(folder / place)
        (folder / place / "generate.py").write_text("raise SystemExit('ran')\n")
    else:
        (folder / "sub" / "evil.py").write_text("raise SystemExit('ran')\n")
        names = {kind: f"sub/evil.{kind}" for kind in ("AutoConfig", "AutoModelForCausalLM")}
        auto_map = {"auto_map": names | {"AutoTokenizer": ["sub/evil.AutoTokenizer", None]}}
        (folder / place).write_text(json.dumps(json.loads((folder / place).read_text()) | auto_map))
    with pytest.raises(RequestError, match="contains code"):
        evaluate(folder, ["choice"], include_path=tasks, device="cpu")


def architectures() -> Iterator[Architecture]:
    """Sub-networks as a generation has them: leading layers shared with the one before, halves and layers removed."""
    full, slim, thin = LayerSizes(4, 2, 64), LayerSizes(2, 1, 32), LayerSizes(4, 2, 16)
    mlp_only, attention_only, removed = LayerSizes(0, 0, 64), LayerSizes(4, 2, 0), LayerSizes(0, 0, 0)
    for layers in (
        (full, full, full),
        (full, slim, full),
        (full, slim, full),
        (full, slim, thin),
        (full, slim, removed),
        (full, mlp_only, attention_only),
        (slim, mlp_only, attention_only),
        (slim, removed, full),
        (full, slim, full),
    ):
        yield Architecture(32, layers)


@pytest.mark.parametrize(("cache_bytes", "workers"), [(2**28, 1), (2**28, 3), (40_000, 2), (0, 1)])
def test_sub_networks_score_as_their_extracted_selves(
    llama: PreTrainedModel, tasks: Path, cache_bytes: int, workers: int
) -> None:
    supernet = SuperNetwork(llama)
    settings = {"max_tokens": 300, "cache_bytes": cache_bytes, "workers": workers}
    scorer = scorer_of(llama, tasks, "choice_long", "rolling", "writing", holdout=False, **settings)
    for architecture in architectures():
        with supernet.activated(architecture):
            answers = scorer.ask("all", architecture=architecture)
        alone = NetworkLM(extract(llama, supernet.structure, architecture), scorer.tasks.encoder)
        expected = Scorer(scorer.tasks, alone).ask("all")
        for request in requests(scorer.tasks):
            answer, wanted = (x[id(request)][0] for x in (answers, expected))
            is_pair = isinstance(answer, tuple)
            assert_same_answer(answer[0] if is_pair else answer, wanted[0] if is_pair else wanted)
    assert not llama.model.__dict__.get("layers")  # the super-network is left as it was


def test_kept_layers_are_dropped_when_weights_change(llama: PreTrainedModel, tasks: Path) -> None:
    scorer, base = scorer_of(llama, tasks, "rolling"), describe(llama.config).base
    before = scorer.score("search", architecture=base)
    assert scorer.score("search", architecture=base) == before
    with torch.no_grad():
        llama.model.layers[0].mlp.down_proj.weight.mul_(2)
    after = scorer.score("search", architecture=base)
    assert after != before and after["rolling"].value == pytest.approx(scorer.score("search")["rolling"].value)


def test_equal_leading_layers_are_not_computed_again(llama: PreTrainedModel, tasks: Path) -> None:
    scorer = scorer_of(llama, tasks, "choice")
    computed: list[int] = []
    for i, layer in enumerate(llama.model.layers):
        layer.mlp.register_forward_hook(lambda *_, i=i: computed.append(i))
    full, slim = LayerSizes(4, 2, 64), LayerSizes(4, 2, 32)
    scorer.score("search", architecture=Architecture(32, (full, full, full)))
    computed.clear()
    scorer.score("search", architecture=Architecture(32, (full, slim, full)))
    assert computed == [1, 2]


@pytest.mark.parametrize(
    ("kind", "row", "settings", "reason"),
    [
        (CHOICE, {"question": "why", "choices": [" a", " b" * 40], "gold": 0}, {}, "has 81 tokens"),
        (CHOICE, {"question": "why", "choices": [" a", ""], "gold": 0}, {"target_delimiter": ""}, "has no token"),
        (
            WRITING,
            {"question": "why", "word": "x"},
            {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 64}},
            "leave no room",
        ),
    ],
)
def test_a_document_that_lm_eval_cannot_score_is_named(
    llama: PreTrainedModel, tmp_path: Path, kind: Row, row: Row, settings: Row, reason: str
) -> None:
    rows = [{"question": f"what {i}", "choices": [" a", " b"], "gold": 1, "word": "x"} for i in range(3)]
    write_task(tmp_path, "odd", [*rows, row], **kind | settings)
    task_set = load(llama, tmp_path, "odd")
    document = 0 if kind is WRITING else 3
    with pytest.raises(RequestError, match=rf"task odd, document {document}: .*{reason}"):
        task_set.requests("all")


def test_generation_settings_of_a_task_are_honoured(llama: PreTrainedModel, tmp_path: Path) -> None:
    """Anything but plain greedy decoding is the network's own `generate`'s, as in HFLM."""
    kwargs = {"until": ["e"], "max_gen_toks": 10, "do_sample": False, "num_beams": 2}
    write_task(tmp_path, "beams", documents(4), **WRITING | {"generation_kwargs": kwargs})
    write_task(tmp_path, "greedy", documents(4), **WRITING)
    scorer = scorer_of(llama, tmp_path, "beams")
    assert_same_answers(scorer.lm, hflm(llama, batch=1), requests(scorer.tasks))
    llama.generation_config.repetition_penalty = 1.7
    scorer = scorer_of(llama, tmp_path, "greedy")
    assert_same_answers(scorer.lm, hflm(llama, batch=1), requests(scorer.tasks))


def test_plain_greedy_decoding_goes_on_in_batches(
    llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by `generate`, whose stop strings work for a batch of one only."""
    write_task(tmp_path, "greedy", documents(8), **WRITING)
    scorer = scorer_of(llama, tmp_path, "greedy")
    expected = hflm(llama, batch=1).generate_until(requests(scorer.tasks), disable_tqdm=True)
    monkeypatch.setattr(llama, "generate", None)
    assert scorer.lm.generate_until(requests(scorer.tasks)) == expected


def test_documents_leave_a_batch_of_linear_attention(tmp_path: Path) -> None:
    writer = network(Qwen3_5TextConfig(**SIZES, **tiny_families.LINEAR, full_attention_interval=2))
    write_task(tmp_path, "greedy", documents(8), **WRITING)
    scorer = scorer_of(writer, tmp_path, "greedy")
    written = scorer.lm.generate_until(requests(scorer.tasks))
    assert len(set(map(len, written))) > 1
    alone = [scorer.lm.generate_until([request])[0] for request in requests(scorer.tasks)]
    assert written == alone


CHAT = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture
def chat_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.mark.parametrize("longest", [None, 150], ids=["whole", "truncated"])
@pytest.mark.parametrize("kind", [CHOICE, LAST_WORD, WRITING], ids=["choice", "loglikelihood", "generation"])
def test_answers_under_a_chat_template_equal_hflm(
    llama: PreTrainedModel, tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase, kind: Row, longest: int | None
) -> None:
    write_task(tmp_path, "talk", documents(6, longest=longest), **kind)
    prompting = Prompting(chat=True, system=None if longest is None else "be brief")
    task_set = load(llama, tmp_path, "talk", tokenizer=chat_tokenizer, prompting=prompting)
    encoder, asked = task_set.encoder, requests(task_set)
    prompts = [encoder.encode([request.args[0]])[0] for request in asked]
    assert any(len(prompt) > encoder.max_length for prompt in prompts) == (longest is not None)
    assert all(request.args[0].endswith("a:") for request in asked)
    assert_same_answers(NetworkLM(llama, encoder), hflm(llama, chat_tokenizer, batch=1), asked)


def test_few_shot_examples_under_a_chat_template_are_lm_evals(
    llama: PreTrainedModel, tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase
) -> None:
    write_task(tmp_path, "talk", documents(6), shots=documents(3, 5), num_fewshot=1, **CHOICE)
    prompting = Prompting(chat=True, system="be brief")
    task_set = load(llama, tmp_path, "talk", tokenizer=chat_tokenizer, prompting=prompting, holdout=False)
    score = Scorer(task_set, NetworkLM(llama, task_set.encoder)).score("all")["talk"]
    settings = {"apply_chat_template": True, "system_instruction": "be brief"}
    theirs = simply_evaluated(llama, tmp_path, "talk", tokenizer=chat_tokenizer, **settings)
    samples = theirs["samples"]["talk"]
    prompts = [document.instances[0].args[0] for document in task_set.documents("all")["talk"][0][1]]
    assert prompts == [sample["arguments"][0][0] for sample in samples]
    assert prompts[0].startswith("s:be brief;u:")
    assert score.value == theirs["results"]["talk"]["acc_norm,none"]


def score(value: float, stderr: float | None = 0.02, chance: float | None = 0.5) -> Score:
    return Score(metric="acc", value=value, stderr=stderr, n=100, split="report", chance=chance)


def test_near_chance() -> None:
    assert score(0.54).near_chance and score(0.46).near_chance
    assert not score(0.55).near_chance
    assert not score(0.54, chance=None).near_chance and not score(0.54, stderr=None).near_chance


def test_standard_error_where_lm_eval_states_none() -> None:
    def ratio(items: Any) -> float:
        return sum(a for a, _ in items) / sum(b for _, b in items)

    items = [(float(i % 7), 3.0) for i in range(200)]
    assert standard_error(ratio, items, everywhere=False) is None
    assert standard_error(ratio, items[:1]) is None
    spread = torch.tensor([a / b for a, b in items]).std().item() / 200**0.5
    assert standard_error(ratio, items) == pytest.approx(spread, rel=0.25)


@needs_assets
@pytest.mark.parametrize("checkpoint", ["stories260K", "prose-7m"])
def test_real_tasks_equal_hflm(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of real task on real checkpoints, some documents longer than the context."""
    assets = Path(ASSETS or "")
    monkeypatch.chdir(assets)  # the task files name their data relative to a neighbour of the assets
    path = assets / "checkpoints" / checkpoint
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    encoder = Encoder(tokenizer, model.config)
    names = {
        "blimp_passive_2": 12,
        "arc_easy_local": 6,
        "hellaswag_local": 3,
        "mmlu_high_school_us_history_local": 3,
        "stories_last_word": 12,
        "stories_bpb": 3,
        "wikitext2_bpb": 1,
        "gsm8k_local": 3,
    }
    task_set = TaskSet.load(list(names), encoder=encoder, include_path=[assets / "tasks"])
    ours, theirs = NetworkLM(model, encoder), hflm(model, tokenizer)
    truncated = 0
    for name, limit in names.items():
        subtasks = task_set.tasks[name].subtasks
        asked = [i for subtask in subtasks for d in subtask.documents("report", limit) for i in d.instances]
        if name == "gsm8k_local":
            theirs = hflm(model, tokenizer, batch=1)
        assert_same_answers(ours, theirs, asked)
        truncated += any(len(encoder.encode([request.args[0]])[0]) > encoder.max_length for request in asked)
    assert truncated
    assert ours._as_tree


@needs_assets
def test_a_score_at_chance_is_told_from_one_that_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assets = Path(ASSETS or "")
    monkeypatch.chdir(assets)
    path = assets / "checkpoints" / "stories260K"
    ours = evaluate(path, ["mmlu6_local", "blimp12"], include_path=assets / "tasks", limit=96, device="cpu")
    mmlu, blimp = ours["scores"]["mmlu6_local"], ours["scores"]["blimp12"]
    assert (mmlu["chance"], blimp["chance"]) == (0.25, 0.5)
    assert mmlu["near_chance"] and not blimp["near_chance"]
    assert (mmlu["n"], blimp["n"]) == (96, 96)
