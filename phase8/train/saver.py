"""When a checkpoint of a run is written, what happens if it fails, and which older ones go."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from phase8.checkpoint.background import BackgroundSaver
from phase8.checkpoint.retention import apply_retention
from phase8.checkpoint.save import save_checkpoint
from phase8.checkpoint.state import flat_state
from phase8.errors import StorageError
from phase8.observe.metrics import MetricsWriter
from phase8.train.build import Run
from phase8.train.resume import checkpoint_metadata

_MOMENTS = 2  # of a weight that AdamW keeps


class Saver:
    """Saves a run, aside if the config says so.

    Args:
        run: Weights, optimizer, position and where they go.
        record: Writes metrics, if this rank does.
        say: Shows a sentence.
    """

    def __init__(self, run: Run, *, record: Callable[[Callable[[MetricsWriter], None]], None], say: Callable[[str], None]):
        self._run, self._record, self._say = run, record, say
        self.saved_step = run.saved_step
        self._background = BackgroundSaver(run.device) if run.config.checkpoint.asynchronous else None
        self._step_under_way, self._stall_seconds = 0, 0.0
        if self._background is not None:
            parts = [part.nbytes for part in run.learner.shards.parts.values()]
            self._background.prepare([*parts, *(size for size in parts for _ in range(_MOMENTS))])

    def save(self, *, must_succeed: bool) -> None:
        """Writes a checkpoint of the current step and applies the retention policy; may return while it is being written.

        Args:
            must_succeed: Return when it is on the disk, and raise when the disk refuses; otherwise say so and train on, the older
                checkpoints stay.

        Raises:
            StorageError: It must succeed and did not.
        """
        run, step, begin = self._run, self._run.position.step, time.perf_counter()
        self.hear(wait=True)  # one at a time
        if self.saved_step == step:
            return
        tensors = flat_state(run.learner.stage.module, run.learner.optimizer, run.learner.shards.parts)
        save = partial(
            save_checkpoint,
            run.directory.checkpoints,
            step=step,
            metadata=checkpoint_metadata(
                run.config,
                run.position,
                global_batch_size=run.shape.global_batch_size,
                fingerprint=run.data.fingerprint,
                device=run.device,
            ),
            attachments={} if run.tokenizer_file is None else {run.tokenizer_file.name: run.tokenizer_file},
            group=run.host_group,
        )
        if self._background is not None and not must_succeed:
            self._background.start(tensors, lambda copies: save(tensors=copies))
            self._step_under_way, self._stall_seconds = step, time.perf_counter() - begin
            return
        try:
            saved = save(tensors=tensors)
        except StorageError as error:  # raised on every rank
            if must_succeed:
                raise
            self._report_failure("checkpoint failed", error)
            return
        self._stall_seconds = time.perf_counter() - begin
        self._has_saved(step, saved)

    def hear(self, *, wait: bool = False) -> None:
        """Looks whether the save under way has ended, or waits until it has."""
        if self._background is None:
            return
        try:
            saved = self._background.finished(wait=wait)
        except StorageError as error:
            self._report_failure("checkpoint failed", error)
            return
        if saved is not None:
            self._has_saved(self._step_under_way, saved)

    def close(self) -> None:
        """Waits for the save under way."""
        self.hear(wait=True)
        if self._background is not None:
            self._background.close()

    def _has_saved(self, step: int, saved: Path) -> None:
        run, checkpoint = self._run, self._run.config.checkpoint
        self.saved_step = step
        if not run.is_main:
            return
        stall = self._stall_seconds
        self._say(f"step {step:,}  saved; training stood still for {stall:.2f} s")
        self._record(
            lambda metrics: metrics.log_event(run.position.step, "checkpoint", checkpoint_step=step, checkpoint_stall_seconds=stall)
        )
        try:
            apply_retention(
                run.directory.checkpoints,
                keep_last=checkpoint.keep_last,
                keep_every_n_steps=checkpoint.keep_every_n_steps,
                known_good=saved,
            )
        except StorageError as error:
            self._report_failure("retention failed", error)

    def _report_failure(self, event: str, error: StorageError) -> None:
        """Says that something could not be stored; training goes on, and the older checkpoints stay."""
        step = self._run.position.step
        self._say(f"step {step}: {event}, training goes on: {error}")
        self._record(lambda metrics: metrics.log_event(step, event.replace(" ", "_"), reason=str(error)))
