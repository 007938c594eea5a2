"""Tokenizers: text to token ids and back, from a sentencepiece model or a Hugging Face `tokenizer.json`.

Models trained here (`tokenizer_training.py`) are exact: `decode(encode(text)) == text` for every text that UTF-8 can hold, NUL, tabs,
runs of spaces and sentencepiece's own space mark U+2581 included. Only lone surrogates, which UTF-8 cannot hold, are refused. A model
made elsewhere gives the ids of its own library, and normalises text as it was configured.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from phase8.data.end_of_document import KNOWN_PIECES, choose_end_of_document, hugging_face_without, sentencepiece_without
from phase8.data.tokenizer_file import SPACE_MARK, parse_tokenizer_json, read_tokenizer_file
from phase8.data.utf8 import lone_surrogate
from phase8.errors import DataError

# Options of a Hugging Face model that make it give other ids for the same text at every call.
_RANDOMNESS = ("dropout", "alpha", "nbest_size")
# Names of the token for places without text in common models.
_PADDING = ("<pad>", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>", "[PAD]", "<PAD>")
# What tokenizers rewrite: spaces at ends and in runs, case, compatible and composed characters, invisible ones.
_PROBES = ("a", " a", "a  b \t\n", "  A\u00c0\u00e9e\u0301 ", "\ufb01\u2460\uff21\u212b\u00bd", "\u00a0\u200b\u3000\u2028\r\n", "\U0001f642\u65e5")


class Tokenizer(ABC):
    """A fixed map between text and token ids.

    Args:
        path: The file it was read from.
        content: The bytes of that file; `sha256` is their digest.
        vocab_size: Every id is below it.
        eod_id: The end-of-document token; `encode` never returns it, whatever the text contains.
        eod_token: Its piece.
        unknown_id: The token for text that has no other; None: there is none.
        pad_id: A token that `encode` never returns, for places without text; None: there is none beside the end-of-document token.
    """

    def __init__(
        self, path: Path, content: bytes, *, vocab_size: int, eod_id: int, eod_token: str, unknown_id: int | None, pad_id: int | None = None
    ):
        self.path = path
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.vocab_size = vocab_size
        self.eod_id = eod_id
        self.eod_token = eod_token
        self.unknown_id = unknown_id
        self.pad_id = pad_id

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without an end-of-document token. Safe to call from several threads.

        Raises:
            DataError: The text holds a lone surrogate, or something that the tokenizer can only encode as an end of a document.
        """
        check_unicode(text)
        ids = self._encode(text, without_eod=False)
        return ids if self.eod_id not in ids else self._encode_around_eod(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens give none, bytes that are not UTF-8 give U+FFFD.

        Raises:
            DataError: An id outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise DataError(f"token id {i} is outside the vocabulary of {self.path}, which has ids 0 to {self.vocab_size - 1}")
        return self._decode([i for i in ids if i != self.eod_id])

    def first_unknown(self, text: str) -> str | None:
        """The first part of `text` that becomes the unknown token; None where there is none."""
        for without_eod in (False, True):
            for token_id, part in self._parts(text, without_eod=without_eod):
                if token_id == self.unknown_id:
                    return part
        return None

    @cached_property
    def bytes_per_id(self) -> np.ndarray | None:
        """UTF-8 bytes of the text behind each id, 0 for special tokens and -1 where texts differ; None where the tokenizer rewrites text.

        Shape:
            int64 [vocab_size].
        """
        counts = self._bytes_per_id()
        if counts is None:
            return None
        found = np.array(counts, np.int64)
        if self.unknown_id is not None:
            found[self.unknown_id] = -1
        found[self.eod_id] = 0
        known = [(text, ids) for text, ids in ((probe, self.encode(probe)) for probe in _PROBES) if self.unknown_id not in ids]
        keeps_text = all(self.decode(ids) == text and found[ids].sum() == len(text.encode()) for text, ids in known)
        return found if known and keeps_text else None

    def drops(self, character: str, *, without_eod: bool = False) -> bool:
        """Whether a character leaves no trace in the ids, between letters or alone (white space alone separates words)."""
        between, bare, alone = (self._encode(text, without_eod=without_eod) for text in (f"x{character}x", "xx", character))
        return (between == bare and self.unknown_id not in bare) or not (alone or character.isspace())

    def _encode_around_eod(self, text: str) -> list[int]:
        """Ids of a text that would give the end-of-document token, from a copy of the model without its piece."""
        if self.eod_id == self.unknown_id:
            raise self._no_other_way("it is also what unknown text becomes")
        ids = self._encode(text, without_eod=True)
        if self.eod_id in ids:
            raise self._no_other_way("the token has other pieces too")
        for part in {part for token_id, part in self._parts(text, without_eod=False) if token_id == self.eod_id}:
            if self.unknown_id in self._encode(part, without_eod=True) or any(self.drops(character, without_eod=True) for character in part):
                raise self._no_other_way("its vocabulary cannot spell the piece")
        return ids

    def _no_other_way(self, reason: object) -> DataError:
        return DataError(
            f"text that gives the end-of-document token {self.eod_token!r} cannot be encoded another way by the tokenizer {self.path} ({reason}); "
            "remove it from the text, or name another piece with --eod-token or data.eod_token"
        )

    @abstractmethod
    def piece_of(self, token_id: int) -> str:
        """Piece of the vocabulary with an id."""

    @abstractmethod
    def _encode(self, text: str, *, without_eod: bool) -> list[int]:
        """Ids from the library, with or without the end-of-document piece in its vocabulary."""

    @abstractmethod
    def _parts(self, text: str, *, without_eod: bool) -> list[tuple[int, str]]:
        """The same ids, each with the text that it represents."""

    @abstractmethod
    def _decode(self, ids: list[int]) -> str: ...

    @abstractmethod
    def _bytes_per_id(self) -> list[int] | None:
        """UTF-8 bytes of each piece as it is in a text; None where a piece does not tell."""


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model.

    Args:
        path: The `.model` file.
        model: Its bytes.
        eod_token: The piece between documents; None: the model's own.

    Raises:
        DataError: Not a sentencepiece model, or one without an end-of-document token.
    """

    def __init__(self, path: Path, model: bytes, *, eod_token: str | None = None):
        self._processor = _sentencepiece_processor(path, model)
        eod_id = self._processor.eos_id()
        if eod_id < 0 or eod_token is not None:
            pieces = KNOWN_PIECES if eod_token is None else (eod_token,)
            ids = {piece: self._processor.piece_to_id(piece) for piece in pieces}
            ids = {piece: i for piece, i in ids.items() if self._processor.id_to_piece(i) == piece}  # unknown pieces have the id of <unk>
            control = {piece for piece, i in ids.items() if self._processor.is_control(i)}
            eod_id = choose_end_of_document(ids, path, named=eod_token, own_words=[control])
        self._space_mark_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        has_bytes = all(self._processor.is_byte(i) for i in self._space_mark_ids)
        size, unknown_id, pad_id = self._processor.vocab_size(), self._processor.unk_id(), self._processor.pad_id()
        if pad_id < 0:  # a text spelled in bytes has no unknown part
            pad_id = unknown_id if has_bytes and unknown_id != eod_id else None
        super().__init__(
            path, model, vocab_size=size, eod_id=eod_id, eod_token=self.piece_of(eod_id), unknown_id=unknown_id, pad_id=pad_id
        )
        adds_space = any(SPACE_MARK in piece for piece in self._processor.encode("a", out_type=str))
        # A model that rewrites spaces anyway is used unchanged.
        keeps_spaces = not adds_space and self._processor.decode(self._processor.encode("  a  ")) == "  a  "
        self._spell_space_mark = has_bytes and keeps_spaces

    def piece_of(self, token_id: int) -> str:
        """Piece of the vocabulary with an id."""
        return self._processor.id_to_piece(token_id)

    def _encode(self, text: str, *, without_eod: bool) -> list[int]:
        processor = self._without_eod if without_eod else self._processor
        if SPACE_MARK not in text or not self._spell_space_mark:
            return processor.encode(text)
        # As a character of the text, U+2581 would be decoded to a space; spelled in bytes it is decoded to itself.
        ids: list[int] = []
        for i, part in enumerate(text.split(SPACE_MARK)):
            ids += (self._space_mark_ids if i else []) + processor.encode(part)
        return ids

    def _parts(self, text: str, *, without_eod: bool) -> list[tuple[int, str]]:
        processor = self._without_eod if without_eod else self._processor
        # The piece of an unknown token is the text itself.
        return list(zip(processor.encode(text), processor.encode(text, out_type=str), strict=True))

    def _decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def _bytes_per_id(self) -> list[int]:
        pieces = self._processor
        sizes = [len(pieces.id_to_piece(i).replace(SPACE_MARK, " ").encode()) for i in range(self.vocab_size)]
        return [1 if pieces.is_byte(i) else 0 if pieces.is_control(i) or pieces.is_unused(i) else size for i, size in enumerate(sizes)]

    @cached_property
    def _without_eod(self) -> sentencepiece.SentencePieceProcessor:
        try:
            model = sentencepiece_without(self._processor.serialized_model_proto(), self.eod_id)
            return sentencepiece.SentencePieceProcessor(model_proto=model)
        except (ValueError, IndexError, RuntimeError) as error:
            raise self._no_other_way(error) from error


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` of the Hugging Face `tokenizers` package, without its truncation, padding, dropout and special tokens.

    Args:
        path: The file.
        content: Its bytes.
        eod_token: The piece between documents; None: the tokenizer's own.

    Raises:
        DataError: The package is not installed, the file is not such a tokenizer, or it has no known end-of-document token.
    """

    def __init__(self, path: Path, content: bytes, *, eod_token: str | None = None):
        parsed = parse_tokenizer_json(content, path)
        try:
            self._tokenizer = _hugging_face_tokenizer(_without_randomness(parsed) or content.decode())
            added = self._tokenizer.encode("").tokens  # added by the post-processor
        except ImportError as error:
            raise DataError(f"{path} is a Hugging Face tokenizer, which needs the package tokenizers: pip install 'phase8[tokenizers]'") from error
        except Exception as error:  # the package raises nothing narrower
            raise DataError(f"{path} is JSON but not a Hugging Face tokenizer ({error}); give a tokenizer.json or a sentencepiece .model") from error
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        special = {token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special}
        eod_id = choose_end_of_document(ids, path, named=eod_token, own_words=[special, set(added)])
        size, eod_token = max(ids.values()) + 1, self._tokenizer.id_to_token(eod_id)
        unknown_id, pad_id = _unknown_id(parsed["model"], ids), next((ids[piece] for piece in _PADDING if piece in ids and piece in special), None)
        super().__init__(path, content, vocab_size=size, eod_id=eod_id, eod_token=eod_token, unknown_id=unknown_id, pad_id=pad_id)

    def piece_of(self, token_id: int) -> str:
        """Piece of the vocabulary with an id."""
        return self._tokenizer.id_to_token(token_id)

    def _encode(self, text: str, *, without_eod: bool) -> list[int]:
        return self._encoding(text, without_eod=without_eod).ids

    def _parts(self, text: str, *, without_eod: bool) -> list[tuple[int, str]]:
        encoding = self._encoding(text, without_eod=without_eod)
        return [(token_id, text[start:end]) for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)]

    def _encoding(self, text: str, *, without_eod: bool) -> Any:
        tokenizer = self._without_eod if without_eod else self._tokenizer
        try:
            return tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:  # the package raises nothing narrower
            raise DataError(f"the tokenizer {self.path} cannot encode a text that begins with {text[:40]!r} ({error}); leave it out") from error

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _bytes_per_id(self) -> list[int] | None:
        parsed = json.loads(self._tokenizer.to_str())
        if (parsed["decoder"] or {}).get("type") != "ByteLevel" or parsed["normalizer"] is not None:
            return None
        counts = [0] * self.vocab_size
        for piece, i in self._tokenizer.get_vocab(with_added_tokens=False).items():
            counts[i] = len(piece)  # a character for each byte
        for i, token in self._tokenizer.get_added_tokens_decoder().items():
            takes_spaces = token.lstrip or token.rstrip  # any number of them
            counts[i] = 0 if token.special else -1 if takes_spaces else len(token.content.encode())
        return counts

    @cached_property
    def _without_eod(self) -> Any:
        try:
            return _hugging_face_tokenizer(hugging_face_without(json.loads(self._tokenizer.to_str()), self.eod_token))
        except Exception as error:  # the package raises nothing narrower
            raise self._no_other_way(error) from error


def load_tokenizer(path: str | Path, *, eod_token: str | None = None) -> Tokenizer:
    """Reads a sentencepiece `.model` or a Hugging Face `tokenizer.json`, which are distinguished by content.

    Args:
        path: The file.
        eod_token: The piece between documents; None: the one that the tokenizer itself names.

    Raises:
        DataError: The file is missing or unreadable, is neither, has no such end-of-document token, or needs a package not installed.
    """
    path = Path(path)
    content = read_tokenizer_file(path)
    if content.lstrip().startswith(b"{"):
        return HuggingFaceTokenizer(path, content, eod_token=eod_token)
    return SentencePieceTokenizer(path, content, eod_token=eod_token)


def check_unicode(text: str) -> None:
    """Refuses text that UTF-8 cannot hold.

    Raises:
        DataError: The text holds a lone surrogate.
    """
    if found := lone_surrogate(text):
        position, problem = found
        raise DataError(f"character {position} of the text is {problem}")


def _sentencepiece_processor(path: Path, model: bytes) -> sentencepiece.SentencePieceProcessor:
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model) if model else None
    except RuntimeError:
        processor = None
    if processor is None or processor.vocab_size() == 0:
        raise DataError(f"{path} begins with {model[:16]!r}, neither a sentencepiece model nor a Hugging Face tokenizer.json; give one of these")
    return processor


def _hugging_face_tokenizer(content: str) -> Any:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(content)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # "<|endoftext|>" inside a document is text, not the end of it
    return tokenizer


def _without_randomness(parsed: dict[str, Any]) -> str | None:
    """The text of a `tokenizer.json` without the options that make its model random; None if there are none."""
    random = {key: None for key in _RANDOMNESS if parsed["model"].get(key) is not None}
    return json.dumps(parsed | {"model": parsed["model"] | random}) if random else None


def _unknown_id(model: Mapping[str, Any], ids: Mapping[str, int]) -> int | None:
    """The id of the unknown token: Unigram models store the id, other models its piece."""
    return model["unk_id"] if "unk_id" in model else ids.get(model.get("unk_token") or "")
