"""Failures that a finished job tolerates: each is reported in one sentence, and neither changes the result nor hides an earlier error."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

from phase8.errors import Phase8Error


class Tolerated:
    """A context manager that reports an error of its block in one sentence and suppresses it.

    It is meant for extras at the end of a job or in a `finally` (a report, a flush, the release of something). Any error, of the disk, of a
    library or a bug, is reported and suppressed, so an earlier error that is already being raised stays the one that counts.
    `KeyboardInterrupt` and `SystemExit` are not suppressed.

    Args:
        failure: The beginning of the sentence: what is lost.
        say: Shows a sentence; if it fails itself, the sentence is dropped.
    """

    def __init__(self, failure: str, say: Callable[[str], object]):
        self._failure, self._say = failure, say

    def __enter__(self) -> Tolerated:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if not isinstance(error, Exception):
            return False
        with suppress(Exception):
            self._say(f"{self._failure}: {_reason(error)}")
        return True


def _reason(error: Exception) -> str:
    """The first line of an error's message, preceded by the class name if the message was not written for users."""
    line = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, Phase8Error):
        return line
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
