import io
import re
from contextlib import nullcontext

import pytest
import torch
from rich.console import Console

from phase8.config.load import load_config
from phase8.config.schema import RunConfig
from phase8.config.validate import find_problems
from phase8.data.tokenizer_training import train_sentencepiece
from phase8.errors import ConfigError, DataError, OutOfMemoryError
from phase8.formatting import format_bytes
from phase8.model.model import build_model
from phase8.model.parameters import initialise
from phase8.plan.cost_facts import communication_fact, memory_facts
from phase8.plan.dry_run import dry_run
from phase8.plan.run_communication import plan_run_communication
from phase8.plan.whole_config import count_parameters, plan_stages, shapes_only
from phase8.zero.swap import swapped_bytes
from tests.documented_commands import ROOT, commands_of, config_of

SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))
SMALL = """
run: {name: small}
model: {d_model: 32, num_layers: 3, num_heads: 2, vocab_size: 64, sequence_length: 48, local_window_size: 16, global_tokens: 4}
train: {global_batch_size: 24, micro_batch_size: 2, num_steps: 1000, tuning: off}
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
    kinds = "weights|gradients|optimizer|activations|libraries"
    assert re.fullmatch(rf"[\d.]+ MiB:(,? ({kinds}) [\d.]+ [KM]iB){{5}}", facts["planned memory per rank"])
    memory, speed = "planned memory per rank", "predicted speed"
    assert list(facts) == ["topology", "batch", "run", "model", "parameters", "FLOPs/token", "optimizer", memory, speed]


def test_the_optimizer_has_its_share_of_a_step_where_the_config_can_run(small):
    def shown(*settings):
        return facts_and_problems(small(*settings))[0]["optimizer"]

    assert re.fullmatch(r"adamw, learning rate 0\.0006, moments in fp32, [\d.]+ % of a step by prediction", shown())
    muon = shown("optim.name=muon", "zero.offload_optimizer=cpu")
    assert re.fullmatch(r"muon on \d+ matrices .*, state in host memory, [\d.]+ % of a step by prediction", muon)
    assert shown("train.kernels=reference") == shown("train.micro_batch_size=7") == "adamw, learning rate 0.0006, moments in fp32"


def test_explicit_settings_without_room_are_said_and_are_no_problem(small):
    facts, problems = facts_and_problems(small("train.device_memory_gib=0.0001"))
    assert problems == [] and facts["no room"].startswith("pipeline stage 0 needs ")
    assert "more than the 105 KiB that train.device_memory_gib 0.0001 leaves on " in facts["no room"]


@pytest.mark.parametrize(
    ("limit", "settings"),
    [
        ("0.001", ()),
        ("0.001", ("train.tuning=plan", "train.micro_batch_size=auto")),
        ("0.13", ("train.tuning=plan", "train.micro_batch_size=auto")),  # as large as the smallest plan, without the room that is left free
    ],
)
def test_what_does_not_fit_has_no_predicted_speed(small, limit, settings):
    output = io.StringIO()
    with nullcontext() if not settings else pytest.raises(OutOfMemoryError, match="no settings fit into"):
        dry_run(small(f"train.device_memory_gib={limit}", *settings), world_size=1, console=Console(file=output))
    facts = dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in output.getvalue().splitlines()[1:])
    assert facts["predicted speed"] == "none, because the run does not fit into the memory of the GPU" and "planned memory per rank" in facts
    assert facts["optimizer"] == "adamw, learning rate 0.0006, moments in fp32"


def test_keys_without_effect_are_said_and_are_no_problem(small):
    facts, problems = facts_and_problems(small("optim.momentum=0.9", "train.compile.fullgraph=true"))  # whether anything is compiled is open
    assert problems == [] and facts["without effect"] == "optim.momentum, because optim.name is adamw"
    assert "without effect" not in facts_and_problems(small())[0]


def test_what_a_run_would_not_find_is_said_and_is_no_problem(small, tmp_path):
    def missing(*overrides):
        output = io.StringIO()
        dry_run(small(*overrides), world_size=1, console=Console(file=output))
        return [line.strip() for line in output.getvalue().splitlines() if "missing here" in line]

    for name in ("a.bin", "a.idx", "b.bin"):
        (tmp_path / name).touch()
    train_sentencepiece(["def main(): pass\n"] * 50, tmp_path / "t.model", vocab_size=280)
    tokenized = (f"data.train={tmp_path}/a", f"data.tokenizer={tmp_path}/t.model")
    assert missing() == missing(*tokenized, "model.vocab_size=280") == []
    train, validation, tokenizer, weights = missing(
        f"data.train=[{{path: {tmp_path}/a, weight: 1}}, {{path: {tmp_path}/none, weight: 1}}]", f"data.validation={tmp_path}/*c",
        f"data.tokenizer={tmp_path}/none.model", f"checkpoint.initialise_from={tmp_path}/run",
    )  # fmt: skip
    assert f"data.train: {tmp_path}/none.bin and {tmp_path}/none.idx must both exist and neither does; " in train
    assert "make the pair with tools/prepare_data.py" in train and f"data.validation: no .bin/.idx pair matches {tmp_path}/*c; " in validation
    assert f"data.tokenizer: {tmp_path}/none.model is missing; " in tokenizer and tokenizer.endswith("tools/prepare_data.py --train-tokenizer")
    assert f"checkpoint.initialise_from: {tmp_path}/run is missing; " in weights
    with pytest.raises(DataError, match=r"t.model has 280 ids, but model.vocab_size is 256; set model.vocab_size to 280 or more"):
        missing(*tokenized, "model.vocab_size=256")
    (half,) = missing(f"data.train={tmp_path}/b")
    assert f"data.train: {tmp_path}/b.bin exists, but {tmp_path}/b.idx" in half


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        (None, r"NVIDIA H100 80GB HBM3, assumed because this machine has no GPU"),
        ("NVIDIA H200", r"NVIDIA H200"),
        ("NVIDIA RTX A1000", r"NVIDIA H100 80GB HBM3, assumed because NVIDIA RTX A1000 is not known"),
    ],
)
def test_the_speed_is_predicted_for_the_gpu_of_this_machine_or_an_h100(small, monkeypatch, name, gpu):
    monkeypatch.setattr("phase8.accelerator.present", lambda: None if name is None else "cuda")
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: name)
    facts, _ = facts_and_problems(small(), world_size=2)
    assert re.fullmatch(rf"[\d,]+ tok/s, MFU [\d.]+ %, .+ for the whole run, on 2 x {gpu}", facts["predicted speed"])


def test_settings_are_chosen_for_the_memory_that_the_run_may_take(small):
    automatic = ("train.tuning=plan", "train.micro_batch_size=auto", "model.vocab_size=1024", "model.sequence_length=4096", "model.d_model=256")
    whole, limited = (facts_and_problems(small(*automatic, *limit))[0] for limit in ((), ("train.device_memory_gib=2",)))
    assert whole["settings"].startswith("micro batch 24, nothing recomputed") and limited["settings"].startswith("micro batch ")
    assert whole["settings"] != limited["settings"]


def test_references_have_no_predicted_speed(small):
    assert "predicted speed" not in facts_and_problems(small("train.kernels=reference"))[0]


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


LLAMA_3_8B = """
model: {block: transformer, d_model: 4096, num_layers: 32, num_heads: 32, num_kv_heads: 8, ffn_size: 14336, vocab_size: 128256, rope_base: 500000}
"""


def test_a_llama_3_of_eight_billion_parameters_has_as_many_as_they_say(tmp_path):
    path = tmp_path / "llama.yaml"
    path.write_text(LLAMA_3_8B, encoding="utf-8")
    assert count_parameters(shapes_only(load_config(path))) == 8_030_261_248


def test_a_world_of_eight_is_planned(small):
    facts, problems = facts_and_problems(small("train.micro_batch_size=null"), world_size=8)
    assert facts["topology"] == "pp 1 x dp 8 x cp 1 x tp 1 = 8 ranks; rank 0 is first on every axis, rank 7 is pp 0, dp 7, cp 0, tp 0"
    assert facts["batch"].endswith("micro batch 3 x 1 microbatches x 8 data-parallel ranks")
    assert "planned memory per rank" in facts
    assert problems == []


def test_a_topology_that_does_not_fit_hides_nothing_else(small):
    facts, problems = facts_and_problems(small("parallel.tensor_parallel_size=3"), world_size=8)
    assert list(facts) == ["model", "parameters", "FLOPs/token", "optimizer"]
    assert [problem for problem in problems if not problem.startswith("parallel.tensor_parallel_size 3 does not divide")] == [
        "world size 8 is not a positive multiple of parallel.tensor_parallel_size 3 x parallel.context_parallel_size 1 x "
        "parallel.pipeline_parallel_size 1 = 3; start 6 or 9 processes (torchrun --nproc_per_node starts them, --world-size 6 or "
        "--world-size 9 plans for them) or change the degrees.",
    ]


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_a_shipped_config_on_one_process_says_on_how_many_it_can_be_planned(path):
    config = load_config(path)
    problems = find_problems(config)
    assert len(problems) == (config.parallel.tensor_parallel_size * config.parallel.context_parallel_size > 1)
    for problem in problems:
        (named,) = re.findall(r"; start (\d+) processes \(torchrun .*, --world-size \1 plans for them\) or change the degrees\.$", problem)
        assert find_problems(config, world_size=int(named)) == []
        assert facts_and_problems(config)[1] == problems


def test_a_batch_that_does_not_fit_hides_nothing_else(small):
    facts, problems = facts_and_problems(small("train.micro_batch_size=5"))
    assert list(facts) == ["topology", "model", "parameters", "FLOPs/token", "optimizer"]
    assert len(problems) == 1 and problems[0].startswith("train.global_batch_size 24 is not train.micro_batch_size 5")


@pytest.mark.parametrize(
    ("override", "beginning"),
    [
        ("model.num_heads=5", "model.num_heads 5 does not divide"),
        ("model.ffn=low_rank_swiglu", "model.ffn is low_rank_swiglu, but"),
        ("model.head_size=7", "model.head_size 7 is odd"),
    ],
)
def test_a_model_that_cannot_be_built_hides_nothing_else(small, override, beginning):
    facts, problems = facts_and_problems(small(override))
    assert list(facts) == ["topology", "batch", "run"]
    assert len(problems) == 1 and problems[0].startswith(beginning)


# One of each kind; tools/plan.py check, whose tests build every config, needs no compiler.
QUICK = {"quickstart", "phase8_1b", "phase8_7b_3d"}


@pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.stem, marks=() if path.stem in QUICK else pytest.mark.full) for path in SHIPPED]
)
def test_every_shipped_config_dry_runs(path):
    config = load_config(path)
    num_stages = config.parallel.pipeline_parallel_size
    num_token_ranks = max(config.parallel.context_parallel_size, config.zero.shard_size or 1)
    world_size = config.parallel.tensor_parallel_size * num_stages * num_token_ranks
    facts, problems = facts_and_problems(config, world_size=world_size)
    assert problems == [] and len(facts) == 10 + any(config.model.has_experts) + (world_size > 1) + (num_stages if num_stages > 1 else 0)


def test_communication_of_several_ranks(small):
    facts, problems = facts_and_problems(small("zero.stage=2", "train.micro_batch_size=3"), world_size=8)
    assert problems == []
    table, grid = plan_run_communication(small("zero.stage=2", "train.micro_batch_size=3"), world_size=8, rank=0)
    # Blocks and the rest once; sums of four groups; four scalars.
    assert facts["communication per step and rank"] == communication_fact(table, grid)[1]
    assert facts["communication per step and rank"].startswith("shard 12 collectives of ")
    assert sum(each.count for each in table) == (3 + 1) + 4 + 4


def test_communication_of_the_stage_that_sends_most(small):
    """The last one has head and loss, and the most layers only if they are even."""
    config = small("parallel.pipeline_parallel_size=2", "parallel.tensor_parallel_size=2", "model.vocab_size=640")
    facts, _ = facts_and_problems(config, world_size=4)
    tables = [plan_run_communication(config, world_size=4, rank=rank) for rank in range(4)]
    sent = [sum(each.sent_bytes(2) for each in table) for table, _ in tables]
    most = max(0, 2, key=lambda rank: sent[rank])
    assert sent[0] != sent[2]
    name, fact = communication_fact(*tables[most])
    assert name == f"communication per step and rank (stage {most // 2})" and facts[name] == fact
    assert re.search(r"pp 3 collectives and \d+ messages of ", fact) and "; tp " in fact


def test_every_place_of_a_rank_reaches_its_plan(small):
    config = small(
        "parallel.tensor_parallel_size=2", "zero.stage=1", "zero.shard_size=2", "model.tie_embeddings=true", "parallel.pipeline_parallel_size=2",
        "precision.dtype=fp32", "train.recompute=selective",
    )  # fmt: skip
    grids = [plan_run_communication(config, world_size=16, rank=rank)[1] for rank in range(16)]
    assert {(grid.pipeline, grid.replicate, grid.shard, grid.tensor) for grid in grids} == {(2, 2, 2, 2)}
    places = [(grid.stage, grid.shard_index, grid.tensor_index) for grid in grids]
    assert places == [(stage, shard, tensor) for stage in range(2) for _ in range(2) for shard in range(2) for tensor in range(2)]


def test_communication_is_planned_for_configs_that_can_run_only(small):
    with pytest.raises(ConfigError, match=r"does not divide model\.num_heads"):
        plan_run_communication(small("parallel.tensor_parallel_size=3"), world_size=3, rank=0)
    facts, problems = facts_and_problems(small("data.tokenizer=some.model", "train.micro_batch_size=3"), world_size=2)
    assert "communication per step and rank" in facts and len(problems) == 1


def test_memory_follows_the_config(small):
    def plan(*overrides):
        (stage,) = plan_stages(small(*overrides), world_size=1, device_type="cpu")
        return stage.memory

    base = plan("precision.dtype=fp32")
    size = count_parameters(shapes_only(small()))
    assert (base.weights_bytes, base.gradients_bytes, base.optimizer_bytes) == (4 * size, 4 * size, 8 * size)
    activations = {
        "larger batch": plan("precision.dtype=fp32", "train.micro_batch_size=4"),
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


def test_stages_of_a_pipeline_are_listed(small):
    settings = ("parallel.pipeline_parallel_size=2", "model.vocab_size=640", "train.micro_batch_size=3")
    facts, problems = facts_and_problems(small(*settings), world_size=4)
    stages = plan_stages(small(*settings), world_size=4, device_type="cuda")
    assert problems == []
    assert [(name, fact) for name, fact in memory_facts(stages) if facts[name] != fact] == []
    assert re.fullmatch(r"layers 0-\d, [\d.]+k parameters of a rank, [\d.]+ [KM]iB", facts["stage 0"])
    totals = [stage.memory.total_bytes for stage in stages]
    assert f"planned memory per rank (stage {totals.index(max(totals))})" in facts and totals[0] != totals[1]


def test_memory_needs_a_model_and_ranks_that_fit(small):
    facts, problems = facts_and_problems(small("parallel.pipeline_parallel_size=4", "train.micro_batch_size=1"), world_size=4)
    assert not [name for name in facts if name.startswith(("planned memory", "stage"))]
    assert len(problems) == 1 and problems[0].startswith("model.num_layers 3 is below parallel.pipeline_parallel_size 4")


def test_the_page_of_small_gpus_says_what_ten_billion_parameters_on_a_disk_need():
    page = (ROOT / "docs/howto/small_gpus.md").read_text(encoding="utf-8")
    (command,) = (each for each in commands_of(page) if "zero.offload_params=nvme" in each.words)
    config = config_of(command)
    facts, problems = facts_and_problems(config)
    assert problems == []
    (host,) = re.findall(r"on the host ([\d.]+ GiB)$", facts["planned memory per rank"])
    disk = swapped_bytes(config.zero, count_parameters(shapes_only(config)), is_bf16=True)
    assert f"{host} of host memory by plan" in page and f"{format_bytes(disk)} of the disk" in page
