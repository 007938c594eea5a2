"""Reading inputs: exact texts, every document once however the reading is cut, and errors that name file and line."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from phase8.data import json_lines
from phase8.data.documents import cut_shards, read_documents, spread
from phase8.data.input_files import Source, Span, check_unchanged, find_sources
from phase8.data.shards import DocumentRules, InvalidInputs, read_texts
from phase8.errors import DataError


def stop(error: DataError) -> None:
    raise error


def read_all(*inputs: Path, shard_bytes: int = 1 << 20, json_key: str = "text", separator: str | None = None) -> list[str]:
    sources, _ = find_sources(inputs)
    spans = [span for shard in cut_shards(sources, shard_bytes, document_separator=separator) for span in shard]
    found = [document for span in spans for document in read_documents(span, json_key=json_key, document_separator=separator, on_invalid=stop)]
    assert sum(document.source_bytes for document in found) <= sum(source.size_bytes for source in sources)
    return [document.text for document in found]


def read_skipping(path: Path) -> tuple[list[str], list[str]]:
    """Texts, and the messages about what was skipped."""
    errors: list[DataError] = []
    (source,) = find_sources([path])[0]
    texts = [text for text, _ in read_documents(Span(source, 0, source.size_bytes), json_key="text", on_invalid=errors.append)]
    return texts, [str(error) for error in errors]


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)), encoding="utf-8")
    return path


def test_a_text_file_is_one_document_exactly(tmp_path: Path):
    content = "\t first\r\nsecond\n\n\0 — 😀 no newline at the end"
    for name in ("plain.txt", "source.py", "no_suffix"):
        (tmp_path / name).write_bytes(content.encode())
        assert read_all(tmp_path / name) == [content]
    (tmp_path / "zipped.txt.gz").write_bytes(gzip.compress(content.encode()))
    assert read_all(tmp_path / "zipped.txt.gz") == [content]


def test_a_byte_order_mark_is_no_text(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "hello"}\n')
    assert read_all(tmp_path / "a.txt", tmp_path / "a.jsonl") == ["hello", "hello"]


def test_json_lines_give_a_document_per_line(tmp_path: Path):
    texts = ["one\ntwo", "", "😀\u2028", "last"]
    path = write_lines(tmp_path / "a.jsonl", texts)
    zipped = tmp_path / "a.jsonl.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    named_json = tmp_path / "a.json"
    named_json.write_bytes(path.read_bytes().rstrip(b"\n") + b"\n \n\n")
    assert read_all(path) == read_all(zipped) == read_all(named_json) == texts


def test_the_key_of_the_text_can_be_chosen(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"content": "here", "text": "not here"}')
    assert read_all(tmp_path / "a.jsonl", json_key="content") == ["here"]


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(max_size=20), max_size=20), shard_bytes=st.integers(1, 400), ascii_only=st.booleans(), newline_at_end=st.booleans())
def test_every_line_is_read_once_and_in_order_however_the_file_is_cut(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], shard_bytes: int, ascii_only: bool, newline_at_end: bool
):
    path = tmp_path_factory.mktemp("cut") / "a.jsonl"
    content = "\n".join(json.dumps({"text": text}, ensure_ascii=ascii_only) for text in texts) + "\n" * newline_at_end
    path.write_bytes(content.encode())
    assert read_all(path, shard_bytes=shard_bytes) == texts


@pytest.mark.parametrize("shard_bytes", [1, 7, 30, 1000])
def test_line_numbers_are_right_in_every_cut(tmp_path: Path, shard_bytes: int):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "bb"}\n{"text": 5}\n{"text": "c"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 4: 'text' is a number, where a text is needed; name the key"):
        read_all(path, shard_bytes=shard_bytes)


@pytest.mark.parametrize(("bad", "num_counts"), [("", 0), ("5\n" * 100, 1)])
def test_what_stands_before_a_span_is_counted_once_and_only_for_bad_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: str, num_counts: int):
    path, first, last = tmp_path / "a.jsonl", '{"text": "first"}\n', '{"text": "last"}\n'
    path.write_text(first + bad + last)
    (source,) = find_sources([path])[0]
    counted, count = [], json_lines._num_lines
    monkeypatch.setattr(json_lines, "_num_lines", lambda path, end: counted.append(end) or count(path, end))
    errors: list[DataError] = []
    span = Span(source, len(first), source.size_bytes)
    assert [text for text, _ in read_documents(span, json_key="text", on_invalid=errors.append)] == ["last"]
    assert [f"line {i + 2}: " in str(error) for i, error in enumerate(errors)] == [True] * bad.count("\n")
    assert counted == [len(first)] * num_counts


@pytest.mark.parametrize(
    ("line", "finding"),
    [
        (b'{"text": "x"', "not JSON"),
        (b"plain words", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"text": "\xff"}', "byte 10 is 0xff, which is not UTF-8"),
        (b'{"content": "x", "id": 3}', "an object with the keys 'content', 'id', without the key 'text'"),
        (b"{}", "keys (none), without the key 'text'"),
        (b'["text"]', "found a list, where an object with the text under 'text' is needed; correct or remove the line"),
        (b'"text"', "found a string, where"),
        (b"null", "found null, where"),
        (b'{"text": null}', "'text' is null, where a text is needed; put the text there or remove the line"),
        (b'{"text": true}', "'text' is true, where a text is needed; name the key of the text with --json-key"),
        (b'{"text": 1.5}', "'text' is a number, where"),
        (b'{"text": ["a"]}', "'text' is a list, where"),
        (b'{"text": {"a": 1, "a": 2}}', "'text' is an object, where"),
        (b'{"text": "\\ud800"}', "holds the lone surrogate '\\ud800'"),
        (b'{"text": "a", "id": 1, "text": "b"}', "the key 'text' occurs more than once"),
        (b'{"te\\u0078t": "a", "text": "a"}', "the key 'text' occurs more than once"),
    ],
)
def test_bad_lines_are_named_or_skipped(tmp_path: Path, line: bytes, finding: str):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "first"}\n' + line + b'\n{"text": "third"}\n')
    with pytest.raises(DataError) as caught:
        read_all(path)
    assert finding in str(caught.value)
    assert f"{path}, line 2: " in str(caught.value)
    texts, messages = read_skipping(path)
    assert texts == ["first", "third"]
    assert messages == [str(caught.value)]


def test_only_repeats_of_the_key_of_the_text_matter(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"id": 1, "text": "x", "id": 2, "meta": {"text": 1, "text": 2}}')
    assert read_all(tmp_path / "a.jsonl") == ["x"]


def test_an_object_of_many_keys_is_named_in_few_words(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(json.dumps({f"key{i}": 1 for i in range(2000)}))
    with pytest.raises(DataError) as caught:
        read_all(tmp_path / "a.jsonl")
    assert "'key19', ..., without the key 'text'" in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_bytes_that_are_not_text_are_named_or_skipped(tmp_path: Path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"latin\.txt is not UTF-8 text: byte 3 is 0xe9"):
        read_all(path)
    assert read_skipping(path)[0] == []
    assert len(read_skipping(path)[1]) == 1


def whole_compressed(suffix: str) -> bytes:
    content = b"".join(b'{"text": "document %d"}\n' % i for i in range(3000))
    return gzip.compress(content) if suffix == "gz" else zstandard.ZstdCompressor(write_checksum=True).compress(content)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz", "a.jsonl.zst", "a.txt.zst"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "bad block", "not compressed", "empty"])
def test_damaged_compressed_files_are_named_or_give_nothing_at_all(tmp_path: Path, name: str, damage: str):
    content = whole_compressed(name.rsplit(".", 1)[1])
    middle = len(content) // 2
    damaged = {
        "truncated": content[:middle],
        "flipped": content[:middle] + bytes(byte ^ 0xFF for byte in content[middle : middle + 40]) + content[middle + 40 :],
        "bad block": content[:10] + b"\xff" + content[11:],
        "not compressed": b"plain",
        "empty": b"",
    }[damage]
    path = tmp_path / name
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=rf"{name} is not a whole (gzip|zstd) file|{name}, line \d+"):
        read_all(path)
    invalid = InvalidInputs(skip=True)
    shards = cut_shards(find_sources([path])[0], 1 << 20)
    assert [*read_texts(shards[0], DocumentRules(skip_invalid=True), invalid)] == []
    assert invalid.count == 1
    assert "is not a whole" in str(invalid.first)


SEPARATOR = "<|endoftext|>"


@settings(max_examples=80, deadline=None)
@given(
    lines=st.lists(st.sampled_from(["", "a", "é😀", "a <|endoftext|>", SEPARATOR, SEPARATOR, f" {SEPARATOR}\r", "x" * 30]), max_size=30),
    shard_bytes=st.integers(1, 300),
    ends_in_newline=st.booleans(),
    mark=st.booleans(),
)
def test_documents_between_separators_are_read_once_however_the_file_is_cut(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], shard_bytes: int, ends_in_newline: bool, mark: bool
):
    path = tmp_path_factory.mktemp("cut") / "a.txt"
    content = "\n".join(lines) + "\n" * ends_in_newline
    path.write_bytes(b"\xef\xbb\xbf" * mark + content.encode())
    expected, current = [], ""
    for line in content.split("\n"):
        if line.strip() == SEPARATOR:
            expected, current = [*expected, current], ""
        else:
            current += line + "\n"
    expected = [text for text in [*expected, current[:-1]] if text]
    assert read_all(path, shard_bytes=shard_bytes, separator=SEPARATOR) == expected


def test_separators_work_in_compressed_files_and_name_what_is_no_text(tmp_path: Path):
    content = b"one\n<|endoftext|>\ncaf\xe9\n<|endoftext|>\nthree\n<|endoftext|>\n"
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(content.replace(b"\xe9", b"e")))
    assert read_all(tmp_path / "a.txt.gz", separator=SEPARATOR) == ["one\n", "cafe\n", "three\n"]
    (tmp_path / "b.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"b\.txt, the document from byte 18 on, is not UTF-8 text: byte 3 is 0xe9"):
        read_all(tmp_path / "b.txt", separator=SEPARATOR)
    assert read_all(tmp_path / "a.txt.gz") == [content.replace(b"\xe9", b"e").decode()]


def test_a_directory_gives_its_text_files_in_order_of_their_path(tmp_path: Path):
    for name in (
        "b/z.txt",
        "b/a.py",
        "a.md",
        "B.txt",
        "c.jsonl",
        "c.txt.gz",
        ".hidden.txt",
        ".git/x.txt",
        "__pycache__/x.txt",
        "image.png",
        "data.json",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    sources, left_out = find_sources([tmp_path])
    found = [str(Path(source.path).relative_to(tmp_path.resolve())) for source in sources]
    assert found == ["B.txt", "a.md", "b/a.py", "b/z.txt", "c.jsonl", "c.txt.gz"]
    assert left_out.num_by_suffix == {".png": 1, ".json": 1}
    assert left_out.dangling_links == []


def test_inputs_keep_their_order_and_each_file_is_read_once(tmp_path: Path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    assert read_all(tmp_path / "c.txt", tmp_path, tmp_path / "a.txt") == ["c", "a", "b"]


def test_missing_and_unusable_inputs_are_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"cannot read the input .*absent\.txt: No such file"):
        find_sources([tmp_path / "absent.txt"])
    (tmp_path / "image.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"holds no text, source code, \.jsonl or \.parquet file \(1 file has no suffix of text \(\.png: 1\)\); name"):
        find_sources([tmp_path])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe is not a regular file"):
        find_sources([tmp_path / "pipe"])


def test_an_input_that_vanishes_or_changes_is_named(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("before")
    sources, _ = find_sources([path])
    check_unchanged(sources)
    path.write_text("longer than before")
    with pytest.raises(DataError, match=r"a\.txt was changed while"):
        check_unchanged(sources)
    path.unlink()
    with pytest.raises(DataError, match="cannot read the input"):
        list(read_documents(Span(sources[0], 0, 6), json_key="text", on_invalid=stop))


@given(
    sizes=st.lists(st.integers(0, 50), max_size=12),
    kinds=st.lists(st.sampled_from(["a.txt", "a.jsonl", "a.jsonl.gz"]), min_size=12, max_size=12),
    shard_bytes=st.integers(1, 60),
)
def test_shards_cover_every_byte_once_and_stay_small(sizes: list[int], kinds: list[str], shard_bytes: int):
    sources = [Source(f"{i}/{kind}", size, "sha256:0") for i, (size, kind) in enumerate(zip(sizes, kinds, strict=False))]
    shards = cut_shards(sources, shard_bytes)
    covered = {source: 0 for source in sources}
    order = [span.source for shard in shards for span in shard]
    assert order == sorted(order, key=sources.index)
    for shard in shards:
        assert len(shard) == 1 or sum(span.end - span.start for span in shard) <= shard_bytes
        for span in shard:
            assert span.start == covered[span.source]
            assert span.start < span.end or (span.source.is_compressed and span.source.size_bytes == 0)
            covered[span.source] = span.end
            if span.source.path.endswith(".jsonl"):
                assert span.end - span.start <= shard_bytes
    assert covered == {source: source.size_bytes for source in sources}


@given(length=st.integers(0, 300))
def test_spreading_is_a_fixed_permutation_with_even_beginnings(length: int):
    order = spread(range(length))
    assert sorted(order) == list(range(length))
    assert order == spread(range(length))
    if length >= 64:
        quarters = [sum(length * q <= 4 * i < length * (q + 1) for i in order[:16]) for q in range(4)]
        assert min(quarters) >= 3
