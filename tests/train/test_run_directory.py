"""Who may write in a run directory, whatever its name, and what is opened there for writing."""

import multiprocessing
import os
from contextlib import contextmanager

import pytest

from phase8.errors import StorageError
from phase8.train.run_directory import RunDirectory


def claim(path):
    """What a process is told that wants to train there; None: it may."""
    try:
        with RunDirectory(path).lock():
            return None
    except StorageError as error:
        return str(error)


def claim_elsewhere(path):
    """`claim` in another process: locks are those of processes."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=lambda: theirs.send(claim(path)))
    process.start()
    answer = ours.recv()
    process.join()
    return answer


@contextmanager
def other_names(kind, tmp_path):
    """Two names of one run directory."""
    (tmp_path / "disk").mkdir()
    real, link = tmp_path / "disk" / "run", tmp_path / "runs"
    if kind == "the parent is a link":
        link.symlink_to(tmp_path / "disk")
        yield real, link / "run"
    else:
        if kind == "the directory is a link":
            real.mkdir()
        link.mkdir()
        (link / "other").symlink_to(real)  # dangling where the run is yet to come
        yield real, link / "other"


@pytest.mark.parametrize("kind", ["the parent is a link", "the directory is a link", "a link to a run that is yet to come"])
def test_one_directory_under_two_names_belongs_to_one_process(kind, tmp_path):
    with other_names(kind, tmp_path) as (real, other):
        for held, asked in ((real, other), (other, real)):
            with RunDirectory(held).lock():
                assert claim_elsewhere(asked) == f"another process is training in {asked}; wait until it has finished or choose another run.name."
            assert claim_elsewhere(asked) is None
        RunDirectory(other).create()
        assert (real / "checkpoints").is_dir()


def test_an_earlier_run_behind_a_link_is_set_aside_where_it_is(tmp_path):
    with other_names("the directory is a link", tmp_path) as (real, other):
        (real / "metrics.jsonl").write_text("")
        directory = RunDirectory(other)
        assert directory.set_aside() == real.with_name("run.1") and (tmp_path / "disk" / "run.1" / "metrics.jsonl").exists()
        directory.create()
        assert other.is_symlink() and (real / "checkpoints").is_dir()


def test_a_claim_leaves_nothing(tmp_path):
    with RunDirectory(tmp_path / "new" / "runs" / "run").lock():
        assert [path.name for path in (tmp_path / "new" / "runs").iterdir()] == [".run.lock"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("made", [lambda lock, target: lock.symlink_to(target), lambda lock, target: os.mkfifo(lock)], ids=["link", "pipe"])
def test_what_is_in_the_way_of_the_lock_is_neither_followed_nor_emptied(made, tmp_path):
    target, lock = tmp_path / "precious", tmp_path / ".run.lock"
    target.write_text("content")
    made(lock, target)
    assert "cannot write" in claim(tmp_path / "run") and ".run.lock" in claim(tmp_path / "run")
    assert target.read_text() == "content" and os.path.lexists(lock)
