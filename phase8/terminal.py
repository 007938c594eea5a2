r"""Output for people: streams that survive the loss of their reader, and the common begin and end of every door.

| what happens to standard output | ordinary work | a block of `output_is_the_product` |
|---|---|---|
| its reader goes (`\| head`) | one sentence on stderr, then silence; the work continues | the door ends without a word, exit code 141 |
| its disk is full, its terminal gone | the same | one sentence, exit code 5 |
| it was closed from the start (`>&-`) | silence | silence |

Standard error is silenced without a sentence. A character that an encoding lacks, or a byte of a path that is not UTF-8, is written as its
escape (`\u65e5`, `\udcff`).
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO, cast

from phase8.errors import Phase8Error, ReaderGoneError, StorageError, describe_error

if TYPE_CHECKING:
    from rich.console import Console

EXIT_INTERRUPTED = 130
ESCAPED = "backslashreplace"


class LastingStream:
    """A text stream whose `write` and `flush` do not raise: after the first failure it is silent.

    All other attributes are those of the wrapped stream.

    Args:
        stream: The wrapped stream.
        name: Name of the stream in the sentence about a failure; empty: no sentence.
    """

    def __init__(self, stream: TextIO, name: str = ""):
        self._stream, self._name = stream, name
        self.is_lost = False
        self.is_the_product = False  # True inside a block of `output_is_the_product`

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes the text, or drops it after a failure."""
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def writelines(self, lines: Iterator[str]) -> None:
        """Writes several texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flushes the wrapped stream."""
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[[], object]) -> None:
        if self.is_lost:
            return
        try:
            action()
        except BlockingIOError as error:  # another program has made the pipe non-blocking, and it is full: only this text is lost
            if self.is_the_product:
                self._lose(error)
        except (OSError, ValueError) as error:  # ValueError: the file was closed
            self._lose(error)

    def _lose(self, error: OSError | ValueError) -> None:
        self.is_lost = True
        with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:  # takes what is buffered, and what libraries and children write
            os.dup2(nowhere.fileno(), self._stream.fileno())
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if self.is_the_product:
            if isinstance(error, BrokenPipeError):
                raise ReaderGoneError("whoever read the output has gone")
            raise StorageError(f"cannot write {self._name}: {reason}; free space there, or send the output elsewhere") from error
        if self._name:
            warn(f"{self._name} is lost ({reason}); going on without it")


def tell(text: str) -> None:
    """Writes to stderr without its buffers, whose locks another thread or the interrupted code may hold; it never fails."""
    with suppress(OSError):
        os.write(2, text.encode(errors=ESCAPED))


def warn(sentence: str) -> None:
    """Shows a sentence where no console is at hand."""
    tell(f"{sentence}\n")


def lasting(stream: TextIO | None, name: str = "") -> LastingStream:
    """Wraps a stream so that it does not fail; None (it was closed from the start) becomes a silent stream."""
    if isinstance(stream, LastingStream):
        return stream
    if isinstance(stream, io.TextIOWrapper):
        with suppress(OSError, ValueError):
            stream.reconfigure(errors=ESCAPED)
    return LastingStream(open(os.devnull, "w", encoding="utf-8") if stream is None else stream, name)


@contextmanager
def lasting_streams() -> Iterator[None]:
    """A context manager in which sys.stdout and sys.stderr do not fail, however they were closed."""
    _occupy_standard_descriptors()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, lasting(*pair)) for pair in ((before[0], "standard output"), (before[1], "")))
    try:
        yield
    finally:
        sys.stdout.flush()  # a failure at interpreter exit would give exit code 120
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


@contextmanager
def output_is_the_product() -> Iterator[None]:
    """A context manager for work whose only purpose is its output: it ends when standard output is lost.

    Raises:
        ReaderGoneError: The reader of the output has gone.
        StorageError: The output cannot be written.
    """
    stream = lasting(sys.stdout)
    stream.is_the_product = True
    try:
        yield
        stream.flush()
    finally:
        stream.is_the_product = False


def run_door(work: Callable[[], int], *, interrupted: str = "interrupted") -> int:
    """Runs a command line, from its arguments to its exit code.

    Args:
        work: Reads the arguments, does what they ask, and returns the exit code.
        interrupted: The message after Ctrl-C, where the `KeyboardInterrupt` has none.
    """
    with lasting_streams():
        try:
            return work()
        except ReaderGoneError as error:
            return error.exit_code
        except Phase8Error as error:
            sys.stderr.write(f"{describe_error(error)}\n")
            return error.exit_code
        except KeyboardInterrupt as interrupt:
            sys.stderr.write(f"{interrupt}\n" if str(interrupt) else f"{interrupted}\n")
            return EXIT_INTERRUPTED


def make_console(*, stderr: bool = False, **options: Any) -> Console:
    """Creates a rich console that survives a lost stream, where rich itself would exit.

    Args:
        stderr: Print to standard error.
        **options: Options of rich's Console.
    """
    from rich.console import Console  # not at the top: threads that only `tell` do not need rich

    return Console(file=cast(TextIO, lasting(sys.stderr) if stderr else lasting(sys.stdout, "standard output")), stderr=stderr, **options)


def _occupy_standard_descriptors() -> None:
    """Opens descriptors that were closed from the start on the null device, so that no file gets their number and the text meant for people."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
            os.set_inheritable(number, True)
