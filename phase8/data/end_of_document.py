"""The end-of-document token: its choice, and models whose vocabulary lacks its piece.

If text could produce the piece, any text that contains it would end a document. Such text is encoded by a copy of the
model without the piece: all other pieces keep their ids, and the text becomes what that model makes of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from phase8.data.protobuf import LENGTH_DELIMITED, varint
from phase8.data.tokenizer_file import SPACE_MARK
from phase8.errors import DataError

END_OF_DOCUMENT = "<|endoftext|>"

# With fullwidth bars; the words are parted by sentencepiece's mark of a space.
_OF_DEEPSEEK = f"<\uff5cend{SPACE_MARK}of{SPACE_MARK}sentence\uff5c>"
# Names of the end-of-document token in common models.
KNOWN_PIECES = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", _OF_DEEPSEEK)
# U+FFFE is not a character, so no valid text contains a piece with this name.
_UNWRITTEN = "\ufffe"
# Fields of sentencepiece's ModelProto and SentencePiece.
_PIECES, _SELF_TEST = 1, 4
_TYPE_IS_CONTROL = bytes([3 << 3, 3])


def choose_end_of_document(ids: Mapping[str, int], path: Path, *, named: str | None, own_words: Iterable[set[str]]) -> int:
    """Chooses the id of the end-of-document token.

    Args:
        ids: Every candidate piece of the vocabulary, with its id.
        path: The tokenizer file, for messages.
        named: The piece that the user names; None: a known one.
        own_words: Sets of pieces that the tokenizer itself marks, for example as special, the most telling set first. They decide between
            several known pieces.

    Raises:
        DataError: The named piece is not in the vocabulary; or none is known, or several are and the tokenizer marks none of them.
    """
    if named is not None:
        if named not in ids:
            raise DataError(f"the tokenizer {path} has no piece {named!r}; name one of its vocabulary with --eod-token (data.eod_token in a config)")
        return ids[named]
    found = [piece for piece in KNOWN_PIECES if piece in ids]
    for marked in own_words:
        found = [piece for piece in found if piece in marked] or found
    if not found:
        raise DataError(
            f"the tokenizer {path} has no end-of-document token; it needs one of {', '.join(KNOWN_PIECES)}, "
            "or the name of another with --eod-token (data.eod_token in a config)"
        )
    if len(found) > 1:
        raise DataError(
            f"the tokenizer {path} has {len(found)} end-of-document tokens, {', '.join(found)}, and does not say which one ends a document; "
            "name it with --eod-token (data.eod_token in a config)"
        )
    return ids[found[0]]


def sentencepiece_without(model: bytes, piece_id: int) -> bytes:
    """A copy of a sentencepiece model in which a piece is a control piece, which no text produces.

    Args:
        model: A serialised ModelProto.
        piece_id: Id of the piece.

    Raises:
        ValueError: The model holds fields that are not sentencepiece's.
    """
    parts, position, num_pieces = [], 0, 0
    while position < len(model):
        start = position
        tag, position = varint(model, position)
        if tag & 7 != LENGTH_DELIMITED:
            raise ValueError(f"field {tag >> 3} of the model is not one of sentencepiece's")
        length, position = varint(model, position)
        content, position = model[position : position + length], position + length
        if tag >> 3 == _SELF_TEST:
            continue  # the self-test samples may contain the piece
        if tag >> 3 == _PIECES:
            if num_pieces == piece_id:
                content += _TYPE_IS_CONTROL  # the last value of a repeated field counts
            num_pieces += 1
            parts.append(bytes([tag]) + _as_varint(len(content)) + content)
        else:
            parts.append(model[start:position])
    return b"".join(parts)


def hugging_face_without(content: dict[str, Any], piece: str) -> str:
    """The text of a `tokenizer.json` in which a piece is renamed so that no text contains it, and no merge produces it.

    Args:
        content: The file's JSON; it is modified.
        piece: The piece.
    """
    model, renamed = content["model"], piece + _UNWRITTEN
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {renamed if name == piece else name: token_id for name, token_id in vocabulary.items()}
    else:
        model["vocab"] = [[renamed if name == piece else name, score] for name, score in vocabulary]
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        model["merges"] = [[left, right] for left, right in pairs if piece not in (left, right, left + right.removeprefix(prefix))]
    for token in content.get("added_tokens") or []:
        if token["content"] == piece:
            token |= {"content": renamed, "special": True}  # special tokens are not searched for in text
    content["post_processor"] = None  # it may refer to the piece, and is not used
    return json.dumps(content, ensure_ascii=False)


def _as_varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])
