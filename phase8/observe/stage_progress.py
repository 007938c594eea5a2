"""The progress of a tool that works in stages."""

from __future__ import annotations

import time

from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn

from phase8.closing import Tolerated
from phase8.terminal import make_console, warn

SECONDS_BETWEEN_LINES = 5.0


class ProgressDisplay:
    """The progress of each stage on stderr: a bar on a terminal, else a line every few seconds.

    Args:
        *columns: Columns after name and bar of a stage.
    """

    def __init__(self, *columns: ProgressColumn) -> None:
        self._console = make_console(stderr=True)
        name = TextColumn("{task.description}")
        self._progress = Progress(name, BarColumn(), *columns, console=self._console, disable=not self._console.is_terminal)
        self._tasks: dict[str, TaskID] = {}
        self._last_line_seconds = 0.0

    def __enter__(self) -> ProgressDisplay:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        with Tolerated("the last line of progress is lost", warn):
            self._progress.stop()

    def show(self, stage: str, completed: int, total: int, *, in_bytes: bool = False) -> None:
        """Shows that `completed` of `total` are done; an amount in bytes is shown too. Columns find it as `task.fields[amount]`."""
        is_new = stage not in self._tasks
        if is_new:
            self._tasks[stage] = self._progress.add_task(stage, amount="")
        amount = f"{completed / 1e6:,.1f} of {total / 1e6:,.1f} MB" if in_bytes else ""
        self._progress.update(self._tasks[stage], completed=completed, total=max(total, 1), amount=amount)
        now = time.monotonic()
        if not self._console.is_terminal and (is_new or completed >= total or now - self._last_line_seconds > SECONDS_BETWEEN_LINES):
            self._last_line_seconds = now
            self._console.print(f"{stage}: {100 * completed // max(total, 1)} %" + (f" ({amount})" if amount else ""), highlight=False)
