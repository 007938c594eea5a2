from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from phase8.observe.metrics import StepMetrics


@pytest.fixture
def make_step() -> Callable[..., StepMetrics]:
    def build(step: int, **changes: Any) -> StepMetrics:
        fields = {
            "step": step,
            "loss": 9.0 / step**0.3,
            "learning_rate": 3e-4,
            "grad_norm": 1.25,
            "tokens": 8192 * step,
            "tokens_per_second": 48_100.0,
            "step_seconds": 0.17,
            "data_wait_seconds": 0.0017,
            "mfu": 0.412,
            "peak_memory_bytes": 3 * 2**30,
            "skipped": False,
        }
        return StepMetrics(**{**fields, **changes})

    return build


@pytest.fixture
def make_skipped(make_step: Callable[..., StepMetrics]) -> Callable[[int], StepMetrics]:
    return lambda step: make_step(step, loss=None, grad_norm=None, skipped=True)
