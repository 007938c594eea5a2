"""One shard: what becomes of a document, which split it goes to, and when a committed shard counts."""

from __future__ import annotations

import dataclasses
import gzip
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from phase8.data import shards
from phase8.data.documents import cut_shards
from phase8.data.indexed import IndexedDataset
from phase8.data.input_files import find_sources
from phase8.data.shards import DocumentRules, InvalidInputs, Shard, encode_document, finished_counts, make_shard
from phase8.data.tokenizer import Tokenizer, load_tokenizer
from phase8.data.tokenizer_training import train_sentencepiece
from phase8.errors import DataError

TEXTS = [f"document {i}\n\tholds the number {i * i} — é\n" for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(train_sentencepiece(TEXTS, tmp_path_factory.mktemp("tokenizer") / "t.model", vocab_size=300))


def shard_of(directory: Path, tokenizer: Tokenizer, texts: list[str], **rules: object) -> Shard:
    for i, text in enumerate(texts):
        (directory / f"{i:03d}.txt").write_bytes(text.encode())
    (spans,) = cut_shards(find_sources([directory])[0], 1 << 30)
    digest = tokenizer.sha256
    return Shard(directory=directory / "out" / "shard", spans=spans, tokenizer=tokenizer.path, tokenizer_sha256=digest, rules=DocumentRules(**rules))


def stored_texts(prefix: Path, tokenizer: Tokenizer) -> list[str]:
    dataset = IndexedDataset(prefix)
    documents = [np.concatenate(dataset.document(k)) for k in range(dataset.num_documents)]
    assert all(document[-1] == tokenizer.eod_id for document in documents)
    return [tokenizer.decode(document[:-1]) for document in documents]


def test_documents_come_back_in_order_each_ended(tmp_path: Path, tokenizer: Tokenizer):
    shard = shard_of(tmp_path, tokenizer, TEXTS)
    counts = make_shard(shard)
    assert stored_texts(shard.directory / "train", tokenizer) == TEXTS
    assert counts.num_documents == {"train": 60}
    assert counts.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert finished_counts(shard) == counts


def test_the_end_of_document_can_be_left_out(tmp_path: Path, tokenizer: Tokenizer):
    shard = shard_of(tmp_path, tokenizer, TEXTS[:2], append_eod=False)
    make_shard(shard)
    dataset = IndexedDataset(shard.directory / "train")
    assert [tokenizer.decode(dataset.document(k)[0]) for k in range(2)] == TEXTS[:2]


def test_empty_documents_are_counted_not_written(tmp_path: Path, tokenizer: Tokenizer):
    texts = ["a", "b", "c"]
    shard = shard_of(tmp_path, tokenizer, texts)
    (tmp_path / "lines.jsonl").write_text('{"text": ""}\n{"text": "d"}\n')
    shard = dataclasses.replace(shard, spans=cut_shards(find_sources([tmp_path])[0], 1 << 30)[0])
    counts = make_shard(shard)
    assert counts.num_empty == 1
    assert stored_texts(shard.directory / "train", tokenizer) == [*texts, "d"]


def test_a_text_has_one_split_whatever_is_beside_it(tmp_path: Path, tokenizer: Tokenizer):
    shard = shard_of(tmp_path, tokenizer, [*TEXTS, *reversed(TEXTS)], validation_fraction=0.3)
    counts = make_shard(shard)
    train, validation = (set(stored_texts(shard.directory / split, tokenizer)) for split in ("train", "validation"))
    assert train | validation == set(TEXTS)
    assert not train & validation
    assert counts.num_documents == {"train": 2 * len(train), "validation": 2 * len(validation)}
    assert 8 <= len(validation) <= 28
    wider = DocumentRules(validation_fraction=0.5)
    assert all(wider.split_of(text) == "validation" for text in validation)


def test_the_split_of_a_text_never_changes():
    rules = DocumentRules(validation_fraction=0.5)
    assert [rules.split_of(text)[0] for text in ("a", "b", "c", "d", "é", "")] == ["t", "v", "v", "v", "v", "t"]


def test_invalid_inputs_stop_or_are_counted(tmp_path: Path, tokenizer: Tokenizer):
    shard = shard_of(tmp_path, tokenizer, ["good"])
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    spans = cut_shards(find_sources([tmp_path])[0], 1 << 30)[0]
    with pytest.raises(DataError, match=r"bad\.txt is not UTF-8 .*--skip-invalid"):
        make_shard(dataclasses.replace(shard, spans=spans))
    assert list((tmp_path / "out").iterdir()) == []
    counts = make_shard(dataclasses.replace(shard, spans=spans, rules=DocumentRules(skip_invalid=True)))
    assert counts.num_invalid == 1
    assert "bad.txt" in str(counts.first_invalid)
    assert stored_texts(shard.directory / "train", tokenizer) == ["good"]


def test_counting_keeps_the_first_message():
    invalid = InvalidInputs(skip=True)
    for message in ("first", "second"):
        invalid(DataError(message))
    assert (invalid.count, invalid.first) == (2, "first")


def test_a_shard_counts_only_when_whole_and_made_from_the_same(tmp_path: Path, tokenizer: Tokenizer):
    shard = shard_of(tmp_path, tokenizer, TEXTS[:5])
    assert finished_counts(shard) is None
    make_shard(shard)
    assert finished_counts(shard) is not None
    for change in ({"tokenizer_sha256": "1"}, {"rules": DocumentRules(append_eod=False)}, {"spans": shard.spans[1:]}):
        assert finished_counts(dataclasses.replace(shard, **change)) is None
    (tmp_path / "000.txt").write_text("changed")
    changed = cut_shards(find_sources([tmp_path])[0], 1 << 30)[0]
    assert finished_counts(dataclasses.replace(shard, spans=changed)) is None
    tokens = shard.directory / "train.bin"
    written = tokens.read_bytes()
    for altered in (written[:-2], b"zz" + written[2:]):
        tokens.write_bytes(altered)
        assert finished_counts(shard) is None


def test_a_tokenizer_that_is_replaced_meanwhile_is_refused(tmp_path: Path, tokenizer: Tokenizer):
    """Its ids were written beside those of the one before, in a shard that says that it is of that one."""
    shard = dataclasses.replace(shard_of(tmp_path, tokenizer, TEXTS[:5]), tokenizer=tmp_path / "replaced.model")
    shard.tokenizer.write_bytes(tokenizer.path.read_bytes())
    make_shard(shard)
    train_sentencepiece(["other words"], shard.tokenizer, vocab_size=280)
    with pytest.raises(DataError, match=r"replaced\.model was changed while it was being used; run again when nothing writes to it"):
        make_shard(dataclasses.replace(shard, directory=tmp_path / "next"))
    assert not (tmp_path / "next").exists()


class WordTokenizer(Tokenizer):
    """As quick as a tokenizer can be: an id for every four characters."""

    def __init__(self):
        super().__init__(Path("none"), b"", vocab_size=300, eod_id=1, eod_token="</s>", unknown_id=None)

    def piece_of(self, token_id: int) -> str:
        raise NotImplementedError

    def _encode(self, text: str, *, without_eod: bool) -> list[int]:
        return [7] * (len(text) // 4)

    def _parts(self, text: str, *, without_eod: bool) -> list[tuple[int, str]]:
        raise NotImplementedError

    def _bytes_per_id(self) -> None:
        return None

    def _decode(self, ids: list[int]) -> str:
        raise DataError("it cannot")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt", "separated.txt"])
def test_a_huge_document_is_in_memory_a_few_times_and_progress_goes_on_inside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer, name: str
):
    monkeypatch.setattr(shards, "load_tokenizer", lambda *_, **__: WordTokenizer())
    monkeypatch.setattr(shards, "_PIECE_CHARACTERS", 1 << 20)
    size, path = 24 << 20, tmp_path / name
    text = ("abcdefg " * 511 + "abcdefg\n") * (size // 4096)
    content = (json.dumps({"text": text}) + "\n" if "jsonl" in name else text + "<|endoftext|>\n").encode() * 2
    path.write_bytes(gzip.compress(content, 1) if name.endswith(".gz") else content)
    separator = "<|endoftext|>" if name == "separated.txt" else None
    num_documents = 1 if name == "a.txt" else 2
    (spans,) = cut_shards(find_sources([path])[0], 1 << 30, document_separator=separator)
    rules = DocumentRules(validation_fraction=1e-9, document_separator=separator)
    shard = Shard(directory=tmp_path / "out" / "shard", spans=spans, tokenizer=tokenizer.path, tokenizer_sha256=WordTokenizer().sha256, rules=rules)
    del text, content
    seen: list[int] = []
    tracemalloc.start()
    counts = make_shard(shard, on_bytes=seen.append)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert counts.num_documents == {"train": num_documents, "validation": 0}
    assert seen == sorted(seen)
    assert len(seen) >= 40
    assert path.stat().st_size * 0.95 <= seen[-1] <= path.stat().st_size
    # Held at once: a line and the text of it, then the text and its ids (a quarter of the characters, two bytes each) in pieces and as one.
    assert peak < 2.5 * size * (2 / num_documents)


def test_long_documents_are_encoded_in_pieces_that_lose_nothing(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    text = "".join(TEXTS) + "document number " * 20 + "\n\n" + TEXTS[0]
    whole = encode_document(text, tokenizer)
    monkeypatch.setattr(shards, "_PIECE_CHARACTERS", 45)
    pieces = encode_document(text, tokenizer)
    assert tokenizer.decode(pieces) == text
    assert pieces.dtype == whole.dtype == np.dtype("<u2")
    assert len(pieces) > len(whole)
    monkeypatch.setattr(shards, "_PIECE_CHARACTERS", len(text))
    np.testing.assert_array_equal(encode_document(text, tokenizer), whole)
