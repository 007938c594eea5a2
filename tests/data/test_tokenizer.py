"""Tokenizers: exactness on arbitrary text, special tokens, streaming, foreign and damaged files."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from phase8.data import utf8
from phase8.data.end_of_document import END_OF_DOCUMENT
from phase8.data.streaming_decoder import StreamingDecoder
from phase8.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer, check_unicode, load_tokenizer
from phase8.data.tokenizer_training import train_sentencepiece
from phase8.errors import DataError, StorageError

SOURCE = Path(textwrap.__file__).read_text(encoding="utf-8")
TEXTS = [SOURCE[start : start + 500] + "\t# größer — naïve\n" for start in range(0, len(SOURCE), 500)]
TRICKY = [
    "",
    "\n\n\t x\t\t  \n",
    " leading and trailing ",
    "a\0b\0",
    "\u2581",
    "a\u2581b \u2581 \u2581\u2581",
    "\u2585\u2047\ufffd",
    "\r\n\x01\x7f",
    "😀👨‍👩‍👧 e\u0301 \u200b\ufeff\U0010ffff",
    f"{END_OF_DOCUMENT} </s> <unk> <0x41> <s>",
    "｜fullwidth① ﬁ",
]


def byte_level_tokenizer(path: Path, special_token: str = END_OF_DOCUMENT) -> Path:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=[special_token], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.save(str(path))
    return path


def llama_like_model(path: Path) -> Path:
    """A model that normalises and puts a space in front, as most published ones do."""
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS), model_writer=file, vocab_size=420, model_type="bpe", byte_fallback=True, minloglevel=2
        )
    return path


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(train_sentencepiece(TEXTS, tmp_path_factory.mktemp("sp") / "t.model", vocab_size=420))


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(byte_level_tokenizer(tmp_path_factory.mktemp("hf") / "tokenizer.json"))


@pytest.fixture(scope="module")
def llama_like(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(llama_like_model(tmp_path_factory.mktemp("llama") / "t.model"))


@pytest.mark.parametrize("text", TRICKY)
@pytest.mark.parametrize("kind", ["exact", "hugging_face"])
def test_tricky_text_comes_back_exactly(kind: str, text: str, request: pytest.FixtureRequest):
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=300, deadline=None)
@given(text=st.text() | st.text(alphabet=" \t\n\u2581\u2585\0a<>|\u00e9"))
def test_any_text_comes_back_exactly(exact: Tokenizer, text: str):
    ids = exact.encode(text)
    assert exact.decode(ids) == text
    assert all(0 <= i < exact.vocab_size and i not in (0, exact.eod_id) for i in ids)


@pytest.mark.parametrize("kind", ["exact", "hugging_face", "llama_like"])
def test_text_that_spells_the_end_of_document_is_not_one(kind: str, request: pytest.FixtureRequest):
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    for spelled in ("<|endoftext|>", "</s>", "a<|endoftext|>b"):
        assert tokenizer.eod_id not in tokenizer.encode(spelled)


@pytest.mark.parametrize("kind", ["exact", "hugging_face", "llama_like"])
def test_the_end_of_document_decodes_to_nothing(kind: str, request: pytest.FixtureRequest):
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    ids = tokenizer.encode("value")
    assert tokenizer.decode([*ids, tokenizer.eod_id]) == tokenizer.decode(ids) == "value"


@pytest.mark.parametrize("kind", ["exact", "hugging_face"])
def test_bytes_of_ids_add_up_to_those_of_the_text(kind: str, request: pytest.FixtureRequest):
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    assert tokenizer.bytes_per_id is not None and tokenizer.bytes_per_id[tokenizer.eod_id] == 0
    for text in [*TRICKY, *TEXTS]:
        assert tokenizer.bytes_per_id[tokenizer.encode(text)].sum() == len(text.encode())


def test_a_tokenizer_that_rewrites_text_does_not_tell_the_bytes_of_its_ids(llama_like: Tokenizer, tmp_path: Path):
    assert llama_like.bytes_per_id is None
    rare = {"normalizer": {"type": "Replace", "pattern": {"String": "colour"}, "content": "color"}}
    for change in (rare, {"normalizer": {"type": "Lowercase"}}, {"decoder": {"type": "Fuse"}}, {"pre_tokenizer": {"add_prefix_space": True}}):
        content = json.loads(byte_level_tokenizer(tmp_path / "tokenizer.json").read_text())
        for key, value in change.items():
            content[key] = (content[key] or {}) | value
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        assert load_tokenizer(tmp_path / "tokenizer.json").bytes_per_id is None


def test_a_token_that_takes_the_spaces_beside_it_has_no_known_bytes(tmp_path: Path):
    """Its own characters were counted, whatever number of spaces it stood for."""
    plain = tokenizers.Tokenizer.from_file(str(byte_level_tokenizer(tmp_path / "tokenizer.json")))
    plain.add_tokens([tokenizers.AddedToken("<l>", lstrip=True), tokenizers.AddedToken("<r>", rstrip=True), tokenizers.AddedToken("<n>")])
    plain.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert len(tokenizer.encode("   <l>")) == len(tokenizer.encode("<r>   ")) == 1
    assert [tokenizer.bytes_per_id[tokenizer.encode(text)].tolist() for text in ("<l>", "<r>", "<n>")] == [[-1], [-1], [3]]


def test_a_space_that_only_the_tokenizer_puts_in_front_makes_bytes_unknown(tmp_path: Path):
    with (tmp_path / "t.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS), model_writer=file, vocab_size=420, model_type="bpe", byte_fallback=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        )  # fmt: skip
    tokenizer = load_tokenizer(tmp_path / "t.model")
    assert tokenizer.decode(tokenizer.encode("a")) == "a" and tokenizer.bytes_per_id is None


def test_unknown_tokens_have_no_known_bytes(tmp_path: Path):
    with (tmp_path / "t.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS), model_writer=file, vocab_size=90, model_type="char", normalization_rule_name="identity",
            add_dummy_prefix=False, remove_extra_whitespaces=False, minloglevel=2,
        )  # fmt: skip
    tokenizer = load_tokenizer(tmp_path / "t.model")
    assert tokenizer.bytes_per_id is not None
    assert tokenizer.bytes_per_id[tokenizer.encode("a\u4e0db")].tolist() == [1, -1, 1]


def test_trained_vocabulary_is_exact_and_starts_with_the_documented_ids(exact: Tokenizer):
    assert isinstance(exact, SentencePieceTokenizer)
    assert exact.vocab_size == 420
    assert exact.eod_id == 1
    assert exact.encode("\t\t") == [2, 2]
    assert exact.encode("\0") == [3]


def test_newlines_and_runs_of_spaces_are_learned(exact: Tokenizer):
    assert len(exact.encode("        ")) < 8
    assert len(exact.encode(":\n")) == 1


def test_training_twice_gives_the_same_bytes(tmp_path: Path, exact: Tokenizer):
    again = train_sentencepiece(iter(TEXTS), tmp_path / "again.model", vocab_size=420)
    assert again.read_bytes() == exact.path.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["again.model"]


def test_training_uses_text_beside_characters_the_trainer_would_drop(tmp_path: Path):
    texts = ["wonderful\0wonderful \u2585 wonderful\u2581" + "ab" * 10] * 20
    tokenizer = load_tokenizer(train_sentencepiece(texts, tmp_path / "t.model", vocab_size=285))
    assert len(tokenizer.encode("wonderful")) == 1
    assert tokenizer.decode(tokenizer.encode(texts[0])) == texts[0]


def test_training_uses_documents_far_longer_than_a_sentence(tmp_path: Path):
    texts = ["".join(TEXTS) * 40]
    assert len(texts[0]) > 1 << 19
    assert load_tokenizer(train_sentencepiece(texts, tmp_path / "t.model", vocab_size=420)).vocab_size == 420


def test_unigram_can_be_chosen(tmp_path: Path):
    tokenizer = load_tokenizer(train_sentencepiece(TEXTS, tmp_path / "t.model", vocab_size=420, model_type="unigram"))
    assert tokenizer.decode(tokenizer.encode(TEXTS[3])) == TEXTS[3]


@pytest.mark.parametrize("vocab_size", [0, 3, 299, 100_000])
def test_impossible_vocabulary_names_the_allowed_range_and_both_ends_work(tmp_path: Path, vocab_size: int):
    with pytest.raises(DataError, match=rf"vocabulary of {vocab_size} \(model.vocab_size.*use (\d+) to (\d+)") as caught:
        train_sentencepiece(TEXTS, tmp_path / "t.model", vocab_size=vocab_size)
    assert list(tmp_path.iterdir()) == []
    smallest, largest = (int(word) for word in str(caught.value).split("use ")[1].split(" to "))
    for size in (smallest, largest):
        assert load_tokenizer(train_sentencepiece(TEXTS, tmp_path / f"{size}.model", vocab_size=size)).vocab_size == size
    for size in (smallest - 1, largest + 1):
        with pytest.raises(DataError, match="cannot be trained"):
            train_sentencepiece(TEXTS, tmp_path / "t.model", vocab_size=size)


@pytest.mark.parametrize("texts", [[], ["", "\0"]])
def test_training_on_nothing_is_refused(tmp_path: Path, texts: list[str]):
    with pytest.raises(DataError, match="no text to train"):
        train_sentencepiece(texts, tmp_path / "t.model", vocab_size=300)


def test_training_into_a_place_that_cannot_be_written_is_a_storage_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        train_sentencepiece(TEXTS, tmp_path / "file" / "t.model", vocab_size=420)


@pytest.mark.parametrize("make", [byte_level_tokenizer, llama_like_model])
def test_the_digest_of_a_tokenizer_is_of_the_file_that_was_read(tmp_path: Path, make):
    path = make(tmp_path / "tokenizer")
    content, tokenizer = path.read_bytes(), load_tokenizer(path)
    path.write_bytes(b"changed since")
    assert tokenizer.sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("kind", ["exact", "hugging_face"])
def test_lone_surrogates_are_refused(kind: str, request: pytest.FixtureRequest):
    with pytest.raises(DataError, match=r"character 1 .*surrogate.*ud800"):
        request.getfixturevalue(kind).encode("a\ud800b")


def test_the_place_of_a_lone_surrogate_is_counted_from_the_begin_of_the_text(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(utf8, "_PIECE_CHARACTERS", 4)
    for position in range(13):
        with pytest.raises(DataError, match=rf"^character {position} of the text is the lone surrogate '\\udfff', which is not"):
            check_unicode("é" * position + "\udfff" + "x\ud800" * 3)
    check_unicode("é😀" * 10)


@pytest.mark.parametrize("kind", ["exact", "hugging_face"])
@pytest.mark.parametrize("offset", [0, 5])
def test_ids_outside_the_vocabulary_are_refused(kind: str, offset: int, request: pytest.FixtureRequest):
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    with pytest.raises(DataError, match=f"token id {tokenizer.vocab_size + offset} is outside"):
        tokenizer.decode([tokenizer.vocab_size + offset])
    with pytest.raises(DataError, match="token id -1 is outside"):
        tokenizer.decode([-1])


def test_published_models_are_used_as_their_makers_do(llama_like: Tokenizer):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(llama_like.path))
    for text in ["a\u2581b", " lead", "x\ny", "ﬁ  two"]:
        assert llama_like.encode(text) == processor.encode(text)
    assert llama_like.eod_id == processor.eos_id() == 2


def test_truncation_padding_and_added_tokens_of_a_hugging_face_file_do_not_apply(tmp_path: Path):
    path = byte_level_tokenizer(tmp_path / "tokenizer.json")
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single=f"{END_OF_DOCUMENT} $A", special_tokens=[(END_OF_DOCUMENT, 0)])
    tokenizer.save(str(path))
    loaded = load_tokenizer(path)
    assert isinstance(loaded, HuggingFaceTokenizer)
    assert loaded.encode(TEXTS[0]) == load_tokenizer(byte_level_tokenizer(path)).encode(TEXTS[0])


def test_a_hugging_face_model_that_drops_merges_at_random_gives_the_same_ids_every_time(tmp_path: Path):
    path = byte_level_tokenizer(tmp_path / "tokenizer.json")
    expected = load_tokenizer(path).encode(TEXTS[0])
    content = json.loads(path.read_text())
    content["model"]["dropout"] = 0.5
    path.write_text(json.dumps(content))
    loaded = load_tokenizer(path)
    assert [loaded.encode(TEXTS[0]) for _ in range(3)] == [expected] * 3


def test_special_tokens_of_a_hugging_face_file_decode_to_nothing_and_other_added_ones_to_their_text(tmp_path: Path):
    path = byte_level_tokenizer(tmp_path / "tokenizer.json")
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens(["<|call|>"])
    tokenizer.add_tokens(["<|note|>"])
    tokenizer.save(str(path))
    loaded = load_tokenizer(path)
    call, note = loaded.vocab_size - 2, loaded.vocab_size - 1
    assert loaded.decode([call, *loaded.encode("value"), note, loaded.eod_id]) == "value<|note|>"
    assert loaded.decode(loaded.encode("a<|call|>b<|note|>")) == "a<|call|>b<|note|>"
    assert call not in loaded.encode("a<|call|>b") and note in loaded.encode("<|note|>")


def test_hugging_face_vocabulary_covers_the_largest_id(tmp_path: Path):
    path = byte_level_tokenizer(tmp_path / "tokenizer.json")
    content = json.loads(path.read_text())
    content["model"]["vocab"]["zzz"] = 5000
    path.write_text(json.dumps(content))
    assert load_tokenizer(path).vocab_size == 5001


@pytest.mark.parametrize("kind", ["exact", "hugging_face", "llama_like"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
@example(data=None)
def test_streamed_pieces_are_the_whole_text(kind: str, data: st.DataObject | None, request: pytest.FixtureRequest):
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    if data is None:
        ids = tokenizer.encode("naïve 😀 \ufffd — ende")
    else:
        some_ids = st.integers(0, tokenizer.vocab_size - 1) | st.sampled_from(tokenizer.encode("😀é\ufffd x"))
        ids = data.draw(st.lists(some_ids, max_size=30))
    decoder = StreamingDecoder(tokenizer)
    assert "".join(decoder.feed(i) for i in ids) + decoder.flush() == tokenizer.decode(ids)


def test_streaming_holds_back_a_character_until_it_is_whole(exact: Tokenizer):
    ids = exact.encode("a😀b")
    assert len(ids) == 6
    decoder = StreamingDecoder(exact)
    assert [decoder.feed(i) for i in ids] == ["a", "", "", "", "😀", "b"]
    assert decoder.flush() == ""


@pytest.mark.parametrize(
    ("begin", "endless"), [*itertools.product(["", "a", " ", "😀"], ["\n", " ", "\t"]), ("a", END_OF_DOCUMENT), ("😀", END_OF_DOCUMENT)]
)
@pytest.mark.parametrize("kind", ["exact", "hugging_face", "llama_like"])
def test_streaming_decodes_few_ids_for_each_of_endless_spaces(request, monkeypatch, kind: str, begin: str, endless: str):
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    ids = [*tokenizer.encode(begin), *(tokenizer.encode(endless) if endless != END_OF_DOCUMENT else [tokenizer.eod_id]) * 200]
    ids += tokenizer.encode("b")
    num_decoded, decode = [], type(tokenizer).decode
    monkeypatch.setattr(type(tokenizer), "decode", lambda self, ids: num_decoded.append(len(ids)) or decode(self, ids))
    decoder = StreamingDecoder(tokenizer)
    text = "".join(decoder.feed(i) for i in ids)
    assert text == decode(tokenizer, ids) and max(num_decoded) < 20


def test_streaming_keeps_spaces_on_which_later_ones_depend():
    def decode(ids):
        """Every second one of the spaces (0) that follow each other is a tab."""
        return "".join("a" if i else "\t" if number % 2 else " " for i, run in itertools.groupby(ids) for number, _ in enumerate(run))

    ids = [1, *[0] * 9, 1, 0]
    decoder = StreamingDecoder(SimpleNamespace(decode=decode))
    assert "".join(map(decoder.feed, ids)) == decode(ids) == "a \t \t \t \t a "


def test_streaming_flush_shows_the_incomplete_rest_and_starts_afresh(exact: Tokenizer):
    decoder = StreamingDecoder(exact)
    assert [decoder.feed(i) for i in exact.encode("a😀")[:-1]] == ["a", "", "", ""]
    assert set(decoder.flush()) == {"\ufffd"}
    assert decoder.feed(exact.encode("b")[0]) == "b"


@pytest.mark.parametrize(
    ("content", "finding"),
    [
        (b"", "neither a sentencepiece model nor"),
        (b"\x7fELF\x02\x01", "neither a sentencepiece model nor"),
        (b"plain text", "begins with b'plain text'"),
        (b"{}", "JSON but not a Hugging Face tokenizer"),
        (b'{"version": "1.0", "model"', "begins like JSON but is not"),
        (b'{"\xff": 1}', "begins like JSON but is not"),
    ],
)
def test_files_that_are_no_tokenizer_are_named(tmp_path: Path, content: bytes, finding: str):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(DataError, match=finding) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)


def test_a_truncated_model_is_refused_or_whole_never_a_crash(tmp_path: Path, exact: Tokenizer):
    content = exact.path.read_bytes()
    for length in range(0, len(content), 97):
        path = tmp_path / "cut.model"
        path.write_bytes(content[:length])
        with pytest.raises(DataError):
            load_tokenizer(path)


def test_missing_tokenizer_and_directory_are_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"cannot read the tokenizer .*absent.model: No such file"):
        load_tokenizer(tmp_path / "absent.model")
    with pytest.raises(DataError, match=r"cannot read the tokenizer .*: it is a directory"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("opening", ['{"a":' + "[" * 200_000, '{"a":' * 200_000])
@pytest.mark.parametrize("is_closed", [False, True])
def test_json_nested_without_end_is_refused(tmp_path: Path, opening: str, is_closed: bool):
    path = tmp_path / "tokenizer.json"
    path.write_text(opening + ("1" + "".join({"[": "]", "{": "}"}.get(mark, "") for mark in reversed(opening)) if is_closed else ""))
    with pytest.raises(DataError, match="begins like JSON but is nested too deeply to be a tokenizer"):
        load_tokenizer(path)


def test_a_pipe_a_device_and_a_file_of_absurd_size_are_refused_unread(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe", tmp_path / "link"):
        with pytest.raises(DataError, match=f"cannot read the tokenizer {path}: it is a pipe or device"):
            load_tokenizer(path)
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match=r"large\.json has 1,099,511,627,776 bytes, but none has more than 536,870,912"):
        load_tokenizer(tmp_path / "large.json")


def test_a_tokenizer_without_end_of_document_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="no end-of-document token; it needs one of"):
        load_tokenizer(byte_level_tokenizer(tmp_path / "tokenizer.json", special_token="<pad>"))


def test_hugging_face_file_without_the_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = byte_level_tokenizer(tmp_path / "tokenizer.json")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"needs the package tokenizers: pip install 'phase8\[tokenizers\]'"):
        load_tokenizer(path)
