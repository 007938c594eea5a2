"""The training loop, from the first step to the last checkpoint and the end of the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

from phase8.accelerator import has_kernels
from phase8.closing import Tolerated
from phase8.config.load import config_to_mapping
from phase8.distributed.collectives import broadcast_text
from phase8.errors import CorruptionError, DivergenceError, Phase8Error, SwapError
from phase8.observe.loggers import Logger, open_loggers
from phase8.observe.metrics import MetricsWriter
from phase8.observe.progress import Progress
from phase8.observe.report import write_report
from phase8.train.build import Run
from phase8.train.faults.anomaly import RollbackAsked
from phase8.train.faults.rollback import roll_back
from phase8.train.memory_limits import memory_errors
from phase8.train.provenance import start_record
from phase8.train.signals import StopRequest
from phase8.train.trainer import Trainer
from phase8.train.unreadable import UnreadableData

_UNSAVED = "the steps since the last checkpoint are not saved"


def train(run: Run, *, resume_command: str, report: Callable[[int, str], None] = lambda step, doing: None) -> None:
    """Trains until the last step, until `train.stop_at_step`, or until a stop signal, and saves.

    Args:
        run: Run from `build_run`; its lock is released at the end.
        resume_command: Command that is printed when a signal stopped the run.
        report: Function that is called with the step and what this rank does from now on.

    Raises:
        DivergenceError: An anomaly occurred and the policy is to stop, anomalies or rollbacks were too many, or there is no checkpoint to go
            back to.
        DataError: The data cannot be read; the steps so far are saved.
        StorageError: The last checkpoint cannot be written.
        OutOfMemoryError: The memory of the device or of the host does not suffice.
        CorruptionError: Copies of the weights or of the optimizer state differ between ranks.
    """
    with run.lock, memory_errors(run.config, run.chosen, run.machine, world_size=run.engine.mesh.topology.world_size, has_begun=True):
        if not run.is_complete:  # a run that was resumed from elsewhere and has no steps to take is saved here
            try:
                stopped_by = _train_with_rollbacks(run, run.stop_step, report)
            except DivergenceError:
                finish(run, otherwise="no report")
                broadcast_text(None)  # a rank that ended earlier would make the launcher end the first one while it writes
                raise
            if stopped_by is not None and run.position.step < run.stop_step:
                run.say(f"{stopped_by}: saved at step {run.position.step}; go on with:\n  {resume_command}")
                return
        elif _is_reported(run):
            run.say(
                f"{run.directory.path} has already reached step {run.position.step}; raise train.num_steps or train.stop_at_step to go on, "
                "or start again with --resume none (the old run is kept under another name)."
            )
            return
        finish(run)


def _is_reported(run: Run) -> bool:
    """Whether the report exists too, so that nothing remains to be done; the first rank looks, because all ranks have to agree."""
    is_reported = not run.config.observe.report or (run.directory.path / "report" / "index.html").exists()
    return broadcast_text("reported" if is_reported else None) is not None


def finish(run: Run, *, otherwise: str = "no report, but the run is saved") -> None:
    """Writes the report. What is to be saved is saved already, so a failure, which `otherwise` describes, does not change how the run ends."""
    if run.config.observe.report and run.is_main:
        with Tolerated(otherwise, run.say):
            page = write_report(run.directory.path, say=run.say)
            run.say(f"report: {page}")


def _train_with_rollbacks(run: Run, stop_step: int, report: Callable[[int, str], None]) -> str | None:
    """Trains and saves, and after an anomaly rolls back and trains on; returns the name of the signal that stopped it, or None."""
    rollback: dict[str, str | int] | None = None
    with _loggers(run) as loggers:
        while True:
            try:
                return _train_until(run, stop_step, report, loggers=loggers, rollback=rollback)
            except RollbackAsked as asked:
                report(run.position.step, "rolling back")
                try:
                    rollback = roll_back(run, asked.anomaly)
                except DivergenceError as diverged:
                    _record_end(run, diverged, loggers)
                    raise


def _record_end(run: Run, diverged: DivergenceError, loggers: Sequence[Logger]) -> None:
    """Records that a run ended because it could not be rolled back, which is found when its metrics are closed."""
    if run.is_main:
        step, directory = run.position.step, run.directory.path
        with Tolerated("the metrics lack the end of the run", run.say), MetricsWriter(directory, resume_step=step, loggers=loggers) as metrics:
            metrics.log_event(step, "diverged", message=str(diverged))


def _loggers(run: Run) -> AbstractContextManager[Sequence[Logger]]:
    """The loggers of the first rank; the others have none."""
    if not run.is_main:
        return nullcontext(())
    config = run.config
    return open_loggers(config.observe, run.directory.path, name=config.run.name, config=config_to_mapping(config), say=run.say)


def _stop_request(run: Run) -> StopRequest:
    """The handler of stop signals; of several ranks only the first one prints a message. A launcher turns a second Ctrl-C into SIGTERM."""
    if run.engine.mesh.device_mesh is None:
        return StopRequest()
    return StopRequest("all ranks stop after this step" if run.is_main else None)


def _train_until(
    run: Run, stop_step: int, report: Callable[[int, str], None], *, loggers: Sequence[Logger], rollback: dict[str, str | int] | None
) -> str | None:
    """Trains and saves; returns the name of the signal that stopped it, or None. `rollback` is recorded as an event."""
    config = run.config
    metrics = None
    if run.is_main:
        metrics = MetricsWriter(run.directory.path, resume_step=run.position.step, loggers=loggers, say=run.say)
    progress = Progress(
        total_steps=stop_step,
        start_step=run.position.step,
        log_every_n_steps=config.observe.log_every_n_steps,
        console=run.console,
        epochs=lambda: run.data.epochs(run.position.samples_consumed),
    )
    with metrics or nullcontext(), _stop_request(run) as stop, progress:
        trainer = Trainer(run, metrics, progress, report)
        _record_beginning(trainer, run, rollback)
        if rollback is None and run.position.step < stop_step and (config.train.compile.enabled or has_kernels(run.device.type)):
            progress.message("the first step compiles what the others run, which may take minutes")
        try:
            asked_to_stop = trainer.train_until(stop_step, stop)
        except UnreadableData as unreadable:
            with Tolerated(_UNSAVED, progress.message):
                trainer.save(must_succeed=True)
            report(run.position.step, "waiting for a rank that cannot read its data")
            unreadable.end()
        except (Phase8Error, OSError) as error:
            # Between steps the weights are good, so unreadable data or a closed terminal must not lose them. After divergence, and after an update
            # that did not end, training continues from an earlier checkpoint. With several ranks nothing is saved: ranks without an error would
            # never join.
            if trainer.is_alone and not isinstance(error, (CorruptionError, DivergenceError, SwapError)):
                with Tolerated(_UNSAVED, progress.message):
                    trainer.save(must_succeed=True)
            raise
        else:
            trainer.save(must_succeed=True)
        finally:
            trainer.close()
        if run.position.step >= stop_step:
            trainer.show_sample()
    return (stop.received or "another rank was asked to stop") if asked_to_stop else None


def _record_beginning(trainer: Trainer, run: Run, rollback: dict[str, str | int] | None) -> None:
    """Records how the run begins, or goes on after a rollback."""
    if rollback is None and run.is_main:
        trainer.record_event("start", **start_record(run))
    if run.chosen.values and rollback is None:
        trainer.record_event("settings", **run.chosen.values, device=run.chosen.device, reason=run.chosen.reason)
    if run.origin is not None and run.position.step == 0:
        trainer.record_event("initialised", **run.origin.fields)
    if rollback is not None:
        trainer.record_event("rollback", **rollback)
    else:
        for change in run.changes:
            trainer.record_event(change.event, **change.record)
