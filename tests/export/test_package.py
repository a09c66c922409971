"""Packages: written whole or not at all, in the base's dtype, and every fault named by its file."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from export import package as packages
from export.package_record import RECORD, PackageRecord, check_files, read_record, update_record, write_card
from supernet.architecture import Architecture, LayerSizes
from supernet.common.errors import RequestError, VerificationError
from supernet.families import describe
from supernet.trust import check_code, load_tokenizer
from tests.support.export_networks import (
    CHAT_TEMPLATE,
    EVEN,
    TEXTS,
    UNEVEN,
    cut,
    edited,
    probe_ids,
    record_anew,
    tiny_llama,
    tiny_tokenizer,
    write_tiny,
)
from tests.support.tiny_families import assert_close

NETWORKS = {"even": EVEN, "uneven": UNEVEN}


@pytest.fixture(scope="module", params=NETWORKS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PackageRecord:
    folder = tmp_path_factory.mktemp("packages") / request.param
    return write_tiny(folder, NETWORKS[request.param], card="# A card\n")


@pytest.fixture
def package(tmp_path: Path, written: PackageRecord) -> Path:
    return shutil.copytree(written.folder, tmp_path / "package")


def assert_same_logits(package: Path, network: nn.Module, **options: Any) -> None:
    """A package that transformers loads computes the same as a network."""
    loaded = AutoModelForCausalLM.from_pretrained(package, **options)
    with torch.no_grad():
        assert_close(loaded(probe_ids()).logits, network(probe_ids()).logits)


def test_it_says_what_it_is(written: PackageRecord) -> None:
    folder, entry = written.folder, written.entry
    architecture = NETWORKS[folder.name]
    assert entry.layout == ("uneven" if folder.name == "uneven" else "uniform")
    assert entry.architecture == architecture and entry.quantization is None and entry.verified is None
    assert entry.params == describe(tiny_llama().config).parameters(architecture)
    assert entry.bytes == (folder / "model.safetensors").stat().st_size
    assert 0 < entry.bytes - 4 * entry.params < 10_000
    assert written == read_record(folder)
    names = {p.name for p in folder.iterdir()}
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"}
    expected |= {"tokenizer_config.json", "chat_template.jinja", "compression.json"}
    assert names - {"modeling_uneven_llama.py"} == expected
    assert ("modeling_uneven_llama.py" in names) == (entry.layout == "uneven") == check_code(folder)
    check_files(folder)


def test_transformers_loads_it_and_computes_the_same(written: PackageRecord) -> None:
    uneven = written.entry.layout == "uneven"
    loaded = AutoModelForCausalLM.from_pretrained(written.folder, trust_remote_code=uneven)
    assert loaded.dtype == torch.float32
    assert isinstance(loaded, LlamaForCausalLM)
    assert_same_logits(written.folder, cut(tiny_llama(), written.entry.architecture), trust_remote_code=uneven)
    tokenizer = load_tokenizer(written.folder)
    assert tokenizer(TEXTS).input_ids == tiny_tokenizer()(TEXTS).input_ids
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_an_uneven_package_stops_a_loader_that_does_not_run_its_code(tmp_path: Path) -> None:
    write_tiny(tmp_path / "p", UNEVEN)
    (tmp_path / "p" / "modeling_uneven_llama.py").unlink()
    with edited(tmp_path / "p" / "config.json") as config:
        del config["auto_map"]
    with pytest.raises(ValueError, match="uneven_llama"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "p")


def test_what_vllm_reads_is_there(tmp_path: Path) -> None:
    """Its Transformers backend: AutoModel, attention by interface, sizes by layer. Its DeciLM: `block_configs`."""
    sizes = (LayerSizes(4, 2, 96), LayerSizes(4, 2, 32), LayerSizes(0, 0, 64), LayerSizes(4, 2, 0))
    write_tiny(tmp_path / "p", Architecture(64, sizes))
    config = AutoConfig.from_pretrained(tmp_path / "p", trust_remote_code=True)
    model = AutoModel.from_config(config, trust_remote_code=True)
    assert type(model).__name__ == "UnevenLlamaModel" and model._supports_attention_backend
    assert config.base_model_tp_plan and model.layers[1].mlp.up_proj.out_features == 32
    blocks = config.block_configs
    assert [(b.attention.no_op, b.ffn.no_op) for b in blocks] == [(False, False)] * 2 + [(True, False), (False, True)]
    assert [b.ffn.intermediate_size for b in blocks[:3]] == [96, 32, 64] and blocks[0].attention.n_heads_in_group == 2
    assert not hasattr(blocks[0].ffn, "ffn_mult")  # which would be rounded
    other = AutoConfig.from_pretrained(write_tiny(tmp_path / "q", UNEVEN).folder, trust_remote_code=True)
    assert [layer.num_attention_heads for layer in other.per_layer_config][:2] == [4, 2]
    assert other.block_configs is None


def test_weights_are_stored_in_the_given_dtype(tmp_path: Path) -> None:
    write_tiny(tmp_path / "p", UNEVEN, dtype=torch.bfloat16, reference=tmp_path / "reference.safetensors")
    original = cut(tiny_llama(), UNEVEN).state_dict()
    with safe_open(tmp_path / "p" / "model.safetensors", "pt") as stored:
        assert set(stored.keys()) == set(original)
        for name in stored.keys():  # noqa: SIM118
            assert torch.equal(stored.get_tensor(name), original[name].to(torch.bfloat16))
    assert json.loads((tmp_path / "p" / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "p", dtype=torch.float32, trust_remote_code=True)
    with torch.no_grad(), safe_open(tmp_path / "reference.safetensors", "pt") as reference:
        assert_close(loaded(reference.get_tensor("ids")).logits, reference.get_tensor("logits"))


@pytest.mark.parametrize("later", [False, True])
def test_every_layer_attends_as_is_asked(tmp_path: Path, later: bool) -> None:
    package = write_tiny(tmp_path / "p", UNEVEN).folder
    given = {} if later else {"attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(package, trust_remote_code=True, **given)
    if later:
        assert {module.config._attn_implementation for module in attention_of(model)} == {"sdpa"}
        model.set_attn_implementation("eager")
    assert {module.config._attn_implementation for module in attention_of(model)} == {"eager"}
    attentions = model(input_ids=probe_ids(), output_attentions=True).attentions
    assert len(attentions) == sum("attention" not in layer.skip for layer in UNEVEN.layers)


def attention_of(model: nn.Module) -> list[Any]:
    return [
        module for name, module in model.named_modules() if name.endswith("self_attn") and hasattr(module, "config")
    ]


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    model = cut(tiny_llama(tie_word_embeddings=True), UNEVEN)
    write_tiny(tmp_path / "p", UNEVEN, model)
    with safe_open(tmp_path / "p" / "model.safetensors", "pt") as stored:
        assert "lm_head.weight" not in stored.keys()  # noqa: SIM118
    assert_same_logits(tmp_path / "p", model, trust_remote_code=True)


def test_files_have_the_mode_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "new").touch()
    modes = {file.stat().st_mode for file in write_tiny(tmp_path / "p", EVEN).folder.iterdir()}
    assert modes == {(tmp_path / "new").stat().st_mode}


def test_shards_are_named_and_indexed_as_the_hub_does(tmp_path: Path) -> None:
    record = write_tiny(tmp_path / "p", EVEN, max_shard_bytes=60_000)
    shards = sorted(p.name for p in record.folder.glob("*.safetensors"))
    count = len(shards)
    assert count > 2 and shards == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    index = json.loads((record.folder / "model.safetensors.index.json").read_text())
    total = index["metadata"]["total_size"]
    assert total == 4 * record.entry.params and set(index["weight_map"].values()) == set(shards)
    assert record.entry.bytes == sum((record.folder / shard).stat().st_size for shard in shards)
    held = [[tensor.nbytes for tensor in load_file(record.folder / shard).values()] for shard in shards]
    assert all(sum(one) <= 60_000 or len(one) == 1 for one in held)
    assert all(sum(one) + sum(following) > 60_000 for one, following in pairwise(held))  # as full as they may be
    assert_same_logits(record.folder, cut(tiny_llama(), EVEN))
    (record.folder / shards[1]).unlink()
    with pytest.raises(VerificationError, match=shards[1]):
        check_files(record.folder)


def test_the_tokenizer_may_be_a_folder(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"never copied")
    package = write_tiny(tmp_path / "p", EVEN, tokenizer=tmp_path / "base").folder
    assert (package / "tokenizer.json").read_bytes() == (tmp_path / "base" / "tokenizer.json").read_bytes()
    assert AutoTokenizer.from_pretrained(package).chat_template == CHAT_TEMPLATE
    assert not list(package.glob("*.bin"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match="no tokenizer files"):
        write_tiny(tmp_path / "q", EVEN, tokenizer=tmp_path / "empty")
    assert not (tmp_path / "q").exists()


def test_nothing_half_written_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(packages, "write_record", fail)
    with pytest.raises(KeyboardInterrupt):
        write_tiny(tmp_path / "p", EVEN)
    assert not list(tmp_path.iterdir())


def test_what_killed_processes_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(process: int, signal: int) -> None:
        assert signal == 0
        if process == 111:
            raise ProcessLookupError
        if process == 222:
            raise PermissionError  # of another user, and alive

    monkeypatch.setattr(os, "kill", kill)
    for name in (".p.partial-111", ".p.old-111", ".p.partial-222", ".p.partial-333", ".p-int8.partial-111"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard-0.safetensors").write_bytes(b"gigabytes")
    write_tiny(tmp_path / "p", EVEN)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"p", ".p.partial-222", ".p.partial-333", ".p-int8.partial-111"}


def test_an_interrupt_while_a_package_is_replaced_brings_the_earlier_one_back(
    tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_record(package.rename(tmp_path / "p"))
    rename = Path.rename

    def interrupted(source: Path, target: Path) -> Path:
        if ".partial-" in source.name:
            raise KeyboardInterrupt
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_tiny(tmp_path / "p", EVEN, dtype=torch.bfloat16)
    assert [path.name for path in tmp_path.iterdir()] == ["p"] and read_record(tmp_path / "p").files == before.files


def test_an_earlier_package_is_replaced_and_anything_else_is_not(tmp_path: Path, package: Path) -> None:
    before = read_record(package.rename(tmp_path / "p")).entry.bytes
    assert write_tiny(tmp_path / "p", EVEN, dtype=torch.bfloat16).entry.bytes < before
    assert [p.name for p in tmp_path.iterdir()] == ["p"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    with pytest.raises(RequestError, match="holds something else"):
        write_tiny(tmp_path / "other", EVEN)
    assert (tmp_path / "other" / "thesis.txt").read_text() == "years of work"
    with pytest.raises(RequestError, match="in the way"):
        write_tiny(tmp_path / "other" / "thesis.txt", EVEN)


def test_a_full_disk_says_how_much_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 2**20, 2**20))
    with pytest.raises(RequestError, match=r"needs 17\.\d MB of disk space, 1\.05 MB are free"):
        write_tiny(tmp_path / "p", EVEN)
    assert not (tmp_path / "p").exists()


def test_values_that_the_dtype_cannot_hold_are_refused(tmp_path: Path) -> None:
    model = cut(tiny_llama(), EVEN)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 4] = 1e6
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight holds values that torch.float16 cannot"):
        write_tiny(tmp_path / "p", EVEN, model, dtype=torch.float16)
    with pytest.raises(ValueError, match="says 7 parameters"):
        write_tiny(tmp_path / "p", EVEN, entry={"name": "best", "architecture": EVEN.to_dict(), "params": 7})
    assert not (tmp_path / "p").exists()


def test_the_card_and_later_measurements_are_recorded(package: Path) -> None:
    write_card(package, "# Another card\n")
    update_record(package, entry={"quality": 0.97})
    check_files(package)
    assert read_record(package).entry.quality == 0.97
    (package / "README.md").write_text("# Better numbers\n")
    with pytest.raises(VerificationError, match=r"README\.md"):
        check_files(package)


def test_every_edit_is_found_and_named(package: Path) -> None:
    for name in sorted(read_record(package).files):
        kept = (package / name).read_bytes()
        (package / name).unlink()
        with pytest.raises(VerificationError, match=f"{name}: the file is missing"):
            check_files(package)
        (package / name).write_bytes(kept[:-1])
        with pytest.raises(VerificationError, match=f"{name}: {len(kept) - 1} bytes where {len(kept)}"):
            check_files(package)
        (package / name).write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        with pytest.raises(VerificationError, match=f"{name}: its content"):
            check_files(package)
        (package / name).write_bytes(kept)
    check_files(package)
    for name in ("extra.py", "pytorch_model.bin", "model-00002-of-00002.safetensors", "sub/evil.pkl"):
        (package / name).parent.mkdir(exist_ok=True)
        (package / name).write_bytes(b"x")
        with pytest.raises(VerificationError, match=name):
            check_files(package)
        (package / name).unlink()
    (package / ".gitattributes").write_text("the hub adds this one")
    check_files(package)


def test_code_is_trusted_only_as_this_version_or_an_earlier_one_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = write_tiny(tmp_path / "p", UNEVEN).folder
    code = package / "modeling_uneven_llama.py"
    code.write_text(code.read_text() + "\nimport os\n")
    record_anew(package, code.name)
    with pytest.raises(VerificationError, match=r"modeling_uneven_llama\.py: the code file differs"):
        check_files(package)
    with monkeypatch.context() as patched:
        patched.setattr("supernet.trust.EARLIER_CODE", {sha256(code.read_bytes()).hexdigest()})
        assert check_code(package)
    with edited(package / "config.json") as config:
        config["auto_map"]["AutoModelForCausalLM"] = "somebody/else--modeling.Model"
    with pytest.raises(VerificationError, match="auto_map"):
        check_code(package)


def test_code_in_sub_folders_and_behind_links_is_not_trusted(tmp_path: Path) -> None:
    """transformers runs `custom_generate/generate.py` of a folder that it trusts."""
    package = write_tiny(tmp_path / "p", UNEVEN).folder
    planted = package / "custom_generate" / "generate.py"
    planted.parent.mkdir()
    planted.write_text("raise SystemExit('ran')")
    record_anew(package, "custom_generate/generate.py")
    with pytest.raises(VerificationError, match=r"custom_generate/generate\.py: a code file that this version"):
        check_files(package)
    planted.parent.rename(tmp_path / "elsewhere")
    (package / "custom_generate").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(VerificationError, match="custom_generate: a link to a folder"):
        check_code(package)


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 99, "entry": {}, "files": {}, "probe": {}}'])
def test_a_broken_record_is_named(package: Path, text: str) -> None:
    (package / "compression.json").write_text(text)
    with pytest.raises(RequestError, match=r"compression\.json"):
        read_record(package)


@pytest.mark.parametrize(
    ("section", "name", "value", "problem"),
    [
        ("entry", "layout", None, "entry.layout is missing"),
        ("entry", "layout", "onxx", "entry.layout is wrong: Input should be 'uneven', "),
        ("entry", "quantization", "int7", "entry.quantization is wrong: Input should be 'int8', "),
        ("entry", "architecture", {}, "entry.architecture is wrong: not an architecture"),
        ("files", "config.json", "abc", r"files\.config\.json is wrong"),
        ("files", "../config.json", {"sha256": "", "bytes": 1}, r"outside the package, \.\./config\.json"),
    ],
)
def test_a_record_edited_by_hand_is_named(package: Path, section: str, name: str, value: object, problem: str) -> None:
    with edited(package / RECORD) as record:
        if value is None:
            del record[section][name]
        else:
            record[section][name] = value
    with pytest.raises(RequestError, match=rf"compression\.json: .*{problem}"):
        check_files(package)


def test_what_other_versions_recorded_is_read_and_kept(package: Path) -> None:
    with edited(package / RECORD) as record:
        for section in ("entry", "lineage", "probe"):
            record[section]["colour"] = "red"
        del record["versions"]
    update_record(package, lineage={"inputs": "abc"})
    record = json.loads((package / RECORD).read_text())
    assert [record[section]["colour"] for section in ("entry", "lineage", "probe")] == ["red"] * 3
    assert read_record(package).lineage.inputs == "abc"


def test_what_is_no_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such folder"):
        read_record(tmp_path / "nowhere")
    with pytest.raises(RequestError, match="not a package"):
        read_record(tmp_path)


def test_uniform_refuses_what_the_plain_class_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="padded"):
        write_tiny(tmp_path / "p", UNEVEN, layout="uniform")
    with pytest.raises(RequestError, match="did you mean padded"):
        write_tiny(tmp_path / "p", UNEVEN, layout="paded")
    assert not (tmp_path / "p").exists()
    assert write_tiny(tmp_path / "p", EVEN, layout="uniform").entry.layout == "uniform"
