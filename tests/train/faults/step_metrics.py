"""What a step measured, where a test cares for little of it."""

from phase8.observe.metrics import StepMetrics


def step_metrics(step, **changes):
    fields = {
        "loss": 2.0, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens": 8 * step, "tokens_per_second": 8.0, "step_seconds": 1.0,
        "data_wait_seconds": 0.1, "mfu": None, "peak_memory_bytes": 0, "skipped": False,
    }  # fmt: skip
    return StepMetrics(step=step, **(fields | changes))
