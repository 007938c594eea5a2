"""The trainer of a run: it reads data, takes and records steps, and evaluates, checks and saves between them."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from phase8.accelerator import give_back_memory
from phase8.closing import Tolerated
from phase8.data.loader import build_loader, microbatch_sample_numbers
from phase8.data.microbatch import Microbatch, stand_in
from phase8.distributed.collectives import gather_texts
from phase8.errors import DataError, DivergenceError, StorageError
from phase8.model.flops import training_flops_per_token
from phase8.observe.memory import peak_memory_bytes, reset_peak_memory
from phase8.observe.metrics import MetricsWriter, StepMetrics
from phase8.observe.progress import Progress
from phase8.observe.step_profile import profile_steps, write_profile
from phase8.optim.schedule import learning_rate
from phase8.train.build import Run
from phase8.train.engine.protocol import StepResult
from phase8.train.evaluation import HeldOutData
from phase8.train.faults.allocator import FullMemory
from phase8.train.faults.anomaly import largest_loss, take_note
from phase8.train.faults.collapse import CollapsedRouters
from phase8.train.faults.replicas import check_replicas
from phase8.train.faults.stragglers import probe_ranks
from phase8.train.garbage import GarbageBetweenSteps
from phase8.train.sample import sample_text
from phase8.train.saver import Saver
from phase8.train.signals import StopRequest
from phase8.train.unreadable import UnreadableData

# A rank that takes this many times as long as the median rank is named on the console.
WORTH_A_MESSAGE = 1.1


class Trainer:
    """Takes the steps of a run, with all that happens between them.

    Args:
        run: Run with engine, data and position.
        metrics: Writer that records every step; None: another rank records.
        progress: Display of the steps.
        report: Function that is called with a step and what this rank does in it, as for `train`.
    """

    def __init__(self, run: Run, metrics: MetricsWriter | None, progress: Progress, report: Callable[[int, str], None]):
        self.run, self.metrics, self.progress, self.report = run, metrics, progress, report
        self.flops_per_token = training_flops_per_token(run.config.model)
        self.metrics_failed = False
        self.compared_step = 0
        self.saver = Saver(run, record=self._record, say=progress.message)
        self.num_ranks = run.engine.mesh.topology.world_size
        is_evaluated = run.data.validation is not None and run.config.train.evaluate_every_n_steps > 0
        self.held_out = HeldOutData(run) if is_evaluated else None
        reset_peak_memory(run.device)

    def close(self) -> None:
        """Ends workers, waits for the save in the background and frees the engine's memory for updates; a failure changes nothing about the end."""
        if self.held_out is not None:
            self.held_out.close()
        with Tolerated("the save under way failed", self.progress.message):
            self.saver.close()
        with Tolerated("what the engine keeps for updates was not freed", self.progress.message):
            self.run.engine.close()

    @property
    def is_alone(self) -> bool:
        """Whether this process is the only one of the run."""
        return self.run.engine.mesh.device_mesh is None

    def train_until(self, stop_step: int, stop: StopRequest) -> bool:
        """Takes steps, and evaluates and saves between them. Returns whether any rank was asked to stop."""
        with GarbageBetweenSteps(self.run.engine.num_slow_updates) as garbage:
            return self._train_until(stop_step, stop, garbage)

    def _train_until(self, stop_step: int, stop: StopRequest, garbage: GarbageBetweenSteps) -> bool:
        config, position = self.run.config, self.run.position
        memory, routers = FullMemory(self.run.device, num_slow_steps=self.run.engine.num_slow_updates), CollapsedRouters(config.model)
        looks = {"full_memory": memory.after_step, "collapsed_routers": routers.after_step}
        microbatches = self._microbatches()
        asked_to_stop = stop.received is not None and self.is_alone
        while position.step < stop_step and not asked_to_stop:
            take = self._take_profiled_step if position.step + 1 == config.observe.profile_at_step else self._take_step
            result = take(microbatches, stop=stop.received is not None)
            garbage.after_step()
            self.saver.hear()
            self._tell_what_is_seen(looks)
            self._check_ranks()
            is_last = position.step == stop_step
            # Several ranks stop after the same step, in which all of them have learnt of the signal.
            asked_to_stop = stop.received is not None if self.is_alone else result.stop
            if asked_to_stop and not is_last:
                return True  # somebody waits for this process to end, so an evaluation that is due now is left out
            if is_last or _is_due(position.step, config.train.evaluate_every_n_steps):
                if self.evaluate(None if is_last else stop):
                    return True
                if config.observe.sample_at_evaluations and not is_last:
                    self.sample()
            if not is_last and _is_due(position.step, config.checkpoint.every_n_steps):
                self.save(must_succeed=False)
        return asked_to_stop

    def _tell_what_is_seen(self, looks: Mapping[str, Callable[[StepMetrics], str | None]]) -> None:
        """Shows and records the sentences about the last step, by event."""
        for event, look in looks.items():
            if (sentence := look(self.last_step)) is not None:
                self.record_event(event, message=sentence)
                self.progress.message(sentence)

    def _check_ranks(self) -> None:
        """Compares replicas and looks for stragglers, where this is due after the current step."""
        run, step = self.run, self.run.position.step
        if _is_due(step, run.config.train.check_replicas_every_n_steps):
            self._compare_replicas()
        if self.num_ranks > 1 and _is_due(step, run.config.observe.stragglers_every_n_steps):
            self.report(step, "looking for stragglers")
            last = self.last_step
            found = probe_ranks(run.device, data_wait_seconds=last.data_wait_seconds, step_seconds=last.step_seconds)
            self.record_event("stragglers", **asdict(found))
            if found.ratio > WORTH_A_MESSAGE:
                self.progress.message(f"step {step}: {found.describe()}")

    def _compare_replicas(self) -> None:
        """Compares the copies that several ranks hold, at most once per step."""
        step = self.run.position.step
        if self.compared_step != step:
            self.report(step, "comparing replicas")
            check_replicas(self.run.engine, step=step)
            self.compared_step = step

    def evaluate(self, stop: StopRequest | None) -> bool:
        """Measures and records the loss on the held-out sequences, if there are any.

        Args:
            stop: What leaves the evaluation out when any rank is asked to stop; None: nothing, since no later start would make up for it.

        Returns:
            Whether it was left out.
        """
        step = self.run.position.step
        if self.held_out is None:
            return False

        def goes_on() -> bool:
            self.report(step, "evaluation")
            return stop is None or not any(gather_texts(stop.received, self.run.host_group))

        self.report(step, "evaluation")
        found = self.held_out.evaluate(goes_on)
        if found is None:
            return True
        self._record(
            lambda metrics: metrics.log_evaluation(
                step, validation_loss=found.loss, validation_tokens=found.num_tokens, sources=found.sources
            )
        )
        self.progress.evaluation(step, found.loss, found.sources)
        self.saver.losses.validation = step, found.loss
        return False

    def sample(self) -> str | None:
        """Records a text sample of the present weights; every rank takes part. Returns it on the first rank; a failure there is only reported."""
        run, step = self.run, self.run.position.step
        if run.config.observe.sample_prompt is None or run.data.tokenizer is None:
            return None
        self.report(step, "writing a sample")
        whole_model, text = run.engine.whole_model(), None
        if whole_model is not None:
            with Tolerated(f"step {step}: no sample", self.progress.message):
                text = sample_text(whole_model, run.data.tokenizer, run.config, run.device)
                self.record_event("sample", text=text)
            if text is None:  # what it held is in pieces that the next step may not fit into
                give_back_memory(run.device.type)
        return text

    def show_sample(self) -> None:
        """Prints a sample at the end of a run, which is saved."""
        text = self.sample()
        if text is not None:
            self.run.console.rule("sample")
            self.run.say(text)
            self.run.console.rule()

    def save(self, *, must_succeed: bool) -> None:
        """Saves the current step after replicas were compared, if that is enabled; arguments and errors as in `Saver.save`."""
        if self.run.config.train.check_replicas_every_n_steps:
            self._compare_replicas()
        self.report(self.run.position.step, "saving a checkpoint")
        self.saver.save(must_succeed=must_succeed)

    def _take_profiled_step(self, microbatches: Iterator[Microbatch], *, stop: bool) -> StepResult:
        """Takes a step and writes where its time went; what fails in writing is only reported."""
        run, step = self.run, self.run.position.step + 1
        table, results = run.directory.profile(step=step, rank=run.engine.mesh.rank), list[StepResult]()

        def take() -> None:
            results.append(self._take_step(microbatches, stop=stop))

        profile = profile_steps(take, device=run.device, num_steps=1)
        with Tolerated("the profile is lost", self.progress.message):
            profile.write_trace(table.with_suffix(".json.gz"))
            write_profile(table, profile, title=f"step {step}, rank {run.engine.mesh.rank}")
            self.progress.message(f"step {step}: its profile is in {table}")
        return results[0]

    def _take_step(self, microbatches: Iterator[Microbatch], *, stop: bool) -> StepResult:
        run, config, position = self.run, self.run.config, self.run.position
        begin = time.perf_counter()
        self.report(position.step + 1, "reading data")
        batch, unreadable = self._read(microbatches)
        data_wait_seconds = time.perf_counter() - begin
        rate = learning_rate(position.step + 1, config.optim, num_steps=config.train.num_steps)
        self.report(position.step + 1, "training")
        loss_limit = largest_loss(position.recent_losses, config.train.anomaly)
        result = run.engine.update(
            batch,
            learning_rate=rate,
            gradient_clip_norm=config.optim.gradient_clip_norm,
            largest_loss=loss_limit,
            stop=stop,
            unreadable=unreadable is not None,
            report=lambda doing: self.report(position.step + 1, doing),
        )
        if result.unreadable:
            raise UnreadableData(unreadable)
        step_seconds = time.perf_counter() - begin
        samples = range(position.samples_consumed, position.samples_consumed + run.shape.global_batch_size)
        position.step += 1
        position.samples_consumed += run.shape.global_batch_size
        position.tokens_seen += run.shape.global_batch_size * config.model.sequence_length
        record = self.last_step = self._step_metrics(result, rate, step_seconds=step_seconds, data_wait_seconds=data_wait_seconds)
        self._record(lambda metrics: metrics.log_step(record))
        self.progress.step(record)
        if record.loss is not None and not record.skipped:
            self.saver.losses.training.append(record.loss)
        try:
            anomaly = take_note(position, result, config.train.anomaly, largest_loss=loss_limit, samples=samples)
        except DivergenceError as diverged:
            raise self._recorded(diverged) from None
        if anomaly is not None:
            self.record_event("skipped", message=str(anomaly))
        return result

    def _recorded(self, diverged: DivergenceError) -> DivergenceError:
        """The error with how to go on after it, recorded as the event that ends the run."""
        step = self.saver.newest_step()
        ending = "start again: no checkpoint was saved yet" if step is None else f"resume from the last checkpoint, that of step {step}"
        whole = DivergenceError(f"{diverged}, then {ending}.")
        self.record_event("diverged", message=str(whole))
        return whole

    def _read(self, microbatches: Iterator[Microbatch]) -> tuple[list[Microbatch], DataError | None]:
        """Reads the microbatches of a step. Where that fails and other ranks wait for this one, returns stand-ins and the error.

        Raises:
            DataError: The data cannot be read, and this process is the only one.
        """
        run = self.run
        try:
            return list(itertools.islice(microbatches, run.shape.num_microbatches)), None
        except DataError as error:
            if self.is_alone:
                raise
            batch = stand_in(
                run.shape.micro_batch_size,
                run.config.model.sequence_length,
                reset_at_document_boundaries=run.config.data.reset_at_document_boundaries,
                own_slice=run.engine.mesh.own_slice,
            )
            return [batch] * run.shape.num_microbatches, error

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
            auxiliary_losses=result.auxiliary_losses,
            routing=result.routing if _is_due(run.position.step, run.config.observe.log_every_n_steps) else {},
        )

    def record_event(self, event: str, **fields: Any) -> None:
        """Records an event that happened after the current step."""
        self._record(lambda metrics: metrics.log_event(self.run.position.step, event, **fields))

    def _record(self, write: Callable[[MetricsWriter], None]) -> None:
        """Writes metrics. A failure of the disk is reported once and does not end the run."""
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
            index=self.run.engine.mesh.data_parallel_index,
            num_readers=self.run.shape.data_parallel_size,
        )
        num_microbatches = self.run.shape.num_microbatches
        return iter(build_loader(self.run.data.train, self.run.config.data, sample_numbers=numbers, taken_at_once=num_microbatches))


def _is_due(step: int, every_n_steps: int) -> bool:
    return every_n_steps > 0 and step % every_n_steps == 0
