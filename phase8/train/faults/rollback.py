"""Rollback to the newest checkpoint after an anomaly; training then continues with later samples."""

from __future__ import annotations

from phase8.checkpoint.load import Checkpoint
from phase8.errors import DivergenceError
from phase8.train.build import Run
from phase8.train.faults.anomaly import Anomaly
from phase8.train.resume import restore_run
from phase8.train.start import restore_asked


def roll_back(run: Run, anomaly: Anomaly) -> dict[str, str | int]:
    """Restores weights, optimizer and random state on all ranks, and sets the position after the samples of the anomaly.

    Args:
        run: Run, which gets the state of its newest checkpoint.
        anomaly: Anomaly whose samples, with all others since that checkpoint, are left out from now on.

    Returns:
        Fields of the event in the metrics.

    Raises:
        DivergenceError: There is no checkpoint yet, or there were too many rollbacks to the same one.
    """
    abandoned, limit = run.position, run.config.train.anomaly.max_consecutive
    restored = abandoned

    def restore(checkpoint: Checkpoint) -> None:
        nonlocal restored
        restored, _ = restore_run(checkpoint, run.config, data=run.data, attachments=run.attachments, engine=run.engine)

    checkpoint = restore_asked("auto", run.directory, restore, is_first=run.is_main, on_message=run.say)
    if checkpoint is None:
        raise DivergenceError(
            f"{anomaly}, and train.anomaly.policy is rollback, but there is no checkpoint to go back to yet; lower "
            "checkpoint.every_n_steps or set train.anomaly.policy to skip."
        )
    left_out = range(restored.samples_consumed, anomaly.samples.stop)
    is_same = abandoned.rolled_back_to == restored.step
    restored.rolled_back_to, restored.rollbacks_in_a_row = restored.step, abandoned.rollbacks_in_a_row + 1 if is_same else 1
    if restored.rollbacks_in_a_row >= limit:
        raise DivergenceError(
            f"{anomaly}, after {restored.rollbacks_in_a_row} rollbacks to step {restored.step} (train.anomaly.max_consecutive); lower "
            "optim.learning_rate, then resume from that checkpoint."
        )
    restored.samples_consumed = left_out.stop
    restored.total_skipped = abandoned.total_skipped
    run.position, run.saved_step = restored, None  # the checkpoint does not leave the samples out
    run.say(f"{anomaly}; back to step {restored.step}, samples {left_out.start}..{left_out.stop - 1} are left out")
    return {
        "from_step": anomaly.step,
        "message": str(anomaly),
        "first_sample_left_out": left_out.start,
        "last_sample_left_out": left_out.stop - 1,
        "rollbacks_in_a_row": restored.rollbacks_in_a_row,
    }
