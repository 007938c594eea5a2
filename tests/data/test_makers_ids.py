"""Ids of models made elsewhere are those that their makers' library gives."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import sentencepiece

from phase8.data.tokenizer import load_tokenizer

# The library has a piece for an a with a space in front, as every published model.
TEXTS = [f"  The fox {i} jumps\tover ﬁve lazy dogs — é,  a a a said a crow.\n" for i in range(60)]
PROBES = [*TEXTS[:3], "a\u2581b", "\u2581", " \u2581 a", "", " ", "\n", " lead", "trail  ", "a  b", "ﬁ①Å\u3000x", "日本 fox", "a\0b"]
PROBES += ["<s> </s>", "x" * 50]

# What makers choose, each value in several models.
MODELS = {
    "llama 2": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "llama 2, extra white space removed": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"},
    "unigram with bytes": {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "defaults": {},
    "t5": {"byte_fallback": False, "normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "bpe of the library": {"model_type": "bpe", "normalization_rule_name": "nmt_nfkc"},
    "nfkc with bytes": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "nfkc", "remove_extra_whitespaces": False},
    "no dummy prefix": {"add_dummy_prefix": False},
    "no dummy prefix, no bytes": {"model_type": "bpe", "add_dummy_prefix": False, "normalization_rule_name": "identity"},
    "suffix": {"treat_whitespace_as_suffix": True, "byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
}
EXACT = {"byte_fallback": True, "add_dummy_prefix": False, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}


def trained(path: Path, options: dict[str, object]) -> Path:
    model = io.BytesIO()
    options = {"vocab_size": 310 if options.get("byte_fallback") else 60, "hard_vocab_limit": options.get("model_type") == "bpe"} | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_writer=model, minloglevel=2, **options)
    path.write_bytes(model.getvalue())
    return path


@pytest.mark.parametrize("name", MODELS)
def test_ids_are_those_of_the_makers(name: str, tmp_path: Path):
    path = trained(tmp_path / "t.model", MODELS[name])
    processor, tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path)), load_tokenizer(path)
    for text in PROBES:
        assert tokenizer.encode(text) == processor.encode(text), text
        assert tokenizer.decode(tokenizer.encode(text)) == processor.decode(processor.encode(text))


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_a_model_that_keeps_white_space_and_adds_none_also_keeps_the_space_mark(model_type: str, tmp_path: Path):
    path = trained(tmp_path / "t.model", {**EXACT, "model_type": model_type})
    processor, tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path)), load_tokenizer(path)
    for text in PROBES:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert "\u2581" in text or tokenizer.encode(text) == processor.encode(text)
