"""Crash-safe writing: complete or not at all, swept after a kill, one owner at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from phase8.data.staging import exclusive_lock, read_json, sweep_partial, write_json
from phase8.durable import staged_directory, staged_file
from phase8.errors import DataError, StorageError

ROOT = Path(__file__).parents[2]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_staged_file_replaces_the_old_one_only_at_the_end(tmp_path: Path):
    path = tmp_path / "new" / "file"
    with staged_file(path) as partial:
        partial.write_text("first")
        assert not path.exists()
    with staged_file(path) as partial:
        partial.write_text("second")
        assert path.read_text() == "first"
    assert path.read_text() == "second"
    assert names(path.parent) == ["file"]


def test_an_error_while_staging_leaves_the_old_content_and_nothing_else(tmp_path: Path):
    write_json(tmp_path / "file", {"a": 1})
    with staged_directory(tmp_path / "directory") as partial:
        (partial / "old").write_text("")
    with pytest.raises(ZeroDivisionError), staged_file(tmp_path / "file") as partial:
        partial.write_text("new")
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), staged_directory(tmp_path / "directory") as partial:
        (partial / "new").write_text("")
        raise ZeroDivisionError
    assert read_json(tmp_path / "file") == {"a": 1}
    assert names(tmp_path / "directory") == ["old"]
    assert names(tmp_path) == ["directory", "file"]


def test_a_staged_directory_replaces_the_old_one(tmp_path: Path):
    for content in ("old", "new"):
        with staged_directory(tmp_path / "directory") as partial:
            (partial / content).write_text("")
    assert names(tmp_path / "directory") == ["new"]


def test_storage_trouble_is_one_sentence(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for stage in (staged_file, staged_directory):
        with pytest.raises(StorageError, match=r"cannot write .*file.x: .*file is a file, but a dir"), stage(tmp_path / "file" / "x"):
            pass
    for stage in (staged_file, staged_directory):
        with pytest.raises(StorageError, match="No space left on device"), stage(tmp_path / "x"):
            raise OSError(28, "No space left on device")
        assert names(tmp_path) == ["file"]
    with pytest.raises(StorageError, match="cannot write"), exclusive_lock(tmp_path / "file" / "x", wait=True):
        pass


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff", b'{"a": '])
def test_a_missing_or_damaged_record_reads_as_none(tmp_path: Path, content: bytes | None):
    if content is not None:
        (tmp_path / "record.json").write_bytes(content)
    assert read_json(tmp_path / "record.json") is None


def test_an_unreadable_record_is_an_error(tmp_path: Path):
    (tmp_path / "record.json").mkdir()
    with pytest.raises(DataError, match="cannot read"):
        read_json(tmp_path / "record.json")


def test_sweeping_removes_partial_names_of_one_thing_only(tmp_path: Path):
    (tmp_path / "a[1].x.partial").write_text("")
    (tmp_path / "a[1].y.partial" / "inner").mkdir(parents=True)
    (tmp_path / "a1.x.partial").write_text("")
    (tmp_path / "a[1]").write_text("")
    sweep_partial(tmp_path, "a[1].")
    assert names(tmp_path) == ["a1.x.partial", "a[1]"]


def test_a_second_owner_is_refused_or_waits(tmp_path: Path):
    path = tmp_path / "lock"
    order = []

    def second() -> None:
        with exclusive_lock(path, wait=True):
            order.append("second")

    with exclusive_lock(path, wait=False):
        with pytest.raises(DataError, match="another process holds"), exclusive_lock(path, wait=False):
            pass
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert names(tmp_path) == []


def python(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_owners_exclude_each_other_although_the_lock_file_is_removed(tmp_path: Path):
    (tmp_path / "counter").write_text("0")
    code = (
        "from pathlib import Path; from phase8.data.staging import exclusive_lock\n"
        f"directory = Path({str(tmp_path)!r}); counter = directory / 'counter'\n"
        "for _ in range(300):\n"
        "    with exclusive_lock(directory / 'lock', wait=True):\n"
        "        counter.write_text(str(int(counter.read_text()) + 1))\n"
    )
    processes = [python(code) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert (tmp_path / "counter").read_text() == "900"


def test_a_killed_owner_gives_the_lock_back(tmp_path: Path):
    code = (
        "import os, signal; from pathlib import Path; from phase8.data.staging import exclusive_lock; from phase8.durable import staged_directory\n"
        f"directory = Path({str(tmp_path)!r})\n"
        "with exclusive_lock(directory / 'lock', wait=False), staged_directory(directory / 'work'):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert python(code).wait() == -signal.SIGKILL
    assert len(names(tmp_path)) == 2
    with exclusive_lock(tmp_path / "lock", wait=False):
        sweep_partial(tmp_path, "work")
    assert names(tmp_path) == []
