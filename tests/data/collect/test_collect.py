"""A collection holds every document once, in an order that depends on the texts alone."""

import gzip
import json
import os
import random

import pytest

from phase8.data.collect.collect import collect
from phase8.data.collect.roots import default_roots, find_files
from phase8.errors import DataError

TEXTS = [f"document {i} " + "with words that make it long enough to be kept " * (4 + i % 5) + "\n" for i in range(60)]


def ignore(*_: object) -> None:
    pass


def write_tree(root, names, texts=TEXTS):
    for name, text in zip(names, texts, strict=True):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def texts_of(path):
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "tree"
    write_tree(root, [f"{i % 7}/{i}.md" for i in range(60)])
    (root / "copy.txt").write_text(TEXTS[0].replace("\n", "  \r\n"))
    (root / "packed.txt.gz").write_bytes(gzip.compress(TEXTS[1].encode()))
    (root / "binary.txt").write_bytes(b"\0" * 1000)
    (root / "none.png").write_bytes(b"\0" * 1000)
    os.link(root / "0/0.md", root / "second_name.md")
    (root / "link.md").symlink_to(root / "0/0.md")
    (root / "dangling.md").symlink_to(root / "nowhere")
    (root / ".hidden").mkdir()
    (root / ".hidden" / "a.md").write_text("hidden " * 100)
    return root


def test_every_document_once_with_counts(tree, tmp_path):
    collection = collect("prose", [tree, tree / "1"], tmp_path / "out", on_progress=ignore)
    texts = texts_of(tmp_path / "out" / "prose.jsonl")
    assert sorted(texts) == sorted(text.strip() for text in TEXTS)
    assert (collection.num_files, collection.num_documents, collection.num_duplicates) == (63, 60, 2)
    assert collection.skipped == {"binary": 1} and collection.text_bytes == sum(map(len, texts))
    assert json.loads((tmp_path / "out" / "prose_collected.json").read_text())["num_documents"] == 60


def test_the_same_bytes_whatever_the_names_and_the_number_of_processes(tree, tmp_path, monkeypatch):
    collect("prose", [tree], tmp_path / "a", on_progress=ignore)
    names = [f"{random.Random(i).random()}.txt" for i in range(60)]
    write_tree(tmp_path / "other", names, list(reversed(TEXTS)))
    monkeypatch.setattr("phase8.data.collect.collect._TASK_BYTES", 20_000)
    progress = []
    collect("prose", [tmp_path / "other"], tmp_path / "b", num_workers=2, on_progress=lambda *amounts: progress.append(amounts))
    assert (tmp_path / "a/prose.jsonl").read_bytes() == (tmp_path / "b/prose.jsonl").read_bytes()
    assert len(progress) > 3 and progress[-1][1] == progress[-1][2]


def test_a_limit_takes_the_first_documents(tree, tmp_path):
    collect("prose", [tree], tmp_path / "all", on_progress=ignore)
    limited = collect("prose", [tree], tmp_path / "some", limit_bytes=5000, on_progress=ignore)
    everything, some = texts_of(tmp_path / "all/prose.jsonl"), texts_of(tmp_path / "some/prose.jsonl")
    assert some == everything[: len(some)] and limited.text_bytes <= 5000 < limited.text_bytes + len(everything[len(some)])
    assert limited.num_beyond_limit == 60 - len(some)


@pytest.mark.parametrize(
    ("kind", "options", "message"), [("c", {}, "no document of the kind 'c' in"), ("prose", {"limit_bytes": 10}, "--limit-bytes is 10")]
)
def test_nothing_to_write_is_an_error(tree, tmp_path, kind, options, message):
    with pytest.raises(DataError, match=message):
        collect(kind, [tree], tmp_path, on_progress=ignore, **options)


def test_the_standard_library_is_a_usual_place():
    assert any(file.path.endswith("/argparse.py") for file in find_files("python", default_roots("python")[:1]))
    assert default_roots("c") and default_roots("prose")
