"""The embedded corpus: what it holds, its fixed split, its entropy, and preparation that survives kills and company."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections import Counter
from math import log
from pathlib import Path

import numpy as np
import pytest

from phase8.data.corpus import EmbeddedCorpus, prepare_embedded_corpus
from phase8.data.indexed import IndexedDataset
from phase8.data.tokenizer import load_tokenizer
from phase8.errors import DataError, StorageError

ROOT = Path(__file__).parents[2]
VOCAB_SIZE = 320


def source(i: int) -> str:
    return f'"""Module number {i}."""\n\n\ndef function_{i}(value):\n\treturn value + {i * i}\n'


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small library with everything that must be left out."""
    root = tmp_path_factory.mktemp("library")
    files = {f"package_{i % 7}/module_{i}.py": source(i).encode() for i in range(150)}
    files |= {f"module_{i}.py": source(i).encode() for i in range(150, 160)}
    files |= {
        "zz_duplicate_of_package_0.py": source(0).encode(),
        "empty.py": b"",
        "latin.py": b"# -*- coding: latin-1 -*-\n# caf\xe9\n",
        "site-packages/other/left_out.py": b"LEFT_OUT = 1\n",
        "dist-packages/left_out.py": b"LEFT_OUT = 2\n",
        "__pycache__/left_out.py": b"LEFT_OUT = 3\n",
        "lib2to3/tests/data/left_out.py": b"LEFT_OUT = 4\n",
        "test/test_lib2to3/data/left_out.py": b"LEFT_OUT = 5\n",
        "_sysconfigdata__linux.py": b"LEFT_OUT = 6\n",
        "left_out.txt": b"LEFT_OUT = 7\n",
    }
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


@pytest.fixture(scope="module")
def corpus(library: Path, tmp_path_factory: pytest.TempPathFactory) -> EmbeddedCorpus:
    return prepare_embedded_corpus(tmp_path_factory.mktemp("cache"), vocab_size=VOCAB_SIZE, library=library)


def documents(corpus: EmbeddedCorpus, split: str) -> list[np.ndarray]:
    dataset = IndexedDataset({"train": corpus.train_prefix, "validation": corpus.validation_prefix}[split])
    return [np.concatenate(dataset.document(k)) for k in range(dataset.num_documents)]


def texts(corpus: EmbeddedCorpus, split: str) -> list[str]:
    tokenizer = load_tokenizer(corpus.tokenizer_path)
    found = documents(corpus, split)
    assert all(document[-1] == tokenizer.eod_id for document in found)
    return [tokenizer.decode(document[:-1]) for document in found]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*.*")) if path.is_file()}


def test_it_holds_every_source_once_in_order_of_the_path(corpus: EmbeddedCorpus, library: Path):
    train, validation = texts(corpus, "train"), texts(corpus, "validation")
    assert sorted(train + validation) == sorted(source(i) for i in range(160))
    in_order = [(library / name).read_text() for name in sorted(path.relative_to(library).as_posix() for path in library.rglob("*module_*.py"))]
    assert train == [text for text in in_order if text in set(train)]
    assert validation == [text for text in in_order if text in set(validation)]


def test_the_split_is_about_a_twentieth_and_goes_by_the_path_alone(corpus: EmbeddedCorpus, library: Path, tmp_path: Path):
    validation = set(texts(corpus, "validation"))
    assert 3 <= len(validation) <= 16
    assert not validation & set(texts(corpus, "train"))
    changed = tmp_path / "changed"
    shutil.copytree(library, changed)
    (changed / "aaa_new.py").write_text("NEW = 1\n")
    again = prepare_embedded_corpus(tmp_path / "cache", vocab_size=VOCAB_SIZE, library=changed)
    assert set(texts(again, "validation")) - {"NEW = 1\n"} == validation


def test_the_tokenizer_knows_only_the_training_split(library: Path, tmp_path: Path):
    changed = tmp_path / "changed"
    shutil.copytree(library, changed)
    for i in range(60):
        (changed / f"animal_{i}.py").write_text(f"# {i} zebra\n")
    first = prepare_embedded_corpus(tmp_path / "cache", vocab_size=VOCAB_SIZE, library=changed)
    held_out = {text.split()[1] for text in texts(first, "validation") if "zebra" in text}
    assert 1 <= len(held_out) <= 12
    for i in held_out:
        (changed / f"animal_{i}.py").write_text(f"# {i}" + " quokka" * 500)
    second = prepare_embedded_corpus(tmp_path / "cache", vocab_size=VOCAB_SIZE, library=changed)
    assert any("quokka" in text for text in texts(second, "validation"))
    assert second.tokenizer_path != first.tokenizer_path
    assert second.tokenizer_path.read_bytes() == first.tokenizer_path.read_bytes()


def test_it_describes_itself(corpus: EmbeddedCorpus):
    train, validation = documents(corpus, "train"), documents(corpus, "validation")
    assert (corpus.num_train_documents, corpus.num_validation_documents) == (len(train), len(validation))
    assert (corpus.num_train_tokens, corpus.num_validation_tokens) == (sum(map(len, train)), sum(map(len, validation)))
    assert corpus.train_text_bytes == sum(len(text.encode()) for text in texts(corpus, "train"))
    assert corpus.validation_text_bytes == sum(len(text.encode()) for text in texts(corpus, "validation"))
    assert load_tokenizer(corpus.tokenizer_path).vocab_size == VOCAB_SIZE
    assert corpus.train_prefix.parent.name.startswith(f"stdlib-{sys.version_info.major}.{sys.version_info.minor}.")
    assert f"-v{VOCAB_SIZE}-" in corpus.train_prefix.parent.name


def test_the_unigram_entropy_is_the_smoothed_cross_entropy(corpus: EmbeddedCorpus):
    counts = Counter(int(i) for document in documents(corpus, "train") for i in document)
    total = counts.total() + VOCAB_SIZE
    losses = [-log((counts[int(i)] + 1) / total) for document in documents(corpus, "validation") for i in document]
    assert corpus.unigram_entropy_nats == pytest.approx(sum(losses) / len(losses), rel=1e-12)
    assert 1 < corpus.unigram_entropy_nats < log(VOCAB_SIZE)


def test_a_second_call_reads_what_is_there(corpus: EmbeddedCorpus, library: Path):
    cache = corpus.train_prefix.parent.parent
    before = contents(cache)
    events: list[str] = []
    again = prepare_embedded_corpus(cache, vocab_size=VOCAB_SIZE, library=library, on_progress=lambda stage, *_: events.append(stage))
    assert again == corpus
    assert events == []
    assert contents(cache) == before
    assert [path.name for path in cache.iterdir()] == [corpus.train_prefix.parent.name]


def test_the_same_sources_give_the_same_bytes(corpus: EmbeddedCorpus, library: Path, tmp_path: Path):
    events: list[tuple[str, int, int]] = []
    prepare_embedded_corpus(tmp_path, vocab_size=VOCAB_SIZE, library=library, on_progress=lambda *event: events.append(event))
    assert contents(tmp_path) == contents(corpus.train_prefix.parent.parent)
    assert events[0] == ("training the tokenizer", 0, 1)
    assert events[-1] == ("tokenizing", 160, 160)


def test_other_sources_or_sizes_are_other_corpora(corpus: EmbeddedCorpus, library: Path, tmp_path: Path):
    changed = tmp_path / "changed"
    shutil.copytree(library, changed)
    (changed / "module_150.py").write_text("changed = True\n")
    cache = tmp_path / "cache"
    shutil.copytree(corpus.train_prefix.parent.parent, cache)
    prepare_embedded_corpus(cache, vocab_size=VOCAB_SIZE, library=changed)
    prepare_embedded_corpus(cache, vocab_size=VOCAB_SIZE + 1, library=library)
    assert len(list(cache.iterdir())) == 3


@pytest.mark.parametrize("name", ["corpus.json", "train.bin", "train.idx", "validation.bin", "tokenizer.model"])
@pytest.mark.parametrize("damage", ["cut", "removed"])
def test_a_damaged_corpus_is_made_anew(corpus: EmbeddedCorpus, library: Path, tmp_path: Path, name: str, damage: str):
    shutil.copytree(corpus.train_prefix.parent.parent, tmp_path / "cache")
    path = tmp_path / "cache" / corpus.train_prefix.parent.name / name
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-2])
    else:
        path.unlink()
    prepare_embedded_corpus(tmp_path / "cache", vocab_size=VOCAB_SIZE, library=library)
    assert contents(tmp_path / "cache") == contents(corpus.train_prefix.parent.parent)


RUN = """
import os, signal, sys
from pathlib import Path
from phase8.data.corpus import prepare_embedded_corpus

kill_at = sys.argv[3]
seen = []

def on_progress(stage, completed, total):
    seen.append(stage)
    if f"{stage} {completed}" == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)

prepare_embedded_corpus(Path(sys.argv[1]), vocab_size=320, library=Path(sys.argv[2]), on_progress=on_progress)
print("made" if seen else "found")
"""


def start(cache: Path, library: Path, kill_at: str = "never") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN, str(cache), str(library), kill_at]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)


def test_a_killed_preparation_is_done_again_and_leaves_nothing(corpus: EmbeddedCorpus, library: Path, tmp_path: Path):
    for kill_at in ("training the tokenizer 1", "tokenizing 20", "tokenizing 160"):
        assert start(tmp_path, library, kill_at).wait() == -signal.SIGKILL
        assert any(path.name.endswith(".partial") for path in tmp_path.iterdir())
    assert prepare_embedded_corpus(tmp_path, vocab_size=VOCAB_SIZE, library=library).num_train_tokens == corpus.num_train_tokens
    assert contents(tmp_path) == contents(corpus.train_prefix.parent.parent)
    assert len(list(tmp_path.iterdir())) == 1


def test_processes_that_start_together_make_it_once(corpus: EmbeddedCorpus, library: Path, tmp_path: Path):
    processes = [start(tmp_path, library) for _ in range(3)]
    outputs = sorted(process.communicate()[0].strip() for process in processes)
    assert outputs == ["found", "found", "made"]
    assert contents(tmp_path) == contents(corpus.train_prefix.parent.parent)


@pytest.mark.parametrize("vocab_size", [1, 100, 50_000])
def test_an_impossible_vocabulary_names_the_key_and_the_range(library: Path, tmp_path: Path, vocab_size: int):
    with pytest.raises(DataError, match=rf"vocabulary of {vocab_size} \(model\.vocab_size.*use \d+ to \d+"):
        prepare_embedded_corpus(tmp_path, vocab_size=vocab_size, library=library)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["absent", "empty", "compiled only", "one file"])
def test_an_installation_without_sources_says_what_to_set(tmp_path: Path, kind: str):
    root = tmp_path / "library"
    if kind != "absent":
        root.mkdir()
    if kind == "compiled only":
        (root / "module.pyc").write_bytes(b"\0")
    if kind == "one file":
        (root / "module.py").write_text("a = 1\n")
    with pytest.raises(DataError, match=r"library in .*library has [01] source files.*set data\.train"):
        prepare_embedded_corpus(tmp_path / "cache", vocab_size=VOCAB_SIZE, library=root)


def test_a_cache_that_cannot_be_written_is_a_storage_error(library: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        prepare_embedded_corpus(tmp_path / "file" / "cache", vocab_size=VOCAB_SIZE, library=library)


def test_the_library_of_the_running_python_is_the_default(corpus: EmbeddedCorpus, library: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    cache = corpus.train_prefix.parent.parent
    assert dataclasses.asdict(prepare_embedded_corpus(cache, vocab_size=VOCAB_SIZE)) == dataclasses.asdict(corpus)
