from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from phase8.checkpoint import step_directories
from phase8.checkpoint.step_directories import clear_leftovers, saving_directory, step_directory_name, step_of


@pytest.mark.parametrize("step", [0, 1, 100, 9_999_999_999, 10_000_000_000, 10**18 - 1])
def test_names_and_steps_correspond(step: int):
    assert step_of(step_directory_name(step)) == step
    assert step_of(step_directory_name(step) + ".resaved") == step


@pytest.mark.parametrize("name", ["step-1", "step-00000000010", "step-000000001x", "step-0000000001.tmp", "xstep-0000000001", "step-0000000001\n"])
def test_other_names_have_no_step(name: str):
    assert step_of(name) is None


def test_a_living_writer_is_left_alone_and_a_dead_one_is_cleared(tmp_path: Path):
    (tmp_path / ".saving-step-0000000001-00000000").mkdir()
    (tmp_path / ".saving-step-0000000001-00000000" / "model-00000.safetensors").write_bytes(b"half")
    (tmp_path / ".removing-step-0000000002-00000000").mkdir()
    with saving_directory(tmp_path, 3) as directory:
        (directory / "manifest.json").write_text("half")
        removed = clear_leftovers(tmp_path)
        assert [path.name for path in removed] == [".removing-step-0000000002-00000000", ".saving-step-0000000001-00000000"]
        assert os.listdir(tmp_path) == [directory.name]
    assert os.listdir(tmp_path) == []


def test_the_writer_may_be_another_process(tmp_path: Path, run_in_fork):
    with saving_directory(tmp_path, 3) as directory:

        def other_process() -> None:
            assert clear_leftovers(tmp_path) == []

        assert run_in_fork(other_process) == 0
        assert directory.is_dir()


def test_a_file_system_without_locks_still_saves_and_never_clears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    (tmp_path / ".saving-step-0000000001-00000000").mkdir()
    with saving_directory(tmp_path, 3) as directory:
        assert directory.is_dir() and clear_leftovers(tmp_path) == []
    assert os.listdir(tmp_path) == [".saving-step-0000000001-00000000"]


def test_a_directory_cleared_before_it_could_be_locked_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = step_directories._lock
    attempts = []

    def lock_too_late(directory: Path, *, wait: bool) -> int:
        attempts.append(directory)
        if len(attempts) == 1:
            directory.rmdir()  # gone before it is opened
        descriptor = real(directory, wait=wait)
        if len(attempts) == 2:
            directory.rmdir()  # gone while waiting for the lock
        return descriptor

    monkeypatch.setattr(step_directories, "_lock", lock_too_late)
    with saving_directory(tmp_path, 3) as directory:
        assert directory == attempts[2] and directory.is_dir()
