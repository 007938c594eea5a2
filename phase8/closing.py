"""What closes last does not decide: work whose failure is said, and neither changes a result nor hides an earlier error."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

from phase8.errors import Phase8Error


class Tolerated:
    """A block that fails in one sentence.

    For what a finished job can do without (a report, a flush, the release of something), at its end or in a `finally`. Any error is said
    and goes no further, be it of the disk, of a library or a bug; so an error that is on its way already stays the one that counts.
    What asks the process to end (`KeyboardInterrupt`, `SystemExit`) goes through.

    Args:
        failure: What is lost then, the begin of the sentence.
        say: Shows a sentence; one that fails itself is given up.
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
    """The first line of what an error says, with the name of its class where the message was not written for people."""
    line = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, Phase8Error):
        return line
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
