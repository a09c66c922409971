"""Texts that a network writes: what HFLM's `generate_until` gives with a batch of one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

from evals.scoring.encoding import Encoder, Generation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HARMLESS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "max_length",
    "_version",
    "_from_model_config",
    "temperature",
    "top_",
    "_sample",
    "_cache",
    "output_",
    "return_dict_",
)
"""Parts of the names of generation settings that leave greedy decoding as it is."""

Prompts = Sequence[tuple[int, ...]]


class Generator:
    """Continues prompts with `model`, to the stop strings or the end of a sequence."""

    def __init__(self, model: PreTrainedModel, encoder: Encoder) -> None:
        self.model = model
        self.encoder = encoder
        self._device = next(model.parameters()).device
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    @torch.inference_mode()
    def continuations(self, prompts: Prompts, settings: Generation) -> list[list[int]]:
        """The new tokens of each prompt, greedy unless the settings say otherwise."""
        arguments = settings.arguments
        greedy = not set(arguments) - {"do_sample", "temperature"} and not arguments.get("do_sample")
        continued = self._greedy if greedy and self._is_plain() else self._generated
        return continued(prompts, settings)

    def _is_plain(self) -> bool:
        """Whether the network's own generation settings leave greedy decoding as it is."""
        own = getattr(self.model, "generation_config", None)
        return own is None or all(
            any(part in name for part in HARMLESS) and not name.startswith("forced_") for name in own.to_diff_dict()
        )

    def _stops(self, until: list[str]) -> Callable[[list[int]], bool]:
        """Whether the tokens written so far end a document: lm-eval's criterion, and the network's end of sequence."""
        tokenizer = self.encoder.tokenizer
        longest = max((len(tokenizer.encode(text, add_special_tokens=False)) for text in until), default=0) + 2
        ends = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        last = set(ends if isinstance(ends, list) else [ends]) | {self.encoder.eot_token_id}

        def stops(written: list[int]) -> bool:
            if written[-1] in last:
                return True
            tail = tokenizer.decode(written[-longest:])
            return any(text in tail for text in until)

        return stops

    def _greedy(self, prompts: Prompts, settings: Generation) -> list[list[int]]:
        """Greedy continuations with a key-value cache; a document that has ended leaves the batch."""
        ids, mask = self._left_padded(prompts)
        stops = self._stops(settings.until)
        cache = DynamicCache(config=self.model.config)
        last_only = {"logits_to_keep": 1} if self._keeps_logits else {}
        written: list[list[int]] = [[] for _ in prompts]
        active = list(range(len(prompts)))
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        for _ in range(settings.new):
            # 1. One more token for every document of the batch.
            logits = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                **last_only,
            ).logits
            chosen = logits[:, -1].argmax(-1)
            for document, token in zip(active, chosen.tolist(), strict=True):
                written[document].append(token)
            # 2. Those that have ended leave.
            rows = [row for row, document in enumerate(active) if not stops(written[document])]
            if not rows:
                break
            if len(rows) < len(active):
                kept = torch.tensor(rows, device=self._device)
                cache.reorder_cache(kept)  # layers of linear attention have no batch_select_indices
                chosen, mask, positions = chosen[kept], mask[kept], positions[kept]
                active = [active[row] for row in rows]
            # 3. The new tokens are the next input.
            ids = chosen[:, None]
            mask = torch.cat([mask, mask.new_ones(len(active), 1)], 1)
            positions = positions[:, -1:] + 1
        return written

    def _generated(self, prompts: Prompts, settings: Generation) -> list[list[int]]:
        """Continuations by the network's own `generate`, with HFLM's arguments."""
        # Token ids alone, whatever the network's own configuration asks for.
        arguments = {"temperature": 0.0, **settings.arguments, "return_dict_in_generate": False}
        if arguments["temperature"] == 0.0 and not arguments.get("do_sample"):
            arguments["do_sample"] = False
            arguments.pop("temperature")
        stops = self._stops(settings.until)
        ids, mask = self._left_padded(prompts)
        sequences = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_length=arguments.pop("max_length", ids.shape[1] + settings.new),
            pad_token_id=self.encoder.pad_token_id,
            use_cache=True,
            **arguments,
        )
        written = []
        for row in sequences[:, ids.shape[1] :].tolist():
            size = next((n for n in range(1, len(row) + 1) if stops(row[:n])), len(row))
            written.append(row[:size])
        return written

    def _left_padded(self, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, [prompts, longest] both."""
        width = max(map(len, prompts))
        pad = self.encoder.pad_token_id
        ids = torch.tensor([(pad,) * (width - len(p)) + p for p in prompts], device=self._device)
        mask = torch.tensor([(0,) * (width - len(p)) + (1,) * len(p) for p in prompts], device=self._device)
        return ids, mask
