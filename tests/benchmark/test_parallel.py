"""Layouts of several ranks: what their names mean, that the work per rank is the same, and what is said when one of them fails."""

import os
import sys
import time
from pathlib import Path

import pytest

from phase8.benchmark.layouts import layout_config, parse_layout, throughput_ceiling
from phase8.benchmark.parallel import Host, first_error, measure_layouts, planned_bytes, torchrun
from phase8.benchmark.parallel_table import LAYOUTS_HEADER, device_lines, host_lines, layout_line
from phase8.benchmark.throughput import WARMUP_STEPS
from phase8.config.batch import batch_shape, run_topology
from phase8.errors import ConfigError
from phase8.plan.whole_config import count_parameters, plan_stages, shapes_only
from tests.train.tiny_run import tiny_config

ROOT = Path(__file__).parents[2]
ON_CPU = Host(torchrun(ROOT / "launch" / "benchmark_rank.py"), "cpu", None, timeout_seconds=300.0)


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def changed_keys(name, tiny, *overrides, sequences_per_rank=4):
    config = layout_config(tiny_config(tiny, *overrides), layout := parse_layout(name), sequences_per_rank=sequences_per_rank)
    topology = run_topology(config.parallel, world_size=layout.world_size)
    return config, topology, batch_shape(config.train, config.parallel, data_parallel_size=topology.data_parallel_size)


@pytest.mark.parametrize(
    ("name", "world_size", "settings"),
    [
        ("one", 1, {}),
        ("tp2", 2, {"parallel.tensor_parallel_size": 2}),
        ("dp4-zero3-shard2", 4, {"zero.stage": 3, "zero.shard_size": 2}),
        ("pp4-gpipe", 4, {"parallel.pipeline_parallel_size": 4, "parallel.pipeline_schedule": "gpipe"}),
        (
            "tp2-pp2-dp2-interleaved-micro1",
            8,
            {
                "parallel.tensor_parallel_size": 2,
                "parallel.pipeline_parallel_size": 2,
                "parallel.pipeline_schedule": "interleaved",
                "parallel.pipeline_chunks": 2,
                "train.micro_batch_size": 1,
            },
        ),
        (
            "pp2-chunks3-interleaved",
            2,
            {"parallel.pipeline_parallel_size": 2, "parallel.pipeline_chunks": 3, "parallel.pipeline_schedule": "interleaved"},
        ),
        (
            "cp2-dp2-ep4-zero3",
            4,
            {"parallel.context_parallel_size": 2, "parallel.expert_parallel_size": 4, "zero.stage": 3},
        ),
        ("one-zero3-offload", 1, {"zero.stage": 3, "zero.offload_optimizer": "cpu", "zero.offload_params": "cpu"}),
        ("dp2-offload-zero1", 2, {"zero.stage": 1, "zero.offload_optimizer": "cpu"}),
        ("one-zero2-deepspeed", 1, {"zero.stage": 2, "zero.engine": "deepspeed"}),
        (
            "one-zero3-nvme", 1,
            {"zero.stage": 3, "zero.engine": "deepspeed", "zero.offload_optimizer": "nvme", "zero.offload_params": "cpu"},
        ),
    ],
)
def test_the_parts_of_a_name_are_config_keys(name, world_size, settings):
    layout = parse_layout(name)
    assert (layout.name, layout.world_size, layout.settings) == (name, world_size, settings)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("tp2-zero", "--layouts: 'tp2-zero' has the part 'zero', but the parts are one, async, copy, graph, offload, deepspeed, nvme, gpipe, "),
        ("tp0", "--layouts: 'tp0' has the part 'tp0'"),
        ("xtp2", "--layouts: 'xtp2' has the part 'xtp2'"),
        ("", "--layouts: '' has the part ''"),
        ("tp2-tp2", "--layouts: 'tp2-tp2' names tp twice"),
        ("pp2-1f1b-gpipe", "--layouts: 'pp2-1f1b-gpipe' names a schedule twice"),
        ("zero3", "--layouts: 'zero3' does not say how many ranks there are"),
    ],
)
def test_what_is_no_layout_is_refused_in_one_sentence(name, sentence):
    with pytest.raises(ConfigError) as error:
        parse_layout(name)
    assert str(error.value).startswith(sentence) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["one", "tp2", "pp2-gpipe", "dp4-zero2", "tp2-pp2-interleaved", "tp2-dp2-zero3", "cp2-tp2", "dp2-micro1"])
def test_every_rank_has_the_same_number_of_tokens(tiny, name):
    _, topology, shape = changed_keys(name, tiny, "train.micro_batch_size=2")
    assert shape.global_batch_size == 4 * topology.world_size and shape.micro_batch_size == (1 if "micro1" in name else 2)
    model_ranks = topology.tensor_parallel_size * topology.pipeline_parallel_size * topology.context_parallel_size
    assert shape.num_microbatches == 4 * model_ranks // shape.micro_batch_size


def test_the_layout_alone_says_how_ranks_divide_the_work(tiny):
    settings = ("parallel.tensor_parallel_size=2", "zero.stage=3", "zero.offload_optimizer=cpu", "zero.offload_params=cpu")
    config, topology, shape = changed_keys("pp2", tiny, *settings, "train.global_batch_size=64")
    assert topology.degrees == {"pp": 2, "dp": 1, "cp": 1, "tp": 1} and shape.global_batch_size == 8
    assert (config.zero.stage, config.zero.offload_optimizer, config.zero.offload_params) == (0, "none", "none")
    assert config.parallel.pipeline_schedule == "1f1b" and config.model == tiny_config(tiny).model
    nvme, _, _ = changed_keys("one-zero1-nvme", tiny, "zero.nvme_path=/disk")
    assert (nvme.zero.nvme_path, nvme.zero.offload_params) == ("/disk", "none")
    _, _, shape = changed_keys("tp2", tiny, "train.micro_batch_size=null")
    assert (shape.micro_batch_size, shape.num_microbatches) == (4, 2)
    with pytest.raises(ConfigError, match=r"train\.global_batch_size 5 is not"):
        changed_keys("one", tiny, sequences_per_rank=5)


def test_the_bubble_leaves_a_ceiling(tiny):
    def ceiling(name):
        config, _, shape = changed_keys(name, tiny, "train.micro_batch_size=1")
        return throughput_ceiling(config, num_microbatches=shape.num_microbatches)

    assert ceiling("tp2") is None and ceiling("pp2-1f1b") == ceiling("pp2-gpipe") == pytest.approx(8 / 9)
    assert ceiling("pp2-interleaved") == pytest.approx(16 / 17) and ceiling("pp4-1f1b") == pytest.approx(16 / 19)


def test_planned_memory_is_that_of_the_fullest_rank_and_of_the_host_for_all(tiny):
    configs = {name: changed_keys(name, tiny)[0] for name in ("one", "pp2", "one-zero3-offload", "dp2-zero3-offload", "pp2-dp2-zero3-offload")}
    plans = {name: planned_bytes(config, world_size=parse_layout(name).world_size, device_type="cpu") for name, config in configs.items()}
    num_parameters = count_parameters(shapes_only(tiny_config(tiny)))
    assert plans["one"][1] == plans["pp2"][1] == 0 and plans["one"][0] > 16 * num_parameters
    for name in ("one-zero3-offload", "dp2-zero3-offload", "pp2-dp2-zero3-offload"):  # weight, gradient and two moments; uneven parts are rounded up
        assert 16 * num_parameters <= plans[name][1] < 16.5 * num_parameters
    assert plans["one-zero3-offload"][0] < plans["one"][0]
    stages = plan_stages(configs["pp2"], world_size=2, device_type="cpu")
    assert plans["pp2"][0] == max(stage.memory.total_bytes for stage in stages) > min(stage.memory.total_bytes for stage in stages)


LOG_OF_TORCHRUN = """
[rank1]:[W1105 10:00:00.1] Warning: something harmless Error
rank 1: Traceback (most recent call last):
  File "step.py", line 1, in train_step
    raise KeyError
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 139 GiB
rank 0: error: rank 1 has failed (torch.OutOfMemoryError); all ranks stop
torch.distributed.elastic.multiprocessing.errors.ChildFailedError: launch/benchmark_rank.py FAILED
"""


@pytest.mark.parametrize(
    ("log", "sentence"),
    [
        (LOG_OF_TORCHRUN, "torch.OutOfMemoryError: CUDA out of memory"),
        ("[rank0]: Traceback\n[rank0]:   x\n[rank0]: ValueError: no. And more", "ValueError: no"),
        ("noise\nerror: train.kernels is wrong. Set it to auto.\nChildFailedError", "train.kernels is wrong. Set it to auto."),
        ("rank 2: error: rank 0 is behind; wait.\n", "rank 0 is behind; wait."),
        ("Signal 9 received\n\n", "the last words are: Signal 9 received"),
        ("", "it has not said anything"),
    ],
)
def test_the_first_error_of_a_log_is_what_a_row_says(log, sentence):
    assert first_error(log) == sentence


@pytest.mark.full
def test_layouts_are_measured_by_training_them_under_torchrun(tiny, tmp_path):
    config = tiny_config(tiny, "train.micro_batch_size=2")
    layouts = [parse_layout(name) for name in ("tp3", "one", "dp2-zero3-offload")]
    rows = list(measure_layouts(config, layouts, sequences_per_rank=4, num_steps=2, host=ON_CPU, logs=tmp_path / "logs"))
    refused, alone, two = rows
    assert refused.found is None and refused.reason.startswith("parallel.tensor_parallel_size 3 does not divide model.num_heads 4")
    assert (alone.reason, two.reason) == (None, None)
    for row, num_ranks in ((alone, 1), (two, 2)):
        assert row.shape.global_batch_size == 4 * num_ranks and row.tokens_per_second == 4 * num_ranks * 24 / row.found.step_seconds
        assert row.tokens_per_second_per_rank == row.tokens_per_second / num_ranks and row.seconds > row.found.build_seconds > 0
        assert row.found.peak_memory_bytes is None and row.found.peak_resident_bytes > 1 << 20 and "window" in row.found.facts["mixer"]
    assert alone.relative == 1 and two.relative == two.tokens_per_second_per_rank / alone.tokens_per_second_per_rank
    assert "dp 2, ZeRO stage 3, optimizer and parameters offloaded" in two.found.facts["topology"] and two.planned_host_bytes > 0
    steps = (tmp_path / "logs" / "2-dp2-zero3-offload" / "rank-1" / "metrics.jsonl").read_text().splitlines()
    assert len(steps) == WARMUP_STEPS + 2 and not list((tmp_path / "logs").rglob("*.safetensors"))

    lines = [layout_line(row).split() for row in rows]
    assert len(LAYOUTS_HEADER.split()) == 17 and lines[0][:2] == ["tp3", "3"]
    assert lines[1][:6] == ["one", "1", "4", "2", "x", "2"] and lines[1][8:11] == ["1.000", "-", "-"]
    assert lines[2][:6] == ["dp2-zero3-offload", "2", "8", "2", "x", "2"]
    (host_line,), (device_line,) = host_lines(rows), device_lines(rows)
    assert host_line.startswith("dp2-zero3-offload: ") and "planned" in host_line and device_line.startswith("CPU")


def only_row(tiny, tmp_path, program, *, num_devices=None, timeout_seconds=60.0):
    """The only row of a table of two ranks whose launcher is a program without torch."""
    launcher = tmp_path / "launcher.py"
    launcher.write_text(program)
    device_type = "cpu" if num_devices is None else "cuda"
    host = Host(lambda num_ranks: [sys.executable, str(launcher), str(num_ranks)], device_type, num_devices, timeout_seconds)
    (row,) = measure_layouts(tiny_config(tiny), [parse_layout("dp2")], sequences_per_rank=4, num_steps=1, host=host, logs=tmp_path / "logs")
    return row


def test_a_layout_that_fails_says_why(tiny, tmp_path):
    row = only_row(tiny, tmp_path, "import sys\nsys.exit('error: the rank has had enough.')")
    assert (row.found, row.reason, row.tokens_per_second) == (None, "the rank has had enough.", None)
    assert layout_line(row).split() == ["dp2", "2", "the", "rank", "has", "had", "enough."]


RANKS_THAT_HANG = """
import pathlib, subprocess, sys, time
directory = pathlib.Path(sys.argv[sys.argv.index("--directory") + 1])
for rank in range(int(sys.argv[1])):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    (directory / f"{rank}.pid").write_text(str(process.pid))
print("waiting for ever", flush=True)
time.sleep(600)
"""


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


def test_a_layout_that_hangs_is_ended_with_all_its_ranks(tiny, tmp_path):
    row = only_row(tiny, tmp_path, RANKS_THAT_HANG, timeout_seconds=5.0)
    assert row.reason == "it was not done within 5 s; the last words are: waiting for ever"
    pids = [int(path.read_text()) for path in (tmp_path / "logs").rglob("*.pid")]
    assert len(pids) == 2 and os.getpid() not in pids
    deadline = time.monotonic() + 5
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, pids))


def test_more_ranks_than_gpus_are_not_started(tiny, tmp_path):
    row = only_row(tiny, tmp_path, "raise SystemExit('error: started')", num_devices=1)
    assert row.reason == "layout dp2 needs 2 GPUs, but this host has 1." and not (tmp_path / "logs").exists()
