"""What the benchmarks of kernels share: refusals, figures and output; the GPU's clock is replaced."""

import argparse
import importlib.util
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from phase8.kernels.backends import Backend
from phase8.terminal import run_door

BENCH = Path(__file__).parents[2] / "tools" / "bench"
CPU = torch.device("cpu")


@pytest.fixture
def measure(monkeypatch):
    """The shared module, freshly loaded."""
    monkeypatch.syspath_prepend(BENCH)
    monkeypatch.delitem(sys.modules, "measure", raising=False)
    specification = importlib.util.spec_from_file_location("measure", BENCH / "measure.py")
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "measure", module)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def gpu(measure, monkeypatch):
    """A GPU that copies 2 TB/s, multiplies 500 TFLOP/s, and takes as many milliseconds as a case returns."""
    monkeypatch.setattr(measure, "_gpu", lambda kernel: CPU)
    monkeypatch.setattr(measure, "_facts", lambda kernel, device: {"kernel": kernel, "device": "GPU"})
    monkeypatch.setattr(measure, "require_green", lambda kernel: None)
    monkeypatch.setattr(measure, "measure_ceilings", lambda device: measure.Ceilings(2e12, 5e14))
    monkeypatch.setattr(measure, "time_runs", lambda run, device, repeats: [run() * (1 + 0.01 * i) for i in range(-5, 6)])
    monkeypatch.setattr(measure, "peak_extra_bytes", lambda run, device: 3 * 1024**2)
    return measure


def cases(measure):
    case = measure.Case
    return [
        case("forward", "ours", lambda: 0.5, num_bytes=500_000_000),
        case("forward", "peer", lambda: 2.0, num_bytes=500_000_000),
        case("forward", "other peer", None, reason="fla-core is not installed"),
        case("product", "ours", lambda: 1.0, num_bytes=1000, num_flops=250_000_000_000),
    ]


def run(measure, *words):
    arguments = measure.parser("Times.").parse_args(words)
    return run_door(lambda: measure.benchmark("kernel", arguments, lambda arguments, device: cases(measure)))


def test_figures_are_rates_shares_of_the_ceiling_and_ratios_within_the_group(gpu, capsys):
    assert run(gpu, "--json") == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    ours, peer, absent, product = result["results"]
    assert (ours["milliseconds"], ours["gigabytes_per_second"], ours["speed_ratio"]) == (0.5, pytest.approx(1000), 1)
    assert ours["share_of_ceiling"] == pytest.approx(0.5) and ours["teraflops_per_second"] is None
    assert ours["percentiles"] == pytest.approx([0.476, 0.524]) and ours["peak_extra_bytes"] == 3 * 1024**2
    assert peer["speed_ratio"] == 4 and peer["share_of_ceiling"] == pytest.approx(0.125)
    assert absent["milliseconds"] is None and absent["reason"] == "fla-core is not installed"
    assert product["teraflops_per_second"] == pytest.approx(250) and product["share_of_ceiling"] == pytest.approx(0.5)
    assert product["speed_ratio"] == 1  # of its own group
    assert result["arguments"] == {"repeats": 100} and result["kernel"] == "kernel"
    assert result["ceilings"] == {"bytes_per_second": 2e12, "flops_per_second": 5e14}
    assert "forward: ours" in err


def test_the_table_has_a_line_for_each_case(gpu, capsys):
    assert run(gpu) == 0
    out, err = capsys.readouterr()
    lines = {line.split("  ")[0]: line.split() for line in out.splitlines()}
    assert lines["forward: ours"][2:] == ["0.5000", "0.4760-0.5240", "1000", "50.0%", "1.00x", "3", "MiB"]
    assert lines["forward: peer"][2:] == ["2.0000", "1.9040-2.0960", "250", "12.5%", "4.00x", "3", "MiB"]
    assert "fla-core is not installed" in out and "copy 2.00 TB/s, bf16 matmul 500 TFLOP/s" in out and err == ""


@pytest.mark.parametrize("test", ["assert 1 + 1 == 3", "raise ImportError"])
def test_a_red_kernel_is_not_timed(test, measure, monkeypatch, tmp_path, capsys):
    tests = tmp_path / "tests/kernels"
    tests.mkdir(parents=True)
    (tests / "test_kernel.py").write_text("def test_good():\n    pass\n")
    (tests / "test_kernel_gpu.py").write_text(f"def test_bad():\n    {test}\n")
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    monkeypatch.setattr(measure, "_gpu", lambda kernel: CPU)
    assert run(measure) == 1
    out, err = capsys.readouterr()
    assert "kernel is not timed, since its tests are red" in err and "test_bad" in err and out == ""


def test_green_tests_run_and_machine_code_is_left_to_continuous_integration(measure, monkeypatch, tmp_path):
    tests = tmp_path / "tests/kernels"
    tests.mkdir(parents=True)
    ran = tmp_path / "ran"
    (tests / "test_kernel.py").write_text(
        f"def test_good():\n    open({str(ran)!r}, 'w')\n\ndef test_machine_code():\n    assert False\n"
    )
    (tests / "test_other.py").write_text("def test_bad():\n    assert False\n")
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    measure.require_green("kernel")
    assert ran.exists()


def test_a_kernel_without_tests_is_red(measure, monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    with pytest.raises(measure.BenchmarkError, match="has no tests"):
        measure.require_green("kernel")


def test_results_that_differ_at_the_timed_size_are_refused(measure):
    expected = torch.tensor([1.0, -4.0], dtype=torch.float64)
    measure.require_close("g", torch.tensor([1.0, -4.0003]), expected, tolerance=1e-4)
    for wrong in ([1.0, -4.0005], [float("nan"), -4.0]):
        with pytest.raises(measure.BenchmarkError, match="g is off by"):
            measure.require_close("g", torch.tensor(wrong), expected, tolerance=1e-4)


@pytest.mark.parametrize(
    ("available", "backend", "words"),
    [(False, None, "on a GPU only"), (True, Backend("reference", "ptxas 12.8, which miscompiles"), "does not run in Triton here: ptxas 12.8")],
)
def test_without_gpu_or_kernels_nothing_is_timed(available, backend, words, measure, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(measure, "select_kernels", lambda wanted, device: None)
    monkeypatch.setattr(measure, "kernel_backend", lambda device: backend)
    assert run(measure) == 1
    out, err = capsys.readouterr()
    assert words in err and out == ""


def test_the_cache_is_flushed_and_everything_enqueued_before_a_run_starts(measure, monkeypatch):
    events = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            events.append("event")

        def elapsed_time(self, other):
            return 1.5

    cuda = SimpleNamespace(
        Event=Event, _sleep=lambda cycles: events.append("sleep"), synchronize=lambda device: events.append("synchronize")
    )
    monkeypatch.setattr(measure.torch, "cuda", cuda)
    monkeypatch.setattr(measure, "FLUSH_BYTES", 8)
    monkeypatch.setattr(torch.Tensor, "zero_", lambda self: events.append("flush"))
    assert measure.time_runs(lambda: events.append("run"), CPU, repeats=2) == [1.5, 1.5]
    assert events == ["run"] * measure.WARMUP_RUNS + ["flush", "sleep", "event", "run", "event"] * 2 + ["synchronize"]


@pytest.mark.parametrize(("door", "shape"), [("mixer_inputs", [1, 20, 2, 8]), ("low_rank_mixer_inputs", [1, 20, 2, 8, 4])])
def test_values_pass_silu_in_the_operator_and_after_it(door, shape, measure, monkeypatch):
    """What is timed side by side is the same."""
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    make = runpy.run_path(str(BENCH / f"{door}.py"))["_cases"]
    for flag, peer in ((False, []), (True, ["phase8, then SiLU"])):
        found = list(make(argparse.Namespace(shape=shape, tiles="chosen", silu_values=flag), CPU))
        for group in {case.group for case in found}:
            cases = {case.name: case.run() for case in found if case.group == group}
            assert [name for name in cases if name.startswith("phase8")] == ["phase8", *peer]
            for name in peer:
                torch.testing.assert_close([*cases[name]], [*cases["phase8"]], rtol=0.05, atol=0.05 * max(x.abs().max().item() for x in cases[name]))


@pytest.mark.parametrize("door", sorted(path.name for path in BENCH.glob("*.py") if path.name != "measure.py"))
def test_doors_refuse_in_one_sentence_without_a_gpu(door, measure, monkeypatch, capfd):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [str(BENCH / door)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCH / door), run_name="__main__")
    output, errors = capfd.readouterr()
    assert ended.value.code == 1 and output == ""
    assert re.fullmatch(r"error: \w+ is timed on a GPU( only)?, and torch finds none(; with --device cpu it is timed here)?\.\n", errors)


def test_a_door_runs_as_a_program():
    done = subprocess.run([sys.executable, str(BENCH / "green_scan.py"), "--help"], capture_output=True, text=True, cwd=BENCH.parents[1])
    assert done.returncode == 0 and "--repeats" in done.stdout, done.stderr


def test_arguments_of_a_door_are_reported(gpu, capsys):
    options = gpu.parser("Times.")
    options.add_argument("--size", type=int, default=7)
    seen = []

    def make(arguments: argparse.Namespace, device):
        seen.append((arguments.size, device))
        return []

    assert gpu.benchmark("kernel", options.parse_args(["--json"]), make) == 0
    assert seen == [(7, CPU)] and json.loads(capsys.readouterr().out)["arguments"] == {"repeats": 100, "size": 7}
