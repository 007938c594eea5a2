from pathlib import Path

import pytest

from phase8.config.load import load_config
from phase8.config.schema import RunConfig
from phase8.config.validate import find_problems, validate
from phase8.errors import ConfigError

SHIPPED = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def config_with(*overrides: str, directory: Path) -> RunConfig:
    path = directory / "run.yaml"
    path.write_text("", encoding="utf-8")
    return load_config(path, overrides)


# Overrides of the defaults, and the one sentence they earn.
FP8 = ["precision.linear=fp8", "model.d_model=256", "model.num_heads=4", "model.num_layers=4", "model.ffn_size=512"]
DEEPSPEED = ("zero.engine=deepspeed", "zero.stage=3")
RULES = {
    "slices of a growing state": (
        ["train.recompute=slices", "model.block=transformer"],
        "train.recompute is slices, but model.block is transformer, whose state grows with the sequence; set train.recompute to full.",
    ),
    "offloaded inputs of what is not recomputed whole": (
        ["train.offload_activations=cpu", "train.recompute=selective"],
        "train.offload_activations is cpu, but train.recompute is selective, and only of blocks that are recomputed whole nothing but the input is "
        "kept; set recompute to full or slices.",
    ),
    "sums on the host for parameters on the device": (
        ["zero.offload_gradients=true", "zero.stage=3"],
        "zero.offload_gradients is true, but zero.offload_params is none, and gradients are summed where parameters are; set offload_params to cpu, "
        "or offload_gradients to false.",
    ),
    "sums on the host under DeepSpeed": (
        [*DEEPSPEED, "zero.offload_gradients=true"],
        "zero.offload_gradients is true, but zero.engine is deepspeed, which sums gradients where the optimizer is; leave it false.",
    ),
    "a gradient for every slice under DeepSpeed": (
        [*DEEPSPEED, "train.recompute=slices"],
        "train.recompute is slices with zero.stage 3, but zero.engine is deepspeed, which there takes a single gradient of each parameter from a "
        "backward; set recompute to full, or zero.engine to fsdp.",
    ),
    "recorded copies": (
        ["train.offload_activations=cpu", "train.recompute=full", "train.cuda_graphs=true"],
        "train.cuda_graphs is true, but train.offload_activations is cpu, whose copies no graph of the GPU can hold; set one of them back.",
    ),
    "heads": (
        ["model.num_heads=7"],
        "model.num_heads 7 does not divide model.d_model 512; choose a divisor or set model.head_size.",
    ),
    "heads of keys": (
        ["model.block=transformer", "model.num_kv_heads=3"],
        "model.num_kv_heads 3 does not divide model.num_heads 8; choose a divisor or null.",
    ),
    "more heads of keys than of queries": (
        ["model.block=transformer", "model.num_kv_heads=16"],
        "model.num_kv_heads 16 does not divide model.num_heads 8; choose a divisor or null.",
    ),
    "shared keys in the window": (
        ["model.num_kv_heads=8"],
        "model.num_kv_heads is 8, but model.block is phase8, whose heads have keys and values of their own; set model.num_kv_heads to null.",
    ),
    "scaled positions of a window": (
        ["model.rope_scaling.type=llama3"],
        "model.rope_scaling.type is llama3, but model.block is phase8, whose rotary positions are those of a window and need no scaling for longer "
        "sequences; set model.rope_scaling.type to none.",
    ),
    "nothing between low and high": (
        ["model.block=transformer", "model.rope_scaling.type=llama3", "model.rope_scaling.low_frequency_factor=4"],
        "model.rope_scaling.high_frequency_factor 4.0 is not above model.rope_scaling.low_frequency_factor 4.0; choose a larger one, 4 and 1 for "
        "example.",
    ),
    "eight bits for shared keys": (
        ["precision.linear=fp8", "model.block=transformer", "model.num_kv_heads=1", "model.head_size=36", "model.num_heads=12"],
        "precision.linear is fp8, but (model.num_heads + 2 * model.num_kv_heads) * head size is 504; a multiple of 16 of at least 256 is needed, or "
        "precision.linear null.",
    ),
    "odd head": (
        ["model.d_model=24", "model.num_heads=8"],
        "model.head_size 3 (model.d_model 24 / model.num_heads 8) is odd, but rotary positions need an even one; set an even model.head_size.",
    ),
    "odd head size": (
        ["model.head_size=33"],
        "model.head_size 33 is odd, but rotary positions need an even one; set an even model.head_size.",
    ),
    "low rank": (
        ["model.ffn=low_rank_swiglu"],
        "model.ffn is low_rank_swiglu, but model.low_rank_rank is 0; set a rank of at least 1 or use ffn: swiglu.",
    ),
    "chain without a path": (
        ["model.global_path=none", "model.chain=both"],
        "model.chain is both, but model.global_path is none and has no decay or gate to modulate; set model.chain to none.",
    ),
    "layers that mix nothing": (
        ["model.global_path=none", "model.local_window_size=[0,8]"],
        "model.local_window_size has layers with a window of 0, but model.global_path is none, so they would mix nothing; give them a window.",
    ),
    "gate without a path": (
        ["model.global_path=none", "model.global_gate=channel"],
        "model.global_gate is channel, but model.global_path is none and has no gate; set model.global_gate to scalar.",
    ),
    "floor without a path": (
        ["model.global_path=none", "model.decay_floor=-5"],
        "model.decay_floor is -5.0, but model.global_path is none and has no decay; set model.decay_floor to null.",
    ),
    "two lengths": (
        ["model.score=lorentz", "model.local_qk_norm=true"],
        "model.local_qk_norm is true, but model.score is lorentz, which has lengths of its own; set model.local_qk_norm to false.",
    ),
    "activation without a path": (
        ["model.global_path=none", "model.global_activation=silu"],
        "model.global_activation is silu, but model.global_path is none and has no queries; set model.global_activation to none.",
    ),
    "activation of a gate without a path": (
        ["model.global_path=none", "model.global_gate_activation=silu"],
        "model.global_gate_activation is silu, but model.global_path is none and has no gate; set model.global_gate_activation to sigmoid.",
    ),
    "two activations of values": (
        ["model.value_activation=silu", "model.global_activation=silu_with_values"],
        "model.value_activation is silu, and model.global_activation silu_with_values adds a second one; set model.global_activation to silu.",
    ),
    "skip without a path": (
        ["model.global_path=none", "model.global_skip=true"],
        "model.global_skip is true, but model.global_path is none and adds nothing; set model.global_skip to false.",
    ),
    "warmup": (
        ["train.num_steps=100"],
        "optim.warmup_steps 100 is not below train.num_steps 100; shorten the warmup.",
    ),
    "decay without wsd": (
        ["optim.decay_steps=5"],
        "optim.decay_steps is 5, but optim.schedule is cosine; only wsd has decay_steps, leave it null.",
    ),
    "warmup and decay": (
        ["optim.schedule=wsd", "optim.decay_steps=901"],
        "optim.warmup_steps 100 + optim.decay_steps 901 exceed train.num_steps 1000; shorten one of them.",
    ),
    "warmup and default decay": (
        ["optim.schedule=wsd", "optim.warmup_steps=950"],
        "optim.warmup_steps 950 + optim.decay_steps 100 (null) exceed train.num_steps 1000; shorten one of them.",
    ),
    "betas": (
        ["optim.betas=[0.9, 1.0]"],
        "optim.betas is [0.9, 1.0], but each must be below 1; use [0.9, 0.95], for example.",
    ),
    "stop": (
        ["train.stop_at_step=1001"],
        "train.stop_at_step 1001 is after train.num_steps 1000; leave it null or make it smaller.",
    ),
    "loader workers": (
        ["data.num_workers=1000"],
        "data.num_workers is 1000, but every rank starts as many processes, and 64 is the most that is allowed; leave it auto, or set a smaller "
        "number.",
    ),
    "prefetched microbatches": (
        ["data.prefetch_factor=1000000"],
        "data.prefetch_factor is 1000000, but every worker keeps as many microbatches in memory, and 1024 is the most that is allowed; set a smaller "
        "number.",
    ),
    "profile": (
        ["observe.profile_at_step=1001"],
        "observe.profile_at_step 1001 is after train.num_steps 1000; leave it null or make it smaller.",
    ),
    "recompute interval without recomputation": (
        ["train.recompute_every_n_layers=2"],
        "train.recompute_every_n_layers is 2, but train.recompute is auto; set it to full or selective.",
    ),
    "recompute interval": (
        ["train.recompute=full", "train.recompute_every_n_layers=9"],
        "train.recompute_every_n_layers 9 exceeds model.num_layers 8; choose a smaller interval.",
    ),
    "budget without torch.compile": (
        ["train.recompute=budget", "train.compile.enabled=false"],
        "train.recompute is budget, but train.compile.enabled is false and nobody chooses; set it to true, or recompute to selective.",
    ),
    "exchange beside products of one rank": (
        ["parallel.async_tensor_parallel=true"],
        "parallel.async_tensor_parallel is true, but parallel.tensor_parallel_size is 1 and no tokens are exchanged; "
        "set it to false or the size to at least 2.",
    ),
    "budget of some layers": (
        ["train.recompute=budget", "train.compile.enabled=true", "train.recompute_every_n_layers=2"],
        "train.recompute_every_n_layers is 2, but train.recompute is budget, which all layers share; set it to 1.",
    ),
    "validation without data": (
        ["data.validation=held_out"],
        "data.validation is 'held_out', but data.train is null and the embedded corpus brings its own; set data.train too.",
    ),
    "tokenizer without data": (
        ["data.tokenizer=t.model"],
        "data.tokenizer is 't.model', but data.train is null and the embedded corpus brings its own; set data.train too.",
    ),
    "end of document without tokenizer": (
        ["data.train=mine", "data.eod_token=</s>"],
        "data.eod_token is '</s>', but data.tokenizer is null; give the tokenizer with this piece, or leave it null.",
    ),
    "beginning of texts without tokenizer": (
        ["data.train=mine", "data.begin_token=<s>"],
        "data.begin_token is '<s>', but data.tokenizer is null; give the tokenizer with this piece, or leave it null.",
    ),
    "end of document without data": (
        ["data.eod_token=</s>"],
        "data.eod_token is '</s>', but data.train is null and the embedded corpus brings its own; set data.train too.",
    ),
    "ends of texts without data": (
        ["data.end_ids=[3,5]"],
        "data.end_ids is (3, 5), but data.train is null and the embedded corpus brings its own; set data.train too.",
    ),
    "an end of texts that the model does not have": (
        ["data.train=mine", "data.end_ids=[3,16384]"],
        "data.end_ids has the token id 16384, but model.vocab_size is 16384; leave it out, or give a smaller one.",
    ),
    "padding that the model does not have": (
        ["data.train=mine", "data.padding_id=20000"],
        "data.padding_id has the token id 20000, but model.vocab_size is 16384; leave it out, or give a smaller one.",
    ),
    "prompt without tokenizer": (
        ["data.train=mine", "observe.sample_prompt=Once"],
        "observe.sample_prompt is set, but data.tokenizer is null; give the tokenizer of the data, or leave the prompt null.",
    ),
    "batch": (
        ["train.micro_batch_size=5"],
        "train.global_batch_size 32 is not train.micro_batch_size 5 x parallel.num_microbatches null x data-parallel size 1; "
        "give any two of the three and leave the other null.",
    ),
    "sequence parallel": (
        ["parallel.sequence_parallel=false"],
        "parallel.sequence_parallel is false, which is not supported yet; use true.",
    ),
    "shards of nothing": (
        ["zero.shard_size=2"],
        "zero.shard_size is 2, but zero.stage is 0 and shards nothing; leave it null or choose a stage.",
    ),
    "uneven shards": (
        ["zero.stage=1", "zero.shard_size=2"],
        "zero.shard_size 2 does not divide the data-parallel size 1; choose a divisor.",
    ),
    "parameters offloaded alone": (
        ["zero.stage=3", "zero.offload_params=cpu"],
        "zero.offload_params is cpu, which needs zero.stage 3 and zero.offload_optimizer cpu, but they are 3 and none; "
        "set them, or set offload_params to none.",
    ),
    "parameters offloaded to a disk alone": (
        ["zero.engine=deepspeed", "zero.stage=3", "zero.offload_params=nvme", "zero.nvme_path=disk"],
        "zero.offload_params is nvme, which needs zero.stage 3 and zero.offload_optimizer cpu or nvme, but they are 3 and none; "
        "set them, or set offload_params to none.",
    ),
    "deepspeed": (
        ["zero.engine=deepspeed"],
        "zero.engine is deepspeed, but zero.stage is 0, and DeepSpeed divides from stage 1 on; choose a stage, or set zero.engine to fsdp.",
    ),
    "deepspeed with graphs": (
        [*DEEPSPEED, "train.cuda_graphs=true"],
        "train.cuda_graphs is true, but zero.engine is deepspeed, whose step no graph can hold; set it to false, or zero.engine to fsdp.",
    ),
    "deepspeed with groups of shards": (
        [*DEEPSPEED, "zero.shard_size=1"],
        "zero.shard_size is 1, but zero.engine is deepspeed, which divides over all data-parallel ranks; leave it null.",
    ),
    "deepspeed with another dtype of gathers": (
        [*DEEPSPEED, "zero.gather_dtype=fp32"],
        "zero.gather_dtype is fp32, but zero.engine is deepspeed, which gathers in precision.dtype; set one of them back.",
    ),
    "deepspeed with copy engines": (
        [*DEEPSPEED, "zero.copy_engine_gather=true"],
        "zero.copy_engine_gather is true, but zero.engine is deepspeed, which gathers by itself; set it to false, or zero.engine to fsdp.",
    ),
    "nvme without deepspeed": (
        ["zero.offload_optimizer=nvme"],
        "zero.offload_optimizer is nvme, which only DeepSpeed offloads to, but zero.engine is fsdp; set zero.engine to deepspeed, or "
        "zero.offload_optimizer to cpu.",
    ),
    "nvme without a disk": (
        [*DEEPSPEED, "zero.offload_optimizer=nvme"],
        "zero.offload_optimizer is nvme, but zero.nvme_path is null; name a directory on the NVMe disk of every host.",
    ),
    "nvme in stage 2": (
        ["zero.engine=deepspeed", "zero.stage=2", "zero.offload_optimizer=nvme", "zero.nvme_path=swap"],
        "zero.offload_optimizer is nvme, which needs zero.stage 3, but it is 2; set it to 3, or zero.offload_optimizer to cpu.",
    ),
    "a disk for nothing": (
        [*DEEPSPEED, "zero.nvme_path=swap"],
        "zero.nvme_path is given, but nothing is offloaded to nvme; set zero.offload_optimizer to nvme, or leave it null.",
    ),
    "gather of nothing": (
        ["zero.copy_engine_gather=true"],
        "zero.copy_engine_gather is true, but zero.stage is 0 and nothing is gathered; set it to false or choose a stage.",
    ),
    "gather of what lies on the host": (
        ["zero.copy_engine_gather=true", "zero.stage=3", "zero.offload_optimizer=cpu", "zero.offload_params=cpu"],
        "zero.copy_engine_gather is true, but zero.offload_params is cpu, which no GPU shares; set one of them back.",
    ),
    "int8 in training": (
        ["precision.linear=int8"],
        "precision.linear is int8, but in training such products take 1.1 times as long as those in bf16 (docs/performance.md); "
        "set it to fp8 or null.",
    ),
    "fp8 in fp32": (
        [*FP8, "precision.dtype=fp32"],
        "precision.linear is fp8, but precision.dtype is fp32; set it to bf16, in which results of these products are.",
    ),
    "fp8 of low rank": (
        [*FP8, "model.low_rank_rank=16"],
        "precision.linear is fp8, but model.low_rank_rank is 16: products so thin wait for memory; set precision.linear to null.",
    ),
    "fp8 nowhere": (
        [*FP8, "precision.bf16_layers=2"],
        "precision.linear is fp8, but precision.bf16_layers is 2 at either end of model.num_layers 4, so no block has such products; "
        "lower it, or set precision.linear to null.",
    ),
    "fp8 that does not fit": (
        [*FP8, "model.ffn_size=520"],
        "precision.linear is fp8, but model.ffn_size is 520; a multiple of 16 of at least 256 is needed, or precision.linear null.",
    ),
    "deepspeed with bf16 moments": (
        [*DEEPSPEED, "optim.state_dtype=bf16"],
        "optim.state_dtype is bf16, but zero.engine is deepspeed, which keeps fp32; set one of them back.",
    ),
    "muon with bf16 moments": (
        ["optim.name=muon", "optim.state_dtype=bf16"],
        "optim.state_dtype is bf16, but optim.name is muon, which keeps fp32; set one of them back.",
    ),
    "decays that eight bits have no room for": (
        ["optim.state_dtype=fp8", "optim.betas=[0.9,0.9999]"],
        "optim.state_dtype is fp8, which has room for first moments of 7.75 times the root of the second, but optim.betas [0.9, 0.9999] let them "
        "reach 22.9 times; raise the first or lower the second, or set state_dtype to bf16.",
    ),
    "deepspeed with muon": (
        [*DEEPSPEED, "optim.name=muon"], "optim.name is muon, but zero.engine is deepspeed, which runs adamw; set one of them back."
    ),
    "steps to keep that are not saved": (
        ["checkpoint.every_n_steps=500", "checkpoint.keep_every_n_steps=700"],
        "checkpoint.keep_every_n_steps 700 is not a multiple of checkpoint.every_n_steps 500, so a checkpoint would be kept every 3500 steps only; "
        "use 500, for example.",
    ),
    "top k": (
        ["model.ffn=moe", "model.num_experts=4", "model.top_k=5"],
        "model.top_k 5 is above model.num_experts 4, but a token's experts all differ; choose at most as many.",
    ),
    "capacity": (
        ["model.ffn=moe", "model.capacity_factor=0.9"],
        "model.capacity_factor 0.9 is below 1, so experts would drop tokens even where all get the same number; choose at least 1, or null for no "
        "limit.",
    ),
    "no layer with experts": (
        ["model.ffn=moe", "model.num_layers=3", "model.first_dense_layers=3"],
        "model.first_dense_layers 3 leaves none of model.num_layers 3 for experts; choose fewer, or set model.ffn to swiglu.",
    ),
    "experts farther apart than layers": (
        ["model.ffn=moe", "model.num_layers=4", "model.first_dense_layers=1", "model.moe_every_n_layers=99"],
        "model.moe_every_n_layers 99 is above model.num_layers 4, so that of all layers only layer 1 has experts; choose 1 for experts in every "
        "layer, or another distance of at most 4.",
    ),
    "experts in slices": (
        ["model.ffn=moe", "train.recompute=slices"],
        "train.recompute is slices, but model.capacity_factor is 1.25, which counts the tokens of whole sequences; set recompute to full, or the "
        "factor to null.",
    ),
}


@pytest.mark.parametrize(("overrides", "sentence"), RULES.values(), ids=RULES)
def test_every_rule_is_one_sentence(tmp_path, overrides, sentence):
    config = config_with(*overrides, directory=tmp_path)
    assert find_problems(config) == [sentence]
    with pytest.raises(ConfigError) as caught:
        validate(config)
    assert caught.value.problems == [sentence]


ALLOWED = {
    "head size without division": ["model.num_heads=7", "model.head_size=32"],
    "low rank": ["model.ffn=low_rank_swiglu", "model.low_rank_rank=4"],
    "one head of keys": ["model.block=transformer", "model.num_kv_heads=1", "model.rope_scaling.type=linear"],
    "no warmup": ["optim.warmup_steps=0", "train.num_steps=1"],
    "longest warmup": ["train.num_steps=101"],
    "wsd from warmup to end": ["optim.schedule=wsd", "optim.decay_steps=900"],
    "all that is saved is kept": ["checkpoint.every_n_steps=500", "checkpoint.keep_every_n_steps=250"],
    "nothing is saved but the end": ["checkpoint.every_n_steps=0", "checkpoint.keep_every_n_steps=7"],
    "stop at the end": ["train.stop_at_step=1000"],
    "a loader with many workers": ["data.num_workers=64", "data.prefetch_factor=1024"],
    "a profile of the last step": ["observe.profile_at_step=1000"],
    "recompute every layer but the first": ["train.recompute=selective", "train.recompute_every_n_layers=8"],
    "budget": ["train.recompute=budget", "train.compile.enabled=true", "train.activation_memory_budget=0"],
    "own data": ["data.train=mine", "data.validation=held_out", "data.tokenizer=t.model", "observe.sample_prompt=Once"],
    "accumulation": ["train.micro_batch_size=8", "parallel.num_microbatches=4"],
    "muon": ["optim.name=muon", "zero.stage=3"],
    "deepspeed": [*DEEPSPEED, "zero.offload_optimizer=cpu", "zero.offload_params=nvme", "zero.nvme_path=swap"],
    "slices under stage 2 of deepspeed": ["zero.engine=deepspeed", "zero.stage=2", "train.recompute=slices"],
    "batch from its parts": ["train.global_batch_size=null", "train.micro_batch_size=3", "parallel.num_microbatches=5"],
}


@pytest.mark.parametrize("overrides", ALLOWED.values(), ids=ALLOWED)
def test_what_lies_just_inside_the_rules_is_allowed(tmp_path, overrides):
    validate(config_with(*overrides, directory=tmp_path))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            ["model.block=transformer", "model.num_kv_heads=1"],
            "parallel.tensor_parallel_size 2 does not divide model.num_kv_heads 1; change one of them.",
        ),
        (
            ["train.recompute=budget", "train.compile.enabled=true"],
            "train.recompute is budget with parallel.tensor_parallel_size 2, but torch.compile cannot weigh what holds a process group; "
            "set recompute to selective or full.",
        ),
    ],
)
def test_what_does_not_go_with_tensor_parallelism(tmp_path, settings, sentence):
    config = config_with("parallel.tensor_parallel_size=2", *settings, directory=tmp_path)
    assert find_problems(config, world_size=2) == [sentence]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ([], None),
        (
            ["train.recompute=slices"],
            "train.recompute is slices with parallel.context_parallel_size 4, which divides the sequence itself; set recompute to full.",
        ),
        (
            ["model.block=transformer", "train.compile.fullgraph=true"],
            "train.compile.fullgraph is true with parallel.context_parallel_size 4, but the exchange of the transformer's keys is not compiled; "
            "set it to false.",
        ),
        (
            ["model.sequence_length=130"],
            "parallel.context_parallel_size 4 does not divide model.sequence_length 130; change one of them.",
        ),
        (
            ["model.sequence_length=132", "parallel.tensor_parallel_size=2"],
            "parallel.tensor_parallel_size 2 does not divide the 33 tokens of a slice (model.sequence_length 132 / "
            "parallel.context_parallel_size 4); change one of them.",
        ),
        (
            ["train.recompute=budget", "train.compile.enabled=true"],
            "train.recompute is budget with parallel.context_parallel_size 4, but torch.compile cannot weigh what holds a process group; "
            "set recompute to selective or full.",
        ),
        (
            ["zero.stage=3", "zero.shard_size=3"],
            "zero.shard_size 3 does not divide the data-parallel size times parallel.context_parallel_size, 4; choose a divisor.",
        ),
    ],
)
def test_what_context_parallelism_needs(tmp_path, settings, sentence):
    config = config_with("parallel.context_parallel_size=4", *settings, directory=tmp_path)
    world_size = 4 * config.parallel.tensor_parallel_size
    assert find_problems(config, world_size=world_size) == ([] if sentence is None else [sentence])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["parallel.pipeline_parallel_size=4"], ["model.num_layers 3", "at least 4 layers"]),
        (["parallel.pipeline_schedule=interleaved"], ["parallel.pipeline_chunks is 1", "at least 2"]),
        (["parallel.pipeline_chunks=2", "model.num_layers=4"], ["parallel.pipeline_chunks is 2", "only the interleaved"]),
        (
            ["parallel.pipeline_schedule=interleaved", "parallel.pipeline_chunks=2", "model.num_layers=4", "train.micro_batch_size=4"],
            ["parallel.num_microbatches 1", "not a multiple of parallel.pipeline_parallel_size 2"],
        ),
    ],
)
def test_a_pipeline_must_suit_layers_and_batch(tmp_path, settings, words):
    common = ["parallel.pipeline_parallel_size=2", "model.num_layers=3", "train.global_batch_size=4"]
    config = config_with(*common, *settings, directory=tmp_path)
    (problem,) = find_problems(config, world_size=config.parallel.pipeline_parallel_size)
    assert all(word in problem for word in words)


def test_one_rank_runs_the_config_of_a_pipeline(tmp_path):
    config = config_with("parallel.pipeline_schedule=interleaved", "parallel.pipeline_chunks=99", directory=tmp_path)
    assert find_problems(config) == []


@pytest.mark.parametrize(
    ("settings", "world_size", "sentence"),
    [
        ([], 2, None),
        (["zero.stage=3", "zero.shard_size=2", "train.cuda_graphs=true", "precision.dtype=bf16"], 4, None),
        (
            ["precision.dtype=fp32", "train.cuda_graphs=true"],
            2,
            "train.cuda_graphs is true with model.ffn moe, but precision.dtype is fp32, for which the host counts the rows of experts; set "
            "train.cuda_graphs to false.",
        ),
        (
            ["train.kernels=reference", "train.cuda_graphs=true"],
            2,
            "train.cuda_graphs is true with model.ffn moe, but train.kernels is reference, for which the host counts the rows of experts; set "
            "train.cuda_graphs to false.",
        ),
        (
            ["model.expert_ffn_size=100", "train.cuda_graphs=true"],
            2,
            "train.cuda_graphs is true with model.ffn moe, but a rank's part of model.expert_ffn_size is 100 and no multiple of 8, as torch's "
            "products of experts need it; change the width, or set train.cuda_graphs to false.",
        ),
        (["model.capacity_factor=null", "parallel.context_parallel_size=2"], 4, None),
        (
            ["model.ffn=swiglu"],
            2,
            "parallel.expert_parallel_size is 2, but model.ffn is swiglu and has no experts; set it to 1, or model.ffn to moe.",
        ),
        (["model.num_experts=5"], 2, "parallel.expert_parallel_size 2 does not divide model.num_experts 5; change one of them."),
        (
            ["parallel.tensor_parallel_size=2", "model.expert_ffn_size=129"],
            4,
            "parallel.tensor_parallel_size 2 does not divide model.expert_ffn_size 129; change one of them.",
        ),
        (
            ["zero.stage=1", "zero.shard_size=3"],
            6,
            "zero.shard_size 3 is not a multiple of parallel.expert_parallel_size 2, whose ranks hold different experts; change one of them.",
        ),
        (
            ["zero.stage=3"],
            6,
            "zero.stage 3 divides model.d_model 512 of experts over 3 ranks unevenly; set zero.shard_size so that its quotient by "
            "parallel.expert_parallel_size divides it.",
        ),
        (
            ["model.capacity_factor=null", "train.cuda_graphs=true"],
            2,
            "train.cuda_graphs is true with parallel.expert_parallel_size 2 and model.capacity_factor null, where ranks exchange as many rows as "
            "tokens choose, which the host has to read; set it to false.",
        ),
        (
            ["parallel.context_parallel_size=2", "train.cuda_graphs=true", "precision.dtype=bf16"],
            4,
            "train.cuda_graphs is true with parallel.expert_parallel_size 2 and parallel.context_parallel_size 2, where ranks exchange as many "
            "rows as tokens choose, which the host has to read; set it to false.",
        ),
        (
            ["train.compile.fullgraph=true"],
            2,
            "train.compile.fullgraph is true with parallel.expert_parallel_size 2, where FSDP gathers experts between the graphs of a block; set it "
            "to false.",
        ),
        (
            ["train.recompute=budget", "train.compile.enabled=true"],
            2,
            "train.recompute is budget with parallel.expert_parallel_size 2, but torch.compile cannot weigh what holds a process group; "
            "set recompute to selective or full.",
        ),
    ],
)
def test_what_expert_parallelism_needs(tmp_path, settings, world_size, sentence):
    common = ["model.ffn=moe", "parallel.expert_parallel_size=2", "train.global_batch_size=12"]
    config = config_with(*common, *settings, directory=tmp_path)
    assert find_problems(config, world_size=world_size) == ([] if sentence is None else [sentence])


@pytest.mark.parametrize(
    ("num_ranks", "override", "sentence"),
    [
        (4, "model.num_heads=2", "parallel.tensor_parallel_size 4 does not divide model.num_heads 2; change one of them."),
        (4, "model.sequence_length=514", "parallel.tensor_parallel_size 4 does not divide model.sequence_length 514; change one of them."),
        (4, "model.ffn_size=1410", "parallel.tensor_parallel_size 4 does not divide model.ffn_size 1410; change one of them."),
        (
            4,
            "model.vocab_size=5",
            "parallel.tensor_parallel_size 4 leaves ranks without any token id of model.vocab_size 5; use fewer.",
        ),
    ],
)
def test_what_tensor_parallel_ranks_cannot_divide_is_refused(tmp_path, num_ranks, override, sentence):
    config = config_with(f"parallel.tensor_parallel_size={num_ranks}", override, directory=tmp_path)
    assert find_problems(config, world_size=num_ranks) == [sentence]
    assert find_problems(config_with(override, directory=tmp_path)) == []


def test_cuda_graphs_hold_no_pipeline_and_no_offloading(tmp_path):
    settings = ("train.cuda_graphs=true", "train.global_batch_size=8")
    config = config_with(*settings, directory=tmp_path)
    assert find_problems(config) == [] and find_problems(config, world_size=2) == []
    assert find_problems(config_with(*settings, "parallel.tensor_parallel_size=2", directory=tmp_path), world_size=4) == []
    (problem,) = find_problems(config_with(*settings, "parallel.pipeline_parallel_size=2", directory=tmp_path), world_size=2)
    assert problem.startswith("train.cuda_graphs is true, but parallel.pipeline_parallel_size is 2") and problem.endswith("set it to false.")
    (problem,) = find_problems(config_with("train.cuda_graphs=true", "zero.offload_optimizer=cpu", directory=tmp_path))
    assert problem.startswith("train.cuda_graphs is true, but zero.offload_optimizer is cpu")
    backend = ("train.compile.enabled=auto", "train.compile.backend=cudagraphs")
    (problem,) = find_problems(config_with("train.cuda_graphs=true", *backend, directory=tmp_path))
    assert problem.startswith("train.cuda_graphs is true, but train.compile.backend is cudagraphs, which records parts of a step by itself")
    assert find_problems(config_with("train.cuda_graphs=auto", *backend, directory=tmp_path)) == []


def test_zero_is_allowed_on_the_ranks_there_are(tmp_path):
    config = config_with("zero.stage=3", "zero.shard_size=2", "train.global_batch_size=8", directory=tmp_path)
    assert find_problems(config, world_size=4) == []


def test_a_topology_that_does_not_fit_is_reported_with_everything_else(tmp_path):
    config = config_with("parallel.tensor_parallel_size=3", "model.num_heads=7", "train.stop_at_step=2000", directory=tmp_path)
    problems = find_problems(config, world_size=8)
    beginnings = (
        "model.num_heads 7 does not divide",
        "train.stop_at_step 2000 is after",
        "parallel.tensor_parallel_size 3 does not divide model.num_heads 7",
        "world size 8 is not a positive multiple of parallel.tensor_parallel_size 3",
    )
    assert all(any(problem.startswith(beginning) for problem in problems) for beginning in beginnings), problems


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_every_shipped_config_is_valid_and_named_after_its_file(path):
    config = load_config(path)
    parallel = config.parallel
    num_token_ranks = max(parallel.context_parallel_size, config.zero.shard_size or 1)
    validate(config, world_size=parallel.tensor_parallel_size * parallel.pipeline_parallel_size * num_token_ranks)
    assert config.run.name == path.stem


@pytest.mark.parametrize("axis", ["pipeline", "context", "expert"])
def test_deepspeed_works_with_data_and_tensor_parallelism_alone(tmp_path, axis):
    problems = find_problems(config_with(*DEEPSPEED, f"parallel.{axis}_parallel_size=2", directory=tmp_path), world_size=2)
    expected = f"parallel.{axis}_parallel_size is 2, but zero.engine is deepspeed, which works with data and tensor parallelism alone; "
    assert expected + "set zero.engine to fsdp." in problems


def test_modes_of_compilation_are_those_of_torchs_compiler(tmp_path):
    settings = ["train.compile.backend=neuron", "train.compile.mode=max-autotune"]
    sentence = "train.compile.mode is max-autotune, which only torch's own compiler knows, but train.compile.backend is neuron; set one of them only."
    assert find_problems(config_with(*settings, directory=tmp_path), world_size=1) == [sentence]
    assert find_problems(config_with(settings[0], directory=tmp_path), world_size=1) == []
