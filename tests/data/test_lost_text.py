"""Text that a tokenizer cannot keep: unknown tokens and dropped characters are counted, and what is only rewritten is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer as Library
from tokenizers import models, normalizers, pre_tokenizers

from phase8.data.lost_text import LostText, LostTextCounter, stored_lost_text
from phase8.data.tokenizer import load_tokenizer
from phase8.data.tokenizer_training import train_sentencepiece

TEXTS = [f"the fox {i} jumps over the lazy dog é\n" for i in range(40)]


def count(path: Path, *documents: str) -> LostText:
    tokenizer = load_tokenizer(path)
    counter = LostTextCounter(tokenizer)
    for document in documents:
        counter.add([document], np.array(tokenizer.encode(document), np.int32))
    return counter.total


def without_bytes(path: Path) -> Path:
    """A sentencepiece model with the library's default normalisation, which drops control characters."""
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS), model_writer=file, vocab_size=40, hard_vocab_limit=False, minloglevel=2
        )
    return path


def saved(path: Path, model: object, *, normalizer: object = None) -> Path:
    library = Library(model)
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if normalizer is not None:
        library.normalizer = normalizer
    library.save(str(path))
    return path


def test_unknown_tokens_and_dropped_characters_are_counted_with_the_first_of_each(tmp_path: Path):
    lost = count(without_bytes(tmp_path / "t.model"), "the dog", "the\x01 fox 日本 over ☃", "the \x02\x01 dog")
    assert lost == LostText(
        num_unknown=2,
        num_documents_with_unknown=1,
        first_unknown=r"'日本' in a document that begins with 'the\x01 fox 日本 over ☃'",
        num_dropped=3,
        num_documents_with_dropped=2,
        first_dropped=r"U+0001 in a document that begins with 'the\x01 fox 日本 over ☃'",
    )


def test_what_is_rewritten_is_not_lost(tmp_path: Path):
    assert count(without_bytes(tmp_path / "t.model"), "  the   dog\n\n fox ", "dog\u3000fox", "\uff46\uff4f\uff58") == LostText()


def test_an_exact_tokenizer_loses_nothing(tmp_path: Path):
    path = train_sentencepiece(TEXTS, tmp_path / "t.model", vocab_size=300)
    assert count(path, "".join(map(chr, range(0xD800))), "\u2581\u2585\0\ufffd", "\U0010ffff e\u0301", "") == LostText()


def test_words_of_a_hugging_face_vocabulary(tmp_path: Path):
    words = models.WordLevel({"[UNK]": 0, "fox": 1, "dog": 2, "</s>": 3}, unk_token="[UNK]")
    lost = count(saved(tmp_path / "tokenizer.json", words), "fox dog", "fox hen dog hen")
    assert (lost.num_unknown, lost.num_documents_with_unknown) == (2, 1)
    assert lost.first_unknown == "'hen' in a document that begins with 'fox hen dog hen'"
    assert lost.num_dropped == 0


def test_characters_that_a_hugging_face_model_has_no_piece_for_are_dropped(tmp_path: Path):
    path = saved(tmp_path / "tokenizer.json", models.BPE({"x": 0, "y": 1, "</s>": 2}, []), normalizer=normalizers.StripAccents())
    lost = count(path, "xyx", "x?y?", "xé", "x\u0301y")
    assert (lost.num_unknown, lost.num_dropped, lost.num_documents_with_dropped) == (0, 4, 3)
    assert lost.first_dropped == "U+003F in a document that begins with 'x?y?'"


def test_a_tokenizer_that_refuses_unknown_words_drops_nothing(tmp_path: Path):
    words = models.WordLevel({"fox": 0, "</s>": 1}, unk_token="none")
    assert count(saved(tmp_path / "tokenizer.json", words), "fox") == LostText()


def test_losses_add_up_and_keep_the_first():
    first = LostText(num_unknown=1, num_documents_with_unknown=1, first_unknown="a")
    later = LostText(num_unknown=2, num_documents_with_unknown=1, first_unknown="b", num_dropped=3, num_documents_with_dropped=1, first_dropped="c")
    assert first + later == LostText(
        num_unknown=3, num_documents_with_unknown=2, first_unknown="a", num_dropped=3, num_documents_with_dropped=1, first_dropped="c"
    )


@pytest.mark.parametrize("change", [{"num_unknown": -1}, {"num_dropped": "1"}, {"num_dropped": True}, {"first_unknown": 3}, {"more": 1}])
def test_a_record_of_something_else_does_not_count(change: dict[str, object]):
    whole = vars(LostText(num_unknown=1, first_unknown="a"))
    assert stored_lost_text(dict(whole)) == LostText(num_unknown=1, first_unknown="a")
    assert stored_lost_text(whole | change) is None
    assert stored_lost_text([]) is None
