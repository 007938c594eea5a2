import dataclasses
import gc
import math
import statistics
import time
import weakref
from pathlib import Path

import pytest
import torch

from phase8.benchmark import throughput
from phase8.benchmark.throughput import WARMUP_STEPS, measure_alone, measure_throughput
from phase8.config.load import with_settings
from phase8.data.loader import SequenceDataset
from phase8.errors import ConfigError, DivergenceError
from phase8.observe.metrics import MetricsWriter
from phase8.tensor_parallel.linear import JointColumnLinear
from phase8.train import loop, saver, trainer
from phase8.train.engine import fsdp
from phase8.train.engine.protocol import StepResult
from tests.train.tiny_run import tiny_config

CPU = torch.device("cpu")


@pytest.fixture
def clocks(monkeypatch):
    """Clocks of the runs that were measured."""
    made, original = [], throughput.StepClock

    def clock(directory):
        made.append(original(directory))
        return made[-1]

    monkeypatch.setattr(throughput, "StepClock", clock)
    return made


def test_figures_are_medians_of_the_measured_steps(tiny, clocks, monkeypatch):
    # Everything that would interrupt the steps is asked for and must not happen.
    config = tiny_config(
        tiny, "train.evaluate_every_n_steps=1", "checkpoint.every_n_steps=1", "train.stop_at_step=2", "observe.peak_flops=1e9",
        "observe.report=true", "observe.tensorboard=true", "optim.schedule=wsd", "optim.decay_steps=2",
    )  # fmt: skip
    for module, name in ((saver, "save_checkpoint"), (trainer, "HeldOutData"), (loop, "write_report")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("interrupted"))
    found = measure_throughput(config, device=CPU, num_steps=5)
    (clock,) = clocks
    assert [step.step for step in clock.steps] == list(range(1, WARMUP_STEPS + 6))
    measured = clock.steps[WARMUP_STEPS:]
    durations = [after - before for before, after in zip(clock.ends[WARMUP_STEPS:], clock.ends[WARMUP_STEPS + 1 :], strict=False)]
    assert len(durations) == found.num_steps == 5
    assert found.block == "phase8" and found.device.startswith("CPU") and found.device_type == "cpu"
    assert found.torch_version == torch.__version__ and found.facts["device"].startswith("CPU") and "window" in found.facts["mixer"]
    assert (found.sequence_length, found.batch_size, found.recompute) == (24, 4, "none")
    assert found.step_seconds == statistics.median(durations) and found.tokens_per_second == 4 * 24 / found.step_seconds
    assert found.warmup_seconds == pytest.approx(clock.ends[WARMUP_STEPS] - clock.ends[0])
    assert found.data_wait_ratio == statistics.median(step.data_wait_seconds / t for step, t in zip(measured, durations, strict=True))
    assert 0 < found.data_wait_ratio < 1 and found.peak_memory_bytes == measured[-1].peak_memory_bytes > 0
    rate = measured[0].mfu * 1e9 / measured[0].tokens_per_second  # FLOPs of a token
    assert found.mfu == pytest.approx(rate * found.tokens_per_second / 1e9) and found.mfu > 0
    assert found.first_loss == clock.steps[0].loss
    assert found.gradients.keys() == {"q", "k", "v", "global_path.scalars", "global_path.gate.down", "global_path.gate.up", "out"}
    assert found.first_loss == pytest.approx(math.log(config.model.vocab_size), rel=0.1)
    assert not Path(config.run.output_dir).exists()


def test_what_happens_between_two_steps_is_in_their_time(tiny, monkeypatch):
    """The trainer's own clock ends before the record is written and does not see the optimizer of a GPU end."""
    write = MetricsWriter.log_step

    def write_slowly(writer, metrics):
        time.sleep(0.05)
        write(writer, metrics)

    monkeypatch.setattr(MetricsWriter, "log_step", write_slowly)
    assert measure_throughput(tiny_config(tiny), device=CPU, num_steps=2).step_seconds >= 0.05


@pytest.mark.parametrize("block", ["phase8", "transformer"])
def test_a_wrong_backward_of_the_mixer_shows_in_its_gradients(tiny, monkeypatch, block):
    """Although the block begins with a mixer whose output weights are zero, which hides the gradients of everything before them."""
    config = tiny_config(tiny, f"model.block={block}", "optim.gradient_clip_norm=1e-3")
    right = measure_throughput(config, device=CPU, num_steps=1).gradients

    joint_product = JointColumnLinear.__call__

    def doubled(layers, x):
        y = joint_product(layers, x)
        return 2 * y - y.detach() if len(layers.layers) == 3 else y  # q, k and v, not gate and up

    monkeypatch.setattr(JointColumnLinear, "__call__", doubled)
    wrong = measure_throughput(config, device=CPU, num_steps=1).gradients
    factors = {name: wrong[name] / norm for name, norm in right.items()}
    assert all(factors[name] > 1.9 for name in "qkv") and 0.99 < factors["out"] < 1.9, factors
    assert max(right[name] for name in "qkv") > 0.1 * max(right.values())


def test_mfu_is_unknown_without_a_peak_and_the_block_is_named(tiny):
    found, other = (measure_throughput(tiny_config(tiny, f"model.block={block}"), device=CPU, num_steps=1) for block in ("transformer", "phase8"))
    assert found.mfu is None and (found.block, other.block) == ("transformer", "phase8")
    assert found.num_parameters != other.num_parameters and dataclasses.asdict(found).keys() == dataclasses.asdict(other).keys()


def test_slow_data_raise_the_share_of_waiting(tiny, monkeypatch):
    config = tiny_config(tiny)
    usual = measure_throughput(config, device=CPU, num_steps=3)
    read = SequenceDataset.__getitem__

    def read_slowly(dataset, number):
        time.sleep(4 * usual.step_seconds)  # steps differ by more than half on a busy machine
        return read(dataset, number)

    monkeypatch.setattr(SequenceDataset, "__getitem__", read_slowly)
    assert measure_throughput(config, device=CPU, num_steps=3).data_wait_ratio > max(0.5, usual.data_wait_ratio)


def test_a_run_that_is_not_finite_is_not_timed(tiny, monkeypatch):
    monkeypatch.setattr(fsdp, "train_step", lambda *_, **__: StepResult(float("nan"), 1.0, skipped=True))
    with pytest.raises(DivergenceError, match="step 1: loss nan"):
        measure_throughput(tiny_config(tiny), device=CPU, num_steps=1)


def test_too_little_memory_is_a_finding_and_the_model_is_given_back(tiny, monkeypatch):
    models, original = [], throughput.build_run

    def build_run(*arguments, **options):
        run = original(*arguments, **options)
        models.append(weakref.ref(run.engine.train_state.model))
        return run

    def run_out(trainer, stop_step, stop):
        trainer.itself = trainer  # a cycle, as autograd and compiled code make them
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(throughput, "build_run", build_run)
    monkeypatch.setattr(throughput.Trainer, "train_until", run_out)
    gc.collect()
    gc.disable()  # what is collected, is collected on purpose
    try:
        measurement = measure_alone(tiny_config(tiny), device=CPU, num_steps=1)
        assert (measurement.throughput, measurement.reason) == (None, "out of memory")
        assert [model() for model in models] == [None]
    finally:
        gc.enable()


def test_other_errors_of_a_run_are_not_taken_for_too_little_memory(tiny, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(throughput, "measure_throughput", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        measure_alone(tiny_config(tiny), device=CPU, num_steps=1)


@pytest.mark.parametrize("compiled", [True, False])
def test_compiled_code_is_forgotten_between_runs(tiny, monkeypatch, compiled):
    resets = []
    monkeypatch.setattr(throughput, "measure_throughput", lambda *_, **__: resets.append("measured"))
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append("reset"))
    measure_alone(tiny_config(tiny, f"train.compile.enabled={str(compiled).lower()}"), device=CPU, num_steps=1)
    assert resets == (["measured", "reset"] if compiled else ["measured"])


def test_settings_change_only_their_keys_and_are_checked(tiny):
    config = tiny_config(tiny)
    changed = with_settings(config, {"train.compile.mode": "max-autotune", "model.d_model": 48})
    assert changed.train.compile.mode == "max-autotune" and changed.model.d_model == 48
    assert with_settings(changed, {"train.compile.mode": "default", "model.d_model": config.model.d_model}) == config
    with pytest.raises(ConfigError, match=r"precision\.dtype is"):
        with_settings(config, {"precision.dtype": "fp7"})
