"""Imports of torch, without looks for garbage among what they make."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def imports_that_stay() -> Iterator[None]:
    """A context manager for the imports of a door: a start on a CPU takes a fifth less time.

    An import makes hundreds of thousands of objects, all of which stay. Python would look through them for garbage again and again while
    they become more, and once more whenever a step of training has made enough objects: neither happens to what is made in the block.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()
