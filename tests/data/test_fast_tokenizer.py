"""Sentencepiece models as tokenizer.json: the ids of sentencepiece, whatever the text; and models that have no such file."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from phase8.data.fast_tokenizer import fast_tokenizer
from phase8.data.protobuf import fields
from phase8.data.tokenizer import Tokenizer, load_tokenizer
from phase8.data.tokenizer_training import train_sentencepiece

ROOT = Path(__file__).parents[2]
TEXTS = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "phase8" / "data").glob("*.py"))]
# What is spelled in several ways: runs, special pieces, bytes, the mark of spaces, and characters that no model here knows.
PARTS = (
    "a", "def ", " ", "    ", "\n", "\t", "=", "----", "_", "<|endoftext|>", "<unk>", "<0x41>", "\u2581", "\0", "é", "漢", "😀", "self.x", "0",
    "\r\n",
)  # fmt: skip


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_sentencepiece(TEXTS, path, vocab_size=1200)
    return both_of(path)


def both_of(path: Path) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    fast = tokenizers.Tokenizer.from_str(fast_tokenizer(path.read_bytes()).decode())
    fast.encode_special_tokens = True
    return load_tokenizer(path), fast


def rewritten(model: bytes, change: Callable[[list[dict]], None]) -> bytes:
    """The model after a change of the list of its learned pieces."""
    pieces = [dict(fields(value)) for number, value in fields(model) if number == 1]
    places = [place for place, piece in enumerate(pieces) if piece.get(3, 1) == 1]
    learned = [pieces[place] for place in places]
    change(learned)
    for place, piece in zip(places, learned, strict=True):
        pieces[place] = piece

    def field(number: int, content: bytes) -> bytes:
        length = len(content)
        return bytes([number << 3 | 2]) + (bytes([length]) if length < 128 else bytes([length & 127 | 128, length >> 7])) + content

    bodies = [field(1, piece[1]) + b"\x15" + struct.pack("<f", piece[2]) + bytes([0x18, piece.get(3, 1)]) for piece in pieces]
    others = [(number, value) for number, value in fields(model) if number != 1]
    return b"".join(field(1, body) for body in bodies) + b"".join(field(number, value) for number, value in others)


def reverse_scores(learned: list[dict]) -> None:
    for piece, score in zip(learned, [piece[2] for piece in reversed(learned)], strict=True):
        piece[2] = score


@pytest.mark.parametrize("change", [list.reverse, reverse_scores])
def test_pieces_in_another_order_than_that_of_their_scores(both, tmp_path, change):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(rewritten(both[0].path.read_bytes(), change))
    other = both_of(path)
    assert other[0].encode(TEXTS[0]) != both[0].encode(TEXTS[0])
    for text in TEXTS:
        check(other, text)


def check(both: tuple[Tokenizer, tokenizers.Tokenizer], text: str) -> None:
    ours, fast = both
    ids = fast.encode(text, add_special_tokens=False).ids
    assert ids == ours.encode(text) and fast.decode(ids) == text


def test_real_text_and_runs(both):
    for text in TEXTS:
        check(both, text)
    for character in " -=\n#":
        for length in range(70):
            check(both, character * length + "x")


@settings(max_examples=150, deadline=None)
@given(parts=st.lists(st.sampled_from(PARTS), max_size=30))
def test_any_text(both, parts):
    check(both, "".join(parts))


def test_vocabulary_and_special_pieces(both):
    ours, fast = both
    assert fast.get_vocab_size() == ours.vocab_size
    assert all(fast.id_to_token(i) == ours.piece_of(i).replace("\u2581", " ") for i in range(ours.vocab_size))
    assert [token.content for token in fast.get_added_tokens_decoder().values() if token.special] == ["<unk>", "<|endoftext|>"]
    assert ours.pad_id == ours.unknown_id == 0


@pytest.mark.parametrize(
    "options",
    [
        {"byte_fallback": False},
        {"add_dummy_prefix": True},
        {"remove_extra_whitespaces": True},
        {"normalization_rule_name": "nmt_nfkc"},
        {"user_defined_symbols": ["<mask>"]},
        {"treat_whitespace_as_suffix": True},
        {"model_type": "unigram"},
        {"model_type": "char"},
    ],
)
def test_models_that_do_more_have_none(options):
    plain = {
        "model_type": "bpe", "byte_fallback": True, "add_dummy_prefix": False, "remove_extra_whitespaces": False, "vocab_size": 400, "minloglevel": 2,
        "normalization_rule_name": "identity",
    }  # fmt: skip

    def trained(**changes) -> bytes:
        buffer = io.BytesIO()
        lines = iter([line for text in TEXTS[:3] for line in text.split("\n") if line])
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=buffer, **(plain | changes), hard_vocab_limit=False)
        return buffer.getvalue()

    assert fast_tokenizer(trained()) is not None
    assert fast_tokenizer(trained(**options)) is None


def test_a_tokenizer_json_loses_what_changes_ids_and_is_the_same_bytes_otherwise():
    model = {"type": "WordLevel", "vocab": {"a": 0, "</s>": 1}, "unk_token": "a"}
    plain = json.dumps({"model": model, "post_processor": {"type": "ByteLevel"}, "truncation": None}, indent=3).encode()
    assert fast_tokenizer(plain) == plain
    for changes in (
        {"truncation": {"max_length": 4}},
        {"padding": {"pad_id": 0}},
        {"post_processor": {"type": "TemplateProcessing"}},
        {"post_processor": {"type": "Sequence", "processors": [{"type": "ByteLevel"}, {"type": "TemplateProcessing"}]}},
    ):
        found = json.loads(fast_tokenizer(json.dumps({"model": model, **changes}).encode()))
        assert found == {"model": model, next(iter(changes)): None}
