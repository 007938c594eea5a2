"""Stopping on request: SIGINT, SIGTERM, SIGHUP and SIGUSR1 finish the step, a second SIGINT interrupts it."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

from phase8.processes.exit import heeded_end_signals
from phase8.terminal import tell


class StopRequest:
    """A context manager in which stop signals are remembered instead of ending the process.

    `received` names the signal, or is None.

    Args:
        notice: Message when a signal arrives; None: another rank shows it.
    """

    def __init__(self, notice: str | None = "stopping after this step (Ctrl-C again: at once, unsaved)"):
        self._notice = notice
        self.received: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        self._previous = {number: signal.signal(number, self._remember) for number in (signal.SIGINT, *heeded_end_signals())}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
        # Written directly to the terminal: a handler must not wait for a lock that the interrupted code holds.
        if self._notice is not None:
            tell(f"\n{self.received}: {self._notice}\n")
