"""The states of all random generators as JSON, so that a resumed run draws what the interrupted one would have drawn."""

from __future__ import annotations

import base64
import binascii
import random
from typing import Any

import numpy as np
import torch

from phase8.checkpoint.untrusted import shortened, shown
from phase8.errors import CheckpointCorruptError, CheckpointMismatchError

_NUMPY_WORDS = 624


def capture_random_state(device: torch.device) -> dict[str, Any]:
    """States of Python's, numpy's and torch's global generators; bytes are base64.

    Args:
        device: The run's device; its own generator is included when it is a CUDA device.
    """
    version, words, gauss_next = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    state: dict[str, Any] = {
        "python": {"version": version, "words": _encode(np.array(words, dtype="<u4").tobytes()), "gauss_next": gauss_next},
        "numpy": {
            "words": _encode(numpy_state["state"]["key"].astype("<u4").tobytes()),
            "position": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": _encode(torch.get_rng_state().numpy().tobytes()),
    }
    if device.type == "cuda":
        state["cuda"] = _encode(torch.cuda.get_rng_state(device).numpy().tobytes())
    return state


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Sets the generators to what `capture_random_state` returned.

    A CUDA state is used on a CUDA device only; a CUDA device whose state is not in `state` keeps its own.

    Raises:
        CheckpointCorruptError: `state` does not have the form of a captured one.
        CheckpointMismatchError: torch's generators have another size in this version of torch.
    """
    try:
        python, numpy_state = state["python"], state["numpy"]
        _check_numbers(python, numpy_state)
        python_words = tuple(np.frombuffer(_decode(python["words"]), dtype="<u4").tolist())
        numpy_words = np.frombuffer(_decode(numpy_state["words"]), dtype="<u4")
        torch_bytes = _decode(state["torch"])
        cuda_bytes = _decode(state["cuda"]) if device.type == "cuda" and "cuda" in state else None
        random.setstate((python["version"], python_words, python["gauss_next"]))
        np.random.set_state(("MT19937", numpy_words, numpy_state["position"], numpy_state["has_gauss"], numpy_state["gauss"]))
        torch.set_rng_state(_generator_state(torch_bytes, torch.get_rng_state().numel()))
        if cuda_bytes is not None:
            torch.cuda.set_rng_state(_generator_state(cuda_bytes, torch.cuda.get_rng_state(device).numel()), device)
    except (KeyError, TypeError, ValueError, RuntimeError, binascii.Error) as error:  # RuntimeError: torch does not accept the bytes
        reason = shortened(str(error))
        raise CheckpointCorruptError(f"the random state in the checkpoint's metadata is not valid ({reason}); use another checkpoint") from error


def _check_numbers(python: dict[str, Any], numpy_state: dict[str, Any]) -> None:
    """What the generators themselves do not look at before they use it; numpy would read beyond its words."""
    position, has_gauss = numpy_state["position"], numpy_state["has_gauss"]
    if type(position) is not int or not 0 <= position <= _NUMPY_WORDS:
        raise ValueError(f"numpy's position is {shown(position)}, not one of 0 to {_NUMPY_WORDS}")
    if type(has_gauss) is not int or has_gauss not in (0, 1):
        raise ValueError(f"numpy's has_gauss is {shown(has_gauss)}, neither 0 nor 1")
    if type(python["gauss_next"]) not in (float, type(None)) or type(numpy_state["gauss"]) is not float:
        raise ValueError("a stored normal number is no number")


def _generator_state(data: bytes, expected_bytes: int) -> torch.Tensor:
    if len(data) != expected_bytes:
        raise CheckpointMismatchError(
            f"the checkpoint's random state of torch has {len(data)} bytes and this torch's has {expected_bytes}; "
            "resume with the version of torch it was saved with"
        )
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _decode(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
