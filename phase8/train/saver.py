"""Saving of a run's checkpoints: in the foreground or background, with handling of failures and retention of older checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from torch import Tensor

from phase8.checkpoint.background import BackgroundSaver
from phase8.checkpoint.load import list_checkpoints
from phase8.checkpoint.retention import apply_retention
from phase8.checkpoint.save import save_checkpoint
from phase8.checkpoint.step_directories import step_directory_name, step_of
from phase8.distributed.collectives import gather_texts
from phase8.errors import CheckpointError
from phase8.observe.metrics import MetricsWriter
from phase8.processes.exit import is_echo, summary
from phase8.train.build import Run
from phase8.train.provenance import now
from phase8.train.recent_losses import RecentLosses
from phase8.train.resume import checkpoint_metadata


class SaveFailure(Exception):
    """A failed save after which training goes on; its cause is any exception, and its message summarises the cause in a line."""


class Saver:
    """Writes checkpoints, in the background where `checkpoint.asynchronous` is set.

    Args:
        run: Run with engine, position and run directory.
        record: Function that writes metrics, on the rank that records.
        say: Function that shows a message.
    """

    def __init__(self, run: Run, *, record: Callable[[Callable[[MetricsWriter], None]], None], say: Callable[[str], None]):
        self._run, self._record, self._say = run, record, say
        self.saved_step = run.saved_step
        self.losses = RecentLosses()
        self._background = BackgroundSaver(run.device) if run.config.checkpoint.asynchronous else None
        self._step_under_way, self._stall_seconds = 0, 0.0
        if self._background is not None:
            self._background.prepare(run.engine.state_sizes())

    def save(self, *, must_succeed: bool) -> None:
        """Writes a checkpoint of the current step, with the retention policy before and after; may return while a background save is running.

        Args:
            must_succeed: Whether to return only when the checkpoint is on the disk, and to raise on failure. Otherwise a failure is
                reported, training goes on, and older checkpoints stay.

        Raises:
            Exception: The save failed although it must succeed; it is a StorageError if the disk refused.
        """
        step, begin = self._run.position.step, time.perf_counter()
        self.hear(wait=True)  # only one save runs at a time
        if self.saved_step == step:
            return
        if self.saved_step is not None:  # what a killed save left, or a lower `keep_last` no longer keeps, may take the room of this one
            self._retain(self._run.directory.checkpoints / step_directory_name(self.saved_step))
        saved: Path | None = None
        if must_succeed:
            saved = self._planned_save()(tensors=self._run.engine.state())
        else:
            with self._survived("checkpoint failed"):
                saved = self._save_or_begin_to()
        self._step_under_way, self._stall_seconds = step, time.perf_counter() - begin
        if saved is not None:
            self._has_saved(step, saved)

    def hear(self, *, wait: bool = False) -> None:
        """Checks whether the save in the background has ended, or waits for it, and handles its result."""
        if self._background is None:
            return
        saved: Path | None = None
        with self._survived("checkpoint failed"):
            saved = self._background.finished(wait=wait)
        if saved is not None:
            self._has_saved(self._step_under_way, saved)

    def newest_step(self) -> int | None:
        """Step of the newest checkpoint of the run directory, after a save under way has ended; None: there is none."""
        self.hear(wait=True)
        try:
            return next((step_of(path.name) for path in list_checkpoints(self._run.directory.checkpoints)), None)
        except CheckpointError:  # the directory cannot be listed
            return self.saved_step

    def close(self) -> None:
        """Waits for the save in the background and ends the background saver."""
        self.hear(wait=True)
        if self._background is not None:
            self._background.close()

    def _save_or_begin_to(self) -> Path | None:
        """Writes a checkpoint and returns its path, or begins a save in the background and returns None."""
        save, background = self._planned_save(), self._background
        if background is not None:
            try:
                copies = self._on_all_ranks(lambda: background.copy(self._run.engine.state()))
            except SaveFailure as failure:
                self._background = None
                background.close()
                self._say(f"step {self._run.position.step}: no room for copies to save in the background, so training waits for saves: {failure}")
            else:
                background.start(copies, lambda copies: save(tensors=copies))
                return None
        return save(tensors=self._on_all_ranks(self._run.engine.state))

    def _planned_save(self) -> partial[Path]:
        """The call that saves this step, except for its tensors. All other arguments are evaluated now, so it reads no state that changes later."""
        run = self._run
        return partial(
            save_checkpoint,
            run.directory.checkpoints,
            step=run.position.step,
            metadata=checkpoint_metadata(
                run.config,
                run.position,
                global_batch_size=run.shape.global_batch_size,
                fingerprint=run.data.fingerprint,
                validation_fingerprint=run.data.validation_fingerprint,
                order_history=run.data.train.history.record,
                losses=self.losses.record,
                device=run.device,
                settings=run.chosen.as_record(),
            ),
            attachments=run.attachments,
            group=run.host_group,
        )

    def _on_all_ranks(self, take: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Calls `take` on every rank and returns its tensors; raises on all ranks if one fails, since a save would wait for that rank for ever."""
        failure, taken = None, {}
        try:
            with _one_kind_of_failure():
                taken = take()
        except SaveFailure as error:
            failure = error
        problems = gather_texts(None if failure is None else str(failure), self._run.host_group)
        for rank, problem in enumerate(problems):
            if problem is not None:
                raise SaveFailure(problem if len(problems) == 1 else f"rank {rank}: {problem}") from failure
        return taken

    @contextmanager
    def _survived(self, event: str) -> Iterator[None]:
        """A context in which a failure of any kind is shown and recorded under `event`, and training goes on."""
        try:
            with _one_kind_of_failure():
                yield
        except SaveFailure as failure:
            step = self._run.position.step
            self._say(f"step {step}: {event}, training goes on: {failure}")
            reason = str(failure)
            self._record(lambda metrics: metrics.log_event(step, event.replace(" ", "_"), reason=reason))

    def _has_saved(self, step: int, saved: Path) -> None:
        run = self._run
        self.saved_step = step
        if not run.is_main:
            return
        stall = self._stall_seconds
        self._say(f"step {step:,}  saved; training stood still for {stall:.2f} s")
        fields = {"checkpoint_step": step, "checkpoint_stall_seconds": stall, "time": now(), "epochs": run.data.epochs(run.position.samples_consumed)}
        self._record(lambda metrics: metrics.log_event(run.position.step, "checkpoint", **fields))
        self._retain(saved)

    def _retain(self, known_good: Path) -> None:
        """Removes, on the first rank, checkpoints that are no longer kept and leftovers of killed processes."""
        checkpoint = self._run.config.checkpoint
        if self._run.is_main:
            with self._survived("retention failed"):
                apply_retention(
                    self._run.directory.checkpoints,
                    keep_last=checkpoint.keep_last,
                    keep_every_n_steps=checkpoint.keep_every_n_steps,
                    known_good=known_good,
                )


@contextmanager
def _one_kind_of_failure() -> Iterator[None]:
    """A context that turns every exception into a SaveFailure, except one that results from the loss of another rank."""
    try:
        yield
    except Exception as error:
        if isinstance(error, SaveFailure) or is_echo(error):
            raise
        raise SaveFailure(summary(error)) from error
