from __future__ import annotations

import base64
import json
import random

import numpy as np
import pytest
import torch

from phase8.checkpoint.manifest import json_problem
from phase8.checkpoint.random_state import capture_random_state, restore_random_state
from phase8.errors import CheckpointCorruptError, CheckpointMismatchError

CPU = torch.device("cpu")


def draw(device: torch.device) -> list:
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),
        np.random.randn(),  # numpy keeps the second of a pair of normals
        *torch.randn(3).tolist(),
        *torch.rand(2, device=device).tolist(),
    ]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_all_generators_go_on_where_they_were_after_a_trip_through_json(device: str):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    target = torch.device(device)
    draw(target)
    captured = capture_random_state(target)
    assert json_problem(captured, "random_state") is None
    expected = draw(target)
    draw(target)
    restore_random_state(json.loads(json.dumps(captured)), target)
    assert draw(target) == expected


def test_capturing_draws_nothing():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    capture_random_state(CPU)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("python", "words", "no base64!"),
        ("python", "words", base64.b64encode(bytes(8)).decode()),
        ("python", "version", 99),
        ("numpy", "words", base64.b64encode(bytes(7)).decode()),
        ("numpy", "position", "x"),
        ("numpy", "words", None),
    ],
)
def test_a_malformed_state_is_refused(section: str, key: str, value: object):
    state = capture_random_state(CPU)
    state[section][key] = value
    with pytest.raises(CheckpointCorruptError, match="random state"):
        restore_random_state(state, CPU)


def test_a_missing_generator_and_another_size_are_refused():
    state = capture_random_state(CPU)
    with pytest.raises(CheckpointCorruptError, match="numpy"):
        restore_random_state({key: value for key, value in state.items() if key != "numpy"}, CPU)
    with pytest.raises(CheckpointMismatchError, match="3 bytes"):
        restore_random_state(state | {"torch": base64.b64encode(b"abc").decode()}, CPU)
