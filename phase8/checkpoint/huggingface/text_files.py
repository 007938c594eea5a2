"""The files beside exported weights that say how text is tokenized and generated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from phase8.checkpoint.huggingface.phase8_model import CODE
from phase8.checkpoint.huggingface.source import CONVERTED_FROM, GENERATION_CONFIG_NAME, TOKENIZER_CONFIG_NAME
from phase8.checkpoint.huggingface.text_settings import BEGIN_ID, END_ID, PADDING_ID, post_processor
from phase8.config.model_section import ModelSection
from phase8.config.schema import DataSection

FAST_TOKENIZER_NAME, SENTENCEPIECE_NAME = "tokenizer.json", "tokenizer.model"
TOKENIZER_CODE = CODE / "tokenization_phase8.py"


@dataclass(frozen=True)
class ExportedTokenizer:
    """What exported files say about the tokenizer of a model.

    Args:
        sentencepiece: The sentencepiece model that it is; None: it is a `tokenizer.json`.
        fast: Content of a `tokenizer.json` that encodes as it does; None: there is none, and `TOKENIZER_CODE` runs the sentencepiece model.
        num_ids: Number of token ids that text may become.
        end: Piece and id of the end of a document, which in training also stood before each document.
        begin: Piece and id before every text, of a model made elsewhere; None: a text begins with itself.
        padding: Piece and id for places without text.
        unknown: Piece of the unknown token; None: there is none.
    """

    sentencepiece: bytes | None
    fast: bytes | None
    num_ids: int
    end: tuple[str, int]
    begin: tuple[str, int] | None
    padding: tuple[str, int]
    unknown: str | None


def special_ids(data: DataSection, tokenizer: ExportedTokenizer | None) -> dict[str, Any]:
    """The special token ids under the keys of transformers' configs; None: there is none.

    Args:
        data: What the section says of a model made elsewhere.
        tokenizer: Tokenizer of the model; None: it has none.
    """
    ends, begin, padding = list(data.end_ids or ()), data.begin_id, data.padding_id
    if tokenizer is not None:
        begin, padding = (tokenizer.begin or tokenizer.end)[1], tokenizer.padding[1]
        ends += [] if tokenizer.end[1] in ends else [tokenizer.end[1]]
    return {BEGIN_ID: begin, END_ID: ends if len(ends) > 1 else next(iter(ends), None), PADDING_ID: padding}


def text_files(model: ModelSection, tokenizer: ExportedTokenizer | None, ids: Mapping[str, Any]) -> dict[str, bytes]:
    """Content of the files of tokenizer and generation, by name.

    Args:
        model: Section of the model.
        tokenizer: Its tokenizer; None: it has none.
        ids: Its `special_ids`.
    """
    if tokenizer is None:
        return {GENERATION_CONFIG_NAME: _as_json({key: value for key, value in ids.items() if value is not None})}
    # The embedding may be longer than the vocabulary; ids beyond have never been trained.
    beyond = list(range(tokenizer.num_ids, model.vocab_size))
    fast = {TOKENIZER_CODE.name: TOKENIZER_CODE.read_bytes()}
    if tokenizer.fast is not None:
        fast = {FAST_TOKENIZER_NAME: _with_begin(tokenizer.fast, tokenizer.begin)}
    return {
        GENERATION_CONFIG_NAME: _as_json({**ids, **({"suppress_tokens": beyond} if beyond else {})}),
        TOKENIZER_CONFIG_NAME: _as_json(_tokenizer_config(model, tokenizer)),
        **fast,
        **({} if tokenizer.sentencepiece is None else {SENTENCEPIECE_NAME: tokenizer.sentencepiece}),
    }


def _tokenizer_config(model: ModelSection, tokenizer: ExportedTokenizer) -> dict[str, Any]:
    if tokenizer.fast is None:
        kind = {"tokenizer_class": "Phase8Tokenizer", "auto_map": {"AutoTokenizer": [f"{TOKENIZER_CODE.stem}.Phase8Tokenizer", None]}}
    else:
        kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    return {
        **kind,
        "bos_token": (tokenizer.begin or tokenizer.end)[0],
        **({} if tokenizer.begin is None else {"add_bos_token": True}),
        "eos_token": tokenizer.end[0],
        "pad_token": tokenizer.padding[0],
        "unk_token": tokenizer.unknown,
        # Text is encoded as in training: a special piece that a text contains is text.
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        **({"model_max_length": model.sequence_length} if model.block == "transformer" else {}),
        **({} if tokenizer.fast is None or tokenizer.sentencepiece is None else {CONVERTED_FROM: SENTENCEPIECE_NAME}),
    }


def _with_begin(fast: bytes, begin: tuple[str, int] | None) -> bytes:
    """A `tokenizer.json` that puts the piece before every text."""
    return fast if begin is None else _as_json(json.loads(fast) | {"post_processor": post_processor(*begin)})


def _as_json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=1).encode() + b"\n"
