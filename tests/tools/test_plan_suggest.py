"""The door of suggestions: the table, the line to copy, JSON, and what it refuses."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.tools.doors import load_door

DOOR = Path(__file__).parents[2] / "tools" / "plan.py"
SMALL = """
run: {name: small}
model: {d_model: 256, num_layers: 6, num_heads: 4, vocab_size: 1024, sequence_length: 256, local_window_size: 64}
train: {global_batch_size: 64, num_steps: 1000}
"""


@pytest.fixture
def door(monkeypatch, capfd, tmp_path):
    """The command in this process, with a planner by which everything takes 1 GiB, or 8 on the device or the host: exit code, output and errors."""
    module = load_door("plan")
    path = tmp_path / "small.yaml"
    path.write_text(SMALL, encoding="utf-8")

    def plan(config, **others):
        more = (config.run.name == "large") * 2**33
        is_offloaded = config.zero.offload_optimizer == "cpu"
        sizes = {"total_bytes": 2**30 + (0 if is_offloaded else more), "host_bytes": more if is_offloaded else 0}
        return [SimpleNamespace(memory=SimpleNamespace(**sizes))]

    monkeypatch.setattr("phase8.plan.suggest.plan_stages", plan)

    def call(*words):
        monkeypatch.setattr(sys, "argv", [str(DOOR), "suggest", "--config", str(path), *map(str, words)])
        code = module.main()
        return code, *capfd.readouterr()

    return call


def test_a_table_and_the_line_of_the_first(door):
    code, text, errors = door("--world-size", 4, "--gpu", "h200")
    title, blank, head, *rows, end, line, run = text.splitlines()
    assert (code, errors, blank, end) == (0, "", "", "") and len(rows) == 10
    assert title == "small on 4 GPUs (h200, 141 GiB): layouts that fit, by predicted speed"
    assert head.split() == ["layout", "micro", "batch", "recompute", "CUDA", "graph", "tok/s", "MFU", "planned"]
    assert rows[0].startswith("data 4, ZeRO ") and rows[0].endswith("1 GiB") and len({len(row) for row in (head, *rows)}) == 1
    assert line.startswith("the first: --set zero.stage=") and " train.cuda_graphs=true" in line
    assert run.startswith("its 1,000 steps take ")


def test_what_the_batch_leaves_out_stands_below_the_table(door):
    code, text, errors = door("--world-size", 6)
    *_, blank, sentence, end, _, _ = text.splitlines()
    assert (code, errors, blank, end) == (0, "", "", "") and sentence.startswith("left out are layouts of 3 or 6 data-parallel ranks, which cannot")
    code, out, text = door("--world-size", 11, "--json")
    result = json.loads(out)
    assert code == 0 and result["left_out"] in text and result["suggestions"][0]["set"]["train.global_batch_size"] == 66


def test_json_has_numbers_and_settings(door):
    code, out, text = door("--world-size", 2, "--memory", 40, "--json")
    result = json.loads(out)
    assert code == 0 and text.startswith("small on 2 GPUs (h100, 40 GiB)")
    assert (result["run"], result["world_size"], result["gpu"], result["memory_gib"]) == ("small", 2, "h100", 40)
    assert result["price_of_offloading"] is None and result["left_out"] is None and "host" not in text
    best = result["suggestions"][0]
    assert best["planned_bytes"] == 2**30 and best["tokens_per_second"] * best["step_seconds"] == pytest.approx(64 * 256)
    assert best["set"]["train.compile.enabled"] is True


def test_what_only_fits_with_host_memory_has_a_column_and_a_price(door):
    code, text, errors = door("--memory", 8, "--set", "run.name=large")
    _, _, head, *rows, _, price, _, line, _ = text.splitlines()
    assert (code, errors) == (0, "") and head.endswith("planned    host") and all(row.endswith("1 GiB   8 GiB") for row in rows)
    assert any(row.startswith("one GPU, optimizer on the host") for row in rows) and " zero.offload_optimizer=cpu" in line
    assert price.startswith("nothing fits with everything on the GPUs, so host memory holds a part, and steps are slower: with room on the GPUs the ")
    code, out, _ = door("--memory", 8, "--set", "run.name=large", "--json")
    result = json.loads(out)
    assert result["price_of_offloading"] == price and result["suggestions"][0]["host_bytes"] == 2**33


@pytest.mark.parametrize(
    ("words", "gib"),
    [
        ([], 8),
        (["--memory", 40], 8),
        (["--memory", 6.5], 6.5),
    ],
)
def test_the_smaller_of_the_memory_and_what_the_run_may_take_counts(door, words, gib):
    code, out, text = door(*words, "--json", "--set", "train.device_memory_gib=8")
    assert code == 0 and text.startswith(f"small on 1 GPU (h100, {gib:g} GiB): ") and json.loads(out)["memory_gib"] == gib


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--gpu", "h1000"], "--gpu is 'h1000', which is no GPU whose speed is known; give h100, h200,"),
        (["--world-size", 0], "--world-size is 0, but at least 1 is needed."),
        (["--memory", 0], "--memory is 0, but it must be above 0, in GiB."),
        (["--memory", "nan"], "--memory is nan, but it must be above 0, in GiB."),
        (["--memory", 1.2], "no layout of small fits on one GPU of 1.2 GiB: the smallest planned, one GPU with train.micro_batch_size 1 and"),
        (["--set", "train.device_memory_gib=1.2"], "no layout of small fits on one GPU of 1.2 GiB: the smallest planned, one GPU with"),
    ],
)
def test_what_cannot_be_is_one_sentence(door, words, sentence):
    code, text, errors = door(*words)
    assert (code, text) == (2, "") and errors.startswith(f"error: {sentence}") and errors.count("\n") == 1
