"""One package, any size: what is loaded of it is the slice of the run, and nothing more."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from export.cutting import cut
from export.layouts.elastic import ElasticSource, nearest_size, open_elastic, size_name, write
from export.package_record import ElasticSize, update_record
from export.vocabulary_record import SplitText, VocabularyRecord
from supernet.architecture import Architecture
from supernet.common.errors import RequestError, VerificationError
from supernet.families import describe
from supernet.slicing import extract
from supernet.trust import check_code
from tests.support import tiny, tiny_families


def source_of(network: Any, folder: Path, seed: int = 0) -> ElasticSource:
    """The network's files, and three sizes: the base, and two whose layers differ."""
    folder.mkdir()
    save_file({name: p.detach().contiguous() for name, p in network.named_parameters()}, folder / "model.safetensors")
    network.generation_config.save_pretrained(folder)
    structure = describe(network.config)
    full = structure.parameters(structure.base)
    rng = random.Random(seed)
    named: dict[str, Architecture] = {size_name(1): structure.base}
    while len(named) < 3:
        architecture = tiny_families.random_architecture(structure.base, rng)
        named.setdefault(size_name(structure.parameters(architecture) / full), architecture)
    sizes = [
        ElasticSize(name=name, architecture=architecture, params=structure.parameters(architecture))
        for name, architecture in named.items()
    ]
    return ElasticSource(folder, network.config, structure, sizes)


def written(source: ElasticSource, folder: Path) -> Path:
    default = source.sizes[1].architecture
    write(
        source, default, folder, tokenizer=tiny.byte_tokenizer(), dtype=torch.float32, probe_ids=tiny_families.IDS,
        entry={"name": folder.name, "architecture": default.to_dict()},
    )  # fmt: skip
    return folder


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


@pytest.mark.parametrize("family", tiny_families.CONFIGS)
def test_every_size_is_the_slice_of_the_super_network(family: str, tmp_path: Path) -> None:
    network = tiny_families.tiny_network(family)
    source = source_of(network, tmp_path / "supernet")
    folder = written(source, tmp_path / "elastic")
    assert check_code(folder)
    assert str(tmp_path) not in (folder / "elastic.json").read_text() + (folder / "config.json").read_text()
    for size in source.sizes:
        expected = extract(network, source.structure, size.architecture)
        loaded = load(folder, size=size.name)
        weights = dict(loaded.named_parameters())
        assert sum(p.numel() for p in weights.values()) == size.params
        for name, parameter in expected.named_parameters():
            assert torch.equal(weights[name], parameter), name
        tiny_families.assert_close(tiny_families.logits(loaded), tiny_families.logits(expected))
    (again, opened) = open_elastic(folder)
    assert opened.structure == source.structure and [s.name for s in again.entry.sizes] == [
        s.name for s in source.sizes
    ]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elastic")
    return written(source_of(tiny.llama(), folder / "supernet", seed=3), folder / "package")


def test_without_a_size_it_is_that_of_the_pick(package: Path) -> None:
    record, source = open_elastic(package)
    default = next(size for size in source.sizes if size.name == record.entry.default_size)
    assert sum(p.numel() for p in load(package).parameters()) == default.params == record.entry.params
    assert AutoConfig.from_pretrained(package, trust_remote_code=True).model_type == "elastic_llama"
    same = load(package, size=float(default.name))
    assert sum(p.numel() for p in same.parameters()) == default.params
    with pytest.raises(ValueError, match=r"size 0\.01 is not in this checkpoint; there are 1\.00, "):
        load(package, size="0.01")


def test_what_is_saved_of_a_size_is_a_package_of_that_size(package: Path, tmp_path: Path) -> None:
    smallest = min(open_elastic(package)[1].sizes, key=lambda size: size.params)
    network = load(package, size=smallest.name)
    network.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    ids = torch.tensor([[1, 5, 9, 17]])
    assert torch.equal(again(ids).logits, network(ids).logits)


def test_other_code_is_not_trusted(package: Path, tmp_path: Path) -> None:
    shutil.copytree(package, tmp_path / "package")
    (code,) = (tmp_path / "package").glob("*.py")
    code.write_text(code.read_text() + "\n")
    with pytest.raises(VerificationError, match="differs from what this version writes"):
        check_code(tmp_path / "package")


def test_a_size_of_its_own_says_what_the_vocabulary_was_cut_to(package: Path, tmp_path: Path) -> None:
    folder, text = tmp_path / "package", "Anna has"
    shutil.copytree(package, folder)
    ids = tiny.byte_tokenizer()(text).input_ids
    split = SplitText(text=text, ids=ids, decoded=tiny.byte_tokenizer().decode(ids), kept=True)
    rows = open_elastic(package)[1].structure.vocab_size
    vocabulary = VocabularyRecord(
        rows=rows, base_rows=2 * rows, coverage=1.0, bytes_per_token=1.0, base_bytes_per_token=2.0
    )
    update_record(folder, entry={"vocabulary": vocabulary.model_dump()}, probe={"splits": [split.model_dump()]})
    made = cut(folder, tmp_path / "size", lambda parameters: parameters)
    assert made.entry.vocabulary == vocabulary and made.probe.splits == [split]
    assert made.entry.verified is not None and made.entry.verified["texts_split_as_before"] == 1


def test_the_nearest_size_below(package: Path) -> None:
    sizes = sorted(open_elastic(package)[1].sizes, key=lambda size: size.params)
    assert nearest_size(sizes, sizes[1].params + 1) == sizes[1]
    with pytest.raises(RequestError, match="the smallest size"):
        nearest_size(sizes, sizes[0].params - 1)
