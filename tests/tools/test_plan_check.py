"""`tools/plan.py check`: each stage is built and compared with its plan, on more ranks than there could be."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from phase8.config.load import load_config
from phase8.plan.whole_config import plan_stages
from tests.tools.doors import load_door

ROOT = Path(__file__).parents[2]
DOOR = ROOT / "tools" / "plan.py"
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))
SMALL = """
run: {name: small}
model: {d_model: 32, num_layers: 5, num_heads: 4, vocab_size: 66, sequence_length: 48, local_window_size: 16, ffn_size: 64}
train: {global_batch_size: 64, micro_batch_size: 1, num_steps: 1000}
"""
KINDS = ("weights_bytes", "gradients_bytes", "optimizer_bytes", "activations_bytes", "libraries_bytes")


@pytest.fixture
def door(monkeypatch, capfd):
    """The command in this process: exit code, output and errors."""
    module = load_door("plan")

    def call(*words):
        monkeypatch.setattr(sys, "argv", [str(DOOR), "check", *map(str, words)])
        code = module.main()
        return code, *capfd.readouterr()

    return call


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL, encoding="utf-8")
    return path


def check(door, config, world_size, *settings):
    code, out, text = door("--config", config, "--world-size", world_size, "--json", *(["--set", *settings] if settings else []))
    assert (code, dist.is_initialized()) == (0, False), text
    return json.loads(out), text


def test_a_line_for_each_stage(door, small):
    code, text, errors = door("--config", small, "--world-size", 8, "--set", "parallel.pipeline_parallel_size=2", "zero.stage=2")
    assert (code, errors) == (0, "")
    title, blank, head, *rows = text.splitlines()
    assert title == "small, world size 8: the first rank of each pipeline stage, as built and as planned" and blank == ""
    assert head.split() == ["stage", "layers", "parameters", "weights", "gradients", "optimizer", "activations", "libraries", "total", "host"]
    assert [row.split()[:2] for row in rows] == [["0", "0-2"], ["1", "3-4"]]
    assert len({len(line) for line in (head, *rows)}) == 1


def test_json_has_the_numbers_and_the_text_goes_to_stderr(door, small):
    result, text = check(door, small, 8, "parallel.pipeline_parallel_size=2", "zero.stage=2", "parallel.tensor_parallel_size=2")
    stages = result.pop("stages")
    assert result == {"run": "small", "world_size": 8} and text.startswith("small, world size 8: ")
    assert [(each["stage"], each["rank"], each["layers"]) for each in stages] == [(0, 0, [[0, 3]]), (1, 4, [[3, 5]])]
    for each in stages:
        assert each["total_bytes"] == sum(each[kind] for kind in KINDS)
        assert (each["optimizer_bytes"], each["host_bytes"]) == (8 * each["parameters"], 0)


@pytest.mark.parametrize(
    ("world_size", "settings"),
    [
        (1, ()),
        (1, ("zero.stage=3", "zero.offload_optimizer=cpu", "zero.offload_params=cpu")),
        (4, ("parallel.tensor_parallel_size=4", "model.low_rank_rank=3", "model.ffn=low_rank_swiglu")),
        (6, ("zero.stage=3", "train.global_batch_size=6")),
        (8, ("model.ffn=moe", "parallel.expert_parallel_size=4", "zero.stage=3", "model.num_experts=4", "parallel.tensor_parallel_size=2")),
        (8, ("zero.stage=1", "zero.shard_size=2", "parallel.tensor_parallel_size=2", "model.block=transformer")),
        (8, ("parallel.pipeline_parallel_size=4", "model.tie_embeddings=true", "model.chain=both", "model.score=lorentz", "zero.stage=2")),
        (8, ("parallel.pipeline_parallel_size=2", "parallel.pipeline_schedule=interleaved", "parallel.pipeline_chunks=2", "zero.stage=3")),
    ],
)
def test_what_is_built_is_what_is_planned(door, small, world_size, settings):
    """The command compares; here it is enough that it found no difference, and that the parts make the model."""
    result, _ = check(door, small, world_size, *settings)
    (whole,) = check(door, small, 1, *[each for each in settings if each.startswith("model.")])[0]["stages"]
    of_stages = sum(stage["parameters"] for stage in result["stages"])
    assert of_stages * world_size // len(result["stages"]) >= whole["parameters"]


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_every_shipped_config(door, path):
    config = load_config(path)
    num_token_ranks = max(config.parallel.context_parallel_size, config.zero.shard_size or 1)
    smallest = config.parallel.tensor_parallel_size * config.parallel.pipeline_parallel_size * num_token_ranks
    result, _ = check(door, path, smallest)
    assert len(result["stages"]) == config.parallel.pipeline_parallel_size


@pytest.mark.parametrize("world_size", [32, 1024])
def test_the_flagship_fits_on_its_gpus_and_on_a_thousand(door, world_size):
    result, _ = check(door, ROOT / "configs/phase8_7b_3d.yaml", world_size)
    assert [stage["rank"] for stage in result["stages"]] == [0, world_size // 2]
    assert max(stage["total_bytes"] for stage in result["stages"]) < 70e9


def test_another_number_than_planned_is_a_bug(door, small, monkeypatch):
    def one_less_in_stage_1(config, **arguments):
        return [replace(each, num_parameters=each.num_parameters - each.stage) for each in plan_stages(config, **arguments)]

    monkeypatch.setattr("phase8.train.plan_check.plan_stages", one_less_in_stage_1)
    code, _, errors = door("--config", small, "--world-size", 4, "--set", "parallel.pipeline_parallel_size=2")
    assert code == 1 and errors.startswith("error: rank 2, the first of pipeline stage 1, holds ") and len(errors.splitlines()) == 1


def test_a_config_that_cannot_run_is_named_in_one_sentence_each(door, small):
    code, out, errors = door("--config", small, "--world-size", 9, "--set", "parallel.tensor_parallel_size=2", "zero.shard_size=2")
    assert (code, out) == (2, "") and len(errors.splitlines()) == 2
    assert "error: world size 9 is not a positive multiple of parallel.tensor_parallel_size 2" in errors
    assert door("--config", "missing.yaml")[0] == 2
