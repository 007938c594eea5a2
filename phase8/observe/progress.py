"""Progress of a run: one live line on a terminal, plain lines in a log.

Layout of the line; a narrow terminal shows only the more important parts:
    1,234/5,000 ━━━━━╺━━━━━━  loss 3.412  val 3.501  48.1k tok/s  MFU 41.2 %  5.21 GiB  grad 0.83  lr 6.00e-04  epoch 1.27  ETA 3 min 12 s

Throughput and MFU are means over all steps since the line before, on the live line over the last ten seconds. The other figures belong to
the last step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from phase8.closing import Tolerated
from phase8.formatting import format_bytes, format_count, format_epochs, format_ratio, format_seconds
from phase8.observe.metrics import SourceLoss, StepMetrics
from phase8.observe.pace import RemainingTime, Throughput
from phase8.terminal import warn

_LIVE_WINDOW_SECONDS = 10.0
_MAX_SOURCES = 4
_REFRESH_SECONDS = 0.1
_MIN_BAR_WIDTH = 8
_MAX_BAR_WIDTH = 40


class Field(NamedTuple):
    """One figure of the line.

    Args:
        label: Name of the figure; may be empty if the value is self-explanatory.
        value: The formatted figure.
        importance: Fields of low importance leave a narrow terminal first.
        style: Style of the value on a terminal.
    """

    label: str
    value: str
    importance: int
    style: str = ""

    @property
    def text(self) -> str:
        """Label and value."""
        return f"{self.label} {self.value}" if self.label else self.value


class Progress:
    """The display of a run in progress; a context manager.

    There is no refresh thread: the line is redrawn by the calls themselves, so that loader workers forked in the meantime
    cannot inherit a held lock.

    Args:
        total_steps: Step the run ends with.
        start_step: Last step done before, 0 for a new run.
        log_every_n_steps: Distance of the plain lines where the output is not a terminal; the first and the last step always have one.
        console: Where to print.
        epochs: Epochs that each source has delivered up to the last step, by name; called when a line is drawn.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        start_step: int,
        log_every_n_steps: int,
        console: Console,
        epochs: Callable[[], Mapping[str, float]] = dict,
    ):
        self._total_steps = total_steps
        self._log_every_n_steps = log_every_n_steps
        self._console = console
        self._epochs = epochs
        self._last_step = start_step
        self._last_metrics: StepMetrics | None = None
        self._printed_step: int | None = None
        self._validation_loss: float | None = None
        self._num_skipped = 0
        is_live = console.is_terminal and not console.is_dumb_terminal
        self._throughput = Throughput(window_seconds=_LIVE_WINDOW_SECONDS if is_live else math.inf)
        self._remaining_time = RemainingTime()
        self._refreshed_at = 0.0
        self._live: Live | None = None
        if is_live:
            self._live = Live(self._status_line(), console=console, auto_refresh=False)

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start(refresh=True)
        return self

    def __exit__(self, exception_type: type[BaseException] | None, exception: BaseException | None, traceback: TracebackType | None) -> None:
        with Tolerated("the last line of progress is lost", warn):
            if self._live is not None:
                self._live.update(self._status_line(), refresh=True)
                self._live.stop()
            elif self._last_metrics is not None and self._printed_step != self._last_metrics.step:
                self._print_plain(self._last_metrics)

    def step(self, metrics: StepMetrics) -> None:
        """Show a finished step."""
        is_first = self._last_metrics is None
        self._last_step = metrics.step
        self._last_metrics = metrics
        self._num_skipped += metrics.skipped
        self._throughput.add(seconds=metrics.step_seconds, tokens=metrics.tokens_per_second * metrics.step_seconds)
        self._remaining_time.add(seconds=metrics.step_seconds, ended_at=time.perf_counter())
        if self._live is not None:
            self._refresh(self._live)
        elif is_first or metrics.step % self._log_every_n_steps == 0 or metrics.step == self._total_steps:
            self._print_plain(metrics)

    def evaluation(self, step: int, validation_loss: float, sources: Sequence[SourceLoss] = ()) -> None:
        """Show an evaluation on a line that stays; for a blend, each source with the number of its sequences."""
        self._validation_loss = validation_loss
        each = [f"{source.name} {source.loss:.4f} ({source.num_sequences:,} sequences)" for source in sources if len(sources) > 1]
        self.message("  ".join([f"step {step:,}  validation loss {validation_loss:.4f}", *each]))

    def message(self, text: str) -> None:
        """Print text above the live line, or as a line of the log."""
        self._console.print(Text(text), soft_wrap=True)

    def _refresh(self, live: Live) -> None:
        now = time.monotonic()
        if now - self._refreshed_at >= _REFRESH_SECONDS:
            self._refreshed_at = now
            live.update(self._status_line(), refresh=True)

    def _print_plain(self, metrics: StepMetrics) -> None:
        self._printed_step = metrics.step
        step = f"step {metrics.step:>{len(f'{self._total_steps:,}')},}/{self._total_steps:,}"
        self.message("  ".join([step, *(field.text for field in self._fields())]))
        self._throughput.clear()

    def _status_line(self) -> _StatusLine:
        return _StatusLine(step=self._last_step, total_steps=self._total_steps, fields=tuple(self._fields()))

    def _fields(self) -> Iterator[Field]:
        """The figures, from left to right."""
        metrics = self._last_metrics
        if metrics is None:
            return
        yield Field("loss", "skipped" if metrics.loss is None else f"{metrics.loss:.4f}", 10, "bold")
        if self._validation_loss is not None:
            yield Field("val", f"{self._validation_loss:.4f}", 6)
        tokens_per_second = self._throughput.tokens_per_second
        yield Field("", f"{format_count(tokens_per_second)} tok/s", 7)
        if metrics.mfu is not None:
            yield Field("MFU", format_ratio(metrics.mfu * tokens_per_second / metrics.tokens_per_second), 5)
        yield Field("", format_bytes(metrics.peak_memory_bytes), 4)
        yield Field("grad", "not finite" if metrics.grad_norm is None else f"{metrics.grad_norm:.2f}", 3)
        yield Field("lr", f"{metrics.learning_rate:.2e}", 2)
        if self._num_skipped > 0:
            yield Field("skipped", f"{self._num_skipped:,}", 9, "bold yellow")
        epochs = self._epochs()
        if epochs:
            yield Field("epoch" if len(epochs) == 1 else "epochs", format_epochs(epochs, max_sources=_MAX_SOURCES), 1)
        num_remaining = self._total_steps - metrics.step
        remaining_seconds = self._remaining_time.seconds(num_remaining)
        if num_remaining > 0 and remaining_seconds is not None:
            yield Field("ETA", format_seconds(remaining_seconds), 8, "cyan")


@dataclass(frozen=True)
class _StatusLine:
    """The live line, laid out for the current width whenever it is drawn."""

    step: int
    total_steps: int
    fields: Sequence[Field]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        counter = f"{self.step:,}/{self.total_steps:,}"
        available = options.max_width - len(counter) - 1
        fields = _most_important(self.fields, available - _MIN_BAR_WIDTH)
        figures = Text.assemble(*(part for field in fields for part in _styled(field)))
        bar_width = max(1, min(_MAX_BAR_WIDTH, available - figures.cell_len))
        bar = ProgressBar(total=self.total_steps, completed=self.step, width=bar_width)
        grid = Table.grid(padding=0)
        grid.add_row(Text(f"{counter} ", style="bold"), bar, figures)
        yield grid


def _styled(field: Field) -> Iterator[tuple[str, str]]:
    yield "  " if field.label == "" else f"  {field.label} ", "bright_black"
    yield field.value, field.style


def _most_important(fields: Sequence[Field], width: int) -> list[Field]:
    """The most important fields that fit into a width, in their order."""
    kept = list(fields)
    while kept and sum(len(field.text) + 2 for field in kept) > width:
        kept.remove(min(kept, key=lambda field: field.importance))
    return kept
