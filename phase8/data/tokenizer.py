"""Tokenizers: text to token ids and back, from a sentencepiece model or a Hugging Face `tokenizer.json`.

Models trained here are exact: `decode(encode(text)) == text` for every text that UTF-8 can hold, NUL, tabs, runs of spaces and
sentencepiece's own space mark U+2581 included. Only lone surrogates, which UTF-8 cannot hold, are refused. A model made elsewhere
normalises text as its makers chose.
"""

from __future__ import annotations

import io
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import sentencepiece

from phase8.durable import staged_file
from phase8.errors import DataError

END_OF_DOCUMENT = "<|endoftext|>"

# What the makers of common models call the token between documents, in the order in which they are looked for.
_KNOWN_END_OF_DOCUMENT = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<｜end▁of▁sentence｜>")
_SPACE_MARK = "\u2581"
# The trainer drops sentences with NUL or U+2585 (its mark of unknown characters) and takes U+2581 for a space.
_NOT_TRAINABLE = re.compile("[\0\u2581\u2585]+")
_TRAINING_SENTENCE_CHARACTERS = 1 << 20
_TOO_FEW = 4  # below 256 bytes in any case, and enough for the trainer to say so itself
_SMALLEST_VOCABULARY = re.compile(r"smaller than required_chars\. \d+ vs (\d+)")
_LARGEST_VOCABULARY = re.compile(r"set it to a value <= (\d+)")


class Tokenizer(ABC):
    """A fixed map between text and token ids.

    Args:
        path: The file it was read from.
        vocab_size: Every id is below it.
        eod_id: The token between documents; `encode` never gives it, whatever the text says.
    """

    def __init__(self, path: Path, *, vocab_size: int, eod_id: int):
        self.path = path
        self.vocab_size = vocab_size
        self.eod_id = eod_id

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without an end-of-document token. Safe to call from several threads.

        Raises:
            DataError: The text holds a lone surrogate.
        """
        _check_utf8(text)
        return self._encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens give none, bytes that are not UTF-8 give U+FFFD.

        Raises:
            DataError: An id outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise DataError(f"token id {i} is outside the vocabulary of {self.path}, which has ids 0 to {self.vocab_size - 1}")
        return self._decode(ids)

    @abstractmethod
    def _encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def _decode(self, ids: list[int]) -> str: ...


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model.

    Args:
        path: The `.model` file.
        model: Its bytes.

    Raises:
        DataError: Not a sentencepiece model, or one without an end-of-document token.
    """

    def __init__(self, path: Path, model: bytes):
        self._processor = _sentencepiece_processor(path, model)
        eod_id = self._processor.eos_id()
        if eod_id < 0:
            ids = {piece: self._processor.piece_to_id(piece) for piece in _KNOWN_END_OF_DOCUMENT}
            eod_id = _end_of_document({piece: i for piece, i in ids.items() if self._processor.id_to_piece(i) == piece}, path)
        super().__init__(path, vocab_size=self._processor.vocab_size(), eod_id=eod_id)
        self._space_mark_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
        has_bytes = all(self._processor.is_byte(i) for i in self._space_mark_ids)
        adds_prefix = self._processor.encode("a", out_type=str) != self._processor.encode("a ", out_type=str)[:1]
        # A model that rewrites spaces anyway is left as its makers use it.
        keeps_spaces = not adds_prefix and self._processor.decode(self._processor.encode("  a  ")) == "  a  "
        self._spell_space_mark = has_bytes and keeps_spaces

    def _encode(self, text: str) -> list[int]:
        if _SPACE_MARK not in text or not self._spell_space_mark:
            return self._processor.encode(text)
        # As a character of the text U+2581 would come back as a space; spelled in bytes it comes back as itself.
        ids: list[int] = []
        for i, part in enumerate(text.split(_SPACE_MARK)):
            ids += (self._space_mark_ids if i else []) + self._processor.encode(part)
        return ids

    def _decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` of the Hugging Face `tokenizers` package, without its truncation, padding and special tokens.

    Args:
        path: The file.
        content: Its text.

    Raises:
        DataError: The package is not installed, the file is not such a tokenizer, or it has no known end-of-document token.
    """

    def __init__(self, path: Path, content: str):
        try:
            import tokenizers
        except ImportError as error:
            raise DataError(f"{path} is a Hugging Face tokenizer, which needs the package tokenizers: pip install 'phase8[tokenizers]'") from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the package raises nothing narrower
            raise DataError(f"{path} is JSON but not a Hugging Face tokenizer ({error}); give a tokenizer.json or a sentencepiece .model") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # "<|endoftext|>" inside a document is text, not the end of it
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        super().__init__(path, vocab_size=max(ids.values(), default=-1) + 1, eod_id=_end_of_document(ids, path))

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


class StreamingDecoder:
    """Text of token ids as they come, never a piece of a character.

    Whatever the ids, all pieces and the flush together are `decode` of all ids.

    Args:
        tokenizer: The tokenizer of the ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        # The last ids already shown stay as context, spaces alone being none: some decoders drop the spaces a text begins with.
        self._ids: list[int] = []
        self._num_shown = 0

    def feed(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is incomplete."""
        self._ids.append(token_id)
        text = self._new_text()
        if not text or text.endswith("\ufffd"):
            return ""
        if self._tokenizer.decode(self._ids[self._num_shown :]).strip():
            self._ids = self._ids[self._num_shown :]
        self._num_shown = len(self._ids)
        return text

    def flush(self) -> str:
        """The rest: an incomplete character as U+FFFD. The decoder can then be used for another text."""
        text = self._new_text()
        self._ids, self._num_shown = [], 0
        return text

    def _new_text(self) -> str:
        return self._tokenizer.decode(self._ids)[len(self._tokenizer.decode(self._ids[: self._num_shown])) :]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a sentencepiece `.model` or a Hugging Face `tokenizer.json`, told apart by content.

    Raises:
        DataError: The file is missing or unreadable, is neither, has no end-of-document token, or needs a package not installed.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the tokenizer {path}: {error.strerror}; give a sentencepiece .model or a tokenizer.json") from error
    if not content.lstrip().startswith(b"{"):
        return SentencePieceTokenizer(path, content)
    try:
        text = content.decode("utf-8")
        json.loads(text)
    except ValueError as error:
        raise DataError(f"{path} begins like JSON but is not ({error}); give a whole tokenizer.json or a sentencepiece .model") from error
    return HuggingFaceTokenizer(path, text)


def train_sentencepiece(
    texts: Iterable[str],
    destination: str | Path,
    *,
    vocab_size: int,
    model_type: Literal["bpe", "unigram"] = "bpe",
    character_coverage: float = 0.9995,
) -> Path:
    """Trains an exact sentencepiece model and writes it, complete or not at all; the same texts give the same bytes.

    Text is not normalised, so newlines, tabs and runs of spaces stay as they are; characters outside the vocabulary are spelled in
    bytes. Ids: 0 unknown (never given), 1 end of document, 2 tab, then 256 bytes and what was learned.

    Args:
        texts: Documents to learn from.
        destination: The `.model` file.
        vocab_size: Number of ids, exactly.
        model_type: Algorithm.
        character_coverage: Share of the characters of `texts` that are tokens of their own.

    Raises:
        DataError: No text, a lone surrogate, or a vocabulary size this text cannot give; the message tells the allowed range.
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
    """The model, or the trainer's message when the vocabulary size does not fit the text."""
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
            num_threads=1,  # recorded in the model, so another number would be other bytes
            minloglevel=2,
        )
    except RuntimeError as error:
        if not (_SMALLEST_VOCABULARY.search(str(error)) or _LARGEST_VOCABULARY.search(str(error))):
            raise
        return str(error)
    return buffer.getvalue()


def _training_sentences(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        _check_utf8(text)
        for part in _NOT_TRAINABLE.split(text):
            for start in range(0, len(part), _TRAINING_SENTENCE_CHARACTERS):
                yield part[start : start + _TRAINING_SENTENCE_CHARACTERS]


def _first_number(pattern: re.Pattern[str], message: bytes | str) -> str:
    found = pattern.search(message) if isinstance(message, str) else None
    return found.group(1) if found else "?"


def _check_utf8(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"character {error.start} of the text is the lone surrogate {text[error.start]!a}, which is not Unicode text; remove it"
        ) from error


def _sentencepiece_processor(path: Path, model: bytes) -> sentencepiece.SentencePieceProcessor:
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model) if model else None
    except RuntimeError:
        processor = None
    if processor is None or processor.vocab_size() == 0:
        raise DataError(f"{path} begins with {model[:16]!r}, neither a sentencepiece model nor a Hugging Face tokenizer.json; give one of these")
    return processor


def _end_of_document(ids: dict[str, int], path: Path) -> int:
    """The first known end-of-document token."""
    for piece in _KNOWN_END_OF_DOCUMENT:
        if piece in ids:
            return ids[piece]
    raise DataError(f"the tokenizer {path} has no end-of-document token; it needs one of {', '.join(_KNOWN_END_OF_DOCUMENT)}")
