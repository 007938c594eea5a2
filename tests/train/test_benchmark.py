import dataclasses
import statistics
import time
from pathlib import Path

import pytest
import torch
from tiny_run import tiny_config

from phase8.data.loader import SequenceDataset
from phase8.train import benchmark
from phase8.train.benchmark import WARMUP_STEPS, measure_throughput

CPU = torch.device("cpu")


@pytest.fixture
def seen(monkeypatch):
    """Records of the runs that were measured."""
    runs, original = [], benchmark.read_metrics

    def read_metrics(path):
        runs.append(original(path))
        return runs[-1]

    monkeypatch.setattr(benchmark, "read_metrics", read_metrics)
    return runs


def test_figures_are_medians_of_the_measured_steps(tiny, seen):
    # Everything that would interrupt the steps is asked for and must not happen.
    config = tiny_config(
        tiny, "train.evaluate_every_n_steps=1", "checkpoint.every_n_steps=1", "train.stop_at_step=2", "observe.peak_flops=1e9",
        "observe.report=true", "observe.tensorboard=true", "observe.sample_prompt=x",
    )  # fmt: skip
    found = measure_throughput(config, device=CPU, num_steps=5)
    (records,) = seen
    assert [record["step"] for record in records] == list(range(1, WARMUP_STEPS + 6))
    measured = records[WARMUP_STEPS:]
    assert found.num_steps == 5 and found.block == "phase8" and found.device.startswith("CPU") and found.torch_version == torch.__version__
    assert found.tokens_per_second == statistics.median(4 * 24 / record["step_seconds"] for record in measured)
    assert found.step_seconds == statistics.median(record["step_seconds"] for record in measured)
    assert found.data_wait_ratio == statistics.median(record["data_wait_seconds"] / record["step_seconds"] for record in measured)
    assert 0 < found.data_wait_ratio < 1 and found.peak_memory_bytes == measured[-1]["peak_memory_bytes"] > 0
    assert found.mfu == statistics.median(record["mfu"] for record in measured) > 0
    assert not Path(config.run.output_dir).exists()


def test_mfu_is_unknown_without_a_peak_and_the_block_is_named(tiny):
    found, other = (measure_throughput(tiny_config(tiny, f"model.block={block}"), device=CPU, num_steps=1) for block in ("transformer", "phase8"))
    assert found.mfu is None and (found.block, other.block) == ("transformer", "phase8")
    assert found.num_parameters != other.num_parameters and dataclasses.asdict(found).keys() == dataclasses.asdict(other).keys()


def test_slow_data_raise_the_share_of_waiting(tiny, monkeypatch):
    config = tiny_config(tiny)
    usual = measure_throughput(config, device=CPU, num_steps=3)
    read = SequenceDataset.__getitem__

    def read_slowly(dataset, number):
        time.sleep(usual.step_seconds)
        return read(dataset, number)

    monkeypatch.setattr(SequenceDataset, "__getitem__", read_slowly)
    assert measure_throughput(config, device=CPU, num_steps=3).data_wait_ratio > max(0.5, usual.data_wait_ratio)
