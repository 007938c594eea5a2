"""Checkpoints written aside while training goes on."""

import math
import re
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from phase8.checkpoint.background import BackgroundSaver
from phase8.checkpoint.host_copies import HostCopies
from phase8.checkpoint.load import list_checkpoints, open_checkpoint
from phase8.checkpoint.run_metadata import run_metadata
from phase8.checkpoint.step_directories import SAVING_PREFIX
from phase8.data.tokenizer_training import train_sentencepiece
from phase8.errors import CheckpointError, OutOfMemoryError, StorageError
from phase8.train import saver
from phase8.train.engine import fsdp
from phase8.train.loop import train
from tests.train.faults.test_anomaly import spoil
from tests.train.tiny_run import losses, prepare, records, train_tiny, weights

ASIDE = "checkpoint.asynchronous=true"
EACH = ("checkpoint.every_n_steps=5", "checkpoint.keep_last=10")


def saved_tensors(run):
    checkpoints = [open_checkpoint(path) for path in list_checkpoints(run.directory.checkpoints)]
    return {checkpoint.step: {name: checkpoint.read(name) for name in checkpoint.tensor_names} for checkpoint in checkpoints}


def test_what_is_saved_aside_is_what_was_there_when_it_began(tiny, monkeypatch):
    plain = prepare(tiny, *EACH, "run.name=plain")
    train(plain, resume_command="")
    original, threads = saver.save_checkpoint, []

    def slow(root, **rest):
        threads.append(threading.current_thread() is threading.main_thread())
        time.sleep(0.2)  # several steps of this run
        return original(root, **rest)

    monkeypatch.setattr(saver, "save_checkpoint", slow)
    aside = prepare(tiny, *EACH, ASIDE, "run.name=aside")
    train(aside, resume_command="")
    expected, found = saved_tensors(plain), saved_tensors(aside)
    assert losses(aside) == losses(plain) and found.keys() == expected.keys() == {5, 10, 15, 20}
    assert all(torch.equal(found[step][name], tensor) for step, tensors in expected.items() for name, tensor in tensors.items())
    assert threads == [False, False, False, True]  # the last one is awaited


def test_a_run_goes_on_from_what_was_saved_aside(tiny):
    whole = prepare(tiny, *EACH, "run.name=whole")
    train(whole, resume_command="")
    train(prepare(tiny, *EACH, ASIDE, "run.name=cut", "train.stop_at_step=12"), resume_command="")
    resumed = prepare(tiny, *EACH, ASIDE, "run.name=cut")
    train(resumed, resume_command="")
    assert resumed.position.step == 20 and losses(resumed) == losses(whole)
    assert all(torch.equal(parameter, weights(resumed)[name]) for name, parameter in weights(whole).items())


def test_every_save_says_how_long_training_stood_still(tiny, capsys):
    for name, settings in (("aside", (ASIDE,)), ("plain", ())):
        train(prepare(tiny, *EACH, *settings, f"run.name={name}", "train.stop_at_step=10", console=Console(width=500)), resume_command="")
        said = re.findall(r"^step (\d+)  saved; training stood still for \d+\.\d\d s$", capsys.readouterr().out, re.MULTILINE)
        assert said == ["5", "10"], name


def test_never_two_at_once(tiny, monkeypatch):
    original, busy, most = saver.save_checkpoint, [], []

    def slow(root, **rest):
        busy.append(rest["step"])
        most.append(len(busy))
        time.sleep(0.3)
        busy.remove(rest["step"])
        return original(root, **rest)

    monkeypatch.setattr(saver, "save_checkpoint", slow)
    run = prepare(tiny, ASIDE, "checkpoint.every_n_steps=1", "train.stop_at_step=4")
    train(run, resume_command="")
    assert most == [1] * 4
    events = [record for record in records(run) if record.get("event") == "checkpoint"]
    assert [event["checkpoint_step"] for event in events] == [1, 2, 3, 4]
    assert events[0]["checkpoint_stall_seconds"] < 0.3 < events[-1]["checkpoint_stall_seconds"]  # the first waits for its copy only


def test_a_failure_aside_is_reported_and_the_older_ones_stay(tiny, monkeypatch):
    original = saver.save_checkpoint

    def save(root, *, step, **rest):
        if step == 10:
            raise StorageError("no space left on device; free some space")
        return original(root, step=step, **rest)

    monkeypatch.setattr(saver, "save_checkpoint", save)
    run = prepare(tiny, *EACH, ASIDE)
    train(run, resume_command="")
    assert saved_tensors(run).keys() == {5, 15, 20}
    (failed,) = [record for record in records(run) if record.get("event") == "checkpoint_failed"]
    assert 10 <= failed["step"] <= 15 and "no space left" in failed["reason"]


FAILURES = {
    "the disk": StorageError("no space left on device; free some space"),
    "what is saved": CheckpointError("metadata.loss is nan"),
    "the system": PermissionError(13, "Permission denied"),
    "memory": MemoryError(),
    "torch": RuntimeError("not enough memory: you tried to allocate 4 bytes"),
    "a bug": KeyError("exp_avg"),
}


@pytest.mark.parametrize("asynchronous", [False, True], ids=["", "in the background"])
@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_training_survives_every_failure_of_a_periodic_save_but_not_of_the_last(tiny, monkeypatch, failure, asynchronous, capsys):
    original, failing = saver.save_checkpoint, {2, 3}

    def save(root, *, step, **rest):
        if step in failing:
            raise failure
        return original(root, step=step, **rest)

    monkeypatch.setattr(saver, "save_checkpoint", save)
    settings = (f"checkpoint.asynchronous={asynchronous}".lower(), "checkpoint.every_n_steps=1", "train.stop_at_step=4")
    run = prepare(tiny, *settings, console=Console(width=500))
    train(run, resume_command="")
    assert saved_tensors(run).keys() == {1, 4}
    reasons = [record["reason"] for record in records(run) if record.get("event") == "checkpoint_failed"]
    assert len(reasons) == 2 and all(str(failure).strip("'") in reason for reason in reasons)
    assert capsys.readouterr().out.count("checkpoint failed, training goes on: ") == 2
    failing.add(4)
    lacks_memory = isinstance(failure, MemoryError) or "memory" in str(failure)
    with pytest.raises(OutOfMemoryError if lacks_memory else type(failure)):
        train(prepare(tiny, *settings, "run.name=last"), resume_command="")


def test_the_ranks_save_together_or_not_at_all(tiny, monkeypatch):
    """One that has run out of memory would be waited for by the others for ever."""
    answers = iter([[None, "MemoryError"], [None, None], [None, None]])
    monkeypatch.setattr(saver, "gather_texts", lambda text, group: next(answers))
    run = prepare(tiny, "checkpoint.every_n_steps=1", "train.stop_at_step=4")
    train(run, resume_command="")
    assert saved_tensors(run).keys() == {2, 3, 4}
    assert [record["reason"] for record in records(run) if record.get("event") == "checkpoint_failed"] == ["rank 1: MemoryError"]


def test_the_loss_of_another_rank_is_no_failure_of_a_save(tiny, monkeypatch):
    def lost(root, **rest):
        raise dist.DistNetworkError("connection closed by peer")

    monkeypatch.setattr(saver, "save_checkpoint", lost)
    with pytest.raises(dist.DistNetworkError):
        train(prepare(tiny, *EACH), resume_command="")


def put_away(path):
    path.rename(path.with_name("away"))


def make_a_file(path):
    put_away(path)
    path.touch()


LOSSES = {
    "its copy of the tokenizer": ("tokenizer.model", Path.unlink, {5, 10, 15, 20}),
    "the checkpoints": ("checkpoints", put_away, {10, 15, 20}),
    "a file in their place": ("checkpoints", make_a_file, {15, 20}),
    "the whole run": (".", put_away, {10, 15, 20}),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_save_needs_nothing_that_it_can_lose(tiny, tmp_path, monkeypatch, name):
    """Between the saves of steps 5 and 10 something is taken away; a file in the way is removed again after step 10."""
    file, lose, saved = LOSSES[name]
    tokenizer = train_sentencepiece(["def main(): pass\n"] * 50, tmp_path / "small.model", vocab_size=280)
    run = prepare(tiny, *EACH, f"data.tokenizer={tokenizer}", "model.vocab_size=300")
    original = fsdp.train_step

    def train_step(*arguments, **options):
        path = run.directory.path / file
        if run.position.step + 1 == 7:
            lose(path)
        if run.position.step + 1 == 12 and path.is_file():
            path.unlink()
        return original(*arguments, **options)

    monkeypatch.setattr(fsdp, "train_step", train_step)
    tokenizer.unlink()
    train(run, resume_command="")
    assert saved_tensors(run).keys() == saved
    newest = open_checkpoint(list_checkpoints(run.directory.checkpoints)[0])
    newest.verify()
    assert list(newest.manifest.attachments) == ["tokenizer.model"]


def test_a_failure_of_retention_is_told_whatever_it_is(tiny, monkeypatch):
    def fail(root, **rest):
        raise CheckpointError("the checkpoints cannot be listed")

    monkeypatch.setattr(saver, "apply_retention", fail)
    run = prepare(tiny, *EACH, "train.stop_at_step=5")
    train(run, resume_command="")
    (event,) = [record for record in records(run) if record.get("event") == "retention_failed"]
    assert "cannot be listed" in event["reason"]


def test_what_is_no_longer_kept_makes_room_before_the_next_save(tiny, monkeypatch):
    """On a full disk a save would fail again and again beside what it would remove afterwards."""
    original, found = saver.save_checkpoint, []

    def save(root, **rest):
        found.append(sorted(path.name for path in root.iterdir()))
        (root / f"{SAVING_PREFIX}step-0000000099-00000000").mkdir()  # what another process, killed by now, was writing
        return original(root, **rest)

    train(prepare(tiny, *EACH, "train.stop_at_step=10"), resume_command="")
    monkeypatch.setattr(saver, "save_checkpoint", save)
    run = prepare(tiny, "checkpoint.every_n_steps=5", "checkpoint.keep_last=1")
    train(run, resume_command="")
    assert found == [["step-0000000010"], ["step-0000000015"]]
    assert [path.name for path in run.directory.checkpoints.iterdir()] == ["step-0000000020"]


def test_a_step_whose_save_failed_aside_is_saved_again_at_the_end(tiny, monkeypatch):
    original, tried = saver.save_checkpoint, []

    def save(root, *, step, **rest):
        tried.append(step)
        if len(tried) == 1:
            raise StorageError("no space left on device; free some space")
        return original(root, step=step, **rest)

    monkeypatch.setattr(saver, "save_checkpoint", save)
    run = prepare(tiny, ASIDE, "train.stop_at_step=3", "checkpoint.every_n_steps=2")
    train(run, resume_command="")
    assert tried == [2, 3] and saved_tensors(run).keys() == {3}


def test_a_rollback_frees_the_memory_of_copies_before_others_are_made(tiny, monkeypatch):
    """Nothing waits for the garbage collector: a host that has room for the copies of a run may have none for twice as many."""
    taken, take = [], HostCopies._take

    def noted(copies, num_bytes):
        alive = sum(reference() is not None for reference, _ in taken)
        slab = take(copies, num_bytes)
        taken.append((weakref.ref(slab), alive))
        return slab

    monkeypatch.setattr(HostCopies, "_take", noted)
    run = prepare(tiny, *EACH, ASIDE, "train.anomaly.policy=rollback")
    spoil(run, 12 * 4, factor=math.nan)
    train(run, resume_command="")
    assert [alive for _, alive in taken] == [0, 0] and run.position.total_skipped == 1


def test_without_room_for_copies_training_waits_for_saves(tiny, monkeypatch, capsys):
    """On each rank, if one has no room; before, such a run saved nothing until its end."""
    taken = []

    def take(copies, num_bytes):
        taken.append(num_bytes)
        raise MemoryError

    monkeypatch.setattr(HostCopies, "_take", take)
    run = prepare(tiny, *EACH, ASIDE, console=Console(width=500))
    train(run, resume_command="")
    assert saved_tensors(run).keys() == {5, 10, 15, 20} and len(taken) == 2  # prepared, and at the first save
    said = [line for line in capsys.readouterr().out.splitlines() if "training waits for saves" in line]
    assert said == ["step 5: no room for copies to save in the background, so training waits for saves: MemoryError"]
    assert not any(record.get("event") == "checkpoint_failed" for record in records(run))


def test_copies_do_not_follow_their_tensors():
    background, tensor, seen = BackgroundSaver(torch.device("cpu")), torch.zeros(1000), []
    release = threading.Event()

    def save(copies):
        release.wait()
        seen.append(copies["model.w"].clone())
        return Path("saved")

    background.start(background.copy({"model.w": tensor}), save)
    assert background.finished(wait=False) is None
    tensor.fill_(1)
    release.set()
    assert background.finished(wait=True) == Path("saved") and torch.equal(seen[0], torch.zeros(1000))
    background.close()


def test_what_fails_aside_is_raised_once():
    background = BackgroundSaver(torch.device("cpu"))

    def save(copies):
        raise StorageError("no space left on device; free some space")

    background.start(background.copy({"model.w": torch.zeros(1)}), save)
    with pytest.raises(StorageError, match="no space"):
        background.finished(wait=True)
    assert background.finished(wait=True) is None
    background.close()


def test_checkpoints_name_the_losses_of_late(tiny):
    run = train_tiny(tiny, "train.evaluate_every_n_steps=8", "checkpoint.keep_last=9")
    losses_by_step = losses(run)
    for step, evaluated in ((5, None), (10, 8), (20, 20)):
        found = run_metadata(open_checkpoint(run.directory.checkpoints / f"step-{step:010}")).losses
        assert found.num_steps == step and found.training == pytest.approx(sum(losses_by_step[n] for n in range(1, step + 1)) / step)
        assert found.validation_step == evaluated
        validation = {record["step"]: record["validation_loss"] for record in records(run) if "validation_loss" in record}
        assert found.validation == validation.get(evaluated)
