"""The training loop: steps, evaluations, checkpoints, and how a run ends."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

from torch import Tensor

from phase8.data.loader import build_loader, evaluation_microbatches, microbatch_sample_numbers
from phase8.distributed.collectives import broadcast_text
from phase8.errors import DivergenceError, Phase8Error, StorageError
from phase8.model.flops import training_flops_per_token
from phase8.observe.banner import print_line
from phase8.observe.memory import peak_memory_bytes, reset_peak_memory
from phase8.observe.metrics import MetricsWriter, StepMetrics
from phase8.observe.progress import Progress
from phase8.observe.report import write_report
from phase8.optim.schedule import learning_rate
from phase8.train.anomaly import RollbackAsked, largest_loss, take_note
from phase8.train.build import Run
from phase8.train.captured_step import CapturedStep
from phase8.train.learner import whole_model
from phase8.train.microbatch import Microbatch, split_sample
from phase8.train.resume import check_stop
from phase8.train.rollback import roll_back
from phase8.train.sample import write_sample
from phase8.train.saver import Saver
from phase8.train.signals import StopRequest
from phase8.train.step import StepResult, evaluate, train_step


def train(run: Run, *, resume_command: str, report: Callable[[int, str], None] = lambda step, doing: None) -> None:
    """Trains until the last step, until `train.stop_at_step`, or until a stop signal, and saves.

    Args:
        run: From `build_run`; its lock is released at the end.
        resume_command: Printed when a signal stopped the run.
        report: Told what this rank does from now on, and in which step.

    Raises:
        DivergenceError: Too many non-finite steps in a row.
        DataError: The data cannot be read; the steps so far are saved.
        StorageError: The last checkpoint cannot be written.
    """
    with run.lock or nullcontext():
        stop_step = check_stop(run.config, run.position)
        if run.position.step < stop_step or run.saved_step != run.position.step:  # what was resumed from elsewhere is saved here
            stopped_by = _train_with_rollbacks(run, stop_step, report)
            if stopped_by is not None and run.position.step < stop_step:
                print_line(f"{stopped_by}: saved at step {run.position.step}; go on with:\n  {resume_command}", run.console)
                return
        elif _is_complete(run):
            print_line(
                f"{run.directory.path} has already reached step {run.position.step}; raise train.num_steps or train.stop_at_step to go on, "
                "or start again with --resume none (the old run is kept under another name).",
                run.console,
            )
            return
        finish(run)


def _is_complete(run: Run) -> bool:
    """Nothing is left to do, not even the report; the first rank looks, for all have to agree."""
    is_complete = not run.config.observe.report or (run.directory.path / "report" / "index.html").exists()
    return broadcast_text("complete" if is_complete else None) is not None


def finish(run: Run) -> None:
    """Prints a sample and draws the report."""
    sample = None
    if run.config.observe.sample_prompt is not None and run.data.tokenizer is not None:
        model = whole_model(run.learner, run.config)
        sample = None if model is None else write_sample(model, run.data.tokenizer, run.config, run.console)
    if run.config.observe.report and run.is_main:
        page = write_report(
            run.directory.path,
            title=f"phase8: {run.config.run.name}",
            facts=run.facts,
            reference_losses=run.data.reference_losses,
            sample=sample,
        )
        print_line(f"report: {page}", run.console)


def _train_with_rollbacks(run: Run, stop_step: int, report: Callable[[int, str], None]) -> str | None:
    """Takes the steps and saves, again from the newest checkpoint after an anomaly; returns the signal that stopped them, if one did."""
    rollback: dict[str, str | int] | None = None
    while True:
        try:
            return _train_until(run, stop_step, report, rollback=rollback)
        except RollbackAsked as asked:
            report(run.position.step, "rolling back")
            rollback = roll_back(run, asked.anomaly)


def _train_until(run: Run, stop_step: int, report: Callable[[int, str], None], *, rollback: dict[str, str | int] | None) -> str | None:
    """Takes the steps and saves; returns the signal that stopped them, if one did. The record says of a rollback that led here."""
    config = run.config
    metrics = (
        MetricsWriter(run.directory.path, resume_step=run.position.step, tensorboard=config.observe.tensorboard) if run.is_main else None
    )
    progress = Progress(
        total_steps=stop_step, start_step=run.position.step, log_every_n_steps=config.observe.log_every_n_steps, console=run.console
    )
    with metrics or nullcontext(), StopRequest() as stop, progress:
        trainer = Trainer(run, metrics, progress, report)
        if rollback is not None:
            trainer.record_event("rollback", **rollback)
        try:
            asked_to_stop = trainer.train_until(stop_step, stop)
        except (Phase8Error, OSError) as error:
            # Between steps the weights are good: unreadable data or a closed terminal must not cost them. After divergence the
            # checkpoint before it is the one to go on from. Of several ranks the others may be fine, and would wait for ever.
            if trainer.is_alone and not isinstance(error, DivergenceError):
                trainer.save(must_succeed=False)
            raise
        else:
            trainer.save(must_succeed=True)
        finally:
            trainer.saver.close()
    return (stop.received or "another rank was asked to stop") if asked_to_stop else None


class Trainer:
    """The moving parts of a run that trains.

    Args:
        run: Weights, optimizer, data and position.
        metrics: Where every step is recorded; None: another rank does.
        progress: Where it is shown.
        report: As for `train`.
    """

    def __init__(self, run: Run, metrics: MetricsWriter | None, progress: Progress, report: Callable[[int, str], None]):
        self.run, self.metrics, self.progress, self.report = run, metrics, progress, report
        self.flops_per_token = training_flops_per_token(run.config.model)
        self.metrics_failed = False
        self.saver = Saver(run, record=self._record, say=progress.message)
        self.num_ranks = run.learner.mesh.topology.world_size
        self.num_own_evaluations = 0
        self.evaluation_samples = self._evaluation_samples()
        self.take_step = CapturedStep(run.learner) if run.uses_cuda_graphs else partial(train_step, run.learner)
        reset_peak_memory(run.device)

    @property
    def is_alone(self) -> bool:
        """This process is the whole run."""
        return self.run.learner.mesh.device_mesh is None

    def train_until(self, stop_step: int, stop: StopRequest) -> bool:
        """Takes steps; evaluates and saves between them. Returns whether this rank or another was asked to stop."""
        config, position = self.run.config, self.run.position
        microbatches = self._microbatches()
        asked_to_stop = stop.received is not None and self.is_alone
        while position.step < stop_step and not asked_to_stop:
            result = self._take_step(microbatches, stop=stop.received is not None)
            self.saver.hear()
            is_last = position.step == stop_step
            # Several ranks stop after the same step: that in which all have learnt of the signal.
            asked_to_stop = stop.received is not None if self.is_alone else result.stop
            if asked_to_stop and not is_last:
                return True  # somebody waits for this process to end: what is due otherwise is done after resuming
            if is_last or _is_due(position.step, config.train.evaluate_every_n_steps):
                self.evaluate()
            if not is_last and _is_due(position.step, config.checkpoint.every_n_steps):
                self.save(must_succeed=False)
        return asked_to_stop

    def evaluate(self) -> None:
        """Measures the loss on the held-out sequences, if there are any."""
        step = self.run.position.step
        if self.evaluation_samples is None:
            return
        self.report(step, "evaluation")
        loss, num_tokens = evaluate(self.run.learner, self._evaluation_microbatches())
        self._record(lambda metrics: metrics.log_evaluation(step, validation_loss=loss, validation_tokens=num_tokens))
        self.progress.evaluation(step, loss)

    def save(self, *, must_succeed: bool) -> None:
        """Saves the current step; arguments and errors as in `Saver.save`."""
        self.report(self.run.position.step, "saving a checkpoint")
        self.saver.save(must_succeed=must_succeed)

    def _take_step(self, microbatches: Iterator[Microbatch], *, stop: bool) -> StepResult:
        run, config, position = self.run, self.run.config, self.run.position
        begin = time.perf_counter()
        self.report(position.step + 1, "reading data")
        batch = list(itertools.islice(microbatches, run.shape.num_microbatches))
        data_wait_seconds = time.perf_counter() - begin
        rate = learning_rate(position.step + 1, config.optim, num_steps=config.train.num_steps)
        self.report(position.step + 1, "training")
        loss_limit = largest_loss(position.recent_losses, config.train.anomaly)
        result = self.take_step(
            batch,
            learning_rate=rate,
            gradient_clip_norm=config.optim.gradient_clip_norm,
            largest_loss=loss_limit,
            stop=stop,
            report=lambda doing: self.report(position.step + 1, doing),
        )
        step_seconds = time.perf_counter() - begin
        samples = range(position.samples_consumed, position.samples_consumed + run.shape.global_batch_size)
        position.step += 1
        position.samples_consumed += run.shape.global_batch_size
        position.tokens_seen += run.shape.global_batch_size * config.model.sequence_length
        record = self._step_metrics(result, rate, step_seconds=step_seconds, data_wait_seconds=data_wait_seconds)
        self._record(lambda metrics: metrics.log_step(record))
        self.progress.step(record)
        anomaly = take_note(position, result, config.train.anomaly, largest_loss=loss_limit, samples=samples)
        if anomaly is not None:
            self.record_event("skipped", message=str(anomaly))
        return result

    def _step_metrics(self, result: StepResult, rate: float, *, step_seconds: float, data_wait_seconds: float) -> StepMetrics:
        run = self.run
        tokens_per_second = run.shape.global_batch_size * run.config.model.sequence_length / step_seconds
        return StepMetrics(
            step=run.position.step,
            loss=result.loss if math.isfinite(result.loss) else None,
            learning_rate=rate,
            grad_norm=result.grad_norm if math.isfinite(result.grad_norm) else None,
            tokens=run.position.tokens_seen,
            tokens_per_second=tokens_per_second,
            step_seconds=step_seconds,
            data_wait_seconds=data_wait_seconds,
            mfu=None if run.peak_flops is None else self.flops_per_token * tokens_per_second / (run.peak_flops * self.num_ranks),
            peak_memory_bytes=peak_memory_bytes(run.device),
            skipped=result.skipped,
        )

    def record_event(self, event: str, **fields: str | int) -> None:
        """Records something that happened after the current step."""
        self._record(lambda metrics: metrics.log_event(self.run.position.step, event, **fields))

    def _record(self, write: Callable[[MetricsWriter], None]) -> None:
        """Writes metrics; a full disk is said once and does not end the run."""
        if self.metrics is None:
            return
        try:
            write(self.metrics)
        except StorageError as error:
            if not self.metrics_failed:
                self.progress.message(f"step {self.run.position.step}: metrics are lost, training goes on: {error}")
            self.metrics_failed = True

    def _microbatches(self) -> Iterator[Microbatch]:
        numbers = microbatch_sample_numbers(
            samples_consumed=self.run.position.samples_consumed,
            micro_batch_size=self.run.shape.micro_batch_size,
            index=self.run.learner.mesh.data_parallel_index,
            num_readers=self.run.shape.data_parallel_size,
        )
        for sample in build_loader(self.run.data.train, self.run.config.data, sample_numbers=numbers):
            yield self._split(sample)

    def _evaluation_samples(self):
        """Loader of the held-out sequences of this rank, the same ones in every evaluation; None: there are none, or they are not asked for."""
        run, train = self.run, self.run.config.train
        if run.data.validation is None or train.evaluate_every_n_steps == 0:
            return None
        windows = evaluation_microbatches(
            run.data.validation, num_samples=train.evaluation_sequences, micro_batch_size=run.shape.micro_batch_size
        )
        own = windows[run.learner.mesh.data_parallel_index :: run.shape.data_parallel_size]
        self.num_own_evaluations, num_rounds = len(own), -(-len(windows) // run.shape.data_parallel_size)
        return build_loader(run.data.validation, run.config.data, sample_numbers=own + windows[-1:] * (num_rounds - len(own)))

    def _evaluation_microbatches(self) -> Iterator[Microbatch]:
        """This rank's; at the end, where others still have one, some whose targets do not count, for every rank takes part in every forward."""
        for index, sample in enumerate(self.evaluation_samples):
            microbatch = self._split(sample)
            yield microbatch if index < self.num_own_evaluations else microbatch.without_targets()

    def _split(self, sample: dict[str, Tensor]) -> Microbatch:
        return split_sample(sample, reset_at_document_boundaries=self.run.config.data.reset_at_document_boundaries)


def _is_due(step: int, every_n_steps: int) -> bool:
    return every_n_steps > 0 and step % every_n_steps == 0
