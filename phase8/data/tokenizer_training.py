"""Trains sentencepiece models whose encoding is exact: decoding restores any text."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import sentencepiece

from phase8.data.end_of_document import END_OF_DOCUMENT
from phase8.data.tokenizer import check_unicode
from phase8.data.tokenizer_file import SPACE_MARK
from phase8.durable import staged_file
from phase8.errors import DataError

# The trainer drops sentences with NUL or U+2585 (its mark of unknown characters) and takes U+2581 for a space.
_NOT_TRAINABLE = re.compile(f"[\0{SPACE_MARK}\u2585]+")
_TRAINING_SENTENCE_CHARACTERS = 1 << 20
_TOO_FEW = 4  # below 256 bytes in any case, and enough for the trainer itself to report the problem
_SMALLEST_VOCABULARY = re.compile(r"smaller than required_chars\. \d+ vs (\d+)")
_LARGEST_VOCABULARY = re.compile(r"set it to a value <= (\d+)")


def train_sentencepiece(
    texts: Iterable[str],
    destination: str | Path,
    *,
    vocab_size: int,
    model_type: Literal["bpe", "unigram"] = "bpe",
    character_coverage: float = 0.9995,
) -> Path:
    """Trains an exact sentencepiece model and writes it, completely or not at all; the same texts give the same bytes.

    Text is not normalised, so newlines, tabs and runs of spaces stay as they are; characters outside the vocabulary are spelled in
    bytes. Ids: 0 unknown (never given), 1 end of document, 2 tab, then 256 bytes and what was learned.

    Args:
        texts: Documents to learn from.
        destination: The `.model` file.
        vocab_size: Exact number of ids.
        model_type: Algorithm of the model.
        character_coverage: Share of the characters of `texts` that become tokens of their own.

    Raises:
        DataError: There is no text, a lone surrogate, or a vocabulary size that this text cannot give; the message gives the allowed range.
        StorageError: The place cannot be written.
    """
    sentences = list(_training_sentences(texts))
    if not sentences:
        raise DataError(f"there is no text to train the tokenizer {destination} on; give documents that are not empty")

    def train(size: int) -> bytes | str:
        return _train(sentences, vocab_size=size, model_type=model_type, character_coverage=character_coverage)

    model = train(max(vocab_size, _TOO_FEW))
    if isinstance(model, str):
        smallest, largest = _first_number(_SMALLEST_VOCABULARY, train(_TOO_FEW)), _first_number(_LARGEST_VOCABULARY, train(1 << 24))
        raise DataError(f"a vocabulary of {vocab_size} (model.vocab_size, --vocab-size) cannot be trained on this text; use {smallest} to {largest}")
    destination = Path(destination)
    with staged_file(destination) as partial:
        partial.write_bytes(model)
    return destination


def _train(sentences: list[str], *, vocab_size: int, model_type: str, character_coverage: float) -> bytes | str:
    """Trains the model; returns the trainer's message if the vocabulary size does not fit the text."""
    buffer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=buffer,
            vocab_size=vocab_size,
            model_type=model_type,
            character_coverage=character_coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=["\t"],  # the trainer uses the tab as a separator and would never learn it
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            eos_piece=END_OF_DOCUMENT,
            max_sentence_length=8 * _TRAINING_SENTENCE_CHARACTERS,
            num_threads=1,  # recorded in the model, so another number would change the bytes
            minloglevel=2,
        )
    except RuntimeError as error:
        if not (_SMALLEST_VOCABULARY.search(str(error)) or _LARGEST_VOCABULARY.search(str(error))):
            raise
        return str(error)
    return buffer.getvalue()


def _training_sentences(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        check_unicode(text)
        for part in _NOT_TRAINABLE.split(text):
            for start in range(0, len(part), _TRAINING_SENTENCE_CHARACTERS):
                yield part[start : start + _TRAINING_SENTENCE_CHARACTERS]


def _first_number(pattern: re.Pattern[str], message: bytes | str) -> str:
    found = pattern.search(message) if isinstance(message, str) else None
    return found.group(1) if found else "?"
