"""Archives are known by their content, also inside a compressed file, and never taken for a text."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
from pathlib import Path

import pytest
import zstandard

from phase8.data.archives import archive_problem
from phase8.data.documents import cut_shards
from phase8.data.input_files import find_sources
from phase8.data.shards import DocumentRules, InvalidInputs, read_texts
from phase8.errors import DataError


def tar(format: int = tarfile.PAX_FORMAT, name: str = "d/a.txt") -> bytes:
    """A tar of one text; all of it is UTF-8."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=format) as archive:
        entry = tarfile.TarInfo(name)
        entry.size = 5
        archive.addfile(entry, io.BytesIO(b"text\n"))
    return content.getvalue()


def zipped(*names: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in names:
            archive.writestr(name, "text\n")
    return content.getvalue()


ARCHIVES = {
    "a.tar": (tar(), "tar"),
    "gnu.tar": (tar(tarfile.GNU_FORMAT, "long" * 40), "tar"),
    "posix.txt": (tar(tarfile.USTAR_FORMAT), "tar"),
    "a.tar.gz": (gzip.compress(tar()), "tar"),
    "a.jsonl.gz": (gzip.compress(tar()), "tar"),
    "a.tar.zst": (zstandard.compress(tar()), "tar"),
    "a.zip": (zipped("a.txt"), "zip"),
    "empty.zip": (zipped(), "zip"),
    "a.txt.gz": (gzip.compress(zipped("a.txt")), "zip"),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_that_is_named_is_refused_at_once(tmp_path: Path, name: str):
    content, kind = ARCHIVES[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        find_sources([path])
    assert str(caught.value) == f"the input {path} is a {kind} archive and not a text; unpack it and give the directory with its files"


@pytest.mark.parametrize("separator", [None, "%"])
@pytest.mark.parametrize("name", ["x.txt", "x.txt.gz", "x.jsonl"])
def test_one_with_the_name_of_a_text_in_a_directory_is_an_invalid_document(tmp_path: Path, name: str, separator: str | None):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / name).write_bytes(gzip.compress(tar()) if name.endswith(".gz") else tar())
    sources, _ = find_sources([tmp_path])
    rules = DocumentRules(document_separator=separator, skip_invalid=True)
    spans = [span for shard in cut_shards(sources, 1000, document_separator=separator) for span in shard]
    invalid = InvalidInputs(skip=True)
    assert [text for text, _ in read_texts(spans, rules, invalid)] == ["good"]
    assert invalid.count == 1 and f"{name} is a tar archive" in str(invalid.first)
    with pytest.raises(DataError, match=r"is a tar archive and not a text; unpack it .*--skip-invalid"):
        list(read_texts(spans, rules, InvalidInputs(skip=False)))
    with pytest.raises(DataError, match="is a tar archive"):  # also where the directory has been read before
        find_sources([tmp_path, tmp_path / name])


@pytest.mark.parametrize("content", [b"", b"PK", b"x" * 257 + b"ustar and more", b"\0" * 400, b"a zip begins with PK\x03\x04"])
def test_other_contents_are_none(tmp_path: Path, content: bytes):
    for name, stored in (("a.txt", content), ("a.txt.gz", gzip.compress(content)), ("a.txt.zst", zstandard.compress(content))):
        (tmp_path / name).write_bytes(stored)
        assert archive_problem(str(tmp_path / name)) is None


def test_damage_is_left_to_the_reader(tmp_path: Path):
    for name in ("a.txt.gz", "a.txt.zst"):
        for content in (b"", b"not compressed"):
            (tmp_path / name).write_bytes(content)
            assert archive_problem(str(tmp_path / name)) is None
