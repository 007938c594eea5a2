"""Text from prompts: each continuation is handed out piece by piece as it is generated."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, field
from typing import Literal

from phase8.accelerator import records_steps
from phase8.config.model_section import ModelSection
from phase8.config.schema import DataSection
from phase8.data.streaming_decoder import StreamingDecoder
from phase8.data.tokenizer import Tokenizer
from phase8.errors import DataError
from phase8.generate.continuations import Request, continue_prompts
from phase8.generate.decode import DecodingLoop
from phase8.generate.sampling import SamplingOptions
from phase8.model.model import LanguageModel

AT_ONCE_ON_GPU = 8  # tokens that a GPU draws without a word from the host
Reason = Literal["end_of_document", "stop", "max_tokens"]


def text_begin(tokenizer: Tokenizer, data: DataSection) -> list[int]:
    """Token ids before every text: of models made elsewhere their own; else the end of a document, unless those after it did not see it in training.

    Args:
        tokenizer: Tokenizer of the model.
        data: Settings of the data with which the model was trained.

    Raises:
        DataError: The tokenizer has no such piece.
    """
    if data.begin_token is None:
        return [] if data.reset_at_document_boundaries else [tokenizer.eod_id]
    found = next((i for i in range(tokenizer.vocab_size) if tokenizer.piece_of(i) == data.begin_token), None)
    if found is None:
        raise DataError(f"the tokenizer {tokenizer.path} has no piece {data.begin_token!r}, which begins texts of the model; give the model's own")
    return [found]


def prompt_tokens(tokenizer: Tokenizer, prompt: str, *, begin: Sequence[int]) -> list[int]:
    """Token ids that the model reads before it generates: at least one.

    Args:
        tokenizer: Tokenizer of the model.
        prompt: May be empty.
        begin: Token ids before it.
    """
    return [*begin, *tokenizer.encode(prompt)] or [tokenizer.eod_id]


def about_length(section: ModelSection, prompts: Iterable[Sequence[int]], *, max_tokens: int) -> str | None:
    """A sentence if a transformer would go beyond the positions that it was trained on; None for the Phase 8 block, whose window moves along.

    Args:
        section: Section of the model.
        prompts: Token ids of each prompt.
        max_tokens: Largest number of tokens of a continuation.
    """
    longest = max(map(len, prompts)) + max_tokens
    if section.block != "transformer" or longest <= section.sequence_length:
        return None
    return (
        f"prompt and continuation may have {longest:,} tokens, but this transformer was trained on sequences of {section.sequence_length:,}; its "
        "text may make no sense beyond that"
    )


@dataclass
class Continuation:
    """The continuation of a prompt, as far as it has come.

    Args:
        text: Text so far, without the stop text.
        tokens: Token ids so far, without the one that ends it.
        reason: What ended it; None: nothing yet.
        seconds: Time from the start of its prompt to its last token.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    reason: Reason | None = None
    seconds: float = 0.0


class TextEnd:
    """Holds back text that may be the beginning of a stop text.

    Args:
        stops: Stop texts.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops, self._held = stops, ""

    def feed(self, piece: str) -> tuple[str, bool]:
        """The text that can be handed out now, and whether a stop text has come, after which nothing follows."""
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        held = max((size for stop in self._stops for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def flush(self) -> str:
        """The text that was held back."""
        held, self._held = self._held, ""
        return held


class TextWriter:
    """Continues prompts with text.

    Args:
        model: A whole model on one device.
        tokenizer: Its tokenizer.
        options: Sampling options.
        max_tokens: Largest number of tokens of a continuation.
        stops: Texts that end a continuation and are not part of it.
        end_ids: Token ids that end one, beside that of the end of a document.
        batch_size: Sequences side by side.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        options: SamplingOptions,
        max_tokens: int,
        stops: Sequence[str] = (),
        end_ids: Iterable[int] = (),
        batch_size: int = 1,
    ):
        self._end_ids = frozenset((tokenizer.eod_id, *end_ids))
        self._tokenizer, self._options, self._max_tokens, self._stops = tokenizer, options, max_tokens, tuple(stops)
        at_once = AT_ONCE_ON_GPU if records_steps(model.head_weight.device.type) else 1
        self._loop = DecodingLoop(model, batch_size=batch_size, options=options, num_ids=tokenizer.vocab_size, most_at_once=at_once)

    def write(
        self,
        prompts: Iterable[Sequence[int]],
        *,
        num_samples: int = 1,
        on_text: Callable[[int, str], None] = lambda number, piece: None,
        on_end: Callable[[int, Continuation], None] = lambda number, continuation: None,
    ) -> None:
        """Continues every prompt.

        Sample i of each prompt draws with the seed of the options plus i, so a prompt has the same continuations alone and beside others.

        Args:
            prompts: Token ids of each prompt; each is asked for when there is room for it.
            num_samples: Continuations of each prompt; those of prompt p have the numbers from p * num_samples.
            on_text: Is given the number of a continuation and its next piece of text.
            on_end: Is given a number and the whole continuation, in the order of the numbers.
        """
        open_ones: dict[int, _Open] = {}
        ended: dict[int, Continuation] = {}
        next_number = 0

        def requests() -> Iterable[Request]:
            for place, prompt in enumerate(prompts):
                for sample in range(num_samples):
                    number = place * num_samples + sample
                    open_ones[number] = _Open(self._tokenizer, self._stops, self._end_ids)
                    yield Request(number, tuple(prompt), (self._options.seed + sample) % 2**63)

        def take(number: int, token: int) -> bool:
            nonlocal next_number
            current = open_ones[number]
            piece = current.take(token, self._max_tokens)
            if piece:
                on_text(number, piece)
            if current.found.reason is not None:
                ended[number] = open_ones.pop(number).found
            while next_number in ended:
                on_end(next_number, ended.pop(next_number))
                next_number += 1
            return current.found.reason is None

        continue_prompts(self._loop, requests(), max_tokens=self._max_tokens, take=take)


class _Open:
    """A continuation that has not ended."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], end_ids: Set[int]):
        self.found, self._end_ids = Continuation(), end_ids
        self._decoder, self._end, self._begin = StreamingDecoder(tokenizer), TextEnd(stops), time.perf_counter()

    def take(self, token: int, max_tokens: int) -> str:
        """Takes a token, and returns the text that can be handed out."""
        piece, is_stopped = "", False
        if token in self._end_ids:
            self.found.reason = "end_of_document"
        else:
            self.found.tokens.append(token)
            piece, is_stopped = self._end.feed(self._decoder.feed(token))
            if is_stopped:
                self.found.reason = "stop"
            elif len(self.found.tokens) == max_tokens:
                self.found.reason = "max_tokens"
        if self.found.reason is not None and not is_stopped:
            rest, is_stopped = self._end.feed(self._decoder.flush())
            piece += rest if is_stopped else rest + self._end.flush()
        self.found.text += piece
        self.found.seconds = time.perf_counter() - self._begin
        return piece


def continued_text(
    model: LanguageModel, tokenizer: Tokenizer, prompt: Sequence[int], *, max_tokens: int, options: SamplingOptions, end_ids: Iterable[int] = ()
) -> str:
    """The continuation of a prompt, until the document ends or `max_tokens` are generated."""
    found: list[Continuation] = []
    writer = TextWriter(model, tokenizer, options=options, max_tokens=max_tokens, end_ids=end_ids)
    writer.write([prompt], on_end=lambda _, continuation: found.append(continuation))
    return found[0].text
