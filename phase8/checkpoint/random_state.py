"""The states of all random generators as JSON, so that a resumed run draws what the interrupted one would have drawn."""

from __future__ import annotations

import base64
import binascii
import random
from typing import Any, NamedTuple

import numpy as np
import torch

from phase8.accelerator import generator_state, set_generator_state
from phase8.checkpoint.untrusted import printable, shortened, shown
from phase8.errors import CheckpointCorruptError, CheckpointMismatchError

_NUMPY_WORDS = 624
_OF_EVERY_RUN = ("python", "numpy", "torch")


class _States(NamedTuple):
    """Arguments of the generators; those of accelerators by the type of device."""

    python: tuple[Any, ...]
    numpy: tuple[Any, ...]
    torch: bytes
    accelerators: dict[str, bytes]


def capture_random_state(device: torch.device) -> dict[str, Any]:
    """States of Python's, numpy's and torch's global generators; bytes are base64.

    Args:
        device: The run's device; the generator of an accelerator is included, by the type of device.
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
    if (of_device := generator_state(device)) is not None:
        state[device.type] = _encode(of_device.numpy().tobytes())
    return state


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Sets the generators to what `capture_random_state` returned, all of them or none.

    An accelerator's state is used on the same type of device only; one whose state is not in `state` keeps its own.

    Raises:
        CheckpointCorruptError: `state` does not have the form of a captured one.
        CheckpointMismatchError: torch's generators have another size in this version of torch.
    """
    states = check_random_state(state, device)
    random.setstate(states.python)
    np.random.set_state(states.numpy)
    torch.set_rng_state(_as_tensor(states.torch))
    if (of_device := states.accelerators.get(device.type)) is not None:
        set_generator_state(device, _as_tensor(of_device))


def check_random_state(state: dict[str, Any], device: torch.device | None = None) -> _States:
    """Parses the states that `capture_random_state` returned, and tries each in a generator of its kind that is not otherwise used.

    Args:
        state: Any value.
        device: Device on which it will be restored; None: nowhere, so another version of torch may have written it.

    Raises:
        CheckpointCorruptError: `state` does not have the form of a captured one.
        CheckpointMismatchError: torch's generators have another size in this version of torch.
    """
    own_bytes = torch.Generator().get_state().numel()
    try:
        python, numpy_state = state["python"], state["numpy"]
        _check_numbers(python, numpy_state)
        python_words = tuple(np.frombuffer(_decode(python["words"]), dtype="<u4").tolist())
        numpy_words = np.frombuffer(_decode(numpy_state["words"]), dtype="<u4")
        states = _States(
            python=(python["version"], python_words, python["gauss_next"]),
            numpy=("MT19937", numpy_words, numpy_state["position"], numpy_state["has_gauss"], numpy_state["gauss"]),
            torch=_decode(state["torch"]),
            accelerators={name: _decode(text) for name, text in state.items() if name not in _OF_EVERY_RUN},
        )
        random.Random(0).setstate(states.python)
        np.random.RandomState(0).set_state(states.numpy)
        if len(states.torch) == own_bytes:
            torch.Generator().set_state(_as_tensor(states.torch))
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError, binascii.Error) as error:  # RuntimeError: torch does not accept the bytes
        reason = printable(shortened(str(error)))
        raise CheckpointCorruptError(f"the random state in the checkpoint's metadata is not valid ({reason}); use another checkpoint") from error
    if device is not None:
        _check_size(states.torch, own_bytes)
        of_device, own = states.accelerators.get(device.type), generator_state(device)
        if of_device is not None and own is not None:
            _check_size(of_device, own.numel())
    return states


def _check_numbers(python: dict[str, Any], numpy_state: dict[str, Any]) -> None:
    """Checks what the generators do not check before they use it; numpy would read out of bounds."""
    position, has_gauss = numpy_state["position"], numpy_state["has_gauss"]
    if type(position) is not int or not 0 <= position <= _NUMPY_WORDS:
        raise ValueError(f"numpy's position is {shown(position)}, not one of 0 to {_NUMPY_WORDS}")
    if type(has_gauss) is not int or has_gauss not in (0, 1):
        raise ValueError(f"numpy's has_gauss is {shown(has_gauss)}, neither 0 nor 1")
    if type(python["gauss_next"]) not in (float, type(None)) or type(numpy_state["gauss"]) is not float:
        raise ValueError("a stored normal number is no number")


def _check_size(data: bytes, expected_bytes: int) -> None:
    if len(data) != expected_bytes:
        raise CheckpointMismatchError(
            f"the checkpoint's random state of torch has {len(data)} bytes and this torch's has {expected_bytes}; "
            "resume with the version of torch it was saved with"
        )


def _as_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _decode(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
