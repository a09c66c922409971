"""Pre-trains the demo's checkpoint from nothing: `python -m benchmarks.pretrain_demo --output DIR`.

Tokenizer, initial weights and text all come from one seed. The checkpoint bundled in `compressor/demo/world-1.7m` was
made by this script with its defaults, in about half an hour on two cores.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compressor.demo.world import documents

BOS, EOS, PAD = "<s>", "</s>", "<pad>"

VOCABULARY = 1024
TOKENIZER_DOCUMENTS = 40_000

ROW = 128
"""Tokens a row. Most documents are far shorter; rows hold several, and the last one of a row may go on in the next."""
ROWS_PER_STEP = 16
WARM_UP_STEPS = 200
PEAK_LEARNING_RATE = 4e-3
FINAL_LEARNING_RATE = 1e-5
WEIGHT_DECAY = 0.05


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the world's text.

    Digits stand alone, so that sums are a matter of digits and not of remembered numbers. The pre-tokenizer is the
    one that SmolLM uses, because llama.cpp knows that one by name.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(islice(documents(seed), TOKENIZER_DOCUMENTS), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=256,
        clean_up_tokenization_spaces=False,
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
    """Full rows of documents, each between its own beginning and end tokens, without end."""
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
    """Plain next-token training; one progress line on stderr.

    Muon for the matrices of the layers and AdamW for the rest need far fewer steps than AdamW alone did here.
    """
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.dim() == 2]
    in_layers = {id(matrix) for matrix in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in in_layers]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    model.train()
    started = time.monotonic()
    for step, rows in enumerate(islice(batches, n_steps)):
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, n_steps)
            optimizer.step()
            optimizer.zero_grad()
        if step % 50 == 49 or step + 1 == n_steps:
            left = (time.monotonic() - started) * (n_steps - step - 1) / (step + 1)
            line = f"step {step + 1}/{n_steps}  loss {loss.item():.3f}  {left / 60:.1f} minutes left"
            print(f"\r{line:<70}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """A standard Hugging Face checkpoint: bfloat16 safetensors and the tokenizer."""
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)


def main() -> None:
    """Train with the arguments of the command line."""
    parser = argparse.ArgumentParser(description="Pre-train the demo's checkpoint.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2500, help=f"of {ROW * ROWS_PER_STEP} tokens each")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    tokenizer = train_tokenizer(arguments.seed)
    model = build_model(tokenizer, arguments.seed)
    train(model, packed_batches(tokenizer, arguments.seed), arguments.steps)
    save(model, tokenizer, arguments.output)


if __name__ == "__main__":
    main()
