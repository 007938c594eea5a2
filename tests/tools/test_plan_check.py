"""`tools/plan.py check`: each stage is built and compared with its plan, on more ranks than there could be."""

import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from rich.console import Console

from phase8.config.load import load_config
from phase8.formatting import format_bytes
from phase8.plan.dry_run import dry_run
from phase8.plan.whole_config import plan_stages
from tests.tools.doors import load_door

ROOT = Path(__file__).parents[2]
DOOR = ROOT / "tools" / "plan.py"
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))
SMALL = """
run: {name: small}
model: {d_model: 32, num_layers: 5, num_heads: 4, vocab_size: 66, sequence_length: 48, local_window_size: 16, ffn_size: 64}
train: {global_batch_size: 64, micro_batch_size: 1, num_steps: 1000, tuning: off}
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
    assert result == {"run": "small", "world_size": 8, "settings": None, "too_large": None} and text.startswith("small, world size 8: ")
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
    # To choose settings and to compile take a while: dry runs of every config do the first, tests/test_documents.py has both, on up to 1024 GPUs.
    result, _ = check(door, path, smallest, "train.tuning=off", "train.compile.enabled=false", "train.micro_batch_size=1", "train.recompute=full")
    assert len(result["stages"]) == config.parallel.pipeline_parallel_size


WIDE = ("model.d_model=256", "model.vocab_size=1024", "model.sequence_length=4096", "train.device_memory_gib=1", "train.global_batch_size=16")
AUTOMATIC = (*WIDE, "train.tuning=plan", "train.micro_batch_size=auto", "train.recompute=none", "train.compile.enabled=false")
EXPLICIT = (*AUTOMATIC, "train.micro_batch_size=8", "train.cuda_graphs=false")


def test_automatic_settings_are_those_of_a_dry_run_and_have_room(door, small):
    result, text = check(door, small, 2, *AUTOMATIC)
    output = io.StringIO()
    dry_run(load_config(small, AUTOMATIC), world_size=2, console=Console(file=output))
    assert re.search(r"settings +(.+)\n", text)[1] == re.search(r"settings +(.+)\n", output.getvalue())[1] == result["settings"]
    (stage,) = result["stages"]
    assert f"planned memory per rank {format_bytes(stage['total_bytes'])}: " in re.sub(" +", " ", output.getvalue())
    assert stage["total_bytes"] < 2**30 and "micro batch 8" not in result["settings"]


def too_large(door, small, world_size, *settings):
    """The sentence about settings that need more than the GPU has, and the result, which is printed all the same."""
    code, out, text = door("--config", small, "--world-size", world_size, "--json", "--set", *settings)
    result = json.loads(out)
    assert code == 9 and text.endswith(f"\nerror: {result['too_large']}\n")
    return result["too_large"], result


def test_explicit_settings_are_obeyed_and_a_stage_without_room_is_named(door, small):
    sentence, result = too_large(door, small, 2, *EXPLICIT)
    assert result["settings"] is None
    (planned,) = plan_stages(load_config(small, EXPLICIT), world_size=2, device_type="cuda", device_bytes=2**30)
    assert [stage["total_bytes"] for stage in result["stages"]] == [planned.memory.total_bytes]
    needed = f"{format_bytes(planned.memory.total_bytes)} by plan, more than the 1 GiB that train.device_memory_gib 1 leaves on "
    assert sentence.startswith(f"pipeline stage 0 needs {needed}")
    override = re.search(r"; train\.micro_batch_size=(\d+) fits with [\d.]+ MiB, or leave these keys auto\.$", sentence)
    assert check(door, small, 2, *EXPLICIT, f"train.micro_batch_size={override[1]}")[0]["too_large"] is None


def test_every_stage_without_room_is_named(door, small):
    sentence, result = too_large(door, small, 2, *EXPLICIT, "train.micro_batch_size=16", "parallel.pipeline_parallel_size=2")
    most = max(stage["total_bytes"] for stage in result["stages"])
    assert sentence.startswith(f"pipeline stages 0, 1 need up to {format_bytes(most)} by plan, ")


def test_without_tuning_no_settings_are_chosen_and_auto_is_no_advice(door, small):
    sentence, result = too_large(door, small, 2, *AUTOMATIC, "train.tuning=off")
    assert result["settings"] is None and sentence.startswith("pipeline stage 0 needs ")
    assert " fits with " in sentence and "auto" not in sentence


def test_where_nothing_fits_the_smallest_settings_are_planned(door, small):
    sentence, result = too_large(door, small, 1, *AUTOMATIC, "train.device_memory_gib=0.1")
    assert result["settings"] == "nothing fits into 102 MiB, by plan"
    assert sentence.startswith("no settings fit into the 102 MiB that train.device_memory_gib 0.1 leaves on ") and len(result["stages"]) == 1


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
