"""Too little memory for a model or its text, in one sentence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from phase8 import accelerator
from phase8.errors import OutOfMemoryError

FEWER_BITS = "weights of fewer bits (tools/quantize_checkpoint.py SRC DST --bits 4)"


@contextmanager
def memory_errors(doing: str, device: torch.device, remedies: Sequence[str]) -> Iterator[None]:
    """A context manager that turns running out of memory into one sentence.

    Args:
        doing: What happens in its block, as in `while the model was loaded`.
        device: Device of the model.
        remedies: What needs less memory, each as in `give shorter prompts`; at least one.

    Raises:
        OutOfMemoryError: In place of what torch or Python raises.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        lacking = accelerator.memory_that_ran_out(error)
        if lacking is None:
            raise
    else:
        return
    where = {"device": str(device), "host": "the host", "page-locked": f"{device}, or the page-locked memory of the host,"}[lacking]
    # Raised here, where the frames that held tensors have ended, so that whoever catches it can use their memory.
    raise OutOfMemoryError(f"the memory of {where} did not suffice while {doing}; give {', or '.join(remedies)}.")
