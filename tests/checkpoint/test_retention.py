from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from phase8.checkpoint.load import list_checkpoints
from phase8.checkpoint.retention import apply_retention
from phase8.errors import StorageError


@pytest.fixture
def root(tmp_path: Path, save_sample) -> Path:
    for step in (10, 20, 30, 40, 50):
        save_sample(tmp_path / "c", step)
    return tmp_path / "c"


def steps(root: Path) -> list[int]:
    return [int(path.name[5:15]) for path in list_checkpoints(root)]


def damage(root: Path, step: int) -> None:
    path = root / f"step-{step:010d}" / "model-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_the_newest_are_kept_and_the_others_go(root: Path):
    removed = apply_retention(root, keep_last=2, keep_every_n_steps=None)
    assert [path.name for path in removed] == ["step-0000000030", "step-0000000020", "step-0000000010"]
    assert sorted(os.listdir(root)) == ["step-0000000040", "step-0000000050"]
    assert apply_retention(root, keep_last=2, keep_every_n_steps=None) == []


def test_multiples_are_kept_as_well(root: Path):
    apply_retention(root, keep_last=1, keep_every_n_steps=20)
    assert steps(root) == [50, 40, 20]


def test_more_than_there_are_removes_nothing(root: Path):
    assert apply_retention(root, keep_last=9, keep_every_n_steps=None) == []
    assert apply_retention(root / "nowhere", keep_last=1, keep_every_n_steps=None) == []
    assert len(steps(root)) == 5


def test_the_newest_good_one_stays_when_newer_ones_are_damaged(root: Path):
    damage(root, 50)
    damage(root, 40)
    apply_retention(root, keep_last=2, keep_every_n_steps=None)
    assert steps(root) == [50, 40, 30]


def test_nothing_is_removed_when_none_is_good(root: Path):
    for step in steps(root):
        damage(root, step)
    assert apply_retention(root, keep_last=1, keep_every_n_steps=None) == []
    assert len(steps(root)) == 5


def test_nothing_is_removed_where_the_newest_is_of_a_later_release(root: Path, sign):
    path = root / "step-0000000050" / "manifest.json"
    document = json.loads(path.read_bytes())
    del document["checksum"]
    path.write_bytes(sign(document | {"format_version": 2}))
    assert apply_retention(root, keep_last=1, keep_every_n_steps=None) == []


def test_a_checkpoint_just_saved_below_newer_steps_stays(root: Path, save_sample):
    """After going back, the steps of the run are lower than those of the branch it left."""
    saved = save_sample(root, 15)
    apply_retention(root, keep_last=1, keep_every_n_steps=None, known_good=saved)
    assert steps(root) == [50, 15]


def test_damaged_newer_steps_take_no_place_of_the_checkpoints_that_a_run_saves(root: Path, save_sample):
    """A run that has passed over 40 and 50 goes on from 30, and needs as many checkpoints to go back to as any other."""
    for step in (31, 32, 33):
        apply_retention(root, keep_last=2, keep_every_n_steps=None, known_good=save_sample(root, step))
        assert steps(root) == [50, 40, step, step - 1]


def test_a_known_good_checkpoint_spares_the_reading_of_others(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("phase8.checkpoint.retention.newest_good_checkpoint", lambda *_, **__: pytest.fail("was read"))
    apply_retention(root, keep_last=1, keep_every_n_steps=None, known_good=root / "step-0000000050")
    assert steps(root) == [50]


def test_a_directory_loses_its_good_name_before_its_first_file(root: Path, monkeypatch: pytest.MonkeyPatch):
    removals = []
    real = shutil.rmtree

    def rmtree(path: Path, **options: object) -> None:
        removals.append(Path(path).name)
        real(path, **options)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    apply_retention(root, keep_last=4, keep_every_n_steps=None)
    assert len(removals) == 1 and removals[0].startswith(".removing-step-0000000010-")


def test_what_is_not_a_checkpoint_is_never_touched(root: Path):
    (root / "notes").mkdir()
    (root / "notes" / "best.txt").write_text("step 20")
    (root / "step-0000000001").symlink_to(root / "notes")
    (root / "step-0000000002").write_text("a file")
    (root / ".saving-file").write_text("a file")
    apply_retention(root, keep_last=1, keep_every_n_steps=None)
    assert sorted(os.listdir(root)) == [".saving-file", "notes", "step-0000000001", "step-0000000002", "step-0000000050"]
    assert (root / "notes" / "best.txt").read_text() == "step 20"


def test_failing_to_remove_is_one_sentence(root: Path, monkeypatch: pytest.MonkeyPatch):
    def rename(source: Path, destination: Path) -> None:
        raise PermissionError(13, "Permission denied", str(source))

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(StorageError, match=r"cannot be removed \(Permission denied: .*step-0000000010"):
        apply_retention(root, keep_last=4, keep_every_n_steps=None)
    assert len(steps(root)) == 5
