"""Text from a prompt: the continuation is yielded piece by piece as it is generated."""

from __future__ import annotations

from collections.abc import Iterator

from phase8.data.streaming_decoder import StreamingDecoder
from phase8.data.tokenizer import Tokenizer
from phase8.generate.sampling import SamplingOptions, generate_tokens
from phase8.model.model import LanguageModel


def prompt_tokens(tokenizer: Tokenizer, prompt: str, *, after_document_end: bool) -> list[int]:
    """Token ids that the model reads before it generates.

    Args:
        tokenizer: Tokenizer of the model.
        prompt: May be empty.
        after_document_end: Begin with the end-of-document token: in training, packed documents follow one.
    """
    tokens = tokenizer.encode(prompt)
    return [tokenizer.eod_id, *tokens] if after_document_end or not tokens else tokens


def stream_text(
    model: LanguageModel, tokenizer: Tokenizer, prompt: list[int], *, max_tokens: int, options: SamplingOptions
) -> Iterator[str]:
    """Yields the continuation of a prompt in pieces of text, until the document ends or `max_tokens` are generated."""
    decoder = StreamingDecoder(tokenizer)
    drawn = generate_tokens(
        model, prompt, max_tokens=max_tokens, options=options, num_ids=tokenizer.vocab_size, stop_id=tokenizer.eod_id
    )
    for token in drawn:
        yield decoder.feed(token)
    yield decoder.flush()
