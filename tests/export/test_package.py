"""Packages: written whole or not at all, in the base's dtype, and every fault named by its file."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from export import package as packages
from export.layouts.table import write_layout
from export.package import write_package
from export.package_record import PackageInfo, check_files, read_package, update_record, write_card
from export.shards import file_record
from supernet.architecture import Architecture, LayerSizes
from supernet.common.errors import RequestError, VerificationError
from supernet.families import describe
from supernet.trust import check_code, load_tokenizer
from tests.support.export_networks import CHAT_TEMPLATE, EVEN, TEXTS, UNEVEN, cut, probe_ids, tiny_llama, tiny_tokenizer

NETWORKS = {"even": EVEN, "uneven": UNEVEN}


def write(architecture: Architecture, destination: Path, **options: object) -> PackageInfo:
    values = {
        "tokenizer": tiny_tokenizer(),
        "entry": {"name": "best", "architecture": architecture.to_dict()},
        "dtype": torch.float32,
        "probe_ids": probe_ids(),
    }
    return write_package(cut(tiny_llama(), architecture), destination, **values | options)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=NETWORKS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PackageInfo:
    return write(NETWORKS[request.param], tmp_path_factory.mktemp("packages") / request.param, card="# A card\n")


@pytest.fixture
def package(tmp_path: Path, written: PackageInfo) -> Path:
    return shutil.copytree(written.path, tmp_path / "package")


def test_it_says_what_it_is(written: PackageInfo) -> None:
    architecture = NETWORKS[written.path.name]
    assert written.layout == ("uneven" if written.path.name == "uneven" else "uniform")
    assert written.architecture == architecture and written.quantization is None and written.verified is None
    assert written.params == describe(tiny_llama().config).parameters(architecture)
    weights = written.path / "model.safetensors"
    assert written.bytes == weights.stat().st_size
    assert 0 < written.bytes - 4 * written.params < 10_000
    assert written == read_package(written.path)
    names = {p.name for p in written.path.iterdir()}
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"}
    expected |= {"tokenizer_config.json", "chat_template.jinja", "compression.json"}
    assert names - {"modeling_uneven_llama.py"} == expected
    assert ("modeling_uneven_llama.py" in names) == (written.layout == "uneven") == check_code(written.path)
    check_files(written.path)


def test_transformers_loads_it_and_computes_the_same(written: PackageInfo) -> None:
    original = cut(tiny_llama(), written.architecture)
    loaded = AutoModelForCausalLM.from_pretrained(written.path, trust_remote_code=written.layout == "uneven")
    assert loaded.dtype == torch.float32
    assert isinstance(loaded, LlamaForCausalLM)
    with torch.no_grad():
        assert torch.equal(loaded(probe_ids()).logits, original(probe_ids()).logits)
    tokenizer = load_tokenizer(written.path)
    assert tokenizer(TEXTS).input_ids == tiny_tokenizer()(TEXTS).input_ids
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_an_uneven_package_stops_a_loader_that_does_not_run_its_code(tmp_path: Path) -> None:
    write(UNEVEN, tmp_path / "p")
    (tmp_path / "p" / "modeling_uneven_llama.py").unlink()
    config = json.loads((tmp_path / "p" / "config.json").read_text())
    del config["auto_map"]
    (tmp_path / "p" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="uneven_llama"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "p")


def test_what_vllm_reads_is_there(tmp_path: Path) -> None:
    """Its Transformers backend: AutoModel, attention by interface, sizes by layer. Its DeciLM: `block_configs`."""
    sizes = (LayerSizes(4, 2, 96), LayerSizes(4, 2, 32), LayerSizes(0, 0, 64), LayerSizes(4, 2, 0))
    config = AutoConfig.from_pretrained(write(Architecture(64, sizes), tmp_path / "p").path, trust_remote_code=True)
    model = AutoModel.from_config(config, trust_remote_code=True)
    assert type(model).__name__ == "UnevenLlamaModel" and model._supports_attention_backend
    assert config.base_model_tp_plan and model.layers[1].mlp.up_proj.out_features == 32
    blocks = config.block_configs
    assert [(b.attention.no_op, b.ffn.no_op) for b in blocks] == [(False, False)] * 2 + [(True, False), (False, True)]
    assert [b.ffn.intermediate_size for b in blocks[:3]] == [96, 32, 64] and blocks[0].attention.n_heads_in_group == 2
    assert not hasattr(blocks[0].ffn, "ffn_mult")  # which would be rounded
    other = AutoConfig.from_pretrained(write(UNEVEN, tmp_path / "q").path, trust_remote_code=True)
    assert [layer.num_attention_heads for layer in other.per_layer_config][:2] == [4, 2]
    assert other.block_configs is None


def test_weights_are_stored_in_the_given_dtype(tmp_path: Path) -> None:
    info = write(UNEVEN, tmp_path / "p", dtype=torch.bfloat16, reference=tmp_path / "reference.safetensors")
    original = cut(tiny_llama(), UNEVEN).state_dict()
    with safe_open(tmp_path / "p" / "model.safetensors", "pt") as stored:
        assert set(stored.keys()) == set(original)
        for name in stored.keys():  # noqa: SIM118
            assert torch.equal(stored.get_tensor(name), original[name].to(torch.bfloat16))
    assert json.loads((tmp_path / "p" / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = AutoModelForCausalLM.from_pretrained(info.path, dtype=torch.float32, trust_remote_code=True)
    with torch.no_grad(), safe_open(tmp_path / "reference.safetensors", "pt") as reference:
        assert torch.equal(loaded(reference.get_tensor("ids")).logits, reference.get_tensor("logits"))


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    model = cut(tiny_llama(tie_word_embeddings=True), UNEVEN)
    entry = {"name": "best", "architecture": UNEVEN.to_dict()}
    info = write_package(model, tmp_path / "p", tokenizer=tiny_tokenizer(), entry=entry, dtype=torch.float32)
    with safe_open(info.path / "model.safetensors", "pt") as stored:
        assert "lm_head.weight" not in stored.keys()  # noqa: SIM118
    loaded = AutoModelForCausalLM.from_pretrained(info.path, trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(loaded(probe_ids()).logits, model(probe_ids()).logits)


def test_shards_are_named_and_indexed_as_the_hub_does(tmp_path: Path) -> None:
    info = write(EVEN, tmp_path / "p", max_shard_bytes=60_000)
    shards = sorted(p.name for p in info.path.glob("*.safetensors"))
    count = len(shards)
    assert count > 2 and shards == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    index = json.loads((info.path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * info.params and set(index["weight_map"].values()) == set(shards)
    assert info.bytes == sum((info.path / shard).stat().st_size for shard in shards)
    loaded = AutoModelForCausalLM.from_pretrained(info.path)
    with torch.no_grad():
        assert torch.equal(loaded(probe_ids()).logits, cut(tiny_llama(), EVEN)(probe_ids()).logits)
    (info.path / shards[1]).unlink()
    with pytest.raises(VerificationError, match=shards[1]):
        check_files(info.path)


def test_the_tokenizer_may_be_a_folder(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"never copied")
    info = write(EVEN, tmp_path / "p", tokenizer=tmp_path / "base")
    assert (info.path / "tokenizer.json").read_bytes() == (tmp_path / "base" / "tokenizer.json").read_bytes()
    assert AutoTokenizer.from_pretrained(info.path).chat_template == CHAT_TEMPLATE
    assert not list(info.path.glob("*.bin"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match="no tokenizer files"):
        write(EVEN, tmp_path / "q", tokenizer=tmp_path / "empty")
    assert not (tmp_path / "q").exists()


def test_nothing_half_written_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(packages, "write_record", fail)
    with pytest.raises(KeyboardInterrupt):
        write(EVEN, tmp_path / "p")
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
    write(EVEN, tmp_path / "p")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"p", ".p.partial-222", ".p.partial-333", ".p-int8.partial-111"}


def test_an_earlier_package_is_replaced_and_anything_else_is_not(tmp_path: Path, written: PackageInfo) -> None:
    shutil.copytree(written.path, tmp_path / "p")
    assert write(EVEN, tmp_path / "p", dtype=torch.bfloat16).bytes < written.bytes
    assert [p.name for p in tmp_path.iterdir()] == ["p"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    with pytest.raises(RequestError, match="holds something else"):
        write(EVEN, tmp_path / "other")
    assert (tmp_path / "other" / "thesis.txt").read_text() == "years of work"
    with pytest.raises(RequestError, match="in the way"):
        write(EVEN, tmp_path / "other" / "thesis.txt")


def test_a_full_disk_says_how_much_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 2**20, 2**20))
    with pytest.raises(RequestError, match=r"needs 17\.\d MB of disk space, 1\.05 MB are free"):
        write(EVEN, tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_values_that_the_dtype_cannot_hold_are_refused(tmp_path: Path) -> None:
    model = cut(tiny_llama(), EVEN)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 4] = 1e6
    entry = {"name": "best", "architecture": EVEN.to_dict()}
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight holds values that torch.float16 cannot"):
        write_package(model, tmp_path / "p", tokenizer=tiny_tokenizer(), entry=entry, dtype=torch.float16)
    with pytest.raises(ValueError, match="says 7 parameters"):
        write(EVEN, tmp_path / "p", entry=entry | {"params": 7})
    assert not (tmp_path / "p").exists()


def test_the_card_and_later_measurements_are_recorded(package: Path) -> None:
    write_card(package, "# Another card\n")
    update_record(package, entry={"quality": 0.97})
    check_files(package)
    record = json.loads((package / "compression.json").read_text())
    assert record["entry"]["quality"] == 0.97 and record["entry"]["name"] == "best"
    (package / "README.md").write_text("# Better numbers\n")
    with pytest.raises(VerificationError, match=r"README\.md"):
        check_files(package)


def test_every_edit_is_found_and_named(package: Path, written: PackageInfo) -> None:
    for name in sorted(written.files):
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


def test_code_is_trusted_only_as_this_version_writes_it(tmp_path: Path) -> None:
    package = write(UNEVEN, tmp_path / "p").path
    code = package / "modeling_uneven_llama.py"
    code.write_text(code.read_text() + "\nimport os\n")
    # Even where the hash list was brought in line with the edit.
    record = json.loads((package / "compression.json").read_text())
    record["files"][code.name] = file_record(code)
    (package / "compression.json").write_text(json.dumps(record))
    with pytest.raises(VerificationError, match=r"modeling_uneven_llama\.py: the code file differs"):
        check_files(package)
    config = json.loads((package / "config.json").read_text())
    config["auto_map"]["AutoModelForCausalLM"] = "somebody/else--modeling.Model"
    (package / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerificationError, match="auto_map"):
        check_code(package)


def test_code_in_sub_folders_and_behind_links_is_not_trusted(tmp_path: Path) -> None:
    """transformers runs `custom_generate/generate.py` of a folder that it trusts."""
    package = write(UNEVEN, tmp_path / "p").path
    planted = package / "custom_generate" / "generate.py"
    planted.parent.mkdir()
    planted.write_text("raise SystemExit('ran')")
    record = json.loads((package / "compression.json").read_text())
    record["files"]["custom_generate/generate.py"] = file_record(planted)
    (package / "compression.json").write_text(json.dumps(record))
    with pytest.raises(VerificationError, match=r"custom_generate/generate\.py: a code file that this version"):
        check_files(package)
    planted.parent.rename(tmp_path / "elsewhere")
    (package / "custom_generate").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(VerificationError, match="custom_generate: a link to a folder"):
        check_code(package)


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 99, "entry": {}, "files": {}, "probe": {}}'])
def test_a_broken_record_is_named(package: Path, text: str) -> None:
    (package / "compression.json").write_text(text)
    with pytest.raises(VerificationError, match=r"compression\.json"):
        read_package(package)


@pytest.mark.parametrize(
    ("section", "name", "value", "said"),
    [
        ("entry", "layout", None, "its entry lacks layout"),
        ("files", "config.json", "abc", r"the file config\.json is not a hash and a size"),
        ("files", "../config.json", {"sha256": "", "bytes": 1}, r"outside the package, \.\./config\.json"),
    ],
)
def test_a_record_edited_by_hand_is_named(package: Path, section: str, name: str, value: object, said: str) -> None:
    record = json.loads((package / "compression.json").read_text())
    if value is None:
        del record[section][name]
    else:
        record[section][name] = value
    (package / "compression.json").write_text(json.dumps(record))
    with pytest.raises(VerificationError, match=rf"compression\.json: .*{said}"):
        check_files(package)


def test_what_is_no_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such folder"):
        read_package(tmp_path / "nowhere")
    with pytest.raises(RequestError, match="not a package"):
        read_package(tmp_path)


def test_uniform_refuses_what_the_plain_class_cannot_hold(tmp_path: Path) -> None:
    options = {
        "tokenizer": tiny_tokenizer(),
        "entry": {"name": "best", "architecture": UNEVEN.to_dict()},
        "dtype": torch.float32,
    }
    with pytest.raises(RequestError, match="padded"):
        write_layout("uniform", cut(tiny_llama(), UNEVEN), UNEVEN, tmp_path / "p", **options)
    with pytest.raises(RequestError, match="did you mean padded"):
        write_layout("paded", cut(tiny_llama(), UNEVEN), UNEVEN, tmp_path / "p", **options)
    assert not (tmp_path / "p").exists()
    options["entry"] = {"name": "best", "architecture": EVEN.to_dict()}
    assert write_layout("uniform", cut(tiny_llama(), EVEN), EVEN, tmp_path / "p", **options).layout == "uniform"
