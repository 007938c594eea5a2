"""Running out of memory, told in one sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from phase8.accelerator import Memory, memory_that_ran_out
from phase8.errors import OutOfMemoryError


@contextmanager
def told_by(tell: Callable[[Memory], OutOfMemoryError]) -> Iterator[None]:
    """A context manager that replaces what torch or Python raises when memory runs out.

    Args:
        tell: Makes the error, given which memory is used up.

    Raises:
        OutOfMemoryError: The result of `tell`.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        lacking = memory_that_ran_out(error)
        if lacking is None:
            raise
    else:
        return
    # Raised here, where the frames that held tensors have ended, so that whoever catches it can use their memory.
    raise tell(lacking)
