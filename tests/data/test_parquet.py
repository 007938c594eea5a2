"""Parquet inputs: exact texts in order however row groups are cut, and what is not a document named by row or skipped."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from phase8.data.documents import cut_shards, read_documents
from phase8.data.input_files import find_source
from phase8.errors import DataError

TEXTS = [f"document {i}\n\t — 😀 {'x' * (i % 50)}" for i in range(1000)]


def stop(error: DataError) -> None:
    raise error


def write(path: Path, columns: dict[str, object], rows: int = 100, **options: object) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=rows, **options)
    return path


def read(path: Path, *, shard_bytes: int = 1 << 20, column: str = "text", on_invalid=stop) -> list[str]:
    shards = cut_shards([find_source(path)], shard_bytes)
    documents = [document for (span,) in shards for document in read_documents(span, json_key=column, on_invalid=on_invalid)]
    assert sum(source_bytes for _, source_bytes in documents) <= path.stat().st_size
    return [text for text, _ in documents]


def read_skipping(path: Path, **options) -> tuple[list[str], list[str]]:
    errors: list[DataError] = []
    return read(path, on_invalid=errors.append, **options), [str(error) for error in errors]


@pytest.mark.parametrize("rows", [1000, 64, 7])
@pytest.mark.parametrize("shard_bytes", [1, 100, 5000, 1 << 20])
def test_every_row_is_read_once_and_in_order_however_the_file_is_cut(tmp_path: Path, rows: int, shard_bytes: int):
    path = write(tmp_path / "a.parquet", {"id": range(1000), "text": TEXTS}, rows)
    if shard_bytes == 1:
        shard_bytes = path.stat().st_size // 400 + 1  # more spans than row groups
    assert read(path, shard_bytes=shard_bytes) == TEXTS


def test_a_large_file_is_divided_by_row_groups(tmp_path: Path):
    path = write(tmp_path / "a.parquet", {"text": TEXTS})
    shards = cut_shards([find_source(path)], path.stat().st_size // 5 + 1)
    found = [sum(1 for span in spans for _ in read_documents(span, json_key="text", on_invalid=stop)) for spans in shards]
    assert sum(found) == 1000
    assert 100 <= min(found) <= max(found) <= 300


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())])
def test_strings_of_every_encoding_are_texts(tmp_path: Path, kind: pyarrow.DataType):
    path = write(tmp_path / "a.parquet", {"content": pyarrow.array(TEXTS[:20]).cast(kind)})
    assert read(path, column="content") == TEXTS[:20]


@pytest.mark.parametrize(
    ("columns", "finding"),
    [
        ({"id": [1], "body": ["x"]}, r"has no column named 'text'; name the column of the text with --json-key, it has 'id', 'body'"),
        ({"text": [1]}, r"the column 'text' holds int64, not strings"),
        ({"text": [b"x"]}, r"the column 'text' holds binary, not strings"),
        ({"text": [["x"]]}, r"the column 'text' holds list<.*>, not strings"),
        ({f"c{i}": [1] for i in range(50)}, r"it has 'c0', .*'c19', \.\.\."),
    ],
)
def test_a_column_that_holds_no_text_is_named_once(tmp_path: Path, columns: dict[str, object], finding: str):
    path = write(tmp_path / "a.parquet", columns)
    with pytest.raises(DataError, match=rf"a\.parquet.* ?{finding}"):
        read(path)
    texts, messages = read_skipping(path, shard_bytes=100)
    assert (texts, len(messages)) == ([], 1)


def test_two_columns_of_one_name_are_refused(tmp_path: Path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has 2 columns named 'text'"):
        read(tmp_path / "a.parquet")


def test_rows_without_text_are_named_or_skipped(tmp_path: Path):
    broken = pyarrow.array([b"fine", b"caf\xe9", b"x"]).view(pyarrow.string())
    path = write(tmp_path / "a.parquet", {"text": pyarrow.chunked_array([broken, pyarrow.array([None, "last"])])}, rows=2)
    with pytest.raises(DataError, match=r"a\.parquet, row 1 \(the first is 0\): 'text' holds bytes that are not UTF-8 \(0xe9 at byte 3\)"):
        read(path)
    texts, messages = read_skipping(path)
    assert texts == ["fine", "x", "last"]
    assert "row 3 (the first is 0): 'text' holds nothing (null)" in messages[1]


@pytest.mark.parametrize("damage", ["empty", "no parquet", "truncated", "no footer"])
def test_files_that_are_not_whole_are_named_once_or_skipped(tmp_path: Path, damage: str):
    path = write(tmp_path / "a.parquet", {"text": TEXTS})
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "no parquet": b"plain words" * 100, "truncated": whole[: len(whole) // 2], "no footer": whole[:-300]}[damage])
    with pytest.raises(DataError, match=r"a\.parquet is not a whole Parquet file \(.+\); write or copy it again"):
        read(path)
    texts, messages = read_skipping(path, shard_bytes=1000)
    assert (texts, len(messages)) == ([], 1)


def test_damage_in_one_row_group_is_named_and_the_others_are_read(tmp_path: Path):
    path = write(tmp_path / "a.parquet", {"text": TEXTS}, write_page_checksum=True, compression="none", use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[content.index(b"document 350")] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet: row group 3, from row 300 on, cannot be read to its end"):
        read(path)
    texts, messages = read_skipping(path)
    assert len(messages) == 1
    assert set(TEXTS[:300] + TEXTS[400:]) <= set(texts) <= set(TEXTS)
