"""Text to tokens exactly as lm-eval's HFLM does it. No torch.

Every request becomes a `Span` (score the last tokens of a sequence) or a prompt to continue. The rules (where a
beginning-of-sequence token goes, how a context and its continuation are cut apart, what is truncated, how a long
document rolls through the window) are those of `lm_eval.models.huggingface.HFLM` and `lm_eval.api.model.TemplateLM`
0.4.13. They decide scores, so they are followed exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
from lm_eval.models.utils import configure_pad_token, handle_stop_sequences, normalize_gen_kwargs, resolve_max_length
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from supernet.common.errors import RequestError, reading
from supernet.tokens import check_rows, rendering

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

GenerateArguments = dict[str, Any]
"""Arguments of transformers' `generate` by name."""


class CannotScore(ValueError):
    """lm-eval itself cannot score the request at `position`. The message says why, without task or document."""

    def __init__(self, position: int, message: str) -> None:
        super().__init__(message)
        self.position = position


class Span(NamedTuple):
    """Score the last `scored` of `tokens`, each given all tokens before it. At least one token is only context."""

    tokens: tuple[int, ...]
    scored: int


class Generation(NamedTuple):
    """How to continue a prompt: at most `new` tokens, up to the first string of `until`, with `arguments` of
    transformers' `generate`."""

    new: int
    until: list[str]
    arguments: GenerateArguments


class Encoder:
    """Turns text into tokens for a network, as HFLM does.

    `max_length` is the network's context in tokens; without it, it is read from `config` and tokenizer as HFLM does.
    A tokenizer without a pad token is given one, as by HFLM.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig | None = None, max_length: int | None = None
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise RequestError(
                "the tokenizer has no end-of-text token, with which lm-eval separates documents; name one as eos_token "
                "in tokenizer_config.json"
            )
        with reading("the tokenizer's settings cannot be used"):
            self.tokenizer = configure_pad_token(tokenizer, model_config=config)
            self.max_length = max_length or resolve_max_length(config, tokenizer)
        self.eot_token_id: int = tokenizer.eos_token_id
        bos = tokenizer.bos_token_id
        self.prefix_token_id: int = bos if bos is not None else tokenizer.eos_token_id
        text_config = getattr(config, "text_config", None) or config
        self._rows: int | None = getattr(text_config, "vocab_size", None)
        pad = self.tokenizer.pad_token_id
        self.pad_token_id: int = pad if self._rows is None or pad < self._rows else self.eot_token_id
        self._encoded: dict[tuple[str, bool], list[int]] = {}  # by text, and whether special tokens are added

    def encode(self, texts: Iterable[str], special: bool = True, prefix: str | None = "") -> list[list[int]]:
        """Token ids of each text; each distinct text is encoded once.

        `special`: with the special tokens that the tokenizer adds, unless the text already begins with `prefix` (by
        default the prefix token's text; None: with them in any case)."""
        if special and prefix == "":
            prefix = self.tokenizer.decode(self.prefix_token_id)
        keys = [(text, special and (prefix is None or not text.startswith(prefix))) for text in texts]
        for add in (True, False):
            new = list(dict.fromkeys(text for text, adds in keys if adds is add and (text, add) not in self._encoded))
            if new:
                ids = self.tokenizer(new, add_special_tokens=add, verbose=False)["input_ids"]
                for text, row in zip(new, ids, strict=True):
                    check_rows(f"the text {text[:40]!r}", row, self.tokenizer, self._rows)
                self._encoded.update(zip(((text, add) for text in new), ids, strict=True))
        return [self._encoded[key] for key in keys]

    def forget(self) -> None:
        """Drop the texts remembered so far."""
        self._encoded.clear()

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """Each (context, continuation) in tokens. Trailing spaces of a context belong to its continuation.

        Raises `CannotScore` where nothing is left to score or to condition on.
        """
        # 1. Move trailing spaces; an empty context becomes None.
        moved = []
        for context, continuation in pairs:
            stripped = context.rstrip()
            moved.append((stripped, context[len(stripped) :] + continuation) if context else (None, continuation))
        # 2. Encode contexts, and contexts with their continuations, which are what lies behind.
        wholes = iter(self.encode(left + right for left, right in moved if left is not None))
        contexts = iter(self.encode(left for left, right in moved if left is not None))
        bare = iter(self.encode((right for left, right in moved if left is None), special=False))
        # 3. Where there is no context, the prefix token takes its place, unless the continuation begins with it.
        result = []
        for position, (left, _) in enumerate(moved):
            if left is not None:
                context_ids = next(contexts)
                continuation_ids = next(wholes)[len(context_ids) :]
            else:
                continuation_ids = next(bare)
                context_ids = [self.prefix_token_id]
                if continuation_ids[:1] == context_ids:
                    context_ids, continuation_ids = continuation_ids[:1], continuation_ids[1:]
            if not continuation_ids or not context_ids:
                what = "the text to score" if context_ids else "the context"
                raise CannotScore(position, f"{what} has no token")
            result.append((context_ids, continuation_ids))
        return result

    def spans(self, pairs: Sequence[tuple[str, str]]) -> list[Span]:
        """One span for each (context, continuation), truncated from the left where it exceeds the context.

        Raises `CannotScore` where the continuation alone exceeds it.
        """
        result = []
        for position, (context, continuation) in enumerate(self.pairs(pairs)):
            if len(continuation) > self.max_length:
                raise CannotScore(
                    position,
                    f"the text to score has {len(continuation)} tokens and the context holds {self.max_length}",
                )
            result.append(self._span(context, continuation))
        return result

    def rolling(self, texts: Iterable[str]) -> list[list[Span]]:
        """The spans whose log-likelihoods add up to each text's: windows that do not overlap in what they score."""
        result = []
        for ids in self.encode(texts):
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            result.append([self._span(*make_disjoint_window(window)) for window in windows])
        return result

    def generation(self, settings: GenerateArguments) -> Generation:
        """A task's `generation_kwargs` as HFLM reads them: 256 new tokens by default, the end of text always stops."""
        arguments: GenerateArguments = dict(normalize_gen_kwargs(settings, 256))
        end = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(arguments.pop("until", None), eos=end)
        return Generation(arguments.pop("max_gen_toks"), until, arguments)

    def prompts(self, texts: Iterable[str], max_new_tokens: int) -> list[tuple[int, ...]]:
        """Prompts for generation, truncated from the left to leave room for the new tokens. Raises `CannotScore`."""
        room = self.max_length - max_new_tokens
        if room <= 0:
            raise CannotScore(
                0, f"{max_new_tokens} new tokens leave no room for a prompt in a context of {self.max_length}"
            )
        prompts = [tuple(ids[-room:]) for ids in self.encode(texts, prefix=self.tokenizer.bos_token)]
        if () in prompts:
            raise CannotScore(prompts.index(()), "the prompt has no token")
        return prompts

    def chat(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages under the tokenizer's chat template; without the system's where the template refuses it."""

        def render(messages: list[dict[str, str]]) -> str:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

        try:
            return render(messages)
        except jinja2.exceptions.TemplateError:
            with rendering(f"the messages {str(messages)[:60]}"):
                return render([message for message in messages if message["role"] != "system"])

    def _span(self, context: list[int], continuation: list[int]) -> Span:
        return Span(tuple((context + continuation)[-(self.max_length + 1) :]), len(continuation))
