"""The model card: metadata that the hub can read, lines that load, numbers and stamps, text that stays text."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from huggingface_hub import ModelCard
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from export.package_record import ElasticSize, PackageEntry, PackageRecord
from export.report.card import fenced, inline, picture, read_base_card, render_card, render_slice_card
from export.report.schema import BaseCard, validate_report
from supernet.architecture import Architecture, LayerSizes
from tests.support.report_helpers import CUT, HOSTILE, card_of, code_block, full_report, minimal_report


def lines(text: str, opening: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(opening)]


def test_metadata_is_what_the_hub_knows() -> None:
    data = card_of(full_report()).data
    assert (data.base_model, data.base_model_relation, data.license) == ("org/tiny", "finetune", "mit")
    assert (data.language, data.datasets) == (["en"], ["org/text"])
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert {"nas-compressor", "uneven"} <= set(data.tags)
    quantized = card_of(full_report(), "best-int8").data
    assert quantized.base_model_relation == "quantized"
    assert {"int8", "compressed-tensors"} <= set(quantized.tags)
    assert card_of(full_report() | {"hub_dataset": "org/more"}).data.datasets == ["org/text", "org/more"]
    data = full_report()
    data["packages"][1]["quantization"] = "int8-auto-round"
    own_form = card_of(data, "best-int8")
    assert {"int8-auto-round", "auto-round"} <= set(own_form.data.tags)
    assert "in auto-round's own form: `pip install transformers auto-round`" in own_form.text


def test_vllm_is_named_where_it_should_load_the_package() -> None:
    data = full_report()
    line = "`vllm serve path/to/best --trust-remote-code`"
    attention = data["packages"][0]["architecture"]["layers"]
    assert any(layer["intermediate_size"] and not layer["num_key_value_heads"] for layer in attention)
    assert "vllm" not in card_of(data).text, "a layer without attention"
    for layer in attention:
        layer.update({"num_attention_heads": 4, "num_key_value_heads": 2} if layer["intermediate_size"] else {})
    assert line in card_of(data).text and "not run by nas-compressor" in card_of(data).text
    data["packages"][0]["layout"] = "uniform"
    assert "`vllm serve path/to/best`" in card_of(data).text


def test_every_reported_number_is_in_the_model_index() -> None:
    data = full_report()
    results = card_of(data, "best-int4").data.eval_results
    package = data["packages"][2]
    numbers = {(result.dataset_type, result.metric_type): result.metric_value for result in results}
    for task, score in package["tasks"].items():
        assert numbers[task, score["metric"]] == score["value"]
        if score["stderr"] is not None:
            assert numbers[task, f"{score['metric']}_stderr"] == score["stderr"]
    assert ("words", "bits_per_byte_stderr") not in numbers
    for name in ("decode_tps", "prefill_tps"):
        assert numbers["speed", name] == package["speed"][name]
    own = {name: number for (dataset, name), number in numbers.items() if dataset == "nas-compressor"}
    expected = {"quality": package["quality"], "parameters": package["params"], "bytes": package["bytes"]}
    assert own == expected | {"bits_per_weight": 8.25, "bits_per_parameter": 9.5}
    named = {r.dataset_type: r.metric_name for r in results if r.metric_type in ("acc", "decode_tps")}
    assert (named["coin"], named["grammar"]) == ("acc (near chance)", "acc")
    assert "decompressed at load" in named["speed"]


def test_nothing_is_claimed_that_nobody_said() -> None:
    card = card_of(minimal_report())
    metadata = card.data.to_dict()
    assert not {"base_model", "base_model_relation", "license", "language", "datasets"} & set(metadata)
    assert "states no license" in card.text and "without training before the search" in card.text
    assert not [phrase for phrase in ("huggingface.co", "healed", "## Samples") if phrase in card.text]


def test_how_it_is_loaded() -> None:
    data = full_report()
    uneven = card_of(data).text
    assert code_block(uneven).count("trust_remote_code=True") == 2
    assert "transformers 5.15 or newer" in uneven
    data["packages"][0]["layout"] = "uniform"
    uniform = card_of(data).text
    assert "trust_remote_code" not in uniform
    assert "pip install transformers compressed-tensors" not in uniform
    quantized = card_of(full_report(), "best-int8").text
    assert "pip install transformers compressed-tensors" in quantized
    assert "the speed there is that of floats" in quantized
    data["packages"][0] |= {"layout": "gguf", "file": "model-f16.gguf"}
    for_llama_cpp = card_of(data).text
    assert "`llama-cli -m model-f16.gguf -n 40 -p " in for_llama_cpp
    assert "`llama-server -m model-f16.gguf --port 8080`" in for_llama_cpp
    assert "`ollama create best -f Modelfile`" in for_llama_cpp
    named = code_block(card_of(full_report(), repo_id="me/tiny-small").text)
    assert 'name = "me/tiny-small"' in named


def test_the_lines_load_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=3, **sizes)).save_pretrained(tmp_path / "path/to/best")
    words = Tokenizer(models.WordLevel({"<unk>": 0, "once": 1, "more": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="more")
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(tmp_path / "path/to/best")
    data = minimal_report()
    data["packages"][0]["layout"] = "uniform"
    data["samples"] = [{"prompt": "once 'once'\n\"once", "continuations": {"base": "more", "best": "once"}}]
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code_block(card_of(data).text), {})
    assert printed.getvalue().startswith("once")


def test_table_shows_base_package_and_siblings() -> None:
    data = full_report()
    other = data["packages"][0] | {"name": "best-0.5", "architecture": data["front"][1]["architecture"]}
    data["packages"].append(other)
    rows = lines(card_of(data, "best-int8").text, "| ")
    assert len(rows) == 5  # heading, base, compressed, INT8, INT4
    assert rows[1].startswith("| base: tiny | 1.00 M (100 %) | 4.00 MB (100 %) | 100 % | 0.900 ± 0.010 |")
    assert rows[3].startswith("| **compressed INT8** (this one) | 670 k (67.0 %) | 900 kB (22.5 %) |")
    assert all("(near chance)" in row for row in rows[1:])
    assert len({row.count("|") for row in rows}) == 1
    assert lines(card_of(data, "best-int8").text, "|---")[0].count("|") == rows[0].count("|")


def test_how_it_was_made_and_verified() -> None:
    data = full_report()
    (int4,) = [package for package in data["packages"] if package["name"] == "best-int4"]
    int4["quantization_report"]["rounding"] = "gptq"
    text = card_of(data, "best-int4").text
    assert "fine-tuned once as an elastic super-network on 400 tokens of train.jsonl" in text
    assert "searched with linas: 2 sub-networks" in text
    assert "over 1.00 k tokens" in text
    assert "quantized to INT4: 8.25 stored bits" in text and "weights of the blocks rounded by GPTQ" in text
    assert "- logits: yes" in text
    assert "- max logit difference: 1.25e-06" in text
    assert "- Not under int4: model.layers.1.mlp.down_proj, per-channel INT8" in text
    assert "[org/tiny](https://huggingface.co/org/tiny)" in text


def test_card_says_which_states_of_training_are_kept() -> None:
    data = full_report()
    text = " ".join(card_of(data, "best-int8").text.split())  # of what the network healed as `best` is stored in
    assert "held-out largest 3.000" in text and "kept is the last state" in text
    assert "no state was better than the untrained one, which is kept" in text
    del data["healing"], data["finetune"]["outcome"]  # as an earlier version wrote it
    assert "kept" not in card_of(data).text.partition("## How it was made")[2].partition("##")[0]


def test_samples_are_the_packages_own() -> None:
    text = card_of(full_report(), "best-int4").text
    assert text.count("This model:") == 3
    assert "one dog" not in text
    # int8 has no continuations of its own: those of its siblings, by name
    text = card_of(full_report(), "best-int8").text
    assert "This model:" not in text
    assert text.count("best:") == 3


def test_picture_by_hand() -> None:
    base = Architecture(64, (LayerSizes(4, 2, 256),) * 4)
    full, part, gone, mlp = picture(CUT, base).splitlines()[1:]
    assert full == f"    0  {'█' * 12} 2 of 2       {'█' * 24} 256 of 256"
    assert part == f"    1  {'█' * 6}{'░' * 6} 1 of 2       {'█' * 12}{'░' * 12} 128 of 256"
    assert gone == f"    2  {'░' * 12} 0 of 2       {'░' * 24} 0 of 256"
    assert mlp == f"    3  {'░' * 12} 0 of 2       {'█' * 18}{'░' * 6} 192 of 256"
    nearly = Architecture(64, (LayerSizes(4, 2, 255), LayerSizes(4, 2, 1), *base.layers[2:]))
    rows = picture(nearly, base).splitlines()
    assert f"{'█' * 23}░ 255 of 256" in rows[1]
    assert f"█{'░' * 23} 1 of 256" in rows[2]


def test_hostile_text_stays_text() -> None:
    data = full_report()
    data["base"]["name"] = HOSTILE
    data["base"]["card"]["license"] = HOSTILE
    data["finetune"]["data"] = HOSTILE
    data["packages"][0]["verified"] = {HOSTILE: HOSTILE}
    data["samples"][0] = {"prompt": f"```\n{HOSTILE}", "continuations": {"base": HOSTILE, "best": "````\n<b>"}}
    for row in [data["base"], *data["packages"]]:
        row["tasks"][HOSTILE] = row["tasks"].pop("coin")
    card = card_of(data)
    assert card.data.license == HOSTILE
    outside = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", card.text, flags=re.DOTALL | re.MULTILINE)
    assert "<" not in outside
    rows = lines(outside, "| ")
    assert len(rows) == 5
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
    compile(code_block(card.text), "card", "exec")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("stories_last_word", "stories_last_word"),
        ("_x_ **y** [z](u)", r"\_x\_ \*\*y\*\* \[z\](u)"),
        ("a|b\n<c> & `d`", r"a\|b &lt;c&gt; &amp; \`d\`"),
    ],
)
def test_inline(text: str, shown: str) -> None:
    assert inline(text) == shown


def test_a_fence_outlasts_what_it_holds() -> None:
    assert fenced("a") == "```text\na\n```"
    assert fenced("```\n`````") == "``````text\n```\n`````\n``````"


def test_base_card_is_carried_over(tmp_path: Path) -> None:
    assert read_base_card(tmp_path) == BaseCard()
    (tmp_path / "README.md").write_text("No metadata here.")
    assert read_base_card(tmp_path) == BaseCard()
    (tmp_path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\nlanguage: en\ndatasets:\n- a/b\n- c\n---\n"
    )
    stated = {"license": "other", "license_name": "llama3", "license_link": "LICENSE"}
    stated |= {"language": ["en"], "datasets": ["a/b", "c"]}
    assert read_base_card(tmp_path) == BaseCard.model_validate(stated)
    data = full_report()
    data["base"]["card"] = stated
    written = card_of(data).data
    assert (written.license, written.license_name) == ("other", "llama3")
    assert written.license_link == "https://huggingface.co/org/tiny/blob/main/LICENSE"


def test_unknown_package() -> None:
    with pytest.raises(KeyError, match="no package 'worst' in the report"):
        render_card(validate_report(minimal_report()), "worst")


@pytest.mark.parametrize(
    "text", ["---\ntitle: My model: v2\n---\n", "---\n- a\n---\n", "---\n1: x\n---\n", b"\xff\xfe"]
)
def test_a_base_card_that_cannot_be_read_is_no_reason_to_stop(tmp_path: Path, text: str | bytes) -> None:
    (tmp_path / "README.md").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert read_base_card(tmp_path) == BaseCard()


@pytest.mark.parametrize("known", [{}, {"held_out_loss": 2.5}, {"quality": 0.9, "quality_stderr": 0.02}])
def test_a_slice_has_the_licence_of_its_elastic_package_and_what_is_known_of_its_size(
    tmp_path: Path, known: dict[str, float]
) -> None:
    card = "---\nlicense: apache-2.0\nbase_model: a/b\ntags: [pruned, elastic]\n---\n"
    (tmp_path / "README.md").write_text(card)
    record = SimpleNamespace(folder=tmp_path, entry=SimpleNamespace(name="best-elastic"))
    sizes = CUT.to_dict()
    entry = {"name": "my cut", "path": ".", "layout": "uneven", "architecture": sizes, "params": 10, "bytes": 20}
    size = ElasticSize.model_validate({"name": "0.70", "architecture": sizes, "params": 10} | known)
    text = render_slice_card(PackageEntry.model_validate(entry), cast(PackageRecord, record), size, CUT)
    data = ModelCard(text).data
    assert (data.license, data.base_model, data.tags) == ("apache-2.0", "a/b", ["pruned", "uneven"])
    assert data.eval_results is None and "No license is known" not in text
    assert ("Nothing was measured" in text) == (not known)
    assert ("held-out loss: 2.500" in text) == ("held_out_loss" in known)
    assert ("quality, search: 90.0 % ± 2.0" in text) == ("quality" in known)
    assert 'name = "path/to/my cut"' in text


def test_an_elastic_package_is_not_called_healed() -> None:
    report = full_report()
    report["packages"][0]["layout"] = "elastic"
    card = render_card(validate_report(report), report["packages"][0]["name"])
    assert "sliced out" in card and "then healed" not in card
