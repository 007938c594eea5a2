"""A tokenizer as a `tokenizer.json` that gives the same ids to whoever reads it with the `tokenizers` package, where there is one.

A `tokenizer.json` loses what adds tokens, cuts or pads, which phase8 does not apply. A byte-pair encoding of sentencepiece is converted if it leaves
text as it is, spells what it does not know in bytes, and has no pieces of several characters that users defined, as those of
`tokenizer_training.py`. Its pieces then contain the space itself instead of U+2581, so that a U+2581 of the text is spelled in bytes. Unigram models
are not converted: of two segmentations with the same score, the package chooses another than sentencepiece.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from phase8.data.protobuf import fields
from phase8.data.tokenizer_file import SPACE_MARK

# Fields of sentencepiece's messages.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE, _SPACE_AS_SUFFIX, _BYTE_FALLBACK = 3, 24, 35
_CHARSMAP, _ADD_DUMMY_PREFIX, _REMOVE_EXTRA_WHITESPACES, _ESCAPE_WHITESPACES, _RULES = 2, 3, 4, 5, 6
# Values of its enumerations.
_BPE = 2
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5


class _Piece(NamedTuple):
    text: str
    score: float
    kind: int


def fast_tokenizer(content: bytes) -> bytes | None:
    """The content of a `tokenizer.json` that encodes as a tokenizer does; None where none is known.

    Args:
        content: A `tokenizer.json`, or a serialised ModelProto, that has been read as a tokenizer.
    """
    return _bare(content) if content.lstrip().startswith(b"{") else _converted(content)


def _bare(content: bytes) -> bytes:
    """A `tokenizer.json` without what changes the ids afterwards; the same bytes if there is nothing such."""
    parsed = json.loads(content)
    removed = {name: None for name in ("truncation", "padding") if parsed.get(name) is not None}
    if _adds_tokens(parsed.get("post_processor")):
        removed["post_processor"] = None
    return json.dumps(parsed | removed, ensure_ascii=False).encode() + b"\n" if removed else content


def _adds_tokens(post_processor: dict[str, Any] | None) -> bool:
    """Whether a post-processor does anything but trim offsets."""
    if post_processor is None:
        return False
    return any(map(_adds_tokens, post_processor["processors"])) if "processors" in post_processor else post_processor.get("type") != "ByteLevel"


def _converted(model: bytes) -> bytes | None:
    """A sentencepiece model as a `tokenizer.json`; None where none encodes as it does."""
    parts = list(fields(model))
    trainer, normalizer = (dict(fields(dict(parts).get(number, b""))) for number in (_TRAINER, _NORMALIZER))
    pieces = [_piece(dict(fields(part))) for number, part in parts if number == _PIECES]
    if trainer.get(_MODEL_TYPE) != _BPE or not _leaves_text(trainer, normalizer) or not _are_plain(pieces):
        return None
    return json.dumps(_file(_bpe(pieces), pieces), ensure_ascii=False).encode() + b"\n"


def _piece(message: dict[int, Any]) -> _Piece:
    kind = message.get(_TYPE, _NORMAL)
    return _Piece(message[_PIECE].decode().replace(SPACE_MARK, " "), message.get(_SCORE, 0.0), kind)


def _leaves_text(trainer: dict[int, Any], normalizer: dict[int, Any]) -> bool:
    """Whether text reaches the model as it is, and unknown characters become bytes."""
    is_changed = normalizer.get(_CHARSMAP) or normalizer.get(_RULES) or not normalizer.get(_ESCAPE_WHITESPACES, 1)
    has_other_spaces = normalizer.get(_ADD_DUMMY_PREFIX, 1) or normalizer.get(_REMOVE_EXTRA_WHITESPACES, 1) or trainer.get(_SPACE_AS_SUFFIX, 0)
    return not is_changed and not has_other_spaces and bool(trainer.get(_BYTE_FALLBACK, 0))


def _are_plain(pieces: Sequence[_Piece]) -> bool:
    """Whether every piece is of a known kind, and its text its own."""
    is_known = all(piece.kind != _UNUSED and not (piece.kind == _USER_DEFINED and len(piece.text) > 1) for piece in pieces)
    return is_known and len({piece.text for piece in pieces}) == len(pieces)


def _bpe(pieces: Sequence[_Piece]) -> dict[str, Any]:
    """Every way to put a learned piece together from two others, better pieces first.

    Of two ways to one piece, sentencepiece takes the leftmost in the text, the package the first one here. The same symbols would have to be parts of
    both, x y = y z as in `- -- -`; but while `--` was made, the leftmost of equal pairs came first.
    """
    unknown = next(piece.text for piece in pieces if piece.kind == _UNKNOWN)
    learned = {piece.text: piece.score for piece in pieces if piece.kind == _NORMAL}

    def merges() -> Iterator[tuple[float, int, str, str]]:
        for text, score in learned.items():
            for cut in range(1, len(text)):
                if text[:cut] in learned and text[cut:] in learned:
                    yield -score, -cut, text[:cut], text[cut:]

    return {
        "type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": False, "byte_fallback": True, "ignore_merges": False, "vocab": {piece.text: i for i, piece in enumerate(pieces)},
        "merges": [[left, right] for *_, left, right in sorted(merges())],
    }  # fmt: skip


def _file(algorithm: dict[str, Any], pieces: Sequence[_Piece]) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = [{"id": i, "content": piece.text, **flags} for i, piece in enumerate(pieces) if piece.kind in (_UNKNOWN, _CONTROL)]
    decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None, "pre_tokenizer": None,
        "post_processor": None, "decoder": decoder, "model": algorithm,
    }  # fmt: skip
