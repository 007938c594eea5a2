"""The door of the benchmarks: what it prints, as text and as JSON, and what it refuses."""

import json
import sys
from pathlib import Path

import pytest
import torch

from phase8.benchmark import ladder, parallel, throughput
from phase8.benchmark.parallel import LayoutSpeed
from phase8.kernels import backends
from tests.tools.doors import load_door

DOOR = Path(__file__).parents[2] / "tools" / "benchmark.py"
QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
SHAPE = {"d-model": 32, "n-layers": 1, "n-seq": 16, "batch-size": 2, "low-rank-rank": 4, "vocab-size": 128, "iterations": 1}
SPEED = ["speed", "--no-use-compile", *(word for name, value in SHAPE.items() for word in (f"--{name}", value))]
SMALL = ["--set", "model.num_layers=1", "model.sequence_length=8", "train.micro_batch_size=4"]
RUNGS = ["eager fp32", "+ loader", "+ bf16", "+ compile", "+ kernels", "+ CUDA graphs"]


@pytest.fixture
def door(tiny, monkeypatch, capfd):
    """The command in this process, its quickstart a tiny one: exit code, output and errors."""
    precision = torch.get_float32_matmul_precision()
    module = load_door("benchmark")
    configs = tiny.parent / "configs"
    configs.mkdir()
    (configs / "quickstart.yaml").write_text(tiny.read_text())
    monkeypatch.setattr(module, "CONFIGS", configs)

    def call(*words):
        monkeypatch.setattr(sys, "argv", [str(DOOR), *map(str, words), "--device", "cpu"])
        code = module.main()
        return code, *capfd.readouterr()

    yield call
    torch.set_float32_matmul_precision(precision)


@pytest.fixture
def little_memory(monkeypatch):
    """Longer sequences than 16 do not fit the transformer."""
    measure = throughput.measure_throughput

    def measure_or_fail(config, **options):
        if config.model.block == "transformer" and config.model.sequence_length > 16:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return measure(config, **options)

    monkeypatch.setattr(throughput, "measure_throughput", measure_or_fail)


def lines_by_name(table, names):
    return {name: line for line in table.splitlines() for name in names if line.startswith(f"{name} ")}


@pytest.mark.full
def test_the_ladder_names_every_rung_and_all_compute_the_same(door):
    code, output, table = door(*SPEED, "--json")
    assert code == 0 and output.count("\n") == 1 and "error" not in table
    assert table.splitlines()[0] == "phase8: d 32, 1 layers, 1 heads of 32, T 16, rank 4, vocabulary 128, batch 2 x 1"
    lines = lines_by_name(table, [*RUNGS, "total"])
    assert list(lines) == [*RUNGS, "total"]
    assert "switched off by --no-use-compile" in lines["+ compile"]
    assert "not available: the Triton kernels need a GPU" in lines["+ kernels"] and "need a GPU" in lines["+ CUDA graphs"]
    assert lines["total"].endswith("+ bf16 over eager fp32") and lines["+ bf16"].split()[3].endswith("x") and lines["+ bf16"].endswith("%")
    assert "published reference" not in table and "phase8: CPU" in table

    result = json.loads(output)
    rungs, model = result["ladders"]["phase8"]["rungs"], result["config"]["model"]
    assert [rung["name"] for rung in rungs] == RUNGS and [rung["measurement"]["throughput"] for rung in rungs[3:]] == [None] * 3
    found = [rung["measurement"]["throughput"] for rung in rungs[:3]]
    speeds = [throughput["tokens_per_second"] for throughput in found]
    assert [rung["gain"] for rung in rungs[:3]] == [None, speeds[1] / speeds[0], speeds[2] / speeds[1]]
    assert result["ladders"]["phase8"]["total_gain"] == speeds[2] / speeds[0]
    norms = [throughput["gradients"] for throughput in found]
    assert norms[0] == norms[1] != norms[2] and norms[0].keys() == norms[2].keys()
    assert [rung["deviation"] for rung in rungs[:2]] == [None, 0.0] and 0 < rungs[2]["deviation"] < 0.2
    assert (model["d_model"], model["num_layers"], model["num_heads"], model["sequence_length"]) == (32, 1, 1, 16)
    assert (model["low_rank_rank"], model["ffn"], model["vocab_size"]) == (4, "low_rank_swiglu", 128)
    assert result["config"]["train"]["global_batch_size"] == 2 and result["torch_version"] == torch.__version__


def test_the_default_shape_is_the_research_benchmark_s_beside_its_published_figures(door, monkeypatch):
    shapes = []

    def climb(config, **options):
        shapes.append(config)
        assert options["use_compile"] and options["num_steps"] == 20
        return iter(())

    monkeypatch.setattr(ladder, "climb", climb)
    code, output, _ = door("speed")
    (config,) = shapes
    model = config.model
    assert (model.d_model, model.num_layers, model.num_heads, model.sequence_length, model.vocab_size) == (512, 8, 8, 512, 50257)
    assert (model.low_rank_rank, model.ffn, config.train.global_batch_size) == (16, "low_rank_swiglu", 16)
    assert code == 0 and "published reference" in output and "not measured here" in output and "fewer than two rungs" in output
    assert "published reference" not in door("speed", "--d-model", "128")[1] and shapes[1].model.num_heads == 2
    door("speed", "--low-rank-rank", "0", "--num-heads", "4", "--batch-size", "1")
    assert (shapes[2].model.ffn, shapes[2].model.num_heads, shapes[2].train.global_batch_size) == ("swiglu", 4, 1)


def test_flash_attention_adds_a_column_where_it_is_installed(door, monkeypatch):
    blocks = []
    monkeypatch.setattr(ladder, "climb", lambda config, **_: blocks.append(config.model.block) or iter(()))
    monkeypatch.setattr(backends, "installed_flash_attention", lambda: {2: "2.8.3"})
    code, _, errors = door("speed", "--use-flash-attn2")
    assert code == 2 and "needs a GPU" in errors and blocks == []
    monkeypatch.setattr("phase8.train.device.select_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr("phase8.train.device.device_name", lambda device: "GPU of a test")
    code, output, _ = door("speed", "--use-flash-attn2", "--json")
    assert code == 0 and blocks == ["phase8", "transformer"] == list(json.loads(output)["ladders"])


def test_the_blocks_side_by_side(door, tiny, tmp_path):
    code, output, _ = door("model", "--config", tiny, "--iterations", 1, "--profile", tmp_path, *SMALL, "observe.peak_flops=1e9")
    assert code == 0
    assert ["phase8", "transformer", "ratio"] in [line.split() for line in output.splitlines()]
    lines = lines_by_name(output, ["tok/s", "MFU", "peak memory", "parameters", "step"])
    assert len(lines) == 5 and lines["tok/s"].endswith("x") and "%" in lines["MFU"] and lines["peak memory"].split()[2:] == ["-", "-", "-"]
    ours, theirs = ((tmp_path / f"{block}.txt").read_text() for block in ("phase8", "transformer"))
    assert ours.startswith("phase8 on CPU") and "aten::mm" in ours and "green_scan" in ours
    assert theirs.startswith("transformer on CPU") and "scaled_dot_product" in theirs and "green_scan" not in theirs


def test_a_block_that_does_not_fit_is_said_beside_the_other(door, tiny, little_memory):
    code, output, table = door("model", "--config", tiny, "--iterations", 1, "--json")
    assert code == 0 and "transformer: out of memory" in table and lines_by_name(table, ["tok/s"])["tok/s"].split()[2:] == ["-", "-"]
    result = json.loads(output)
    assert result["ratio"] is None and result["config"]["model"]["sequence_length"] == 24
    assert result["blocks"]["transformer"] == {"throughput": None, "reason": "out of memory"}
    assert result["blocks"]["phase8"]["throughput"]["num_steps"] == 1


@pytest.mark.full
def test_lengths_and_where_memory_ends(door, tiny, little_memory):
    options = ["--config", tiny, "--sequence-lengths", 32, 16, "--tokens-per-step", 32, "--iterations", 1]
    code, output, errors = door("scaling", *options, "--json")
    rows = json.loads(output)["lengths"]
    assert code == 0 and [(row["sequence_length"], row["batch_size"]) for row in rows] == [(16, 2), (32, 1)]
    assert rows[1]["blocks"]["transformer"] == {"throughput": None, "reason": "out of memory"} and rows[1]["ratio"] is None
    speeds = [rows[0]["blocks"][block]["throughput"]["tokens_per_second"] for block in ("phase8", "transformer")]
    assert rows[0]["ratio"] == speeds[0] / speeds[1]
    (short,), (long,) = ([line for line in errors.splitlines() if line.split()[:1] == [length]] for length in ("16", "32"))
    assert short.endswith("x") and "out of memory" in long and long.endswith("-")


def test_quickstart_prints_every_figure(door):
    code, output, _ = door("quickstart", "--iterations", 1)
    assert code == 0 and {"block", "tokens_per_second", "data_wait_ratio", "peak_memory_bytes"} <= {line.split()[0] for line in output.splitlines()}
    result = json.loads(door("quickstart", "--iterations", 1, "--json", "--set", "model.block=transformer")[1])
    assert result["block"] == "transformer" and result["num_steps"] == 1 and result["sequence_length"] == 24


def test_layouts_as_a_table_and_as_json(door, tiny, tmp_path, monkeypatch):
    asked = {}

    def measure_layouts(config, layouts, **options):
        asked.update(options, sequence_length=config.model.sequence_length, names=[layout.name for layout in layouts])
        assert options["logs"].is_dir() or options["logs"] == tmp_path / "logs"
        for layout in layouts:
            yield LayoutSpeed(layout, None, None, "not today")

    monkeypatch.setattr(parallel, "measure_layouts", measure_layouts)
    code, output, table = door("parallel", "--config", tiny, "--json", "--layouts", "one", "pp2-1f1b", "--set", "model.sequence_length=48")
    host = asked["host"]
    assert (code, asked["names"], asked["sequence_length"], asked["sequences_per_rank"], asked["num_steps"]) == (0, ["one", "pp2-1f1b"], 48, 8, 8)
    assert (host.device_type, host.num_devices, host.timeout_seconds) == ("cpu", None, 240.0)
    assert Path(host.command(2)[-1]).is_file() and "--nproc_per_node=2" in host.command(2)
    assert "T 48" in table and [line.split()[0] for line in table.splitlines() if "not today" in line] == ["one", "pp2-1f1b"]
    result = json.loads(output)
    assert [row["layout"]["world_size"] for row in result["layouts"]] == [1, 2] and result["config"]["model"]["sequence_length"] == 48
    door("parallel", "--config", tiny, "--logs", tmp_path / "logs", "--sequences-per-rank", 2, "--timeout", 7, "--iterations", 3)
    assert (asked["logs"], asked["sequences_per_rank"], asked["num_steps"], asked["host"].timeout_seconds) == (tmp_path / "logs", 2, 3, 7.0)
    assert asked["names"][0] == "one" and {"tp2", "dp2-zero3", "pp2-interleaved"} <= set(asked["names"])


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["quickstart", "--iterations", 0], "--iterations is 0, but at least 1 is needed."),
        (["speed", "--d-model", 0], "--d-model is 0, but at least 1 is needed."),
        (["speed", "--batch-size", -1], "--batch-size is -1"),
        (["speed", "--low-rank-rank", -1], "model.low_rank_rank is -1"),
        ([*SPEED, "--num-heads", 5], "model.num_heads 5 does not divide model.d_model 32"),
        ([*SPEED, "--set", "model.colour=red"], "unknown key model.colour"),
        (["speed", "--use-flash-attn2"], "flash-attn 2 is not installed"),
        (["model", "--config", "absent.yaml"], "absent.yaml does not exist"),
        (["scaling", "--sequence-lengths", 8, 0], "--sequence-lengths is 0"),
        (["scaling", "--tokens-per-step", 0], "--tokens-per-step is 0"),
        (["parallel", "--config", "absent.yaml"], "absent.yaml does not exist"),
        (["parallel", "--config", QUICKSTART, "--layouts", "one", "tp2-warp9"], "--layouts: 'tp2-warp9' has the part 'warp9'"),
        (["parallel", "--config", QUICKSTART, "--sequences-per-rank", 0], "--sequences-per-rank is 0"),
        (["parallel", "--config", QUICKSTART, "--timeout", 0], "--timeout is 0"),
    ],
)
def test_2_for_what_cannot_be_measured_in_one_sentence(door, monkeypatch, words, text):
    monkeypatch.setattr(backends, "installed_flash_attention", dict)
    code, _, errors = door(*words)
    assert code == 2 and errors.startswith("error: ") and text in errors and errors.count("\n") == 1, errors


@pytest.mark.parametrize("words", [[], ["model"], ["speed", "--no-such-option"], ["swim"]])
def test_2_for_what_is_no_command(door, capfd, words):
    with pytest.raises(SystemExit) as exit_of_parser:
        door(*words)
    assert exit_of_parser.value.code == 2 and "error: " in capfd.readouterr().err


def test_130_when_interrupted(door, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(throughput, "measure_throughput", interrupt)
    code, output, errors = door("quickstart")
    assert (code, output, errors) == (130, "", "interrupted\n")


@pytest.mark.parametrize("command", ["quickstart", "speed", "model", "scaling", "parallel"])
def test_every_command_explains_its_options(door, capfd, command):
    with pytest.raises(SystemExit) as exit_of_parser:
        door(command, "--help")
    shown = capfd.readouterr().out
    assert exit_of_parser.value.code == 0
    options = {"speed": ["--n-seq", "--no-use-compile", "--use-flash-attn2"], "model": ["--profile"], "scaling": ["--tokens-per-step"]}
    options["parallel"] = ["--layouts", "--sequences-per-rank", "--timeout", "--logs"]
    assert all(option in shown for option in ["--iterations", "--set", "--device", "--json", *options.get(command, [])])
