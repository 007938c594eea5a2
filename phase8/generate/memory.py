"""Too little memory for a model or its text, in one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch

from phase8.errors import OutOfMemoryError
from phase8.memory_errors import told_by

FEWER_BITS = "weights of fewer bits (tools/quantize_checkpoint.py SRC DST --bits 4)"


def memory_errors(doing: str, device: torch.device, remedies: Sequence[str]) -> AbstractContextManager[None]:
    """A context manager that turns running out of memory into one sentence.

    Args:
        doing: What happens in its block, as in `while the model was loaded`.
        device: Device of the model.
        remedies: What needs less memory, each as in `give shorter prompts`; at least one.

    Raises:
        OutOfMemoryError: In place of what torch or Python raises.
    """
    where = {"device": str(device), "host": "the host", "page-locked": f"{device}, or the page-locked memory of the host,"}
    return told_by(lambda lacking: OutOfMemoryError(f"the memory of {where[lacking]} did not suffice while {doing}; give {', or '.join(remedies)}."))
