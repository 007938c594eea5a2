"""Room for checkpoints: how large they are, which save has none, and what a start does about it."""

import os
from types import SimpleNamespace

import pytest
from rich.console import Console

from phase8.checkpoint.load import list_checkpoints, open_checkpoint
from phase8.checkpoint.step_directories import saving_directory
from phase8.config.schema import CheckpointSection
from phase8.errors import StorageError
from phase8.plan.whole_config import checkpoint_bytes
from phase8.train.disk_room import Kept, save_without_room
from tests.train.tiny_run import prepare, records, tiny_config, train_tiny

MOE = ("model.ffn=moe", "model.num_experts=4", "model.router_bias_rate=0.1")
BF16 = ("precision.dtype=bf16", "train.compile.enabled=false")


@pytest.fixture
def disk(monkeypatch):
    """A disk with room for as many bytes as its attribute says; files that are written do not change that."""
    found = SimpleNamespace(free=None, blocks=1 << 40, asked=[])

    def statvfs(path):
        found.asked.append(str(path))
        if found.free is None:
            raise OSError
        return SimpleNamespace(f_bfree=found.free, f_bavail=found.free, f_frsize=1, f_blocks=found.blocks)

    monkeypatch.setattr("phase8.train.disk_room.os.statvfs", statvfs)
    return found


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("optim.name=muon",),
        ("optim.state_dtype=bf16",),
        ("optim.state_dtype=fp8",),
        MOE,
        ("model.tie_embeddings=true", *BF16),
        ("model.block=transformer", "zero.stage=3"),
    ],
    ids=str,
)
def test_a_checkpoint_has_the_bytes_that_were_planned(tiny, settings):
    run = train_tiny(tiny, *settings, "train.stop_at_step=1")
    (path,) = list_checkpoints(run.directory.checkpoints)
    tensors = open_checkpoint(path).manifest.tensors
    assert sum(entry.size_bytes for entry in tensors.values()) == checkpoint_bytes(tiny_config(tiny, *settings)) == sum(run.engine.state_sizes())


@pytest.mark.parametrize(
    ("free", "keep", "there", "without"),
    [
        (0, {}, [], 5),
        (1, {}, [], 10),
        (3, {}, [], 20),
        (4, {}, [], None),  # three that are kept, and a fourth until one of them is removed
        (2, {"keep_last": 1}, [], None),
        (1, {"keep_last": 1}, [], 10),
        (1, {}, [2, 3, 4], None),  # of a run that goes on the first save makes room for the next
        (1, {}, [3, 4], 10),
        (0, {}, [2, 3, 4], 5),
        (1, {}, [1, 2, 3, 4], None),
        (3, {"keep_last": 1, "keep_every_n_steps": 10}, [], 30),
        (6, {"keep_last": 1, "keep_every_n_steps": 10}, [], None),
        (2, {"keep_last": 1, "keep_every_n_steps": 2}, [2, 4], 20),
    ],
)
def test_old_checkpoints_make_room_once_a_new_one_is_complete(free, keep, there, without):
    section, kept = CheckpointSection(**keep), [Kept(step, 100) for step in there]
    assert save_without_room(section, kept, free_bytes=100 * free, num_bytes=100, saves=range(5, 51, 5)) == without


def test_very_many_saves_take_no_time():
    assert save_without_room(CheckpointSection(keep_last=10**9), [], free_bytes=10**30, num_bytes=1, saves=range(10**18)) is None


def test_a_run_that_could_save_nothing_is_refused_and_leaves_nothing(tiny, disk, tmp_path):
    size = checkpoint_bytes(tiny_config(tiny))
    disk.free = size - 1
    with pytest.raises(StorageError, match=r"^a checkpoint of this run takes 177 KiB, but the disk of .*/tiny/checkpoints has 177 KiB free, so"):
        prepare(tiny)
    assert not (tmp_path / "runs").exists() and disk.asked == [f"{tmp_path}/runs"]  # which the lock had made
    disk.free = size
    assert prepare(tiny, "train.num_steps=5").facts[-1][0] != "disk"


def test_a_later_save_without_room_is_a_fact_that_the_report_keeps(tiny, disk):
    disk.free = 2 * checkpoint_bytes(tiny_config(tiny))
    run = train_tiny(tiny)
    expected = ("to save step 15 beside the checkpoints that checkpoint.keep_last 3 keep until then, 177 KiB each; ", "make room, or keep fewer")
    name, sentence = run.facts[-1]
    assert name == "disk" and all(text in sentence for text in expected)
    start = next(record for record in records(run) if record.get("event") == "start")
    assert start["facts"]["disk"] == sentence


def test_a_run_that_goes_on_counts_what_it_will_remove_and_no_earlier_run(tiny, disk):
    size = checkpoint_bytes(tiny_config(tiny))
    whole = train_tiny(tiny)  # three are kept
    disk.free = size
    more = "train.num_steps=100"
    assert prepare(tiny, more).facts[-1][0] != "disk"
    with pytest.raises(StorageError, match="none could be saved"):
        disk.free = size - 1
        prepare(tiny, more)
    disk.free = size  # an earlier run is renamed and stays
    assert prepare(tiny, more, resume="none").facts[-1][0] == "disk"
    assert whole.directory.path.with_name("tiny.1").is_dir()


def test_checkpoints_that_are_moved_aside_make_no_room(tiny, disk):
    run = train_tiny(tiny)
    disk.free = checkpoint_bytes(tiny_config(tiny))
    oldest = list_checkpoints(run.directory.checkpoints)[-1]
    assert prepare(tiny, resume=str(oldest)).facts[-1][0] == "disk"  # two later ones


def test_a_run_that_is_complete_needs_no_room(tiny, disk):
    train_tiny(tiny)
    disk.free = 0
    assert prepare(tiny).is_complete


@pytest.mark.parametrize("tells", ["nothing", "no blocks"])
def test_file_systems_that_do_not_tell_refuse_nothing(tiny, disk, tells):
    disk.free, disk.blocks = (None, 1) if tells == "nothing" else (0, 0)
    assert prepare(tiny).facts[-1][0] != "disk"


def test_what_a_killed_save_left_is_removed_and_counted_as_room(tiny, disk):
    run = train_tiny(tiny, "train.stop_at_step=5")
    root, size = run.directory.checkpoints, checkpoint_bytes(tiny_config(tiny))
    (left := root / ".saving-step-0000000010-01234567").mkdir()
    (left / "model-0.safetensors").write_bytes(bytes(size))
    disk.free = 0
    with saving_directory(root, 11) as being_saved:
        (being_saved / "model-0.safetensors").write_bytes(bytes(size))
        assert prepare(tiny, console=Console(quiet=True)).facts[-1][0] == "disk"  # there is room for one save
        assert being_saved.is_dir() and not left.exists()
    with pytest.raises(StorageError, match="0 B free"):
        prepare(tiny)
    assert os.listdir(root) == ["step-0000000005"]
