"""A file with the latest figures of a run for the textfile collector of Prometheus' node exporter, in the OpenMetrics text format.

The node exporter takes the file; of counters, which older formats name otherwise, it passes on the value without type.
The file is replaced as a whole, at most every few seconds. A killed run leaves its last figures there: `phase8_updated_timestamp_seconds` stands
still then, while `phase8_training` is 0 after an orderly end. Source of the format: OpenMetrics 1.0, prometheus.io/docs/specs/om.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from phase8.durable import replace_file

SECONDS_BETWEEN_WRITES = 5.0

# Key of a metrics line -> name and help. Steps and tokens fall in a rollback, so they are no counters.
_GAUGES = {
    "step": ("phase8_step", "Optimizer steps done."),
    "tokens": ("phase8_tokens", "Training tokens seen."),
    "loss": ("phase8_loss_nats", "Training loss of the last step in nats per token; NaN where the step was skipped."),
    "validation_loss": ("phase8_validation_loss_nats", "Loss of the last evaluation in nats per token."),
    "learning_rate": ("phase8_learning_rate", "Learning rate of the last step."),
    "grad_norm": ("phase8_gradient_norm", "Global gradient norm of the last step before clipping."),
    "tokens_per_second": ("phase8_tokens_per_second", "Throughput of the last step."),
    "step_seconds": ("phase8_step_seconds", "Duration of the last step."),
    "data_wait_seconds": ("phase8_data_wait_seconds", "Part of the last step spent waiting for data."),
    "mfu": ("phase8_mfu_ratio", "Model FLOP/s over the peak of the device in the last step."),
    "peak_memory_bytes": ("phase8_peak_memory_bytes", "Peak memory so far."),
}
# Figures that may be unknown for the whole run and are then left out.
_OPTIONAL = {"mfu"}


class OpenMetricsFile:
    """The file of a run.

    Args:
        path: Its path; a collector reads names that end in `.prom`.
        run: Name of the run, a label of every sample.
    """

    def __init__(self, path: Path, *, run: str):
        self._path, self._run = path, run
        self._figures: dict[str, float | None] = {}
        self._sources: dict[str, float | None] = {}
        self._num_skipped, self._events = 0, Counter[str]()
        self._written_at = float("-inf")
        self._is_training = True

    def begin(self, resume_step: int) -> None:
        """Does nothing: the file holds the latest figures alone."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Takes a line, and writes the file if it is older than a few seconds.

        Raises:
            StorageError: The file cannot be written.
        """
        if "event" in record:
            self._events[record["event"]] += 1
        else:
            self._figures.update({key: record[key] for key in _GAUGES if key in record and (key not in _OPTIONAL or record[key] is not None)})
            self._num_skipped += record.get("skipped", False)
            self._sources.update({name: source["loss"] for name, source in record.get("validation_sources", {}).items()})
        if time.monotonic() - self._written_at >= SECONDS_BETWEEN_WRITES:
            self._write()

    def close(self) -> None:
        """Writes the last figures and that the run does not train any more.

        Raises:
            StorageError: The file cannot be written.
        """
        self._is_training = False
        self._write()

    def _write(self) -> None:
        self._written_at = time.monotonic()
        replace_file(self._path, ("\n".join([*self._lines(), "# EOF"]) + "\n").encode())

    def _lines(self) -> Iterator[str]:
        for key, value in self._figures.items():
            name, description = _GAUGES[key]
            yield from self._family(name, "gauge", description, [({}, value)])
        if self._sources:
            of_sources = [({"source": source}, loss) for source, loss in self._sources.items()]
            yield from self._family("phase8_validation_loss_of_source_nats", "gauge", "Loss of a source in the last evaluation.", of_sources)
        skipped: list[tuple[dict[str, str], float | None]] = [({}, self._num_skipped)]
        yield from self._family("phase8_skipped_steps", "counter", "Steps skipped since the process began.", skipped)
        events: list[tuple[dict[str, str], float | None]] = [({"event": event}, count) for event, count in self._events.items()]
        yield from self._family("phase8_events", "counter", "Events since the process began, by kind.", events)
        yield from self._family("phase8_training", "gauge", "1 while the run trains, 0 after it has ended.", [({}, int(self._is_training))])
        yield from self._family("phase8_updated_timestamp_seconds", "gauge", "When this file was written, since 1970.", [({}, time.time())])

    def _family(self, name: str, kind: str, description: str, samples: list[tuple[dict[str, str], float | None]]) -> Iterator[str]:
        """The lines of a metric; None is written as NaN."""
        if not samples:
            return
        yield f"# HELP {name} {description}"
        yield f"# TYPE {name} {kind}"
        for labels, value in samples:
            listed = ",".join(f'{label}="{_escaped(text)}"' for label, text in {"run": self._run, **labels}.items())
            yield f"{name}{'_total' if kind == 'counter' else ''}{{{listed}}} {'NaN' if value is None else repr(value)}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").encode(errors="backslashreplace").decode()
