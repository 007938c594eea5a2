"""kill -9 at any moment of saving, replacing and removing leaves a good newest checkpoint."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from phase8.checkpoint.load import list_checkpoints, newest_good_checkpoint
from phase8.checkpoint.retention import apply_retention
from phase8.checkpoint.save import save_checkpoint
from phase8.errors import CheckpointError

WATCHED = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.truncate", "fcntl.flock"}


def never_damaged(path: Path, error: CheckpointError) -> None:
    raise AssertionError(f"{path} is damaged: {error}")


def kill_at(number: int) -> None:
    """Kills this process right before its n-th operation on the file system."""
    remaining = number

    def hook(event: str, arguments: tuple) -> None:
        nonlocal remaining
        if event in WATCHED:
            remaining -= 1
            if remaining == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@pytest.fixture
def crash_everywhere(run_in_fork, was_killed, tmp_path: Path) -> Callable[..., int]:
    """Runs an action on a fresh copy of a directory, killed before its 1st, 2nd, ... operation, until it is no longer killed."""

    def crash(action: Callable[[Path], None], *, prepared: Path, check: Callable[[Path], None]) -> int:
        root, number, killed = tmp_path / "crashing" / "c", 0, True
        while killed:
            number += 1
            shutil.rmtree(root, ignore_errors=True)
            shutil.copytree(prepared, root)

            def child(number: int = number) -> None:
                kill_at(number)
                action(root)

            status = run_in_fork(child)
            killed = was_killed(status)
            assert killed or status == 0
            check(root)
        return number

    return crash


def seed_of(root: Path, make_tensors, candidates: tuple[int, ...]) -> int:
    """Which sample the newest checkpoint holds; none may be damaged."""
    checkpoint = newest_good_checkpoint(root, on_damaged=never_damaged)
    found = {name: checkpoint.read(name) for name in checkpoint.tensor_names}
    for seed in candidates:
        if all(torch.equal(found[name], tensor) for name, tensor in make_tensors(seed).items()):
            return seed
    raise AssertionError("the newest checkpoint is a mixture")


def test_killed_before_every_operation_of_a_save(tmp_path: Path, save_sample, make_tensors, crash_everywhere):
    save_sample(tmp_path / "c", 1)
    seen = []

    def check(root: Path) -> None:
        seen.append(seed_of(root, make_tensors, (1, 2)))
        apply_retention(root, keep_last=5, keep_every_n_steps=None)
        assert sorted(os.listdir(root)) == [f"step-{step:010d}" for step in range(1, seen[-1] + 1)]

    number = crash_everywhere(lambda root: save_sample(root, 2), prepared=tmp_path / "c", check=check)
    assert number > 8 and seen == sorted(seen) and set(seen) == {1, 2}


def test_killed_before_every_operation_of_saving_the_only_step_again(tmp_path: Path, save_sample, make_tensors, crash_everywhere):
    save_sample(tmp_path / "c", 1, seed=1)
    seen, names = [], set()

    def check(root: Path) -> None:
        names.update(path.name for path in list_checkpoints(root))
        seen.append(seed_of(root, make_tensors, (1, 2)))
        save_sample(root, 1, seed=3)  # finishes what was interrupted
        assert seed_of(root, make_tensors, (1, 2, 3)) == 3
        apply_retention(root, keep_last=5, keep_every_n_steps=None)
        assert os.listdir(root) == ["step-0000000001"]

    crash_everywhere(lambda root: save_sample(root, 1, seed=2), prepared=tmp_path / "c", check=check)
    assert seen == sorted(seen) and set(seen) == {1, 2}
    assert names == {"step-0000000001", "step-0000000001.resaved"}


def test_killed_before_every_operation_of_a_removal(tmp_path: Path, save_sample, make_tensors, crash_everywhere):
    for step in (1, 2, 3):
        save_sample(tmp_path / "c", step)

    def check(root: Path) -> None:
        assert seed_of(root, make_tensors, (3,)) == 3
        for path in list_checkpoints(root):
            newest_good_checkpoint(root, on_damaged=never_damaged)
            shutil.rmtree(path)

    def remove(root: Path) -> None:
        apply_retention(root, keep_last=1, keep_every_n_steps=None, known_good=root / "step-0000000003")

    assert crash_everywhere(remove, prepared=tmp_path / "c", check=check) > 8


def test_killed_at_random_moments_while_saving_and_removing(tmp_path: Path, was_killed):
    root = tmp_path / "c"
    generator = random.Random(0)

    def tensors(step: int) -> dict[str, torch.Tensor]:
        return {f"model.t{index}": torch.full((250_000,), float(step)) for index in range(4)}

    def save(step: int) -> None:
        saved = save_checkpoint(root, step=step, tensors=tensors(step), metadata={}, attachments={}, max_file_bytes=2_000_000)
        apply_retention(root, keep_last=2, keep_every_n_steps=None, known_good=saved)

    save(1)
    newest = 1
    for _ in range(12):
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)  # as in run_in_fork
            try:
                for step in itertools.count(newest + 1):
                    save(step)
            finally:
                os._exit(1)  # not reached unless saving failed; the assertion on its death by SIGKILL tells
        time.sleep(generator.uniform(0.005, 0.12))
        os.kill(child, signal.SIGKILL)
        assert was_killed(os.waitpid(child, 0)[1])
        checkpoint = newest_good_checkpoint(root, on_damaged=never_damaged)
        assert checkpoint.step >= newest
        newest = checkpoint.step
        assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors(newest).items())
        assert len(list_checkpoints(root)) <= 3
    assert newest > 1
    save(newest + 1)
    assert sorted(os.listdir(root)) == [f"step-{newest:010d}", f"step-{newest + 1:010d}"]
