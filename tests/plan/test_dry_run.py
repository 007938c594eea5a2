import io
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

from phase8.config.load import load_config
from phase8.config.schema import RunConfig
from phase8.errors import ConfigError
from phase8.model.model import build_model
from phase8.model.parameters import initialise
from phase8.plan.dry_run import count_parameters, dry_run, plan_run_memory, shapes_only

SHIPPED = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
SMALL = """
run: {name: small}
model: {d_model: 32, num_layers: 3, num_heads: 2, vocab_size: 64, sequence_length: 48, local_window_size: 16, global_tokens: 4}
train: {global_batch_size: 24, micro_batch_size: 2, num_steps: 1000}
"""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL, encoding="utf-8")
    return lambda *overrides: load_config(path, overrides)


def facts_and_problems(config: RunConfig, world_size: int = 1) -> tuple[dict[str, str], list[str]]:
    """What a dry run prints, by name, and the problems it ends with."""
    output, problems = io.StringIO(), []
    try:
        dry_run(config, world_size=world_size, console=Console(file=output))
    except ConfigError as error:
        problems = error.problems
    title, *lines = output.getvalue().splitlines()
    assert title == f"dry run: {config.run.name}, world size {world_size}"
    return dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in lines), problems


def test_everything_is_printed(small):
    facts, problems = facts_and_problems(small())
    assert problems == []
    assert facts["topology"].startswith("pp 1 x dp 1 x cp 1 x tp 1 = 1 ranks")
    assert facts["batch"] == "24 sequences of 48 = 1,152 tokens a step: micro batch 2 x 12 microbatches x 1 data-parallel ranks"
    assert facts["run"] == "1,000 steps, 1,152,000 tokens"
    assert facts["model"] == "phase8, 3 layers, width 32, 2 heads of 16, dense"
    assert re.fullmatch(r"[\d.]+k \([\d,]+\)", facts["parameters"])
    assert re.fullmatch(r"[\d.]+ kFLOP training, [\d.]+ kFLOP forward", facts["FLOPs/token"])
    kinds = "weights|gradients|optimizer|activations"
    assert re.fullmatch(rf"[\d.]+ MiB:(,? ({kinds}) [\d.]+ [KM]iB){{4}}", facts["planned memory per rank"])
    assert list(facts) == ["topology", "batch", "run", "model", "parameters", "FLOPs/token", "planned memory per rank"]


@pytest.mark.parametrize("tie", ["true", "false"])
@pytest.mark.parametrize("block", ["phase8", "transformer"])
def test_parameters_are_those_of_the_real_model(small, block, tie):
    config = small(f"model.block={block}", f"model.tie_embeddings={tie}", "model.low_rank_rank=3")
    model = build_model(config.model, dtype=torch.float32, device=torch.device("cpu"))
    initialise(model, seed=0)
    real = sum(p.numel() for p in model.parameters())
    planned = shapes_only(config)
    assert count_parameters(planned) == count_parameters(model) == real
    assert all(p.is_meta for p in planned.parameters())
    assert facts_and_problems(config)[0]["parameters"].endswith(f"({real:,})")


def test_a_world_of_eight_is_planned(small):
    facts, problems = facts_and_problems(small("train.micro_batch_size=null"), world_size=8)
    assert facts["topology"] == "pp 1 x dp 8 x cp 1 x tp 1 = 8 ranks; rank 0 is first on every axis, rank 7 is pp 0, dp 7, cp 0, tp 0"
    assert facts["batch"].endswith("micro batch 3 x 1 microbatches x 8 data-parallel ranks")
    assert "planned memory per rank" in facts
    assert problems == []


def test_a_topology_that_does_not_fit_hides_nothing_else(small):
    facts, problems = facts_and_problems(small("parallel.tensor_parallel_size=3"), world_size=8)
    assert list(facts) == ["model", "parameters", "FLOPs/token"]
    assert [problem for problem in problems if not problem.startswith("parallel.tensor_parallel_size 3 does not divide")] == [
        "world size 8 is not a positive multiple of parallel.tensor_parallel_size 3 x parallel.context_parallel_size 1 x "
        "parallel.pipeline_parallel_size 1 = 3; start 6 or 9 processes or change the degrees.",
    ]


def test_a_batch_that_does_not_fit_hides_nothing_else(small):
    facts, problems = facts_and_problems(small("train.micro_batch_size=5"))
    assert list(facts) == ["topology", "model", "parameters", "FLOPs/token"]
    assert len(problems) == 1 and problems[0].startswith("train.global_batch_size 24 is not train.micro_batch_size 5")


@pytest.mark.parametrize(
    ("override", "beginning"),
    [
        ("model.num_heads=5", "model.num_heads 5 does not divide"),
        ("model.ffn=moe", "model.ffn is 'moe', which is not supported yet"),
        ("model.head_size=7", "model.head_size 7 is odd"),
        ("precision.dtype=fp8", "precision.dtype is 'fp8', which is not supported yet"),
    ],
)
def test_a_model_that_cannot_be_built_hides_nothing_else(small, override, beginning):
    facts, problems = facts_and_problems(small(override))
    assert list(facts) == ["topology", "batch", "run"]
    assert len(problems) == 1 and problems[0].startswith(beginning)


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_every_shipped_config_dry_runs(path):
    config = load_config(path)
    facts, problems = facts_and_problems(config, world_size=config.parallel.tensor_parallel_size)
    assert problems == [] and len(facts) == 7


def test_memory_follows_the_config(small):
    def plan(*overrides, micro_batch_size=2):
        return plan_run_memory(small(*overrides), num_parameters=100, micro_batch_size=micro_batch_size, device_type="cpu")

    base = plan("precision.dtype=fp32")
    assert (base.weights_bytes, base.gradients_bytes, base.optimizer_bytes) == (400, 400, 800)
    activations = {
        "larger batch": plan("precision.dtype=fp32", micro_batch_size=4),
        "packed": plan("precision.dtype=fp32", "data.reset_at_document_boundaries=true"),
        "base": base,
        "selective": plan("precision.dtype=fp32", "train.recompute=selective"),
        "full": plan("precision.dtype=fp32", "train.recompute=full"),
    }
    sizes = [found.activations_bytes for found in activations.values()]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
    assert plan("train.recompute=none").activations_bytes < base.activations_bytes  # bf16 is the default
    every_second = plan("precision.dtype=fp32", "train.recompute=full", "train.recompute_every_n_layers=2")
    assert activations["full"].activations_bytes < every_second.activations_bytes < base.activations_bytes


def test_planned_activations_of_full_recomputation(small):
    """Three block inputs and, while one block is recomputed, the rest of what it keeps."""
    config = small("precision.dtype=fp32", "train.recompute=full")
    without = plan_run_memory(small("precision.dtype=fp32"), num_parameters=0, micro_batch_size=2, device_type="cpu").activations_bytes
    twice = small("precision.dtype=fp32", "model.num_layers=6")
    block = (plan_run_memory(twice, num_parameters=0, micro_batch_size=2, device_type="cpu").activations_bytes - without) // 3
    block_input = 2 * 48 * 32 * 4
    found = plan_run_memory(config, num_parameters=0, micro_batch_size=2, device_type="cpu").activations_bytes
    assert found == 3 * block_input + (block - block_input)
