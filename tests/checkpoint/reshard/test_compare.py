from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from phase8.checkpoint.load import open_checkpoint
from phase8.checkpoint.reshard.compare import TensorDifference, compare_checkpoints, max_abs_difference
from phase8.checkpoint.save import save_checkpoint

NAN, INF = math.nan, math.inf


def compared(tmp_path: Path, first: dict, second: dict) -> list[TensorDifference]:
    paths = [save_checkpoint(tmp_path / "c", step=step, tensors=tensors, metadata={}, attachments={}) for step, tensors in ((1, first), (2, second))]
    return list(compare_checkpoints(*map(open_checkpoint, paths)))


def test_equal_checkpoints_have_no_differences_whatever_the_bits(tmp_path: Path, make_tensors):
    tensors = make_tensors(1) | {"model.odd": torch.tensor([NAN, INF, -0.0])}
    assert compared(tmp_path, tensors, tensors) == []


def test_every_kind_of_difference_is_told(tmp_path: Path):
    first = {
        "model.same": torch.ones(2),
        "model.value": torch.tensor([1.0, 2.0, 3.0]),
        "model.shape": torch.ones(2),
        "model.dtype": torch.tensor([1.0, 1.5]),
        "model.sign": torch.tensor(0.0),
        "model.first": torch.ones(1),
    }
    second = {
        "model.second": torch.ones(1),
        "model.sign": torch.tensor(-0.0),
        "model.dtype": torch.tensor([1, 1]),
        "model.shape": torch.ones(3),
        "model.value": torch.tensor([1.0, 2.5, 2.75]),
        "model.same": torch.ones(2),
    }
    assert compared(tmp_path, first, second) == [
        TensorDifference("model.value", "values", "", 0.5),
        TensorDifference("model.shape", "shape", "[2] and [3]", None),
        TensorDifference("model.dtype", "dtype", "F32 and I64", 0.5),
        TensorDifference("model.sign", "values", "", 0.0),
        TensorDifference("model.first", "only_in_first", "", None),
        TensorDifference("model.second", "only_in_second", "", None),
    ]


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ([1.0, NAN], [1.0, NAN], 0.0),
        ([1.0, NAN], [3.0, 1.0], NAN),
        ([INF, 1.0], [INF, 2.0], 1.0),
        ([INF], [-INF], INF),
        ([], [], 0.0),
    ],
)
def test_special_values(left: list, right: list, expected: float):
    found = max_abs_difference(torch.tensor(left), torch.tensor(right))
    assert found == expected or (math.isnan(found) and math.isnan(expected))


def test_a_difference_beyond_the_first_chunk_counts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("phase8.checkpoint.reshard.compare._CHUNK_ELEMENTS", 4)
    left = torch.zeros(3, 5)
    right = left.clone()
    right[0, 1], right[2, 4] = 0.25, -2.0
    assert max_abs_difference(left, right) == 2.0
    assert max_abs_difference(torch.tensor([1 + 1j]), torch.tensor([1 - 2j])) == 3.0
