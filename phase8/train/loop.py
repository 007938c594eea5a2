"""The training loop: steps, evaluations, checkpoints, and how a run ends."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import torch

from phase8.checkpoint.retention import apply_retention
from phase8.checkpoint.save import save_checkpoint
from phase8.checkpoint.state import flat_state
from phase8.data.loader import build_loader, evaluation_microbatches, microbatch_sample_numbers
from phase8.errors import StorageError
from phase8.model.flops import training_flops_per_token
from phase8.observe.memory import peak_memory_bytes, reset_peak_memory
from phase8.observe.metrics import MetricsWriter, StepMetrics
from phase8.observe.progress import Progress
from phase8.observe.report import write_report
from phase8.optim.schedule import learning_rate
from phase8.train.anomaly import NonFiniteGuard
from phase8.train.build import Run
from phase8.train.resume import check_stop, checkpoint_metadata
from phase8.train.sample import write_sample
from phase8.train.signals import StopRequest
from phase8.train.step import Microbatch, evaluate, split_sample, train_step


def train(run: Run, *, resume_command: str) -> None:
    """Trains until the last step, until `train.stop_at_step`, or until a stop signal, and saves.

    Args:
        run: From `build_run`.
        resume_command: Printed when the run stops early.

    Raises:
        DivergenceError: Too many non-finite steps in a row.
        StorageError: The last checkpoint or the metrics cannot be written.
    """
    stop_step = check_stop(run.config, run.position)
    if run.position.step >= stop_step:
        run.console.print(
            f"{run.directory.path} has already reached step {run.position.step}; raise train.num_steps or train.stop_at_step to go on, "
            "or start again with --resume none (the old run is kept under another name).",
            markup=False, highlight=False, soft_wrap=True,
        )
        return
    metrics = MetricsWriter(run.directory.path, resume_step=run.position.step, tensorboard=run.config.observe.tensorboard)
    progress = Progress(
        total_steps=stop_step, start_step=run.position.step, log_every_n_steps=run.config.observe.log_every_n_steps, console=run.console
    )
    with metrics, StopRequest() as stop:
        with progress:
            trainer = Trainer(run, metrics, progress)
            trainer.train_until(stop_step, stop)
            trainer.save(must_succeed=True)
        if stop.received is not None:
            run.console.print(
                f"{stop.received}: saved at step {run.position.step}; go on with:\n  {resume_command}", markup=False, highlight=False, soft_wrap=True
            )
            return
        finish(run)


def finish(run: Run) -> None:
    """Prints a sample and draws the report."""
    sample = None
    if run.config.observe.sample_prompt is not None and run.data.tokenizer is not None:
        sample = write_sample(run.model, run.data.tokenizer, run.config, run.console)
    if run.config.observe.report:
        page = write_report(
            run.directory.path,
            title=f"phase8: {run.config.run.name}",
            facts=run.facts,
            reference_losses=run.data.reference_losses,
            sample=sample,
        )
        run.console.print(f"report: {page}", markup=False, highlight=False, soft_wrap=True)


class Trainer:
    """The moving parts of a run that trains.

    Args:
        run: Weights, optimizer, data and position.
        metrics: Where every step is recorded.
        progress: Where it is shown.
    """

    def __init__(self, run: Run, metrics: MetricsWriter, progress: Progress):
        self.run, self.metrics, self.progress = run, metrics, progress
        position, config = run.position, run.config
        self.guard = NonFiniteGuard(
            max_consecutive=config.train.max_consecutive_nonfinite_steps,
            consecutive=position.consecutive_skipped,
            total=position.total_skipped,
        )
        self.flops_per_token = training_flops_per_token(config.model)
        self.last_saved_step = position.step if position.step else None
        self.last_evaluated_step: int | None = None
        if run.uses_cuda_graphs:
            for parameter in run.model.parameters():
                parameter.grad = torch.zeros_like(parameter)
        reset_peak_memory(run.device)

    def train_until(self, stop_step: int, stop: StopRequest) -> None:
        """Takes steps; evaluates and saves between them."""
        config, position = self.run.config, self.run.position
        microbatches = self._microbatches()
        while position.step < stop_step and stop.received is None:
            self._take_step(microbatches)
            if _is_due(position.step, config.train.evaluate_every_n_steps) or position.step == stop_step:
                self.evaluate()
            if _is_due(position.step, config.checkpoint.every_n_steps) and position.step < stop_step and stop.received is None:
                self.save(must_succeed=False)

    def evaluate(self) -> None:
        """Measures the loss on the held-out sequences, if there are any."""
        data, config, step = self.run.data, self.run.config, self.run.position.step
        if data.validation is None or config.train.evaluate_every_n_steps == 0 or self.last_evaluated_step == step:
            return
        windows = evaluation_microbatches(
            data.validation, num_samples=config.train.evaluation_sequences, micro_batch_size=self.run.shape.micro_batch_size
        )
        in_process = config.data.model_copy(update={"num_workers": 0})
        samples = build_loader(data.validation, in_process, sample_numbers=windows)
        loss, num_tokens = evaluate(self.run.model, [self._split(sample) for sample in samples])
        self.metrics.log_evaluation(step, validation_loss=loss, validation_tokens=num_tokens)
        self.progress.evaluation(step, loss)
        self.last_evaluated_step = step

    def save(self, *, must_succeed: bool) -> None:
        """Writes a checkpoint of the current step and applies the retention policy.

        Args:
            must_succeed: Raise when the disk refuses; otherwise say so and train on, the older checkpoints stay.
        """
        run, config, position = self.run, self.run.config, self.run.position
        if self.last_saved_step == position.step:
            return
        tokenizer = run.data.tokenizer
        try:
            saved = save_checkpoint(
                run.directory.checkpoints,
                step=position.step,
                tensors=flat_state(run.model, run.optimizer),
                metadata=checkpoint_metadata(config, position, fingerprint=run.data.fingerprint, device=run.device),
                attachments={} if tokenizer is None else {f"tokenizer{tokenizer.path.suffix}": tokenizer.path},
            )
        except StorageError as error:
            if must_succeed:
                raise
            self._report_storage("checkpoint_failed", error)
            return
        self.last_saved_step = position.step
        try:
            apply_retention(
                run.directory.checkpoints,
                keep_last=config.checkpoint.keep_last,
                keep_every_n_steps=config.checkpoint.keep_every_n_steps,
                known_good=saved,
            )
        except StorageError as error:
            self._report_storage("retention_failed", error)

    def _report_storage(self, event: str, error: StorageError) -> None:
        """Training goes on, and the older checkpoints stay."""
        step = self.run.position.step
        self.progress.message(f"step {step}: {event.replace('_', ' ')}, training goes on: {error}")
        self.metrics.log_event(step, event, reason=str(error))

    def _take_step(self, microbatches: Iterator[Microbatch]) -> None:
        run, config, position = self.run, self.run.config, self.run.position
        begin = time.perf_counter()
        batch = list(itertools.islice(microbatches, run.shape.num_microbatches))
        data_wait_seconds = time.perf_counter() - begin
        step = position.step + 1
        rate = learning_rate(step, config.optim, num_steps=config.train.num_steps)
        result = train_step(
            run.model,
            run.optimizer,
            batch,
            learning_rate=rate,
            gradient_clip_norm=config.optim.gradient_clip_norm,
            keep_gradient_buffers=run.uses_cuda_graphs,
        )
        step_seconds = time.perf_counter() - begin

        tokens = run.shape.global_batch_size * config.model.sequence_length
        first_sample = position.samples_consumed
        position.step, position.samples_consumed = step, first_sample + run.shape.global_batch_size
        position.tokens_seen += tokens
        record = StepMetrics(
            step=step,
            loss=None if result.skipped else result.loss,
            learning_rate=rate,
            grad_norm=None if result.skipped else result.grad_norm,
            tokens=position.tokens_seen,
            tokens_per_second=tokens / step_seconds,
            step_seconds=step_seconds,
            data_wait_seconds=data_wait_seconds,
            mfu=None if run.peak_flops is None else self.flops_per_token * tokens / step_seconds / run.peak_flops,
            peak_memory_bytes=peak_memory_bytes(run.device),
            skipped=result.skipped,
        )
        self.metrics.log_step(record)
        self.progress.step(record)
        self.guard.observe(result, step=step, sample_numbers=range(first_sample, position.samples_consumed))
        position.consecutive_skipped, position.total_skipped = self.guard.consecutive, self.guard.total

    def _microbatches(self) -> Iterator[Microbatch]:
        numbers = microbatch_sample_numbers(
            samples_consumed=self.run.position.samples_consumed, micro_batch_size=self.run.shape.micro_batch_size
        )
        for sample in build_loader(self.run.data.train, self.run.config.data, sample_numbers=numbers):
            yield self._split(sample)

    def _split(self, sample: dict) -> Microbatch:
        return split_sample(sample, reset_at_document_boundaries=self.run.config.data.reset_at_document_boundaries)


def _is_due(step: int, every_n_steps: int) -> bool:
    return every_n_steps > 0 and step % every_n_steps == 0
