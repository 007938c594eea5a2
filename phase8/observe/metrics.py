"""`metrics.jsonl`: what every step of a run measured, one strict JSON object per line, which loggers get too.

| line | keys |
|---|---|
| step | the fields of `StepMetrics`; `auxiliary_losses` only where the model has some, `routing` where it has experts and the step is printed |
| evaluation | `step`, `validation_loss`, `validation_tokens`, `validation_sequences`; of a blend `validation_sources` (see `log_evaluation`) |
| event | `step`, `event` and the event's own fields |

A loss or norm that is not finite is written as null, because JSON has no NaN. Any other line was written by another program: it is kept,
reported, and left out of figures and report.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from phase8.closing import Tolerated
from phase8.durable import append_whole, open_for_appending, replace_file, storage_errors
from phase8.errors import StorageError
from phase8.observe.loggers import Logger
from phase8.observe.routing import Routing, is_routing, routing_record
from phase8.terminal import warn

_LARGEST_COUNT = 2**63
_LARGEST_NUMBER = 1e300  # arrays hold it
_MAX_LINES_NAMED = 5


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
        auxiliary_losses: What was minimised beside the loss, by name, per valid target.
        routing: Routing of each layer with experts, by its number.
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
    auxiliary_losses: Mapping[str, float] = field(default_factory=dict)
    routing: Mapping[int, Routing] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SourceLoss:
    """The result of an evaluation on one source.

    Args:
        name: Name of the source.
        weight: Weight of the source in the blend.
        loss: Mean loss in nats per token.
        num_tokens: Number of tokens in the mean.
        num_sequences: Number of sequences with these tokens.
    """

    name: str
    weight: int
    loss: float
    num_tokens: int
    num_sequences: int


_STEP_KEYS = frozenset(each.name for each in fields(StepMetrics)) - {"auxiliary_losses", "routing"}
_NULLABLE = frozenset({"loss", "grad_norm", "mfu"})


class MetricsWriter:
    """The open `metrics.jsonl` of a run.

    Every line reaches the operating system at once, so a kill loses at most the line being written. Opening first drops what a
    resumed run is going to write again, so each step appears once.

    Args:
        directory: The run directory, created when missing.
        resume_step: Last step of the checkpoint the run goes on from; 0 starts an empty record.
        loggers: Get every line after it was written.
        say: Shows a sentence.

    Raises:
        StorageError: When the directory cannot be written.
    """

    def __init__(self, directory: Path, *, resume_step: int, loggers: Sequence[Logger] = (), say: Callable[[str], None] = warn):
        self._say, self._loggers = say, loggers
        self._path = directory / "metrics.jsonl"
        with storage_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
        _drop_later_lines(self._path, resume_step, say)
        with storage_errors(self._path):
            # Unbuffered: nothing is left behind that a failed write could hold back until close.
            self._file = FileIO(open_for_appending(self._path), "ab")
        for logger in loggers:
            logger.begin(resume_step)

    def log_step(self, metrics: StepMetrics) -> None:
        """Record a training step."""
        record = {name: getattr(metrics, name) for name in (each.name for each in fields(metrics)) if name in _STEP_KEYS}
        if metrics.auxiliary_losses:
            record["auxiliary_losses"] = {name: _finite(loss) for name, loss in metrics.auxiliary_losses.items()}
        if metrics.routing:
            record["routing"] = routing_record(metrics.routing)
        self._write(record)

    def log_evaluation(self, step: int, *, validation_loss: float, validation_tokens: int, sources: Sequence[SourceLoss] = ()) -> None:
        """Record an evaluation made after a step.

        Args:
            step: The step whose weights were evaluated.
            validation_loss: Mean loss in nats per token.
            validation_tokens: Tokens that were predicted.
            sources: Results of each source; with several, the record maps each name to loss and number of sequences.
        """
        record: dict[str, Any] = {"step": step, "validation_loss": validation_loss, "validation_tokens": validation_tokens}
        if sources:
            record["validation_sequences"] = sum(source.num_sequences for source in sources)
        if len(sources) > 1:
            record["validation_sources"] = {
                source.name: {"loss": _finite(source.loss), "sequences": source.num_sequences} for source in sources
            }
        self._write(record)

    def log_event(self, step: int, event: str, /, **fields: Any) -> None:
        """Record something that happened after a step: a checkpoint, a resume, a skipped step, a straggler.

        Args:
            step: The last finished step.
            event: Kind of event, one word.
            **fields: What is known about it, as plain JSON: `message` among others.
        """
        self._write({"step": step, "event": event, **fields})

    def close(self) -> None:
        """Close the file; an error is only reported, because every line has been written before."""
        with Tolerated(f"{self._path.parent} may lack the last metrics", self._say):
            self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, exception_type: type[BaseException] | None, exception: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        finite = {key: _finite(value) for key, value in record.items()}
        with storage_errors(self._path):
            append_whole(self._file, json.dumps(finite, allow_nan=False).encode() + b"\n")
        for logger in self._loggers:
            logger.log(finite)


def _finite(value: Any) -> Any:
    """The number, or None if JSON cannot represent it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path, *, say: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
    """All records of a `metrics.jsonl`, in the order written; a last line torn by a kill is left out.

    Args:
        path: The file.
        say: Shows a sentence about lines that are not metrics.

    Raises:
        StorageError: When the file cannot be read.
    """
    lines = _parse_lines(path)
    if say is not None:
        _name_foreign_lines(path, lines, say)
    return [line.record for line in lines if line.record is not None]


class _Line(NamedTuple):
    """A line of the file.

    Args:
        number: From 1.
        content: Its bytes, without the line break.
        record: Its parsed content; None: the line is not part of the metrics.
    """

    number: int
    content: bytes
    record: dict[str, Any] | None


def _parse_lines(path: Path) -> list[_Line]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}; it must be the metrics.jsonl of a run") from error
    *whole, last = content.split(b"\n")
    lines = [_Line(number, line, _parse_record(line)) for number, line in enumerate(whole, start=1)]
    if (record := _parse_record(last)) is not None or not _is_torn(last):
        lines.append(_Line(len(lines) + 1, last, record))
    return lines


def _is_torn(line: bytes) -> bool:
    """Whether a last line without a line break may be the beginning of a metrics line (or is empty)."""
    begin = b'{"step": '
    return line.startswith(begin) or begin.startswith(line)


def _parse_record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and _is_ours(record) else None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _is_ours(record: Mapping[str, Any]) -> bool:
    """Whether an object has the keys of a metrics line, with values that can be drawn."""
    step = record.get("step")
    if type(step) is not int or not 0 <= step < _LARGEST_COUNT:
        return False
    if "event" in record:
        return isinstance(record["event"], str)
    if "validation_loss" in record:
        numbers = _is_number(record["validation_loss"], nullable=True) and _is_number(record.get("validation_tokens"))
        return numbers and _are_sources(record.get("validation_sources", {}))
    numbers = _STEP_KEYS - {"skipped"}
    return (
        record.keys() >= _STEP_KEYS
        and isinstance(record["skipped"], bool)
        and all(_is_number(record[key], nullable=key in _NULLABLE) for key in numbers)
        and _are_losses(record.get("auxiliary_losses", {}))
        and is_routing(record.get("routing", {}))
    )


def _are_losses(value: object) -> bool:
    """Whether a value maps names to losses."""
    return isinstance(value, dict) and all(_is_number(loss, nullable=True) for loss in value.values())


def _are_sources(value: object) -> bool:
    """Whether a value maps names of sources to their losses and numbers of sequences."""
    return isinstance(value, dict) and all(
        isinstance(source, dict) and _is_number(source.get("loss", ""), nullable=True) and _is_number(source.get("sequences"))
        for source in value.values()
    )


def _is_number(value: object, *, nullable: bool = False) -> bool:
    if value is None:
        return nullable
    return isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST_NUMBER < value < _LARGEST_NUMBER


def _name_foreign_lines(path: Path, lines: Sequence[_Line], say: Callable[[str], None]) -> None:
    numbers = [line.number for line in lines if line.record is None]
    if not numbers:
        return
    named = ", ".join(map(str, numbers[:_MAX_LINES_NAMED]))
    more = f" and {len(numbers) - _MAX_LINES_NAMED:,} more" if len(numbers) > _MAX_LINES_NAMED else ""
    what = f"line {named} is no record of this run; it stays" if len(numbers) == 1 else f"lines {named}{more} are no records of this run; they stay"
    say(f"{path}: {what} there, and figures and report go without")


def _drop_later_lines(path: Path, resume_step: int, say: Callable[[str], None]) -> None:
    """Keep the lines up to a step, and foreign lines; later lines were written by a run that ended before its next checkpoint."""
    if not path.exists():
        return
    lines = _parse_lines(path)
    _name_foreign_lines(path, lines, say)
    last_step = resume_step if resume_step > 0 else -1  # a run that begins anew records the evaluation of step 0 anew
    kept = [line.content for line in lines if line.record is None or line.record["step"] <= last_step]
    replace_file(path, b"".join(line + b"\n" for line in kept))
