"""`metrics.jsonl`: what every step of a run measured, one strict JSON object per line, and the same as TensorBoard events.

| line | keys |
|---|---|
| step | the fields of `StepMetrics` |
| evaluation | `step`, `validation_loss`, `validation_tokens`, `validation_sequences`; of a blend `validation_sources` (see `log_evaluation`) |
| event | `step`, `event` and the event's own fields |

A loss or norm that is not finite is written as null, because JSON has no NaN.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from phase8.durable import open_for_appending, replace_file, storage_errors
from phase8.errors import StorageError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_TENSORBOARD_TAGS = {
    "loss": "loss/train",
    "validation_loss": "loss/validation",
    "learning_rate": "optimizer/learning_rate",
    "grad_norm": "optimizer/grad_norm",
    "tokens_per_second": "speed/tokens_per_second",
    "step_seconds": "speed/step_seconds",
    "data_wait_seconds": "speed/data_wait_seconds",
    "mfu": "speed/mfu",
    "peak_memory_bytes": "memory/peak_bytes",
}


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """What one optimizer step measured.

    Args:
        step: Number of the step, the first is 1.
        loss: Training loss in nats per token; None when the step was skipped.
        learning_rate: Learning rate of the step.
        grad_norm: Global gradient norm before clipping; None when it was not finite.
        tokens: Tokens seen since the run began, this step included.
        tokens_per_second: Tokens of the step over its duration.
        step_seconds: Duration of the step, waiting for data included.
        data_wait_seconds: The part of it spent waiting for data.
        mfu: Model FLOP/s over the device's peak, as a ratio; None when the peak is unknown.
        peak_memory_bytes: Peak memory so far.
        skipped: True when loss or gradient was not finite and the weights were left alone.
    """

    step: int
    loss: float | None
    learning_rate: float
    grad_norm: float | None
    tokens: int
    tokens_per_second: float
    step_seconds: float
    data_wait_seconds: float
    mfu: float | None
    peak_memory_bytes: int
    skipped: bool


@dataclass(frozen=True, kw_only=True)
class SourceLoss:
    """What an evaluation measured on one source.

    Args:
        name: Of the source.
        weight: Of the source in the blend.
        loss: Mean loss in nats per token.
        num_tokens: Tokens it is the mean of.
        num_sequences: Sequences that they are in.
    """

    name: str
    weight: int
    loss: float
    num_tokens: int
    num_sequences: int


class MetricsWriter:
    """The open `metrics.jsonl` of a run.

    Every line reaches the operating system at once, so a kill loses at most the line being written. Opening first drops what a
    resumed run is going to write again, so each step appears once.

    Args:
        directory: The run directory, created when missing.
        resume_step: Last step of the checkpoint the run goes on from; 0 starts an empty record.
        tensorboard: Also write TensorBoard events under `<directory>/tensorboard`.

    Raises:
        StorageError: When the directory cannot be written, or an existing record is damaged before its last line.
    """

    def __init__(self, directory: Path, *, resume_step: int, tensorboard: bool):
        self._path = directory / "metrics.jsonl"
        with storage_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
        _drop_later_lines(self._path, resume_step)
        with storage_errors(self._path):
            # Unbuffered: nothing is left behind that a failed write could hold back until close.
            self._file = FileIO(open_for_appending(self._path), "ab")
        self._tensorboard = _open_tensorboard(directory / "tensorboard", resume_step) if tensorboard else None

    def log_step(self, metrics: StepMetrics) -> None:
        """Record a training step."""
        self._write(asdict(metrics))

    def log_evaluation(self, step: int, *, validation_loss: float, validation_tokens: int, sources: Sequence[SourceLoss] = ()) -> None:
        """Record an evaluation made after a step.

        Args:
            step: The step whose weights were evaluated.
            validation_loss: Mean loss in nats per token.
            validation_tokens: Tokens that were predicted.
            sources: What each source contributed; of several, the record maps the name of each to its loss and number of sequences.
        """
        record: dict[str, Any] = {"step": step, "validation_loss": validation_loss, "validation_tokens": validation_tokens}
        if sources:
            record["validation_sequences"] = sum(source.num_sequences for source in sources)
        if len(sources) > 1:
            record["validation_sources"] = {
                source.name: {"loss": _finite(source.loss), "sequences": source.num_sequences} for source in sources
            }
        self._write(record)

    def log_event(self, step: int, event: str, /, **fields: str | int | float | bool | None) -> None:
        """Record something that happened after a step: a checkpoint, a resume, a skipped step, who held the others up.

        Args:
            step: The last finished step.
            event: Kind of event, one word.
            **fields: What is known about it, `message` among others.
        """
        self._write({"step": step, "event": event, **fields})

    def close(self) -> None:
        """Close the record and flush the TensorBoard events."""
        self._file.close()
        if self._tensorboard is not None:
            with storage_errors(self._path.with_name("tensorboard")):
                self._tensorboard.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, exception_type: type[BaseException] | None, exception: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        finite = {key: _finite(value) for key, value in record.items()}
        with storage_errors(self._path):
            _append(self._file, json.dumps(finite, allow_nan=False).encode() + b"\n")
        if self._tensorboard is not None:
            with storage_errors(self._path.with_name("tensorboard")):
                for key, tag in _TENSORBOARD_TAGS.items():
                    if finite.get(key) is not None:
                        self._tensorboard.add_scalar(tag, finite[key], finite["step"])
                for name, source in finite.get("validation_sources", {}).items():
                    if source["loss"] is not None:
                        self._tensorboard.add_scalar(f"loss/validation/{name}", source["loss"], finite["step"])


def _finite(value: Any) -> Any:
    """None for a number that JSON cannot hold."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a `metrics.jsonl`, in the order written; a last line torn by a kill is left out.

    Raises:
        StorageError: When the file cannot be read, or is damaged before its last line.
    """
    return [record for _, record in _parse_lines(path)]


def _parse_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each line with the record it holds."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}; it must be the metrics.jsonl of a run") from error
    if lines[-1] == b"":
        lines.pop()
    for number, line in enumerate(lines, start=1):
        record = _parse_record(line)
        if record is not None:
            yield line, record
        elif number < len(lines):
            raise StorageError(f"{path} line {number} is not a JSON object with a step; delete that line, or move the file away")


def _parse_record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _drop_later_lines(path: Path, resume_step: int) -> None:
    """Keep the lines up to a step; those after it were written by a run that ended before its next checkpoint."""
    if not path.exists():
        return
    kept = b""
    if resume_step > 0:
        kept = b"".join(line + b"\n" for line, record in _parse_lines(path) if record["step"] <= resume_step)
    replace_file(path, kept)


def _append(file: FileIO, line: bytes) -> None:
    """Write one whole line or, when the disk is full in the middle of it, none of it."""
    start = file.tell()
    written = 0
    try:
        while written < len(line):
            written += file.write(line[written:])
    except OSError:
        file.truncate(start)
        raise


def _open_tensorboard(directory: Path, resume_step: int) -> SummaryWriter:
    # Imported here: it costs seconds of start-up that a run without TensorBoard does not owe.
    from torch.utils.tensorboard import SummaryWriter

    with storage_errors(directory):
        # Events from purge_step on, left by an earlier run, are hidden from the curves.
        return SummaryWriter(log_dir=str(directory), purge_step=resume_step + 1 if resume_step > 0 else 0, flush_secs=10)
