"""The token between documents: which one it is, and that no text gives it, whatever the library below does."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Library
from tokenizers.decoders import ByteLevel, Metaspace, WordPiece

from phase8.data.tokenizer import Tokenizer, load_tokenizer
from phase8.data.tokenizer_file import SPACE_MARK
from phase8.data.tokenizer_training import train_sentencepiece
from phase8.errors import DataError

TEXTS = [f"line {i}: the fox <s>struck</s> the dog {i * i}" for i in range(30)]
# The piece in every position: alone, first, last, doubled, inside a word, beside spaces, line ends and letters of several bytes.
STRUCK = ["</s>", "</s>b", "a </s>", "a</s></s>b", "x </s> y", "é</s>日\n</s>\n", " </s>", "line <</s>>", *TEXTS[:2]]


def sentencepiece_model(path: Path, texts: list[str] = TEXTS, **options: object) -> Path:
    """A model that keeps white space, but puts a space in front, as Llama 2's."""
    model = io.BytesIO()
    defaults = {"vocab_size": 310, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
    defaults |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts * 20), model_writer=model, **defaults | options)
    path.write_bytes(model.getvalue())
    return path


def user_defined(path: Path) -> Path:
    return sentencepiece_model(path, user_defined_symbols=["</s>"])


def user_defined_in_unigram(path: Path) -> Path:
    return sentencepiece_model(path, model_type="unigram", vocab_size=305, user_defined_symbols=["</s>"])


def learned(path: Path) -> Path:
    letters = "abcdefghij"
    texts = [f"{before}</s>{after}" for before in letters for after in letters]
    return sentencepiece_model(path, texts, eos_id=-1, vocab_size=279, split_by_unicode_script=False)


def characters(*more: str) -> dict[str, int]:
    alphabet = sorted({character for text in [*STRUCK, *TEXTS, "#"] for character in text} - {" ", "\n"})
    return {piece: i for i, piece in enumerate(["[UNK]", *alphabet, *more])}


def byte_level(path: Path, merges: list[tuple[str, str]], *, added: AddedToken | None = None, **options: object) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(left + right for left, right in merges)]
    library = Library(models.BPE({piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, merges, **options))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = ByteLevel()
    if added is not None:
        library.add_tokens([added])
    library.save(str(path))
    return path


MERGES = [("<", "/"), ("</", "s"), ("</s", ">"), ("</s>", "b")]


def merged(path: Path) -> Path:
    return byte_level(path, MERGES)


def legacy_merges(path: Path) -> Path:
    content = json.loads(byte_level(path, MERGES).read_text(encoding="utf-8"))
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    path.write_text(json.dumps(content))
    return path


def merged_and_special(path: Path) -> Path:
    return byte_level(path, MERGES, added=AddedToken("</s>", special=True))


def ignoring_merges(path: Path) -> Path:
    content = json.loads(byte_level(path, MERGES, ignore_merges=True).read_text(encoding="utf-8"))
    content["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Split", "pattern": {"String": "</s>"}, "behavior": "Isolated", "invert": False}, content["pre_tokenizer"]],
    }
    path.write_text(json.dumps(content))
    return path


def added_not_special(path: Path) -> Path:
    return byte_level(path, [], added=AddedToken("</s>", special=False))


def added_with_normalisation(path: Path) -> Path:
    return byte_level(path, [], added=AddedToken("</s>", special=False, normalized=True))


def added_with_strips(path: Path) -> Path:
    return byte_level(path, [], added=AddedToken("</s>", special=False, lstrip=True, rstrip=True, normalized=False))


def added_single_word(path: Path) -> Path:
    return byte_level(path, [], added=AddedToken("</s>", special=False, single_word=True))


def unigram(path: Path) -> Path:
    pieces = [*characters(SPACE_MARK, "\n"), "</s>"]
    library = Library(models.Unigram([(piece, -8.0 if len(piece) == 1 else -1.0) for piece in pieces], unk_id=0))
    library.pre_tokenizer, library.decoder = (kind(prepend_scheme="never") for kind in (pre_tokenizers.Metaspace, Metaspace))
    library.save(str(path))
    return path


def prefixed_bpe(path: Path) -> Path:
    """BPE as of a sentencepiece model, with bytes."""
    vocabulary = characters(SPACE_MARK, "\n", *(left + right for left, right in MERGES))
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    library = Library(models.BPE(vocabulary, MERGES, byte_fallback=True, unk_token="[UNK]"))
    library.normalizer = normalizers.Replace(" ", SPACE_MARK)
    path.write_text(library.to_str(), encoding="utf-8")
    content = json.loads(path.read_text(encoding="utf-8"))
    replace, fuse = {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}, {"type": "Fuse"}
    content["decoder"] = {"type": "Sequence", "decoders": [replace, {"type": "ByteFallback"}, fuse]}
    path.write_text(json.dumps(content))
    return path


EXACT = [merged, legacy_merges, merged_and_special, ignoring_merges, added_not_special, added_with_normalisation, added_with_strips]
EXACT += [added_single_word, unigram, prefixed_bpe, user_defined, user_defined_in_unigram, learned]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[Path], Path]], Tokenizer]:
    """A tokenizer by what makes it, made once."""
    made: dict[str, Tokenizer] = {}

    def load(make: Callable[[Path], Path]) -> Tokenizer:
        if make.__name__ not in made:
            made[make.__name__] = load_tokenizer(make(tmp_path_factory.mktemp("made") / make.__name__), eod_token="</s>")
        return made[make.__name__]

    return load


def library_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer._encode(text, without_eod=False)


@pytest.mark.parametrize("make", EXACT, ids=lambda make: make.__name__)
def test_text_that_gives_the_piece_is_encoded_another_way_and_comes_back(make: Callable[[Path], Path], loaded: Callable):
    tokenizer = loaded(make)
    given_by_library = [text for text in STRUCK if tokenizer.eod_id in library_ids(tokenizer, text)]
    assert given_by_library, "the library does not do what this tokenizer is made for"
    for text in STRUCK:
        ids = tokenizer.encode(text)
        assert tokenizer.eod_id not in ids
        assert tokenizer.unknown_id not in ids
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("make", EXACT, ids=lambda make: make.__name__)
def test_other_text_keeps_the_ids_of_the_library(make: Callable[[Path], Path], loaded: Callable):
    tokenizer = loaded(make)
    for text in ["the fox", "</", "s>", "a < / s >", "dog 9\n"]:
        assert tokenizer.encode(text) == library_ids(tokenizer, text)


@pytest.mark.parametrize("make", EXACT, ids=lambda make: make.__name__)
@settings(max_examples=40, deadline=None)
@given(parts=st.lists(st.sampled_from(["</s>", "<", "/", "s", ">", "b", " ", "\n", "</", "s>", "é", SPACE_MARK]), max_size=12))
def test_no_text_gives_the_end_of_a_document(make: Callable[[Path], Path], loaded: Callable, parts: list[str]):
    tokenizer = loaded(make)
    assert tokenizer.eod_id not in tokenizer.encode("".join(parts))


@pytest.mark.parametrize("make", EXACT, ids=lambda make: make.__name__)
def test_the_end_of_a_document_decodes_to_nothing_whatever_kind_of_piece_it_is(make: Callable[[Path], Path], loaded: Callable):
    tokenizer = loaded(make)
    ids = tokenizer.encode("dog")
    assert tokenizer.decode([*ids, tokenizer.eod_id]) == tokenizer.decode([tokenizer.eod_id, *ids]) == tokenizer.decode(ids) == "dog"


def word_level(path: Path, unknown: str = "[UNK]") -> Path:
    library = Library(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "</s>": 3}, unk_token=unknown))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.save(str(path))
    return path


def word_piece(path: Path, *, with_characters: bool) -> Path:
    pieces = {"[UNK]": 0, "a": 1, "b": 2, "</s>": 3}
    if with_characters:
        pieces |= {"<": 4, "##/": 5, "##s": 6, "##>": 7}
    library = Library(models.WordPiece(pieces, unk_token="[UNK]"))
    library.pre_tokenizer, library.decoder = pre_tokenizers.WhitespaceSplit(), WordPiece()
    library.save(str(path))
    return path


def test_a_vocabulary_of_words_refuses_text_that_is_an_end_of_document_and_takes_all_other(tmp_path: Path):
    tokenizer = load_tokenizer(word_level(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("a b c") == [1, 2, 0]
    expected = re.escape(f"'</s>' cannot be encoded another way by the tokenizer {tmp_path}/tokenizer.json (its vocabulary cannot spell the piece)")
    with pytest.raises(DataError, match=expected):
        tokenizer.encode("a </s> b")
    with pytest.raises(DataError, match="cannot spell the piece"):
        load_tokenizer(word_piece(tmp_path / "pieces.json", with_characters=False)).encode("a </s> b")


def test_word_pieces_spell_it(tmp_path: Path):
    tokenizer = load_tokenizer(word_piece(tmp_path / "tokenizer.json", with_characters=True))
    assert tokenizer.encode("a </s> b") == [1, 4, 5, 6, 7, 2]
    assert tokenizer.decode(tokenizer.encode("a </s> b")) == "a </s> b"


def test_an_end_of_document_that_unknown_text_becomes_is_refused_where_it_comes_out(tmp_path: Path):
    tokenizer = load_tokenizer(word_level(tmp_path / "tokenizer.json", unknown="</s>"))
    assert tokenizer.encode("a b") == [1, 2]
    with pytest.raises(DataError, match="it is also what unknown text becomes"):
        tokenizer.encode("a c")


def test_an_ordinary_byte_as_end_of_document_is_refused_where_it_comes_out(tmp_path: Path):
    tokenizer = load_tokenizer(byte_level(tmp_path / "tokenizer.json", []), eod_token="Ċ")
    assert tokenizer.decode(tokenizer.encode("a b")) == "a b"
    with pytest.raises(DataError, match="its vocabulary cannot spell the piece"):
        tokenizer.encode("é\né")
    bytes_model = load_tokenizer(sentencepiece_model(tmp_path / "t.model"), eod_token="<0xC3>")
    with pytest.raises(DataError, match="cannot be encoded another way"):
        bytes_model.encode("é")


def test_a_text_that_the_library_refuses_is_one_sentence(tmp_path: Path):
    tokenizer = load_tokenizer(word_level(tmp_path / "tokenizer.json", unknown="none"))
    with pytest.raises(DataError, match=r"cannot encode a text that begins with 'a c' \(WordLevel error"):
        tokenizer.encode("a c")


def two_known(path: Path, *, special: tuple[str, ...], post_processor: str | None = None) -> Path:
    library = Library(models.BPE({"a": 0}, []))
    library.add_tokens([AddedToken(piece, special=piece in special) for piece in ("<|endoftext|>", "</s>")])
    if post_processor is not None:
        library.post_processor = processors.TemplateProcessing(single=f"$A {post_processor}", special_tokens=[(post_processor, 2)])
    library.save(str(path))
    return path


def test_of_two_known_pieces_the_tokenizers_own_word_decides(tmp_path: Path):
    path = tmp_path / "tokenizer.json"
    both = ("<|endoftext|>", "</s>")
    assert load_tokenizer(two_known(path, special=("</s>",))).eod_token == "</s>"
    assert load_tokenizer(two_known(path, special=("<|endoftext|>",))).eod_token == "<|endoftext|>"
    assert load_tokenizer(two_known(path, special=both, post_processor="</s>")).eod_token == "</s>"
    assert load_tokenizer(sentencepiece_model(tmp_path / "t.model", user_defined_symbols=["<|endoftext|>"])).eod_token == "</s>"
    assert load_tokenizer(sentencepiece_model(tmp_path / "t.model", eos_piece="<|e|>", control_symbols=["</s>"])).eod_token == "<|e|>"


@pytest.mark.parametrize("special", [(), ("<|endoftext|>", "</s>")])
def test_two_known_pieces_and_no_word_of_the_tokenizer_is_a_question(tmp_path: Path, special: tuple[str, ...]):
    path = two_known(tmp_path / "tokenizer.json", special=special)
    with pytest.raises(DataError, match=r"has 2 end-of-document tokens, <\|endoftext\|>, </s>, and does not say .* --eod-token"):
        load_tokenizer(path)
    assert load_tokenizer(path, eod_token="</s>").eod_id == 2
    assert load_tokenizer(path, eod_token="<|endoftext|>").eod_id == 1


def test_a_named_piece_is_taken_and_must_exist(tmp_path: Path):
    for path in (two_known(tmp_path / "tokenizer.json", special=()), sentencepiece_model(tmp_path / "t.model", user_defined_symbols=["<end>"])):
        with pytest.raises(DataError, match=r"has no piece '<none>'; name one of its vocabulary with --eod-token"):
            load_tokenizer(path, eod_token="<none>")
    tokenizer = load_tokenizer(tmp_path / "t.model", eod_token="<end>")
    assert tokenizer.eod_token == "<end>"
    assert tokenizer.eod_id not in tokenizer.encode("fox <end> dog")
    assert tokenizer.decode(tokenizer.encode("fox <end> dog")) == "fox <end> dog"


def test_models_trained_here_end_documents_as_before(tmp_path: Path):
    tokenizer = load_tokenizer(train_sentencepiece(TEXTS, tmp_path / "t.model", vocab_size=300))
    assert (tokenizer.eod_id, tokenizer.eod_token) == (1, "<|endoftext|>")
