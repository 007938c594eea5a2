from __future__ import annotations

import os
from contextlib import suppress

import pytest

from phase8.data.staging import exclusive_lock
from phase8.durable import is_regular_or_free, open_for_appending, open_lock_file, replace_file, storage_errors
from phase8.errors import StorageError


def test_the_file_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "page.html"
    path.write_bytes(b"a much longer old content")
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["page.html"]


def test_a_crash_before_the_rename_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    path.write_bytes(b"old")

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match=r"cannot write .*page\.html: No space left on device; free space"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["page.html"]


def lock(path):
    with exclusive_lock(path, wait=False):
        pass


def append(path):
    os.close(open_for_appending(path))


WRITERS = {"lock": lock, "appended record": append, "replaced file": lambda path: replace_file(path, b"new")}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("obstacle", ["link", "dangling link", "pipe"])
def test_what_is_in_the_way_under_a_known_name_is_neither_followed_nor_waited_for(write, obstacle, tmp_path):
    target, path = tmp_path / "elsewhere" / "precious", tmp_path / "known"
    target.parent.mkdir()
    if obstacle == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(target)
    if obstacle == "link":
        target.write_text("content")
    with suppress(OSError, StorageError):
        write(path)
    assert [entry.read_text() for entry in target.parent.iterdir()] == ["content"] * (obstacle == "link")


@pytest.mark.parametrize("is_link", [False, True])
def test_a_pipe_or_a_device_is_not_replaced_by_a_file(is_link, tmp_path):
    """As /dev/null would be, by a superuser, and /dev/stdout, which is a link."""
    os.mkfifo(tmp_path / "pipe")
    path = tmp_path / ("link" if is_link else "pipe")
    if is_link:
        path.symlink_to("pipe")
    with pytest.raises(StorageError) as refusal:
        replace_file(path, b"new")
    assert str(refusal.value) == f"cannot write {path}: it is a device, a pipe or a socket, whose place a file would take; choose another place"
    assert path.is_fifo() and path.is_symlink() == is_link and not is_regular_or_free(path) and is_regular_or_free(tmp_path / "new")


@pytest.mark.parametrize("opened", [open_lock_file, open_for_appending])
def test_a_link_or_a_pipe_in_the_way_is_called_one_and_is_to_be_removed(opened, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "pipe")
    said = {"link": "it is a symbolic link, which is not followed; remove the link"}
    if opened is open_lock_file:  # to append to a pipe that nobody reads is refused by the system
        said["pipe"] = "it is in the way and not a regular file; remove it"
    for name, reason in said.items():
        with pytest.raises(StorageError) as refusal, storage_errors(tmp_path / name):
            opened(tmp_path / name)
        assert str(refusal.value) == f"cannot write {tmp_path}/{name}: {reason}"


@pytest.mark.parametrize("name", ["file/a", "file/a/b", "file"])
def test_a_file_in_the_place_of_a_directory_is_named(name, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError) as refusal, storage_errors(tmp_path / "output"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    sentence = f"cannot write {tmp_path}/output: {tmp_path}/file is a file, but a directory is needed there; move it, or choose another place"
    assert str(refusal.value) == sentence
