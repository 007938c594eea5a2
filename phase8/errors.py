"""Every error the library raises on purpose.

A message is one sentence: what was found (key and value), what is allowed, and what to do. The doors in `launch/` and `tools/`
print it without a traceback and exit with the class's `exit_code`.

| exit code | meaning |
|---|---|
| 0 | finished, or stopped on request after saving |
| 1 | a bug: an exception that is none of these |
| 2 | config or command line |
| 3 | data or tokenizer |
| 4 | checkpoint: damaged, missing, or of another config |
| 5 | storage: a directory that cannot be written, a full disk |
| 6 | training diverged: too many non-finite steps in a row |
| 7 | communication: a rank that hangs, is lost, or cannot be reached |
| 8 | silent corruption: ranks whose copies of a weight differ |
| 9 | memory: the device or the host has too little |
| 130 | interrupted before there was anything to save, or by a second Ctrl-C |
| 141 | the reader of the output has gone, and printing it was the whole job |

(`tools/inspect_checkpoint.py --diff` exits with 1 when the checkpoints differ, as diff does.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class Phase8Error(Exception):
    """Base of all deliberate errors."""

    exit_code = 1


class ConfigError(Phase8Error):
    """One or more problems of a config, reported together.

    Args:
        problems: One sentence each.
    """

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class TopologyError(ConfigError):
    """Parallel degrees that do not fit the world size."""


class DataError(Phase8Error):
    """Training data or tokenizer that cannot be used as asked."""

    exit_code = 3


class IndexedFormatError(DataError):
    """A `.bin/.idx` pair that is damaged, truncated or written in another project's dialect."""


class CheckpointError(Phase8Error):
    """A checkpoint that cannot be used."""

    exit_code = 4


class CheckpointCorruptError(CheckpointError):
    """A checkpoint whose files are missing, truncated or altered."""


class CheckpointMismatchError(CheckpointError):
    """A good checkpoint that belongs to another model, to other data or to a later release."""


class StorageError(Phase8Error):
    """A place that cannot be written: no permission, no space."""

    exit_code = 5


class SwapError(StorageError):
    """What is offloaded to a disk cannot be written there, in the middle of an update: the weights are neither those before it nor those after it."""


class DivergenceError(Phase8Error):
    """Training stopped because a loss or gradient was not finite or too large, and the policy, or the number of such steps, allows no other way."""

    exit_code = 6


class CommunicationError(Phase8Error):
    """Processes cannot work together: one hangs, is lost, or cannot be reached."""

    exit_code = 7


class CorruptionError(Phase8Error):
    """Copies of a weight or of its optimizer state that must be equal on several ranks differ: memory or a link has corrupted data."""

    exit_code = 8


class ReaderGoneError(Phase8Error):
    """The reader of a tool's output has gone; the exit code is that of programs ended by SIGPIPE."""

    exit_code = 141


class OutOfMemoryError(Phase8Error):
    """The run needs more memory than the device or the host has.

    Args:
        sentence: What is needed, what is available, and the nearest setting that fits.
        values: The automatic settings that ran out of memory; None: there were none.
        has_begun: The run directory belongs to this run; otherwise it may still hold an earlier run.
        of_host: The host has too little, not the device.
    """

    exit_code = 9

    def __init__(self, sentence: str, values: Mapping[str, object] | None = None, *, has_begun: bool = True, of_host: bool = False):
        super().__init__(sentence)
        self.values, self.has_begun, self.of_host = values, has_begun, of_host


def describe_error(error: Phase8Error) -> str:
    """The lines that a door prints to stderr, one for each problem."""
    return "\n".join(f"error: {line}" for line in str(error).splitlines())


def first_few(differences: Sequence[str], *, separator: str = "; ", most: int = 3) -> str:
    """The first of some differences as a part of a sentence, with the number of those that are left out."""
    more = len(differences) - most
    return separator.join(differences[:most]) + (f"{separator}and {more} more" if more > 0 else "")
