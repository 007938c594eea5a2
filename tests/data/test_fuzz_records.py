"""Records of shards that nobody wrote: the counts are those that were stored, or the shard is made again.

Every run of the tests tries 100 to 150 inputs of a kind, always the same. Ten thousand new ones (a minute):

    python -m pytest -m full -s tests/data/test_fuzz_records.py
"""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from phase8.data.documents import cut_shards
from phase8.data.input_files import find_sources
from phase8.data.shards import DocumentRules, Shard, finished_counts, make_shard
from phase8.data.tokenizer_file import tokenizer_digest
from phase8.data.tokenizer_training import train_sentencepiece
from tests.checkpoint.fuzzing import Tally, Watch, fuzz, mutated_bytes, mutated_json

MAX_NESTED = 15_000  # bytes: deeper nesting than Python's limit is for the tests of the function that reads records


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Shard:
    """A committed shard of two splits."""
    place = tmp_path_factory.mktemp("fuzz")
    texts = [f"document {i} holds the number {i * i}\n" for i in range(60)]
    for i, text in enumerate(texts):
        (place / f"{i:03d}.txt").write_text(text)
    tokenizer = train_sentencepiece(texts, place / "out" / "t.model", vocab_size=300)
    (spans,) = cut_shards(find_sources([place])[0], 1 << 30)
    rules = DocumentRules(validation_fraction=0.3)
    digest = tokenizer_digest(tokenizer)
    committed = Shard(directory=place / "out" / "shard", spans=spans, tokenizer=tokenizer, tokenizer_sha256=digest, rules=rules)
    make_shard(committed)
    assert finished_counts(committed) is not None
    return committed


def _fuzz(shard: Shard, watch: Watch, *, num_inputs: int, derandomize: bool) -> None:
    path = shard.directory / "record.json"
    original = path.read_bytes()
    record = json.loads(original)
    tally = Tally()
    counts_only = mutated_json(record["counts"], "train", "validation").map(lambda text: json.dumps({**record, "counts": 0})[:-2] + text + "}")
    texts = st.one_of(counts_only, counts_only, mutated_json(record, "train", "counts")).map(lambda text: text.encode("utf-8", "surrogatepass"))

    @given(content=st.one_of(texts, texts, mutated_bytes(original)))
    def check(content: bytes) -> None:
        assume(len(content) < MAX_NESTED)
        path.write_bytes(content)
        with watch.over(shard.directory):
            counts = finished_counts(shard)
        if counts is None:
            tally.count("made again")
            return
        tally.count("used")
        found = json.loads(content)
        assert found["made_from"] == record["made_from"] and asdict(counts) == found["counts"]
        assert counts.num_documents == record["counts"]["num_documents"]
        assert all(type(number) is int and number >= 0 for number in (counts.text_bytes, counts.num_empty, counts.num_with_nul, counts.num_invalid))
        assert counts.first_invalid is None or type(counts.first_invalid) is str

    try:
        fuzz(check, num_inputs=num_inputs, derandomize=derandomize)()
    finally:
        path.write_bytes(original)
    tally.check("records of shards", at_least=num_inputs, among={"used", "made again"})


def test_records_of_shards(shard: Shard) -> None:
    _fuzz(shard, Watch(), num_inputs=150, derandomize=True)


@pytest.mark.full
def test_many_records_of_shards(shard: Shard) -> None:
    _fuzz(shard, Watch(), num_inputs=10_000, derandomize=False)


@pytest.mark.parametrize(
    "change",
    [
        {"num_documents": {"train": 60, "validation": 0}},
        {"num_documents": None},
        {"text_bytes": "many"},
        {"num_empty": -1},
        {"num_invalid": True},
        {"num_with_nul": None},
        {"first_invalid": 1},
        {"more": 1},
    ],
    ids=str,
)
def test_counts_of_another_form_are_not_used(change: dict[str, object], shard: Shard) -> None:
    """They were taken as they came: the next arithmetic with them failed, or told wrong numbers."""
    path = shard.directory / "record.json"
    original = path.read_bytes()
    record = json.loads(original)
    try:
        path.write_text(json.dumps(record | {"counts": record["counts"] | change}))
        assert finished_counts(shard) is None
        path.write_text(json.dumps({"made_from": record["made_from"]}))
        assert finished_counts(shard) is None
    finally:
        path.write_bytes(original)
    assert finished_counts(shard) is not None
