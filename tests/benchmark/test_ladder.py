import math

import pytest
import torch

from phase8.benchmark import ladder
from phase8.benchmark.ladder import climb, total_gain
from phase8.benchmark.throughput import Measurement
from phase8.errors import ConfigError, DivergenceError
from phase8.kernels.backends import Backend
from tests.benchmark.benchmark_figures import measured
from tests.train.tiny_run import tiny_config

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
NAMES = ["eager fp32", "+ loader", "+ bf16", "+ compile", "+ kernels", "+ CUDA graphs"]


@pytest.fixture
def machine(monkeypatch):
    """A GPU where nothing is measured: `machine.answers` may hold a measurement or an error for a rung by its number."""

    class Machine:
        configs, answers, backend = [], {}, Backend("triton", "of a test")

        def measure(self, config, *, device, num_steps):
            self.configs.append(config)
            answer = self.answers.get(len(self.configs), measured(config, tokens_per_second=100.0 * len(self.configs)))
            if isinstance(answer, Exception):
                raise answer
            return answer

    machine = Machine()
    machine.configs, machine.answers = [], {}
    monkeypatch.setattr(ladder, "measure_alone", machine.measure)
    monkeypatch.setattr(ladder, "select_kernels", lambda wanted, device: None)
    monkeypatch.setattr(ladder, "kernel_backend", lambda device: machine.backend)
    return machine


def reasons(steps):
    return {step.name: step.measurement.reason for step in steps if step.measurement.throughput is None}


def switched_on(config):
    compiled = config.train.compile
    return (
        config.data.num_workers > 0,
        config.data.pin_memory,
        config.precision.dtype,
        compiled.mode if compiled.enabled else None,
        config.train.kernels,
        config.train.cuda_graphs,
    )


def test_every_rung_adds_its_keys_to_those_below(tiny, machine):
    # What the ladder decides itself is asked for from the start.
    decided = ("precision.dtype=bf16", "train.compile.enabled=true", "data.pin_memory=true", "train.cuda_graphs=true")
    config = tiny_config(tiny, *decided, "train.compile.mode=max-autotune")
    steps = list(climb(config, device=GPU, num_steps=3))
    assert [step.name for step in steps] == NAMES and reasons(steps) == {}
    assert [switched_on(config) for config in machine.configs] == [
        (False, False, "fp32", None, "reference", False),
        (True, True, "fp32", None, "reference", False),
        (True, True, "bf16", None, "reference", False),
        (True, True, "bf16", "default", "reference", False),
        (True, True, "bf16", "default", "auto", False),
        (True, True, "bf16", "default", "auto", True),
    ]
    assert len({config.data.train for config in machine.configs}) == 1 and all(c.model == config.model for c in machine.configs)
    assert [step.gain for step in steps] == [None, 2.0, 1.5, pytest.approx(4 / 3), 1.25, 1.2] and total_gain(steps) == 6.0


def test_the_loaders_of_the_config_are_the_rung_s(tiny, machine):
    list(climb(tiny_config(tiny, "data.num_workers=7"), device=GPU, num_steps=3))
    assert [config.data.num_workers for config in machine.configs] == [0, 7, 7, 7, 7, 7]


def test_without_compilation_the_kernels_are_still_measured(tiny, machine):
    steps = list(climb(tiny_config(tiny), device=GPU, num_steps=3, use_compile=False))
    assert reasons(steps) == {
        "+ compile": "not available: switched off by --no-use-compile",
    }
    assert switched_on(machine.configs[-1]) == (True, True, "bf16", None, "auto", True) and len(machine.configs) == 5


def test_a_refused_toolchain_is_no_rung(tiny, machine):
    machine.backend = Backend("reference", "ptxas 12.8 miscompiles")
    steps = list(climb(tiny_config(tiny), device=GPU, num_steps=3))
    assert reasons(steps) == {"+ kernels": "not available: ptxas 12.8 miscompiles"}
    assert switched_on(machine.configs[-1]) == (True, True, "bf16", "default", "reference", True)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Measurement(None, "out of memory"), "out of memory"),
        (ConfigError("this is refused."), "not available: this is refused."),
        (DivergenceError("step 1 was not finite"), "wrong: step 1 was not finite"),
    ],
)
def test_a_rung_that_fails_is_listed_and_left_out(tiny, machine, answer, reason):
    machine.answers[3] = answer
    steps = list(climb(tiny_config(tiny), device=GPU, num_steps=3))
    assert reasons(steps) == {"+ bf16": reason}
    assert [switched_on(config)[2] for config in machine.configs] == ["fp32", "fp32", "bf16", "fp32", "fp32", "fp32"]
    assert steps[3].gain == 2.0 and total_gain(steps) == 6.0


def test_gradients_are_held_against_those_of_the_rung_before(tiny, machine):
    machine.answers[3] = measured(tiny_config(tiny), gradients={"q": 3.0, "v": 3.5})
    machine.answers[4] = Measurement(None, "out of memory")
    machine.answers[5] = measured(tiny_config(tiny), gradients={"q": 3.0, "v": 4.0})
    steps = list(climb(tiny_config(tiny), device=GPU, num_steps=3))
    expected = [None, 0.0, 0.5 / 5.0, None, 0.5 / math.hypot(3.0, 3.5), 0.0]
    assert [step.deviation for step in steps] == [None if value is None else pytest.approx(value) for value in expected]


@pytest.mark.parametrize("error", [ConfigError("this is refused."), DivergenceError("step 1 was not finite")])
def test_what_the_first_rung_refuses_is_the_user_s_to_correct(tiny, machine, error):
    machine.answers[1] = error
    with pytest.raises(type(error)):
        list(climb(tiny_config(tiny), device=GPU, num_steps=3))


def test_the_keys_of_the_first_rung_hold_although_it_does_not_fit(tiny, machine):
    machine.answers[1] = Measurement(None, "out of memory")
    steps = list(climb(tiny_config(tiny, "precision.dtype=bf16"), device=GPU, num_steps=3))
    assert switched_on(machine.configs[1]) == (True, True, "fp32", None, "reference", False) and steps[1].gain is None and steps[2].gain == 1.5


def test_nothing_measured_has_no_gain(tiny, machine):
    machine.answers |= {number: Measurement(None, "out of memory") for number in range(1, 7)}
    steps = list(climb(tiny_config(tiny), device=GPU, num_steps=3))
    assert len(reasons(steps)) == 6 and total_gain(steps) is None and {(step.gain, step.deviation) for step in steps} == {(None, None)}


def test_a_cpu_without_a_compiler_says_so(tiny, machine, monkeypatch):
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none_found():
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none_found)
    machine.backend = Backend("reference", "the Triton kernels need a GPU")
    assert reasons(climb(tiny_config(tiny), device=CPU, num_steps=3)) == {
        "+ compile": "not available: torch.compile needs a C++ compiler on a CPU, and there is none",
        "+ kernels": "not available: the Triton kernels need a GPU",
        "+ CUDA graphs": "not available: CUDA graphs need a GPU",
    }
