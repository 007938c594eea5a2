"""Steps that must not count: found, left out, and followed by what the policy says."""

import math
import os
import signal
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phase8.checkpoint.load import list_checkpoints, open_checkpoint
from phase8.config.schema import AnomalySection
from phase8.data.indexed import IndexedWriter
from phase8.errors import DivergenceError
from phase8.train import loop, trainer
from phase8.train.engine.protocol import StepResult
from phase8.train.faults.anomaly import MIN_SPIKE_HISTORY, SPIKE_WINDOW, RollbackAsked, largest_loss, take_note
from phase8.train.loop import train
from phase8.train.resume import Position
from tests.train.tiny_run import prepare, records, train_tiny, weights

GOOD, BAD = StepResult(1.0, 1.0, skipped=False), StepResult(math.nan, math.inf, skipped=True)
HIGH = StepResult(9.0, 2.0, skipped=True)
SPIKES = AnomalySection(spike_deviations=5.0)
THREE = AnomalySection(max_consecutive=3)
SAMPLES = range(8, 12)


def note(position, result, section=THREE, limit=math.inf):
    position.step += 1
    return take_note(position, result, section, largest_loss=limit, samples=SAMPLES)


@given(st.lists(st.floats(0.01, 20), min_size=MIN_SPIKE_HISTORY, max_size=SPIKE_WINDOW), st.floats(1.0, 10.0))
@settings(deadline=None)
def test_a_limit_is_so_many_deviations_above_the_median(losses, deviations):
    limit = largest_loss(losses, AnomalySection(spike_deviations=deviations))
    median = statistics.median(losses)
    assert limit > median
    # Half of all losses are within one median absolute deviation, which is 0.67 standard deviations of a normal distribution.
    within = (limit - median) * 0.6745 / deviations
    assert sum(abs(loss - median) <= within * (1 + 1e-9) for loss in losses) >= len(losses) / 2
    assert largest_loss([loss * 3 for loss in losses], AnomalySection(spike_deviations=deviations)) == pytest.approx(3 * limit)


def test_there_is_no_limit_without_a_history_or_when_none_is_asked_for():
    steady = [2.0] * SPIKE_WINDOW
    assert largest_loss(steady[: MIN_SPIKE_HISTORY - 1], SPIKES) == math.inf == largest_loss(steady, AnomalySection())
    assert 2.0 < largest_loss(steady, SPIKES) < 2.02  # rounding of equal losses is no spike


def test_only_losses_that_counted_are_remembered():
    position = Position()
    for result in [GOOD] * SPIKE_WINDOW + [HIGH, GOOD]:
        note(position, result, SPIKES, limit=3.0)
    assert position.recent_losses == [1.0] * SPIKE_WINDOW
    position = Position()
    note(position, GOOD)
    assert position.recent_losses == []
    position = Position(recent_losses=[5.0] * SPIKE_WINDOW)  # from before spikes were no longer looked for
    note(position, GOOD)
    assert position.recent_losses == []


def test_a_good_step_ends_a_row_of_skipped_ones():
    position = Position()
    found = [note(position, result) for result in (BAD, BAD, GOOD, BAD, BAD)]
    assert (position.consecutive_skipped, position.total_skipped) == (2, 4)
    assert [anomaly and anomaly.step for anomaly in found] == [1, 2, None, 4, 5]


def test_a_sentence_names_step_loss_norm_and_samples():
    position = Position(step=40)
    assert str(note(position, BAD)) == "step 41: loss nan and gradient norm inf are not both finite, on samples 8..11"
    assert str(note(position, HIGH, limit=3.0)).startswith("step 42: loss 9.0000 is above 3.0000, where spikes begin")


def test_too_many_in_a_row_and_the_policy_stop_end_the_run():
    position = Position()
    note(position, BAD)
    note(position, BAD)
    with pytest.raises(DivergenceError, match=r"^step 3: loss nan .* on samples 8\.\.11, the last of 3 in a row .*; lower"):
        note(position, BAD)
    with pytest.raises(DivergenceError, match=r"^step 1: .*, and train\.anomaly\.policy is stop; lower"):
        note(Position(), BAD, AnomalySection(policy="stop"))
    with pytest.raises(RollbackAsked):
        note(Position(), HIGH, AnomalySection(policy="rollback"))


def spoil(run, sample, *, factor):
    """Multiplies the loss of the steps that read a sample."""
    original = run.engine.train_state.model.loss_sum

    def spoiled(*arguments):
        begin = run.position.samples_consumed
        return original(*arguments) * (factor if sample in range(begin, begin + 4) else 1.0)

    run.engine.train_state.model.loss_sum = spoiled


@pytest.fixture
def taken(monkeypatch):
    """Number and first sample of every step that is taken."""
    steps, take_note = [], trainer.take_note

    def remember(position, result, section, *, largest_loss, samples):
        steps.append((position.step, samples[0]))
        return take_note(position, result, section, largest_loss=largest_loss, samples=samples)

    monkeypatch.setattr(trainer, "take_note", remember)
    return steps


def events(run, name):
    return [record for record in records(run) if record.get("event") == name]


def test_a_spike_is_left_out_and_recorded(tiny, taken):
    run = prepare(tiny, "train.anomaly.spike_deviations=8", "checkpoint.every_n_steps=1", "checkpoint.keep_last=9")
    spoil(run, 17 * 4, factor=10.0)  # read in step 18
    train(run, resume_command="")
    assert taken == [(step, 4 * (step - 1)) for step in range(1, 21)]
    (event,) = events(run, "skipped")
    assert event["step"] == 18 and "samples 68..71" in event["message"] and "where spikes begin" in event["message"]
    (record,) = [record for record in records(run) if record.get("skipped")]
    assert record["step"] == 18 and record["loss"] > 20
    before, at = (open_checkpoint(run.directory.checkpoints / f"step-00000000{step}") for step in (17, 18))
    assert all(torch.equal(before.read(name), at.read(name)) for name in before.manifest.tensors if name.startswith("model."))
    assert run.position.total_skipped == 1 and len(run.position.recent_losses) == 19


def test_losses_on_other_data_make_no_spikes_of_those_that_follow(tiny, tmp_path):
    with IndexedWriter(tmp_path / "easy", dtype=np.dtype(np.uint16)) as writer:
        for _ in range(200):
            writer.add_document(np.arange(40) % 5)
    spikes, easy = ("train.anomaly.spike_deviations=8", "optim.schedule=constant", "train.num_steps=40"), f"data.train={tmp_path}/easy"
    assert len(train_tiny(tiny, *spikes, easy, "train.stop_at_step=30").position.recent_losses) == 30
    same = prepare(tiny, *spikes, easy, "data.allow_fingerprint_change=true")
    same.lock.close()
    assert len(same.position.recent_losses) == 30
    harder = train_tiny(tiny, *spikes, "data.allow_fingerprint_change=true", "train.stop_at_step=32")
    assert harder.position.total_skipped == 0 and len(harder.position.recent_losses) == 2


def test_a_run_without_spikes_is_the_same_as_without_looking_for_them(tiny):
    looked = train_tiny(tiny, "train.anomaly.spike_deviations=100", "run.name=looked")
    plain = train_tiny(tiny)
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(looked).items())


def test_a_rollback_goes_back_to_the_checkpoint_and_leaves_out_all_samples_since(tiny, taken):
    run = prepare(tiny, "train.anomaly.policy=rollback")
    spoil(run, 12 * 4, factor=math.nan)  # read in step 13
    train(run, resume_command="")
    before = [(step, 4 * (step - 1)) for step in range(1, 14)]
    after = [(step, 4 * (step - 1) + 3 * 4) for step in range(11, 21)]  # the samples of steps 11 to 13 are left out
    assert taken == before + after
    (event,) = events(run, "rollback")
    assert (event["step"], event["from_step"], event["first_sample_left_out"], event["last_sample_left_out"]) == (10, 13, 40, 51)
    assert [record["step"] for record in records(run) if "loss" in record] == list(range(1, 21))  # each step once
    assert (run.position.step, run.position.samples_consumed, run.position.tokens_seen) == (20, 92, 20 * 4 * 24)
    assert run.position.total_skipped == 1 and open_checkpoint(list_checkpoints(run.directory.checkpoints)[0]).step == 20


def test_the_weights_after_a_rollback_are_those_of_a_run_that_never_saw_the_samples(tiny):
    run = prepare(tiny, "train.anomaly.policy=rollback")
    spoil(run, 12 * 4, factor=math.nan)
    train(run, resume_command="")
    other = prepare(tiny, "run.name=other", "train.stop_at_step=10")
    train(other, resume_command="")
    other = prepare(tiny, "run.name=other")
    other.position.samples_consumed += 3 * 4
    train(other, resume_command="")
    assert all(torch.equal(value, weights(other)[name]) for name, value in weights(run).items())


def test_a_rollback_needs_a_checkpoint(tiny):
    run = prepare(tiny, "train.anomaly.policy=rollback")
    spoil(run, 2 * 4, factor=math.nan)
    with pytest.raises(DivergenceError, match=r"^step 3: .* but there is no checkpoint to go back to yet; lower") as diverged:
        train(run, resume_command="")
    assert records(run)[-1] == {"step": 3, "event": "diverged", "message": str(diverged.value)}
    assert [record["step"] for record in records(run) if "loss" in record] == [1, 2, 3]


def test_rollbacks_to_the_same_checkpoint_end(tiny, taken):
    run = prepare(tiny, "train.anomaly.policy=rollback", "train.anomaly.max_consecutive=3")
    original = run.engine.train_state.model.loss_sum
    run.engine.train_state.model.loss_sum = lambda *arguments: original(*arguments) * (math.nan if run.position.step == 7 else 1.0)
    with pytest.raises(DivergenceError, match=r"^step 8: .*, after 3 rollbacks to step 5 "):
        train(run, resume_command="")
    assert [step for step, _ in taken] == [1, 2, 3, 4, 5, 6, 7, 8, 6, 7, 8, 6, 7, 8]


def test_a_rollback_is_remembered_across_a_resume(tiny):
    run = prepare(tiny, "train.anomaly.policy=rollback", "train.stop_at_step=15")
    spoil(run, 12 * 4, factor=math.nan)
    train(run, resume_command="")
    resumed = prepare(tiny, "train.anomaly.policy=rollback")
    assert (resumed.position.step, resumed.position.samples_consumed, resumed.position.total_skipped) == (15, 72, 1)
    assert len(events(run, "rollback")) == 1


def test_a_stop_right_after_a_rollback_saves_that_the_samples_are_left_out(tiny, monkeypatch):
    """The checkpoint from which the process began is that of the same step, but does not leave them out."""
    train_tiny(tiny, "train.stop_at_step=10")
    run, record = prepare(tiny, "train.anomaly.policy=rollback"), loop._record_beginning

    def record_and_stop(trainer, run, rollback):
        record(trainer, run, rollback)
        if rollback is not None:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop, "_record_beginning", record_and_stop)
    spoil(run, 12 * 4, factor=math.nan)
    train(run, resume_command="")
    resumed = prepare(tiny)
    assert (resumed.position.step, resumed.position.samples_consumed, resumed.position.rollbacks_in_a_row) == (10, 13 * 4, 1)
