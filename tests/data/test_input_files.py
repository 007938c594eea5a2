"""Which files the inputs name: links followed without loops, links to nothing, what is left out by name, and what identifies a file."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from phase8.data import content
from phase8.data.input_files import check_unchanged, describe_suffixes, find_source, find_sources
from phase8.errors import DataError


def write(path: Path, text: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def names(root: Path) -> list[str]:
    return [os.path.relpath(source.path, root) for source in find_sources([root])[0]]


def test_directories_behind_links_are_read_and_loops_end(tmp_path: Path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    write(root / "a" / "one.txt")
    write(elsewhere / "two.txt")
    write(elsewhere / "deep" / "three.txt")
    (root / "a" / "loop").symlink_to(root)
    (root / "b").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(elsewhere / "deep")
    (root / "c").symlink_to(elsewhere / "deep")
    found = names(root)
    assert sorted(Path(name).name for name in found) == ["one.txt", "three.txt", "two.txt"]
    assert found == names(root)
    assert [Path(source.path).read_text() for source in find_sources([root, root / "b"])[0]] == ["text"] * 3


def test_a_directory_keeps_its_own_name_beside_a_link_to_it(tmp_path: Path):
    write(tmp_path / "z" / "one.txt", "1")
    (tmp_path / "a").symlink_to("z")
    assert names(tmp_path) == ["z/one.txt"]


def test_a_ladder_of_links_is_walked_once_a_rung(tmp_path: Path):
    """Each directory is reached by two links from the one before: 2^30 ways to the last."""
    for i in range(30):
        write(tmp_path / "root" / f"{i:02d}" / "a.txt", str(i))
        for name in ("left", "right"):
            (tmp_path / "root" / f"{i:02d}" / name).symlink_to(tmp_path / "root" / f"{(i + 1) % 30:02d}")
    assert len(find_sources([tmp_path / "root"])[0]) == 30


def test_a_linked_file_has_the_format_of_the_name_it_was_given(tmp_path: Path):
    """Caches store files under their digests and give them names by links."""
    write(tmp_path / "blobs" / "0123abcd", '{"text": "x"}\n')
    (tmp_path / "data.jsonl").symlink_to(tmp_path / "blobs" / "0123abcd")
    (source,) = find_sources([tmp_path / "data.jsonl"])[0]
    assert source.is_json_lines
    assert names(tmp_path) == ["data.jsonl"]


def test_links_to_nothing_are_counted_below_directories_and_refused_by_name(tmp_path: Path):
    write(tmp_path / "a.txt")
    (tmp_path / "gone.txt").symlink_to("/no/such/file")
    (tmp_path / "itself.txt").symlink_to("itself.txt")
    (tmp_path / "directory").symlink_to("/no/such/directory")
    sources, left_out = find_sources([tmp_path])
    assert len(sources) == 1
    assert sorted(left_out.dangling_links) == [str(tmp_path / name) for name in ("directory", "gone.txt", "itself.txt")]
    with pytest.raises(DataError, match=r"cannot read the input .*gone\.txt: it is a symbolic link to /no/such/file, which does not exist; "):
        find_sources([tmp_path / "gone.txt"])
    with pytest.raises(DataError, match=r"below\.txt: .*directory is a symbolic link to /no/such/directory, which does not exist; "):
        find_sources([tmp_path / "directory" / "below.txt"])
    with pytest.raises(DataError, match="Too many levels of symbolic links"):
        find_sources([tmp_path / "itself.txt"])


def test_what_is_left_out_is_counted_by_suffix(tmp_path: Path):
    for name in ("a.txt", "b.pdf", "c.PDF", "d.docx", "README", "x.parquet.gz", "deep/e.pdf"):
        write(tmp_path / name)
    _, left_out = find_sources([tmp_path])
    assert left_out.num_by_suffix == {".pdf": 3, ".docx": 1, "without a suffix": 1, ".gz": 1}
    assert describe_suffixes(left_out.num_by_suffix) == ".pdf: 3, .docx: 1, .gz: 1, without a suffix: 1"


def test_hidden_names_and_caches_are_counted_and_named_in_one_sentence(tmp_path: Path):
    for name in ("a.txt", ".env", "deep/.note.txt", ".git/config", ".git/hooks/x.sh", "__pycache__/a.py", "b.pdf"):
        write(tmp_path / name)
    _, left_out = find_sources([tmp_path])
    assert left_out.sentence == (
        "not everything below the inputs is read: 1 file has no suffix of text (.pdf: 1), 2 files are hidden by a dot before the name, "
        "1 directory is hidden in the same way, with all below, 1 directory is a cache of Python; name a file or a directory itself to read it"
    )
    assert find_sources([tmp_path / "a.txt"])[1].sentence is None
    with pytest.raises(DataError, match=r"holds no text, .* file \(1 file is hidden by a dot before the name\); name the files themselves"):
        find_sources([tmp_path / "deep"])


def test_what_is_left_out_is_counted_once_and_not_where_another_input_names_it(tmp_path: Path):
    for name in ("deep/a.txt", "deep/b.pdf", "deep/.c", ".hidden/d.txt", ".hidden/e.txt", "__pycache__/f.py"):
        write(tmp_path / name)
    (tmp_path / "deep" / "link.pdf").symlink_to("b.pdf")
    (tmp_path / "deep" / "gone.txt").symlink_to("/no/such/file")
    _, left_out = find_sources([tmp_path, tmp_path / "deep", tmp_path / "deep" / ".." / "deep"])
    assert left_out.num_by_suffix == {".pdf": 1}
    assert list(map(len, (left_out.hidden_files, left_out.hidden_directories, left_out.caches, left_out.dangling_links))) == [1, 1, 1, 1]
    sources, left_out = find_sources([tmp_path, *(tmp_path / name for name in ("deep/b.pdf", "deep/.c", ".hidden", "__pycache__"))])
    assert (len(sources), left_out.sentence) == (6, None)


def test_counts_by_suffix_are_bounded_and_printable():
    words = describe_suffixes({f".{i:03d}": 1 for i in range(500)} | {".\x1b[31m": 7})
    assert words.startswith("'.\\x1b[31m': 7, .000: 1, ")
    assert words.endswith(", 491 other suffixes: 491")


@pytest.mark.parametrize(("name", "package"), [("a.parquet", "pyarrow"), ("a.txt.zst", "zstandard")])
def test_a_package_that_is_missing_is_named_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str):
    for module in [module for module in sys.modules if module.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    write(tmp_path / name)
    with pytest.raises(DataError, match=rf"{name} is .*, which needs the package {package}: pip install 'phase8\[data\]'"):
        find_sources([tmp_path])


def edit_unseen(path: Path, offset: int) -> None:
    """Changes a byte; size and time of modification stay."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"#")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_change_behind_equal_size_and_time_is_noticed(tmp_path: Path):
    path = write(tmp_path / "a.txt", "before")
    found = find_source(path)
    edit_unseen(path, 3)
    assert find_source(path) != found
    with pytest.raises(DataError, match=r"a\.txt was changed while"):
        check_unchanged([found])


def test_a_change_between_the_samples_of_a_large_file_is_noticed(tmp_path: Path):
    path = tmp_path / "a.txt"
    with path.open("wb") as file:
        file.truncate(3 * content.WHOLE_BYTES)
    found = find_source(path)
    edit_unseen(path, content.BLOCK_BYTES + 10)
    changed = find_source(path)
    assert changed.digest == found.digest
    assert changed != found


def test_a_small_file_that_was_only_touched_is_the_same(tmp_path: Path):
    path = write(tmp_path / "a.txt")
    found = find_source(path)
    os.utime(path)
    check_unchanged([found])
