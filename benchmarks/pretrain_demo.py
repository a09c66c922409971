"""Pre-trains the demo's checkpoint from nothing: `python -m benchmarks.pretrain_demo --output DIR`.

Tokenizer, initial weights and text all come from one seed. The checkpoint bundled in `compressor/demo/world-1.7m` was
made by this script with its defaults, in about half an hour on two cores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.common import make_parser
from compressor.demo.world import documents
from supernet.common.progress import bar

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
VOCABULARY = 1024
TOKENIZER_DOCUMENTS = 40_000
ROW = 128
"""Tokens a row. Most documents are far shorter: a row holds several, and its last one may go on in the next row."""
ROWS_PER_STEP = 16
WARM_UP_STEPS = 200
PEAK_LEARNING_RATE, FINAL_LEARNING_RATE = 4e-3, 1e-5
WEIGHT_DECAY = 0.05


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the world's text. Each digit is a token, so that the network learns to add digits
    and does not remember numbers. The pre-tokenizer is SmolLM's, which llama.cpp knows by name."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), [BOS, EOS, PAD]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(islice(documents(seed), TOKENIZER_DOCUMENTS), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    markers = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=256, clean_up_tokenization_spaces=False, **markers
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """An untrained network with every width a multiple of 64, most of its parameters in the layers."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=16,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def packed_batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[torch.Tensor]:
    """Token ids, [16, 128], without end: full rows of documents, each between a beginning and an end token."""
    size = ROW * ROWS_PER_STEP
    texts = documents(seed)
    tokens: list[int] = []
    while True:
        while len(tokens) < size:
            for encoded in tokenizer(list(islice(texts, 64)))["input_ids"]:
                tokens += [*encoded, tokenizer.eos_token_id]
        yield torch.tensor(tokens[:size]).view(ROWS_PER_STEP, ROW)
        del tokens[:size]


def learning_rate(step: int, n_steps: int) -> float:
    """Linear warm-up, then a cosine down to almost nothing: the bfloat16 copy then loses no quality."""
    if step < WARM_UP_STEPS:
        return PEAK_LEARNING_RATE * (step + 1) / WARM_UP_STEPS
    progress = (step - WARM_UP_STEPS) / max(1, n_steps - WARM_UP_STEPS)
    span = PEAK_LEARNING_RATE - FINAL_LEARNING_RATE
    return FINAL_LEARNING_RATE + span * (1 + math.cos(math.pi * progress)) / 2


def train(model: LlamaForCausalLM, batches: Iterator[torch.Tensor], n_steps: int) -> None:
    """Plain next-token training. Muon for the matrices of the layers and AdamW for the rest need far fewer steps than
    AdamW alone did here."""
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.dim() == 2]
    in_layers = {id(matrix) for matrix in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in in_layers]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    model.train()
    with bar("pre-training", n_steps) as progress:
        for step, rows in enumerate(islice(batches, n_steps)):
            loss = model(input_ids=rows, labels=rows, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, n_steps)
                optimizer.step()
                optimizer.zero_grad()
            progress.advance(1, f"loss {loss.item():.3f}")


def main() -> None:
    parser = make_parser(__doc__, seed=0, steps=(2500, f"of {ROW * ROWS_PER_STEP} tokens each"), threads=1)
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = train_tokenizer(arguments.seed)
    model = build_model(tokenizer, arguments.seed)
    train(model, packed_batches(tokenizer, arguments.seed), arguments.steps)
    model.to(torch.bfloat16).save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
