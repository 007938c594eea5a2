"""Measurements that were not made, for tests of what is done with them."""

from phase8.benchmark.throughput import Measurement, Throughput
from phase8.config.schema import RunConfig


def measured(config: RunConfig, *, tokens_per_second: float = 100.0, gradients: dict[str, float] | None = None) -> Measurement:
    """A measurement of a config on a GPU."""
    return Measurement(
        Throughput(
            device="GPU of a test",
            device_type="cuda",
            torch_version="2",
            block=config.model.block,
            num_parameters=1000,
            sequence_length=config.model.sequence_length,
            batch_size=config.train.global_batch_size,
            recompute=config.train.recompute,
            num_steps=3,
            tokens_per_second=tokens_per_second,
            step_seconds=0.5,
            data_wait_ratio=0.01,
            mfu=None,
            peak_memory_bytes=1 << 30,
            warmup_seconds=1.0,
            first_loss=4.0,
            gradients=gradients or {"q": 3.0, "v": 4.0},
            facts={"device": "GPU of a test, torch 2", "mixer": "Triton"},
        )
    )
