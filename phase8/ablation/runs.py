"""The runs of an ablation as processes on all GPUs of the machine, several at once on each GPU, since a small model does not fill one.

A run that crashed or was stopped continues from its checkpoint when it is started again. A run that reaches its last step writes a
record; the record alone marks it as finished, so its directory may then be deleted.
"""

from __future__ import annotations

import shlex
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from phase8.ablation.planned_runs import PlannedRun
from phase8.data.staging import read_json, write_json
from phase8.durable import open_for_appending, storage_errors
from phase8.errors import DivergenceError, StorageError
from phase8.observe.history import History, last_finite, median
from phase8.observe.metrics import read_metrics
from phase8.terminal import ESCAPED
from phase8.train.device import environment_with_gpu
from phase8.train.signals import StopRequest

POLL_SECONDS = 0.1
SECONDS_BETWEEN_LINES = 60.0


@dataclass(frozen=True)
class Record:
    """What a finished run measured.

    Args:
        variant: Variant of the model.
        seed: Seed of weights and data order.
        num_parameters: Parameters of the model.
        tokens: Tokens it was trained on.
        validation_loss: After the last step, in nats per token; None: not finite.
        validation_tokens: Held-out tokens this is the mean of.
        tokens_per_second: Median over the steps.
        skipped_steps: Steps left out because loss or gradient was not finite.
        device: Device on which it finished.
        torch_version: Version of torch.
        jobs: Runs that could be side by side on that device.
        curve: Tokens seen and validation loss, of every evaluation.
        learning_rate: Peak learning rate that was searched or tried; None: that of config and variant.
        search_steps: Steps of a run of a shortened search; None: a run like all others.
        is_search: Its loss decided about the learning rate.
        positions: First position of a range, the one after its last, and the loss of the predictions there, on the sequences of the last
            evaluation; None: not measured, as in shortened runs and in records of earlier releases.
    """

    variant: str
    seed: int
    num_parameters: int
    tokens: int
    validation_loss: float | None
    validation_tokens: int
    tokens_per_second: float | None
    skipped_steps: int
    device: str
    torch_version: str
    jobs: int
    curve: list[list[float | None]]
    learning_rate: float | None = None
    search_steps: int | None = None
    is_search: bool = False
    positions: list[list[float | None]] | None = None


@dataclass(frozen=True)
class Machine:
    """The devices of this machine and the command that starts a run.

    Args:
        command: The words that start a run, given its overrides.
        measure: The words that measure the loss of a trained run by position, given the run and the file of the result.
        device: Name of the device.
        jobs: Runs side by side on each device.
        gpus: Name of the GPU that a run sees, for each; empty: there is one device, and nothing to choose.
    """

    command: Callable[[Sequence[str]], list[str]]
    measure: Callable[[PlannedRun, Path], list[str]]
    device: str
    jobs: int
    gpus: Sequence[str] = ()

    @property
    def max_running(self) -> int:
        """Number of runs side by side on all devices."""
        return self.jobs * max(len(self.gpus), 1)


@dataclass(frozen=True)
class _Started:
    run: PlannedRun
    process: subprocess.Popen
    log: Path
    gpu: str | None
    is_measuring: bool


def read_records(output: Path) -> list[Record]:
    """Reads the records of all finished runs below an output directory, in the order of their names.

    Raises:
        StorageError: A record is damaged.
    """
    return [_read_record(path) for path in sorted((output / "records").glob("*.json"))]


def record_path(run: PlannedRun, output: Path) -> Path:
    """Path of the record that a finished run writes."""
    return output / "records" / f"{run.name}.json"


class RunProcesses:
    """Starts runs, watches them, and records those that reach their last step; before that, another process measures their loss by position.

    Args:
        machine: The machine that trains the runs.
        output: Directory of logs and records.
        num_parameters: Parameters of each variant.
        on_message: Called with a line of text for every event.
    """

    def __init__(self, machine: Machine, output: Path, *, num_parameters: Mapping[str, int], on_message: Callable[[str], None]):
        self.machine, self.output, self.num_parameters, self.on_message = machine, output, num_parameters, on_message
        self.failures: list[int] = []  # exit codes; negative: the signal that killed the process
        self.is_stopping = False
        self._running: list[_Started] = []

    def train(self, runs: Sequence[PlannedRun], *, on_record: Callable[[], None]) -> None:
        """Trains every run to its last step, or until a stop signal, at which all save and stop. The failure of one run does not stop the rest.

        Args:
            runs: The runs, in the order in which they are started.
            on_record: Called whenever a run has left its record.

        Raises:
            StorageError: Logs or records cannot be written; the running processes are killed.
            KeyboardInterrupt: A second Ctrl-C; the running processes are killed.
        """
        waiting = deque(runs)
        next_line = time.monotonic() + SECONDS_BETWEEN_LINES
        with StopRequest() as stop:
            try:
                while self._running or waiting:
                    if stop.received is not None and not self.is_stopping:
                        self.is_stopping = True
                        waiting.clear()
                        for started in self._running:
                            started.process.terminate()
                    while waiting and len(self._running) < self.machine.max_running:
                        self._start(waiting.popleft())
                    for started in [started for started in self._running if started.process.poll() is not None]:
                        self._running.remove(started)
                        if self._settle(started):
                            on_record()
                    if time.monotonic() > next_line:
                        next_line = time.monotonic() + SECONDS_BETWEEN_LINES
                        self.on_message("; ".join(f"{started.run.name}: {_progress(started.run)}" for started in self._running))
                    time.sleep(POLL_SECONDS)
            finally:
                for started in self._running:
                    started.process.kill()
                    started.process.wait()

    def _start(self, run: PlannedRun) -> None:
        log, gpu = self.output / "logs" / f"{run.name}.log", self._least_busy_gpu()
        self._run(run, self.machine.command(run.settings), log=log, gpu=gpu, is_measuring=False)
        self.on_message(f"{run.name}: started{'' if gpu is None else f' on GPU {gpu}'}, log in {log}")

    def _run(self, run: PlannedRun, command: Sequence[str], *, log: Path, gpu: str | None, is_measuring: bool) -> None:
        with storage_errors(log):
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(open_for_appending(log), "ab") as file:
                file.write(f"$ {shlex.join(command)}\n".encode(errors=ESCAPED))
                file.flush()
                # The run gets a session of its own, so Ctrl-C reaches this process alone, which then asks each run once.
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=environment_with_gpu(gpu)
                )
                self._running.append(_Started(run, process, log, gpu, is_measuring))

    def _least_busy_gpu(self) -> str | None:
        busy = [started.gpu for started in self._running]
        return min(self.machine.gpus, key=busy.count, default=None)

    def _settle(self, started: _Started) -> bool:
        """Reports how a process ended, starts the measurement of a run that is trained, and returns whether the run left a record."""
        run, code = started.run, started.process.returncode
        # A search goes on without the rates with which training diverges.
        has_diverged = code == DivergenceError.exit_code and run.is_search and not started.is_measuring
        record = self._record(run, has_diverged=has_diverged) if code == 0 or has_diverged else None
        if record is not None and not has_diverged and run.search_steps is None:
            if not started.is_measuring and not self.is_stopping:
                self._measure(started)
                return False
            record = replace(record, positions=_positions(self._positions_path(run))) if started.is_measuring else None
        if record is not None:
            write_json(record_path(run, self.output), asdict(record))
            loss = "not finite" if record.validation_loss is None else f"{record.validation_loss:.4f}"
            self.on_message(f"{run.name}: finished, validation loss {loss}")
            return True
        # A process that was asked before its handler was installed is killed by the signal.
        if code == 0 or (self.is_stopping and (code == -signal.SIGTERM or started.is_measuring)):
            self.on_message(f"{run.name}: stopped at {_progress(run)}")
            return False
        self.failures.append(code)
        end = f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
        self.on_message(f"{run.name}: failed at {_progress(run)}: {end}; the end of {started.log} is: {_last_line(started.log)}")
        return False

    def _measure(self, trained: _Started) -> None:
        """Starts the measurement of the loss by position, in the place of the training."""
        run, path = trained.run, self._positions_path(trained.run)
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._run(run, self.machine.measure(run, path), log=trained.log, gpu=trained.gpu, is_measuring=True)

    def _positions_path(self, run: PlannedRun) -> Path:
        return self.output / "positions" / f"{run.name}.json"

    def _record(self, run: PlannedRun, *, has_diverged: bool) -> Record | None:
        """What a run measured; None if it has not reached its last step, unless it has diverged."""
        evaluations, history = _metrics(run, say=self.on_message)
        if not has_diverged and (not evaluations or evaluations[-1]["step"] != run.config.train.num_steps):
            return None
        seen = history.places.at(history.validation_steps).tokens.astype(int).tolist()
        return Record(
            variant=run.variant,
            seed=run.seed,
            num_parameters=self.num_parameters[run.variant],
            tokens=int(history.tokens[-1]) if history.tokens.size else 0,
            validation_loss=None if has_diverged else evaluations[-1]["validation_loss"],
            validation_tokens=evaluations[-1]["validation_tokens"] if evaluations else 0,
            tokens_per_second=median(history.tokens_per_second),
            skipped_steps=len(history.skipped_steps),
            device=self.machine.device,
            torch_version=str(torch.__version__),
            jobs=self.machine.jobs,
            curve=[[tokens, evaluation["validation_loss"]] for tokens, evaluation in zip(seen, evaluations, strict=True)],
            learning_rate=run.learning_rate,
            search_steps=run.search_steps,
            is_search=run.is_search,
        )


def _positions(path: Path) -> list[list[float | None]]:
    """The loss by position from the result of tools/evaluate.py, where there are predictions."""
    return [[each["first"], each["end"], each["loss"]] for each in read_json(path)["total"]["positions"] if each["num_tokens"]]


def _read_record(path: Path) -> Record:
    tree = read_json(path)
    needed = {field.name for field in fields(Record) if field.default is MISSING}  # the others are missing in records of earlier releases
    if not isinstance(tree, dict) or not needed <= tree.keys() <= {field.name for field in fields(Record)}:
        raise StorageError(f"{path} is not the record of a finished run; delete it, and the run is finished again from its directory")
    return Record(**tree)


def _metrics(run: PlannedRun, *, say: Callable[[str], None] | None = None) -> tuple[list[dict[str, Any]], History]:
    """The evaluations and all other records of a run; empty before it has begun."""
    path = run.directory / "metrics.jsonl"
    records = read_metrics(path, say=say) if path.exists() else []
    return [record for record in records if "validation_loss" in record], History.from_records(records)


def _progress(run: PlannedRun) -> str:
    _, history = _metrics(run)
    step = int(history.steps[-1]) if history.steps.size else 0
    loss = last_finite(history.loss)
    return f"step {step:,} of {run.config.train.num_steps:,}" + ("" if loss is None else f", loss {loss:.3f}")


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()
