"""Cutting a checkpoint to some of its tokens: tokenizer, rows of embedding and head, and every id that a file names."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from supernet.checkpoint import Checkpoint
from supernet.common.errors import RequestError, VerificationError
from supernet.common.files import read_json, write_json
from supernet.tokenizer_cut import cut_tokenizer, named_ids, names_ids, new_ids, renumbered
from supernet.tokens import read_tokenizer
from supernet.vocabulary import Described

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OTHER_FORMS = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")
"""Files that hold a whole vocabulary beside tokenizer.json, with the ids of before."""


@dataclass(frozen=True)
class VocabularyCut:
    """Which rows of the embedding stay. `rows[new id]` is the old id; the first are those of tokens, in the order of
    the cut tokenizer, then rows that have no token and that a configuration names."""

    described: Described
    """The cut tokenizer.json."""
    rows: tuple[int, ...]

    @classmethod
    def of(cls, described: Described, kept: Sequence[int], named: Sequence[int] = ()) -> VocabularyCut:
        """The cut to the ids `kept` of tokens, and rows `named` that are none of theirs."""
        new = new_ids(described, kept)
        return cls(cut_tokenizer(described, new), (*new, *(n for n in dict.fromkeys(named) if n not in new)))

    @property
    def new(self) -> Mapping[int, int]:
        """{old id: new id}."""
        return {old: number for number, old in enumerate(self.rows)}


def describe_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """tokenizer.json of a tokenizer as it was loaded. Raises `RequestError` for one that has none."""
    if not getattr(tokenizer, "is_fast", False):
        raise RequestError(
            f"--vocabulary: {name} has a slow tokenizer, without tokenizer.json; save it as a fast one first "
            "(transformers' AutoTokenizer, save_pretrained)"
        )
    described: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return described


def ids_in_configurations(checkpoint: Checkpoint) -> list[int]:
    """All ids that config.json, its defaults and generation_config.json name, and that have a row."""
    rows = checkpoint.structure.vocab_size
    ids = [
        number for config in (_configuration(checkpoint), _generation(checkpoint)) for number in named_ids(config, rows)
    ]
    return list(dict.fromkeys(ids))


def _configuration(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json with the defaults of ids that it leaves out, under the keys of today."""
    stored = dict(read_json(checkpoint.path / "config.json"))
    stored.pop("torch_dtype", None)  # a former name
    loaded = checkpoint.config.to_dict()
    return {key: loaded[key] for key in loaded if names_ids(key) and loaded[key] is not None} | stored


def _generation(checkpoint: Checkpoint) -> dict[str, Any]:
    file = checkpoint.path / "generation_config.json"
    return dict(read_json(file)) if file.is_file() else {}


def cut_loaded(tokenizer: PreTrainedTokenizerBase, cut: VocabularyCut) -> PreTrainedTokenizerBase:
    """A copy of a loaded tokenizer with the cut's tokens only."""
    from tokenizers import Tokenizer

    small: Any = copy.deepcopy(tokenizer)
    small._tokenizer = Tokenizer.from_str(json.dumps(cut.described))
    return small


def cut_rows(model: PreTrainedModel, rows: Sequence[int]) -> None:
    """Keep these rows of a network's embedding and head, in place; a tied head stays tied."""
    index = torch.tensor(rows)
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    tied = head.weight is embedding.weight
    with torch.no_grad():
        embedding.weight = nn.Parameter(embedding.weight[index.to(embedding.weight.device)].contiguous())
        head.weight = embedding.weight if tied else nn.Parameter(head.weight[index.to(head.weight.device)].contiguous())
        if head.bias is not None:
            head.bias = nn.Parameter(head.bias[index.to(head.bias.device)].contiguous())
    embedding.num_embeddings = head.out_features = model.config.vocab_size = len(rows)
    embedding.padding_idx = None


def write_cut(
    checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, cut: VocabularyCut, model: PreTrainedModel, folder: Path
) -> None:
    """Write the cut checkpoint into `folder`, a checkpoint as any other.

    `model`, in the dtype that it is stored in, loses its rows. Raises `VerificationError` where transformers reads
    another tokenizer from the files than was meant.
    """
    from transformers import GenerationConfig

    new = cut.new

    def renamed(config: Mapping[str, Any]) -> dict[str, Any]:
        return {**config, **renumbered(config, lambda number: new.get(number, number if number < 0 else None))}

    # 1. Weights. transformers refuses to write some generation settings that it reads: its own are never written.
    cut_rows(model, cut.rows)
    for key, value in renamed(model.config.to_dict()).items():
        if names_ids(key):
            setattr(model.config, key, value)
    model.generation_config = GenerationConfig()
    model.save_pretrained(folder)
    # 2. Configurations as they were, under the new ids.
    config = renamed(_configuration(checkpoint))
    config |= {"vocab_size": len(cut.rows), "tie_word_embeddings": checkpoint.config.tie_word_embeddings}
    write_json(folder / "config.json", config | {"dtype": str(model.dtype).removeprefix("torch.")})
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation := _generation(checkpoint):
        write_json(folder / "generation_config.json", renamed(generation))
    for code in checkpoint.path.glob("*.py"):
        shutil.copyfile(code, folder / code.name)
    # 3. The tokenizer.
    tokenizer.save_pretrained(folder)
    for name in OTHER_FORMS:
        (folder / name).unlink(missing_ok=True)
    write_json(folder / "tokenizer.json", cut.described)
    settings = read_json(folder / "tokenizer_config.json")
    if decoder := settings.get("added_tokens_decoder"):
        settings["added_tokens_decoder"] = {str(new[int(old)]): entry for old, entry in decoder.items()}
        write_json(folder / "tokenizer_config.json", settings)
    # 4. What transformers makes of these files.
    read = read_tokenizer(folder, trust_remote_code=checkpoint.trust_remote_code).get_vocab()
    meant = {token: new[number] for token, number in tokenizer.get_vocab().items() if number in new}
    if read != meant:
        wrong = next(token for token in {**meant, **read} if meant.get(token) != read.get(token))
        raise VerificationError(
            f"the cut tokenizer of {checkpoint.name} has {wrong!r} as {read.get(wrong)}, meant is {meant.get(wrong)}"
        )


@dataclass(frozen=True)
class Splits:
    """How a text is split: `ids` of the whole tokenizer, `cut_ids` of the cut one, and the text that the whole one
    makes of its ids."""

    text: str
    ids: tuple[int, ...]
    cut_ids: tuple[int, ...]
    decoded: str
    kept: bool
    """Whether all its tokens were kept; then it must be split as before."""


def compare_splits(
    whole: PreTrainedTokenizerBase, cut: PreTrainedTokenizerBase, new: Mapping[int, int], texts: Sequence[str]
) -> list[Splits]:
    """How both tokenizers split texts.

    Raises `VerificationError` where a text of kept tokens is split otherwise than before, or one decodes to another
    text than with the whole tokenizer.
    """
    splits = []
    for text in texts:
        ids, cut_ids = (tuple(tokenizer(text, verbose=False).input_ids) for tokenizer in (whole, cut))
        decoded = whole.decode(ids)
        kept = all(number in new for number in ids)
        if kept and cut_ids != tuple(new[number] for number in ids):
            raise VerificationError(f"the cut tokenizer splits {text!r}, whose tokens were all kept, in another way")
        if cut.decode(cut_ids) != decoded:
            raise VerificationError(f"the cut tokenizer makes {cut.decode(cut_ids)!r} of {text!r}, not {decoded!r}")
        splits.append(Splits(text, ids, cut_ids, decoded, kept))
    return splits
