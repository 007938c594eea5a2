"""Preparation: what is written and named, independence of workers and shards, and going on after a kill -9 at any point."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers

from phase8.data.indexed import IndexedDataset, IndexedWriter
from phase8.data.input_files import find_sources
from phase8.data.lost_text import LostText
from phase8.data.pair_record import MadeWith
from phase8.data.prepare import prepare
from phase8.data.prepare_options import PrepareOptions, PrepareReport
from phase8.data.shards import DocumentRules
from phase8.data.staging import exclusive_lock
from phase8.data.tokenizer import load_tokenizer
from phase8.data.tokenizer_training import train_sentencepiece
from phase8.errors import ConfigError, DataError, StorageError

ROOT = Path(__file__).parents[2]
TEXTS = [f"document {i}\n\tholds the number {i * i} — é\n" * (1 + i % 5) for i in range(120)]


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A directory with text files, JSON lines and gzipped JSON lines that hold TEXTS in order."""
    directory = tmp_path / "inputs"
    directory.mkdir()
    for i, text in enumerate(TEXTS[:20]):
        (directory / f"a{i:02d}.txt").write_bytes(text.encode())
    (directory / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[20:90]))
    (directory / "c.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[90:]).encode()))
    return directory


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_sentencepiece(TEXTS, tmp_path_factory.mktemp("tokenizer") / "t.model", vocab_size=300)


def options(inputs: Path, prefix: Path, **changes: object) -> PrepareOptions:
    """A preparation with a tokenizer of its own, a split and, unless told otherwise, one shard."""
    defaults = {
        "train_tokenizer": True,
        "vocab_size": 300,
        "rules": DocumentRules(validation_fraction=0.2),
        "shard_bytes": 1 << 20,
        "tokenizer_sample_bytes": 20_000,
    }
    return PrepareOptions(inputs=(inputs,), output_prefix=prefix, **defaults | changes)


def content(directory: Path) -> dict[str, bytes]:
    """Bytes of everything but the record, which holds paths."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if not path.name.endswith("_prepared.json")}


def all_files(directory: Path) -> dict[str, bytes]:
    """Bytes of everything."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def stored_texts(prefix: str, tokenizer_path: Path) -> list[str]:
    dataset, tokenizer = IndexedDataset(prefix), load_tokenizer(tokenizer_path)
    return [tokenizer.decode(np.concatenate(dataset.document(k))) for k in range(dataset.num_documents)]


def test_documents_are_written_in_order_under_megatrons_name(inputs: Path, tmp_path: Path, tokenizer_path: Path):
    report = prepare(
        options(inputs, tmp_path / "out" / "mine", tokenizer=tokenizer_path, train_tokenizer=False, vocab_size=None, rules=DocumentRules())
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "mine_text_document.bin",
        "mine_text_document.idx",
        "mine_text_document.meta.json",
        "mine_text_prepared.json",
    ]
    assert stored_texts(str(tmp_path / "out" / "mine_text_document"), tokenizer_path) == TEXTS
    assert (report.num_documents, report.dtype, report.vocab_size) == (120, "uint16", 300)
    assert report.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert report.settings == [
        f"data.train={tmp_path}/out/mine_text_document",
        f"data.tokenizer={tokenizer_path}",
        "model.vocab_size=300",
    ]


def test_a_split_and_a_trained_tokenizer_have_names_of_their_own(inputs: Path, tmp_path: Path):
    report = prepare(options(inputs, tmp_path / "out" / "mine"))
    names = ["mine_text_prepared.json", "mine_text_tokenizer.model"]
    names += [f"mine_{split}_text_document.{suffix}" for split in ("train", "validation") for suffix in ("bin", "idx", "meta.json")]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)
    tokenizer = tmp_path / "out" / "mine_text_tokenizer.model"
    train, validation = (stored_texts(report.splits[split].prefix, tokenizer) for split in ("train", "validation"))
    rules = DocumentRules(validation_fraction=0.2)
    assert train == [text for text in TEXTS if rules.split_of(text) == "train"]
    assert validation == [text for text in TEXTS if rules.split_of(text) == "validation"]
    assert report.splits["train"].num_documents == len(train)
    assert f"data.validation={tmp_path}/out/mine_validation_text_document" in report.settings


def test_the_output_does_not_depend_on_the_number_of_workers(inputs: Path, tmp_path: Path):
    prepare(options(inputs, tmp_path / "one" / "x", shard_bytes=4000))
    prepare(options(inputs, tmp_path / "two" / "x", shard_bytes=4000, num_workers=2))
    assert content(tmp_path / "one") == content(tmp_path / "two")


@pytest.mark.parametrize("form", ["parquet", "separated text", "zst"])
def test_the_output_depends_on_no_cut_of_any_format(inputs: Path, tmp_path: Path, tokenizer_path: Path, form: str):
    rules = DocumentRules(document_separator="<|endoftext|>" if form == "separated text" else None)
    path = tmp_path / {"parquet": "a.parquet", "separated text": "a.txt", "zst": "a.jsonl.zst"}[form]
    if form == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), path, row_group_size=10)
    elif form == "zst":
        path.write_bytes(zstandard.compress("".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()))
    else:
        path.write_bytes("<|endoftext|>\n".join(TEXTS).encode())
    given = {"tokenizer": tokenizer_path, "train_tokenizer": False, "vocab_size": None, "rules": rules}
    prepare(options(path, tmp_path / "one" / "x", **given))
    prepare(options(path, tmp_path / "two" / "x", shard_bytes=700, num_workers=2 if form == "parquet" else 1, **given))
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert stored_texts(str(tmp_path / "one" / "x_text_document"), tokenizer_path) == TEXTS


def test_the_output_does_not_depend_on_the_shards(inputs: Path, tmp_path: Path, tokenizer_path: Path):
    given = {"tokenizer": tokenizer_path, "train_tokenizer": False, "vocab_size": None}
    prepare(options(inputs, tmp_path / "one" / "x", shard_bytes=2000, **given))
    prepare(options(inputs, tmp_path / "two" / "x", **given))
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_the_tokenizer_learns_from_training_documents_all_over_the_inputs(inputs: Path, tmp_path: Path):
    rules = DocumentRules(validation_fraction=0.2)
    (inputs / "d.jsonl").write_text(json.dumps({"text": "zebra " * 300}) + "\n")
    assert rules.split_of("zebra " * 300) == "train"
    held_out = next(text for text in (f"{i} quokka " * 300 for i in range(100)) if rules.split_of(text) == "validation")
    (inputs / "e.jsonl").write_text(json.dumps({"text": held_out}) + "\n")
    prepare(options(inputs, tmp_path / "x", tokenizer_sample_bytes=1 << 20, shard_bytes=2000))
    tokenizer = load_tokenizer(tmp_path / "x_text_tokenizer.model")
    assert len(tokenizer.encode(" zebra")) == 1
    assert len(tokenizer.encode(" quokka")) > 2


def test_the_tokenizer_sample_is_bounded(inputs: Path, tmp_path: Path):
    small = prepare(options(inputs, tmp_path / "small", tokenizer_sample_bytes=400, vocab_size=290))
    assert small.vocab_size == 290
    with pytest.raises(DataError, match=r"vocabulary of 400 .* use \d+ to \d+"):
        prepare(options(inputs, tmp_path / "large", tokenizer_sample_bytes=400, vocab_size=400))


def test_a_finished_preparation_is_not_done_again(inputs: Path, tmp_path: Path):
    first = prepare(options(inputs, tmp_path / "out" / "x"))
    stages: list[str] = []
    again = prepare(options(inputs, tmp_path / "out" / "x", num_workers=2), on_progress=lambda stage, *_: stages.append(stage))
    assert stages == []
    assert again.is_reused
    assert dataclasses.replace(again, is_reused=False) == first


@pytest.mark.parametrize(
    "change",
    [
        *("input", "input of equal size and time", "new input", "rules", "tokenizer"),
        *("output damaged", "output altered", "output missing", "tokenizer lost"),
    ],
)
def test_what_changed_is_prepared_again_where_it_may_be_overwritten(inputs: Path, tmp_path: Path, change: str):
    old = prepare(options(inputs, tmp_path / "out" / "x"))
    changes: dict[str, object] = {}
    refusal = {
        "input": f"{inputs}/a00.txt was changed", "input of equal size and time": f"{inputs}/b.jsonl was changed",
        "new input": f"{inputs}/z.txt is new", "rules": "--append-eod was true and is false", "tokenizer": "--vocab-size was 300 and is 301",
    }.get(change)  # fmt: skip
    if change == "input":
        (inputs / "a00.txt").write_text("something else")
    elif change == "input of equal size and time":
        path = inputs / "b.jsonl"
        before = path.stat()
        path.write_text(path.read_text().replace("number 400", "number 007"))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    elif change == "new input":
        (inputs / "z.txt").write_text("something new")
    elif change == "rules":
        changes = {"rules": DocumentRules(validation_fraction=0.2, append_eod=False)}
    elif change == "tokenizer":
        changes = {"vocab_size": 301}
    elif change == "output damaged":
        path = tmp_path / "out" / "x_train_text_document.bin"
        path.write_bytes(path.read_bytes()[:-2])
    elif change == "output altered":
        path = tmp_path / "out" / "x_validation_text_document.bin"
        path.write_bytes(b"zz" + path.read_bytes()[2:])
    elif change == "output missing":
        (tmp_path / "out" / "x_validation_text_document.idx").unlink()
    else:
        (tmp_path / "out" / "x_text_tokenizer.model").write_bytes(b"")
    if refusal is not None:  # what is damaged or lost is made again without being asked for
        before = all_files(tmp_path / "out")
        sentence = rf"x, but .*x_train_text_document\.bin exists, prepared with other inputs or options: {re.escape(refusal)}; give .* --overwrite\.$"
        with pytest.raises(ConfigError, match=sentence):
            prepare(options(inputs, tmp_path / "out" / "x", **changes))
        assert all_files(tmp_path / "out") == before
        changes["overwrite"] = True
    new = prepare(options(inputs, tmp_path / "out" / "x", **changes))
    assert not new.is_reused
    prepare(options(inputs, tmp_path / "fresh" / "x", **changes))
    assert content(tmp_path / "out") == content(tmp_path / "fresh")
    if change.startswith(("output", "tokenizer lost")):
        assert dataclasses.replace(new, is_reused=False) == old


def test_all_that_differs_is_named(inputs: Path, tmp_path: Path, tokenizer_path: Path):
    prepare(options(inputs, tmp_path / "x"))
    (inputs / "a00.txt").rename(inputs / "a000.txt")
    others = {"tokenizer": tokenizer_path, "train_tokenizer": False, "vocab_size": None, "rules": DocumentRules()}
    with pytest.raises(ConfigError) as caught:  # of another split, whose pairs have other names: the record would no longer describe those there
        prepare(options(inputs, tmp_path / "x", **others))
    assert f"{tmp_path}/x_train_text_document.bin exists" in str(caught.value)
    named = ["a000.txt is new", "a00.txt is missing", "--validation-fraction was 0.2 and is 0.0", "and 1 more"]
    assert all(difference in str(caught.value) for difference in named)


def test_pairs_of_which_no_record_tells_are_kept(inputs: Path, tmp_path: Path):
    prefix = tmp_path / "x_train_text_document"
    for path in (prefix, tmp_path / "y_text_document"):
        with IndexedWriter(path, dtype=np.dtype(np.uint16)) as writer:
            writer.add_document(np.array([1, 2]))
    for record in (None, "[]", "{"):
        if record is not None:
            (tmp_path / "x_text_prepared.json").write_text(record)
        with pytest.raises(ConfigError, match=r"x_train_text_document\.bin exists, and no record says what it was made from; give another"):
            prepare(options(inputs, tmp_path / "x"))
    assert not prepare(options(inputs, tmp_path / "y")).is_reused  # the pair there has a name that no split has
    prepare(options(inputs, tmp_path / "x", overwrite=True))
    assert IndexedDataset(prefix).num_documents > 1 and prepare(options(inputs, tmp_path / "x")).is_reused


@pytest.mark.parametrize("made_from", [{}, {"sources": [7], "rules": [], "tokenizer": {"sha256": 1}}, {"sources": {}, "rules": {"x": 1}}], ids=str)
def test_records_of_another_form_refuse_in_a_sentence(inputs: Path, tmp_path: Path, made_from: dict[str, object]):
    prepare(options(inputs, tmp_path / "x"))
    (tmp_path / "x_text_prepared.json").write_text(json.dumps({"made_from": made_from}))
    with pytest.raises(ConfigError, match=r"exists, prepared with other inputs or options: another release of phase8 made it.*; give another"):
        prepare(options(inputs, tmp_path / "x"))


KILLED_RUN = """
import os, pickle, signal, sys
from phase8.data.prepare import prepare

remaining = int(sys.argv[2])

def on_progress(stage, completed, total):
    global remaining
    remaining -= 1
    if remaining < 0:
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    with open(sys.argv[1], "rb") as file:
        prepare(pickle.load(file), on_progress=on_progress)
    print("finished")
"""


def run_killed(tmp_path: Path, prepared: PrepareOptions, num_events: int) -> bool:
    """Runs a preparation in a process that kills itself at its (num_events + 1)st progress event; whether it was killed."""
    (tmp_path / "options").write_bytes(pickle.dumps(prepared))
    (tmp_path / "script.py").write_text(KILLED_RUN)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "options"), str(num_events)]
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL or "finished" in result.stdout, result.stderr
    return result.returncode == -signal.SIGKILL


@pytest.mark.parametrize("num_workers", [1, 2])
def test_killed_again_and_again_the_result_is_that_of_an_undisturbed_run(inputs: Path, tmp_path: Path, num_workers: int):
    prepared = options(inputs, tmp_path / "out" / "x", num_workers=num_workers, shard_bytes=2000)
    events: list[str] = []
    prepare(options(inputs, tmp_path / "undisturbed" / "x", shard_bytes=2000), on_progress=lambda stage, *_: events.append(stage))
    points = [4, 3] if num_workers == 1 else [5]
    for point in points:
        assert run_killed(tmp_path, prepared, point)
        assert not (tmp_path / "out" / "x_text_prepared.json").exists()
    assert len(list((tmp_path / "out" / "x_text.preparing").glob("shard-*"))) >= 3
    stages: list[str] = []
    prepare(prepared, on_progress=lambda stage, *_: stages.append(stage))
    assert len(stages) < len(events)
    assert "training the tokenizer" not in stages
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")


def test_killed_while_publishing_nothing_half_written_is_left(inputs: Path, tmp_path: Path):
    prepared = options(inputs, tmp_path / "out" / "x", shard_bytes=1 << 20)
    prepare(dataclasses.replace(prepared, output_prefix=tmp_path / "undisturbed" / "x"))
    assert run_killed(tmp_path, prepared, 3)
    # From here on the shards are finished: the events of a run are tokenizing, writing train (twice), writing validation (twice).
    for point in (1, 3, 4):
        assert run_killed(tmp_path, prepared, point)
        assert not (tmp_path / "out" / "x_text_prepared.json").exists()
        assert (tmp_path / "out" / "x_train_text_document.idx").exists() == (point >= 2)
        assert any(path.name.endswith(".partial") for path in (tmp_path / "out").iterdir()) == (point in (1, 3))
    prepare(prepared)
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")


def test_what_a_stopped_preparation_has_replaced_is_made_again_with_the_options_of_before(inputs: Path, tmp_path: Path, tokenizer_path: Path):
    """Pairs of other options may have as many documents and tokens as those that an earlier record describes."""
    prepared = options(inputs, tmp_path / "out" / "mine", train_tokenizer=False, vocab_size=None, tokenizer=tokenizer_path)
    prepare(prepared)
    train = tmp_path / "out" / "mine_train_text_document.bin"
    before, names = train.read_bytes(), ("a00.txt", "a01.txt")
    texts = [(inputs / name).read_bytes() for name in names]

    def replace_inputs(new: list[bytes]) -> None:
        for name, text in zip(names, new, strict=True):
            (inputs / name).write_bytes(text)

    def stop(stage: str, completed: int, total: int) -> None:
        if stage == "writing validation":
            raise KeyboardInterrupt

    replace_inputs(texts[::-1])
    with pytest.raises(KeyboardInterrupt):
        prepare(dataclasses.replace(prepared, overwrite=True), on_progress=stop)
    assert train.read_bytes() != before
    replace_inputs(texts)
    with pytest.raises(ConfigError, match=r"a00\.txt was changed, .*a01\.txt was changed; give another"):
        prepare(prepared)
    assert not prepare(dataclasses.replace(prepared, overwrite=True)).is_reused and train.read_bytes() == before


def test_only_changed_shards_are_made_again_after_a_kill(inputs: Path, tmp_path: Path, tokenizer_path: Path):
    prepared = options(inputs, tmp_path / "out" / "x", tokenizer=tokenizer_path, train_tokenizer=False, vocab_size=None, shard_bytes=2000)
    events: list[str] = []
    prepare(dataclasses.replace(prepared, output_prefix=tmp_path / "y"), on_progress=lambda stage, *_: events.append(stage))
    num_shards = events.count("tokenizing") - 1
    assert run_killed(tmp_path, prepared, num_shards)
    last = sorted((tmp_path / "out" / "x_text.preparing").glob("shard-*"))[-2]
    made_before = (last / "record.json").stat().st_mtime_ns
    text = (inputs / "a00.txt").read_text()
    (inputs / "a00.txt").write_text(text.replace("document", "tnemucod"))
    stages: list[str] = []

    def on_progress(stage: str, completed: int, total: int) -> None:
        stages.append(stage)
        if stage == "tokenizing" and last.exists():
            assert (last / "record.json").stat().st_mtime_ns == made_before

    report = prepare(prepared, on_progress=on_progress)
    assert 2 <= stages.count("tokenizing") <= 3
    both = stored_texts(report.splits["train"].prefix, tokenizer_path) + stored_texts(report.splits["validation"].prefix, tokenizer_path)
    assert sorted(both) == sorted([TEXTS[0].replace("document", "tnemucod"), *TEXTS[1:]])


def test_two_preparations_of_one_output_do_not_mix(inputs: Path, tmp_path: Path):
    with exclusive_lock(tmp_path / "out" / "x_text.lock", wait=False), pytest.raises(DataError, match="another process holds"):
        prepare(options(inputs, tmp_path / "out" / "x"))
    prepare(options(inputs, tmp_path / "out" / "x"))


def test_invalid_documents_stop_the_preparation_or_are_counted(inputs: Path, tmp_path: Path):
    (inputs / "bad.jsonl").write_text('{"text": "fine"}\n{"txet": "wrong"}\n{"text": ""}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl, line 2: .*without the key 'text'.*--skip-invalid"):
        prepare(options(inputs, tmp_path / "x"))
    report = prepare(options(inputs, tmp_path / "x", rules=DocumentRules(validation_fraction=0.2, skip_invalid=True)))
    assert (report.num_invalid, report.num_empty, report.num_documents) == (1, 1, 121)
    assert "bad.jsonl, line 2" in str(report.first_invalid)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_refusal_leaves_finished_shards_and_nothing_else(tmp_path: Path, tokenizer_path: Path, num_workers: int):
    prefix = tmp_path / "out" / "x"
    for name, text in (("a", '{"text": "fine"}\n'), ("b", '{"text": null}\n')):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.jsonl").write_text(text)
    bad = options(tmp_path / "b", prefix, tokenizer=tokenizer_path, train_tokenizer=False, vocab_size=None, num_workers=num_workers)
    with pytest.raises(DataError, match="'text' is null"):
        prepare(bad)
    assert os.listdir(tmp_path / "out") == []
    with pytest.raises(DataError, match="'text' is null"):
        prepare(dataclasses.replace(bad, inputs=(tmp_path / "a", tmp_path / "b"), shard_bytes=15))
    assert "shard-000000" in os.listdir(tmp_path / "out" / "x_text.preparing")


def test_the_first_invalid_document_is_the_first_of_the_inputs_also_after_an_interruption(tmp_path: Path, tokenizer_path: Path):
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    for name in ("a.txt", "b.txt", "c.txt"):
        (inputs / name).write_text(name * 100)
    (inputs / "c.txt").write_bytes(b"\xff" * 100)
    given = {"train_tokenizer": False, "vocab_size": None, "tokenizer": tokenizer_path, "rules": DocumentRules(skip_invalid=True)}
    prepared = options(inputs, tmp_path / "out" / "x", shard_bytes=100, **given)

    def interrupt(stage: str, completed: int, total: int) -> None:
        if stage.startswith("writing"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(prepared, on_progress=interrupt)
    (inputs / "a.txt").write_bytes(b"\xff" * 100)
    report = prepare(prepared)
    assert report.num_invalid == 2
    assert "a.txt" in str(report.first_invalid)


def in_words(path: Path) -> Path:
    """A tokenizer of a few words, one of which ends documents; it spells nothing."""
    library = Library(models.WordLevel({"[UNK]": 0, "fox": 1, "dog": 2, "</s>": 3, "<end>": 4}, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.save(str(path))
    return path


def of_words(tmp_path: Path, *documents: str, **rules: object) -> PrepareOptions:
    path = tmp_path / "words.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    given = {"tokenizer": in_words(tmp_path / "tokenizer.json"), "train_tokenizer": False, "vocab_size": None, "rules": DocumentRules(**rules)}
    return options(path, tmp_path / "out" / "x", shard_bytes=40, **given)


def test_text_that_the_tokenizer_loses_is_reported_also_when_nothing_is_to_do(tmp_path: Path):
    prepared = of_words(tmp_path, "fox dog", "fox hen", "dog hen hen", "fox")
    report = prepare(prepared)
    expected = LostText(num_unknown=3, num_documents_with_unknown=2, first_unknown="'hen' in a document that begins with 'fox hen'")
    assert report.lost == expected
    again = prepare(prepared)
    assert again.is_reused and again.lost == expected


@pytest.mark.parametrize("earlier", ["of format 1", "without the losses"])
def test_a_record_without_losses_is_not_a_finished_preparation(tmp_path: Path, earlier: str):
    prepared = of_words(tmp_path, "fox dog")
    prepare(prepared)
    path = tmp_path / "out" / "x_text_prepared.json"
    record = json.loads(path.read_text())
    del record["report"]["lost"]
    if earlier == "of format 1":
        record["made_from"]["format_version"] = 1
        del record["made_from"]["rules"]["eod_token"]
    path.write_text(json.dumps(record))
    if earlier == "of format 1":
        with pytest.raises(ConfigError, match="prepared with other inputs or options: another release of phase8 made it; give"):
            prepare(prepared)
        prepared = dataclasses.replace(prepared, overwrite=True)
    assert not prepare(prepared).is_reused
    assert prepare(prepared).is_reused


def test_a_document_that_only_an_end_of_document_can_encode_is_refused_or_skipped(tmp_path: Path):
    documents = ["fox", "fox </s> dog", "dog"]
    with pytest.raises(DataError, match=r"'</s>' cannot be encoded another way .* \(or pass --skip-invalid"):
        prepare(of_words(tmp_path, *documents))
    report = prepare(of_words(tmp_path, *documents, skip_invalid=True))
    assert (report.num_documents, report.num_invalid) == (2, 1)
    assert "'</s>' cannot be encoded another way" in str(report.first_invalid)


def test_a_named_end_of_document_is_written_and_passed_on(tmp_path: Path):
    report = prepare(of_words(tmp_path, "fox dog", "fox </s>", eod_token="<end>"))
    dataset = IndexedDataset(tmp_path / "out" / "x_text_document")
    assert [np.concatenate(dataset.document(k)).tolist() for k in range(2)] == [[1, 2, 4], [1, 3, 4]]
    assert "data.eod_token=<end>" in report.settings
    assert dataset.record.made_with == MadeWith(tokenizer_sha256=report.tokenizer_sha256, eod_id=4, eod_token="<end>")


def test_data_without_ends_of_documents_fit_every_end_of_document(tmp_path: Path):
    report = prepare(of_words(tmp_path, "fox dog", append_eod=False))
    made = IndexedDataset(tmp_path / "out" / "x_text_document").record.made_with
    assert made == MadeWith(tokenizer_sha256=report.tokenizer_sha256, eod_id=None, eod_token=None)
    other = of_words(tmp_path, "fox dog", "fox <end>", eod_token="</s>")
    assert not prepare(dataclasses.replace(other, overwrite=True)).is_reused


@pytest.mark.parametrize(
    ("name", "lines", "count"),
    [
        ("a.jsonl", "", " (1 was empty or invalid)"),
        ("a.txt", "", " (1 was empty or invalid)"),
        ("a.jsonl", "\n\n", ""),
        ("a.jsonl", '{"text": ""}\n' * 2, " (2 were empty or invalid)"),
    ],
)
def test_an_empty_corpus_is_refused(tmp_path: Path, tokenizer_path: Path, name: str, lines: str, count: str):
    path = tmp_path / name
    path.write_text(lines)
    given = {"train_tokenizer": False, "vocab_size": None, "tokenizer": tokenizer_path}
    with pytest.raises(DataError, match=re.escape(f"the inputs hold no document with text{count}; give other inputs")):
        prepare(options(path, tmp_path / "out" / "x", **given))
    with pytest.raises(DataError, match="no text to train"):
        prepare(options(path, tmp_path / "out" / "x"))
    assert list((tmp_path / "out").glob("*_document.*")) == []


def test_empty_files_and_documents_with_nul_bytes_are_counted(inputs: Path, tmp_path: Path, tokenizer_path: Path):
    for name in ("empty.jsonl", "empty.txt"):
        (inputs / name).write_bytes(b"")
    (inputs / "mark.txt").write_bytes(b"\xef\xbb\xbf")
    (inputs / "nul.txt").write_bytes("wide".encode("utf-16-le") * 2)
    given = {"train_tokenizer": False, "vocab_size": None, "tokenizer": tokenizer_path}
    report = prepare(options(inputs, tmp_path / "out" / "x", rules=DocumentRules(), shard_bytes=300, num_workers=2, **given))
    assert (report.num_empty, report.num_with_nul, report.num_documents) == (3, 1, len(TEXTS) + 1)
    assert "w\0i\0d\0e\0" * 2 in stored_texts(report.splits["train"].prefix, tokenizer_path)
    again = prepare(options(inputs, tmp_path / "out" / "x", rules=DocumentRules(), **given))
    assert again == dataclasses.replace(report, is_reused=True)


def test_a_split_without_a_document_is_refused_and_leaves_nothing(tmp_path: Path, tokenizer_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("a")
    for fraction, split in ((0.2, "validation"), (0.999, "train")):
        path.write_text("a" if split == "validation" else "ab")
        rules = DocumentRules(validation_fraction=fraction, document_separator="---")
        message = rf"none of the 1 documents fell into the {split} split with .* {fraction}; .* or many with --document-separator\)"
        with pytest.raises(DataError, match=message):
            prepare(options(path, tmp_path / "x", train_tokenizer=False, vocab_size=None, tokenizer=tokenizer_path, rules=rules))
        assert list(tmp_path.iterdir()) == [path]


def test_a_single_text_file_cannot_be_split_and_that_is_said_before_any_work(tmp_path: Path):
    path, empty = tmp_path / "a.txt", tmp_path / "empty.txt"
    path.write_text("text\n" * 1000)
    empty.touch()
    sentence = rf"{path} is one document, .* but --validation-fraction 0\.2 needs at least two; give --document-separator LINE"
    with pytest.raises(DataError, match=sentence):
        prepare(options(tmp_path, tmp_path / "x"), on_progress=lambda *_: pytest.fail("work began"))
    assert {*tmp_path.iterdir()} == {path, empty}
    for rules in (DocumentRules(), DocumentRules(validation_fraction=0.2, document_separator="text")):  # these get as far as training the tokenizer
        with pytest.raises(DataError, match=r"no text to train|cannot be trained"):
            prepare(options(tmp_path, tmp_path / "x", rules=rules))


def test_an_input_that_changes_meanwhile_is_not_published(inputs: Path, tmp_path: Path):
    def on_progress(stage: str, completed: int, total: int) -> None:
        if stage == "tokenizing" and completed == total:
            (inputs / "a00.txt").write_text("changed meanwhile")

    with pytest.raises(DataError, match=r"a00\.txt was changed while"):
        prepare(options(inputs, tmp_path / "out" / "x"), on_progress=on_progress)
    assert list((tmp_path / "out").glob("*_document.*")) == []


def test_an_output_that_cannot_be_written_is_a_storage_error(inputs: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        prepare(options(inputs, tmp_path / "file" / "x"))


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        ({"train_tokenizer": False, "vocab_size": None}, "choose one tokenizer"),
        ({"tokenizer": Path("t.model")}, "choose one tokenizer"),
        ({"vocab_size": None}, "--vocab-size belongs to --train-tokenizer"),
        ({"tokenizer": Path("t.model"), "train_tokenizer": False}, "--vocab-size belongs to --train-tokenizer"),
        ({"rules": DocumentRules(validation_fraction=1.0)}, "--validation-fraction is 1.0"),
        ({"rules": DocumentRules(validation_fraction=float("nan"))}, "--validation-fraction is nan"),
        ({"rules": DocumentRules(json_key="a/b")}, "--json-key is 'a/b'"),
        ({"rules": DocumentRules(eod_token="</s>")}, "--eod-token belongs to --tokenizer"),
        ({"num_workers": 0}, "--workers is 0"),
        ({"shard_bytes": 0}, "--shard-bytes is 0"),
        ({"rules": DocumentRules(document_separator="")}, "--document-separator is ''; it must be what one line holds"),
        ({"rules": DocumentRules(document_separator="a\nb")}, "--document-separator is 'a"),
        ({"rules": DocumentRules(document_separator=" a")}, "--document-separator is ' a'"),
        ({"inputs": ()}, "there is no input"),
    ],
)
def test_options_that_cannot_be_are_refused(inputs: Path, tmp_path: Path, changes: dict[str, object], finding: str):
    with pytest.raises(ConfigError, match=finding):
        prepare(dataclasses.replace(options(inputs, tmp_path / "x"), **changes))


def test_all_problems_of_the_options_are_reported_at_once(inputs: Path, tmp_path: Path):
    assert len(options(inputs, tmp_path / "x", num_workers=0, shard_bytes=0, vocab_size=None).problems()) == 3


def test_the_same_file_under_another_path_gives_the_same_bytes(inputs: Path, tmp_path: Path):
    first = prepare(options(inputs, tmp_path / "one" / "x"))
    inputs.rename(tmp_path / "moved")
    second = prepare(options(tmp_path / "moved", tmp_path / "two" / "x"))
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert first.num_tokens == second.num_tokens
    assert isinstance(second, PrepareReport)
    assert len(find_sources([tmp_path / "moved"])[0]) == 22
