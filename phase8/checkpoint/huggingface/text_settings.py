"""What a directory says about texts, in the keys of the section `data`: the piece that ends one, the piece that begins one, and special ids.

| key | `tokenizer.json` | `tokenizer.model` |
|---|---|---|
| `eod_token` | `eos_token` of `tokenizer_config.json` | the same |
| `begin_token` | the special token that its post-processor puts before a text | `bos_token`, with `add_bos_token` |

| key | `generation_config.json`, or else `config.json` |
|---|---|
| `end_ids`, `begin_id`, `padding_id` | `eos_token_id`, `bos_token_id`, `pad_token_id` |

So transformers 5 tokenizes and generates. Where a tokenizer puts nothing before a text, documents were packed as in training here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phase8.checkpoint.tensor_file import open_for_reading
from phase8.checkpoint.untrusted import shown
from phase8.errors import CheckpointCorruptError

RESETS = "reset_at_document_boundaries"  # in config.json as in the section `data`, where it is true
BEGIN_ID, END_ID, PADDING_ID = ("bos_token_id", "eos_token_id", "pad_token_id")  # in config.json and in generation_config.json
_MOST_BYTES = 2**28  # those of the largest vocabularies have 2**25


def text_settings(tokenizer: Path, config: dict[str, Any]) -> dict[str, str]:
    """The keys that the files say something about.

    Args:
        tokenizer: The file of the tokenizer.
        config: Content of tokenizer_config.json; empty without one.
    """
    if tokenizer.suffix == ".json":
        begin = _first_piece(_content(tokenizer).get("post_processor"))
    else:
        begin = _piece(config.get("bos_token")) if config.get("add_bos_token") is True else None
    found = {"eod_token": _piece(config.get("eos_token")), "begin_token": begin}
    return {key: piece for key, piece in found.items() if piece}


def id_settings(files: Mapping[Path, Mapping[str, Any]], *, vocab_size: int) -> dict[str, Any]:
    """The keys of the section `data` for special token ids; those that the model does not have, as -1 for none, are left out.

    Args:
        files: Content of each file that may name them; the first one that names an id counts.
        vocab_size: Vocabulary size of the model.

    Raises:
        CheckpointCorruptError: A value is neither an id nor several.
    """
    found: dict[str, Any] = {}
    for ours, theirs in (("end_ids", END_ID), ("begin_id", BEGIN_ID), ("padding_id", PADDING_ID)):
        path, value = next(((path, value) for path, content in files.items() if (value := content.get(theirs)) is not None), (None, None))
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(token_id) is not int for token_id in ids):
            raise CheckpointCorruptError(f"{path}: {theirs} is {shown(value)}, but a token id, a list of them or null is needed; use another copy")
        if ids := [token_id for token_id in dict.fromkeys(ids) if 0 <= token_id < vocab_size]:
            found[ours] = ids if ours == "end_ids" else ids[0]
    return found


def post_processor(piece: str, token_id: int) -> dict[str, Any]:
    """The post-processor of a `tokenizer.json` that puts a piece before every text."""
    special, text, other = {"SpecialToken": {"id": piece, "type_id": 0}}, *({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [special, text],
        "pair": [special, text, other],
        "special_tokens": {piece: {"id": piece, "ids": [token_id], "tokens": [piece]}},
    }


def _first_piece(processor: Any) -> str | None:
    """The special token that a post-processor puts before a text; None: it puts none there, or is damaged, which its reader reports."""
    if not isinstance(processor, dict):
        return None
    if isinstance(parts := processor.get("processors"), list):
        return next(filter(None, map(_first_piece, parts)), None)
    if isinstance(template := processor.get("single"), list) and template and isinstance(template[0], dict):
        return _piece(template[0].get("SpecialToken"), key="id")
    bounds = processor.get("cls")  # of BERT and RoBERTa: the piece and its id
    return _piece(bounds[0]) if isinstance(bounds, list) and bounds else None


def _piece(value: Any, *, key: str = "content") -> str | None:
    """A piece, which is written alone or with its properties."""
    found = value.get(key) if isinstance(value, dict) else value
    return found if isinstance(found, str) else None


def _content(path: Path) -> dict[str, Any]:
    """The object of a `tokenizer.json`; empty where it holds none."""
    with open_for_reading(path) as file:
        content = file.read(_MOST_BYTES)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
