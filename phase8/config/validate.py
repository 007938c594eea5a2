"""Rules across keys and sections, and keys that are declared but not implemented yet. All problems are reported at once."""

from __future__ import annotations

import math
from collections.abc import Iterator

from phase8.config.batch import batch_shape, count_token_ranks, run_topology
from phase8.config.data import data_problems
from phase8.config.deepspeed import deepspeed_problems
from phase8.config.describe import describe_value
from phase8.config.experts import expert_problems, model_expert_problems
from phase8.config.model_section import ModelSection
from phase8.config.pipeline import pipeline_of, pipeline_problems
from phase8.config.precision import precision_problems
from phase8.config.rope_scaling import scaling_problems
from phase8.config.schema import CheckpointSection, ObserveSection, OptimSection, ParallelSection, RunConfig, TrainSection
from phase8.division import part
from phase8.errors import ConfigError

# Sections from which a model can be built.
MODEL_SECTIONS = ("model.", "precision.")
# First moments over the root of the second that eight bits have room for, half of what they hold, since the second is rounded too.
LARGEST_RATIO = 7.75
# The compiler of torch that makes graphs of its own of what it compiles.
_RECORDING_BACKEND = "cudagraphs"


def validate(config: RunConfig, *, world_size: int = 1) -> None:
    """Refuses a config that cannot run on `world_size` processes.

    Raises:
        ConfigError: All problems, one sentence each.
    """
    problems = find_problems(config, world_size=world_size)
    if problems:
        raise ConfigError(problems)


def refuse_problems(config: RunConfig, *, about: tuple[str, ...], world_size: int = 1) -> None:
    """Refuses a config for problems in some sections; problems elsewhere do not matter to the caller.

    Raises:
        ConfigError: The problems whose sentence begins with one of `about`.
    """
    problems = [problem for problem in find_problems(config, world_size=world_size) if problem.startswith(about)]
    if problems:
        raise ConfigError(problems)


def find_problems(config: RunConfig, *, world_size: int = 1) -> list[str]:
    """The problems of a config, one sentence each; empty if it can run."""
    return [
        *model_problems(config.model),
        *_schedule(config.optim, config.train),
        *_train(config.train, config.model, world_size),
        *_cuda_graphs(config),
        *_compiler(config),
        *_budget(config.train, config.parallel),
        *_slices(config),
        *_async_tensor_parallel(config.parallel),
        *data_problems(config),
        *_observe(config.observe, config.train),
        *_checkpoint(config.checkpoint),
        *_tensor_parallel(config.model, config.parallel.tensor_parallel_size),
        *_context_parallel(config),
        *expert_problems(config, world_size),
        *_zero(config, world_size),
        *deepspeed_problems(config),
        *precision_problems(config),
        *_batch_and_pipeline(config, world_size),
        *_not_built_yet(config),
    ]


def model_problems(model: ModelSection) -> Iterator[str]:
    """The problems of a model that do not depend on where it runs, one sentence each."""
    if model.head_size is None and model.d_model % model.num_heads:
        yield f"model.num_heads {model.num_heads} does not divide model.d_model {model.d_model}; choose a divisor or set model.head_size."
    elif model.head_width % 2:
        origin = "" if model.head_size is not None else f" (model.d_model {model.d_model} / model.num_heads {model.num_heads})"
        yield f"model.head_size {model.head_width}{origin} is odd, but rotary positions need an even one; set an even model.head_size."
    if model.num_kv_heads is not None and model.block != "transformer":
        yield (
            f"model.num_kv_heads is {model.num_kv_heads}, but model.block is {model.block}, whose heads have keys and values of their own; "
            "set model.num_kv_heads to null."
        )
    elif model.num_heads % model.key_value_heads:
        yield f"model.num_kv_heads {model.num_kv_heads} does not divide model.num_heads {model.num_heads}; choose a divisor or null."
    yield from scaling_problems(model.rope_scaling, block=model.block)
    if model.block == "phase8" and model.global_path == "none" and 0 in model.window_sizes:
        yield "model.local_window_size has layers with a window of 0, but model.global_path is none, so they would mix nothing; give them a window."
    if model.local_qk_norm and model.block == "phase8" and model.score != "dot":
        yield f"model.local_qk_norm is true, but model.score is {model.score}, which has lengths of its own; set model.local_qk_norm to false."
    if model.global_path == "none":
        yield from _without_path(model)
    if model.value_activation == "silu" and model.has_global_path and model.global_activation == "silu_with_values":
        yield "model.value_activation is silu, and model.global_activation silu_with_values adds a second one; set model.global_activation to silu."
    yield from model_expert_problems(model)
    if model.ffn == "low_rank_swiglu" and model.low_rank_rank == 0:
        yield "model.ffn is low_rank_swiglu, but model.low_rank_rank is 0; set a rank of at least 1 or use ffn: swiglu."


def _without_path(model: ModelSection) -> Iterator[str]:
    """Keys that ask for parts of a global path that is not there."""
    if model.chain != "none":
        yield f"model.chain is {model.chain}, but model.global_path is none and has no decay or gate to modulate; set model.chain to none."
    if model.global_gate == "channel":
        yield f"model.global_gate is {model.global_gate}, but model.global_path is none and has no gate; set model.global_gate to scalar."
    if model.decay_floor is not None:
        yield f"model.decay_floor is {model.decay_floor}, but model.global_path is none and has no decay; set model.decay_floor to null."
    if model.global_gate_activation == "silu":
        yield "model.global_gate_activation is silu, but model.global_path is none and has no gate; set model.global_gate_activation to sigmoid."
    if model.global_skip:
        yield "model.global_skip is true, but model.global_path is none and adds nothing; set model.global_skip to false."
    if model.global_activation not in ("none", None):
        yield (
            f"model.global_activation is {model.global_activation}, but model.global_path is none and has no queries; "
            "set model.global_activation to none."
        )


def _schedule(optim: OptimSection, train: TrainSection) -> Iterator[str]:
    if optim.name != "adamw" and optim.state_dtype != "fp32":
        yield f"optim.state_dtype is {optim.state_dtype}, but optim.name is {optim.name}, which keeps fp32; set one of them back."
    if optim.state_dtype == "fp8" and (ratio := _largest_ratio(*optim.betas)) > LARGEST_RATIO:
        yield (
            f"optim.state_dtype is fp8, which has room for first moments of {LARGEST_RATIO:g} times the root of the second, but optim.betas "
            f"{list(optim.betas)} let them reach {ratio:.3g} times; raise the first or lower the second, or set state_dtype to bf16."
        )
    decay_steps = optim.final_decay_steps(train.num_steps)
    if optim.warmup_steps >= train.num_steps and optim.warmup_steps > 0:
        yield f"optim.warmup_steps {optim.warmup_steps} is not below train.num_steps {train.num_steps}; shorten the warmup."
    elif optim.schedule == "wsd" and optim.warmup_steps + decay_steps > train.num_steps:
        yield (
            f"optim.warmup_steps {optim.warmup_steps} + optim.decay_steps {decay_steps}{' (null)' if optim.decay_steps is None else ''} "
            f"exceed train.num_steps {train.num_steps}; shorten one of them."
        )
    if optim.decay_steps is not None and optim.schedule != "wsd":
        yield f"optim.decay_steps is {optim.decay_steps}, but optim.schedule is {optim.schedule}; only wsd has decay_steps, leave it null."
    if optim.betas[0] == 1 or optim.betas[1] == 1:
        yield f"optim.betas is {list(optim.betas)}, but each must be below 1; use [0.9, 0.95], for example."


def _largest_ratio(first: float, second: float) -> float:
    """The largest ratio of a first moment of AdamW to the root of the second one, by the inequality of Cauchy and Schwarz."""
    if first**2 >= second or second == 1:
        return math.inf
    return (1 - first) / math.sqrt((1 - second) * (1 - first**2 / second))


def _train(train: TrainSection, model: ModelSection, world_size: int) -> Iterator[str]:
    if train.stop_at_step is not None and train.stop_at_step > train.num_steps:
        yield f"train.stop_at_step {train.stop_at_step} is after train.num_steps {train.num_steps}; leave it null or make it smaller."
    if train.recompute in ("none", "auto") and train.recompute_every_n_layers != 1:
        yield (
            f"train.recompute_every_n_layers is {train.recompute_every_n_layers}, but train.recompute is {train.recompute}; "
            "set it to full or selective."
        )
    if train.recompute == "slices" and model.block != "phase8":
        yield f"train.recompute is slices, but model.block is {model.block}, whose state grows with the sequence; set train.recompute to full."
    if train.offload_activations != "none" and train.recompute not in ("full", "slices"):
        yield (
            f"train.offload_activations is {train.offload_activations}, but train.recompute is {train.recompute}, and only of blocks that are "
            "recomputed whole nothing but the input is kept; set recompute to full or slices."
        )
    if train.recompute_every_n_layers > model.num_layers:
        yield (
            f"train.recompute_every_n_layers {train.recompute_every_n_layers} exceeds model.num_layers {model.num_layers}; "
            "choose a smaller interval."
        )


def _compiler(config: RunConfig) -> Iterator[str]:
    mode, backend = config.train.compile.mode, config.train.compile.backend
    if backend is not None and mode != "default":
        yield f"train.compile.mode is {mode}, which only torch's own compiler knows, but train.compile.backend is {backend}; set one of them only."


def _cuda_graphs(config: RunConfig) -> Iterator[str]:
    if config.train.cuda_graphs is not True:
        return
    num_stages = config.parallel.pipeline_parallel_size
    if num_stages > 1:
        yield (
            f"train.cuda_graphs is true, but parallel.pipeline_parallel_size is {num_stages}, and no graph can hold what the stages of a "
            "pipeline agree about before each step; set it to false."
        )
    if config.zero.offload_optimizer != "none":
        yield (
            f"train.cuda_graphs is true, but zero.offload_optimizer is {config.zero.offload_optimizer}, which no graph of the GPU can hold; "
            "set one of them back."
        )
    if config.train.offload_activations != "none":
        yield (
            f"train.cuda_graphs is true, but train.offload_activations is {config.train.offload_activations}, whose copies no graph of the GPU "
            "can hold; set one of them back."
        )
    if config.train.compile.enabled and config.train.compile.backend == _RECORDING_BACKEND:
        yield (
            f"train.cuda_graphs is true, but train.compile.backend is {_RECORDING_BACKEND}, which records parts of a step by itself, and no "
            "recording holds another; set one of them back."
        )


def _async_tensor_parallel(parallel: ParallelSection) -> Iterator[str]:
    if parallel.async_tensor_parallel and parallel.tensor_parallel_size == 1:
        yield (
            "parallel.async_tensor_parallel is true, but parallel.tensor_parallel_size is 1 and no tokens are exchanged; "
            "set it to false or the size to at least 2."
        )


def _budget(train: TrainSection, parallel: ParallelSection) -> Iterator[str]:
    if train.recompute != "budget":
        return
    if train.compile.enabled is False:
        yield "train.recompute is budget, but train.compile.enabled is false and nobody chooses; set it to true, or recompute to selective."
    if train.recompute_every_n_layers != 1:
        yield (
            f"train.recompute_every_n_layers is {train.recompute_every_n_layers}, but train.recompute is budget, which all layers share; "
            "set it to 1."
        )
    sizes = {"tensor": parallel.tensor_parallel_size, "context": parallel.context_parallel_size, "expert": parallel.expert_parallel_size}
    for axis, size in sizes.items():
        if size > 1:
            yield (
                f"train.recompute is budget with parallel.{axis}_parallel_size {size}, but torch.compile cannot weigh what holds a process group; "
                "set recompute to selective or full."
            )


def _tensor_parallel(model: ModelSection, num_ranks: int) -> Iterator[str]:
    """Sizes that tensor-parallel ranks must divide evenly. The vocabulary need not divide, but every rank needs a part of it."""
    sizes = {
        "model.num_heads": model.num_heads,
        "model.sequence_length": model.sequence_length,
    }
    if model.num_kv_heads is not None:
        sizes["model.num_kv_heads"] = model.num_kv_heads
    if not all(model.has_experts):
        sizes["model.ffn_size" + (" (null)" if model.ffn_size is None else "")] = model.feed_forward_width
    for name, size in sizes.items():
        if size % num_ranks:
            yield f"parallel.tensor_parallel_size {num_ranks} does not divide {name} {size}; change one of them."
    if not part(model.vocab_size, num_ranks, num_ranks - 1):
        yield f"parallel.tensor_parallel_size {num_ranks} leaves ranks without any token id of model.vocab_size {model.vocab_size}; use fewer."


def _context_parallel(config: RunConfig) -> Iterator[str]:
    model, parallel = config.model, config.parallel
    num_slices, num_ranks = parallel.context_parallel_size, parallel.tensor_parallel_size
    if num_slices == 1:
        return
    if model.sequence_length % num_slices:
        yield f"parallel.context_parallel_size {num_slices} does not divide model.sequence_length {model.sequence_length}; change one of them."
    elif model.sequence_length // num_slices % num_ranks:
        yield (
            f"parallel.tensor_parallel_size {num_ranks} does not divide the {model.sequence_length // num_slices} tokens of a slice "
            f"(model.sequence_length {model.sequence_length} / parallel.context_parallel_size {num_slices}); change one of them."
        )
    if model.block == "transformer" and config.train.compile.fullgraph:
        yield (
            f"train.compile.fullgraph is true with parallel.context_parallel_size {num_slices}, but the exchange of the transformer's keys is not "
            "compiled; set it to false."
        )


def _slices(config: RunConfig) -> Iterator[str]:
    parallel = config.parallel
    for axis, size in (("tensor", parallel.tensor_parallel_size), ("context", parallel.context_parallel_size)):
        if config.train.recompute == "slices" and size > 1:
            yield f"train.recompute is slices with parallel.{axis}_parallel_size {size}, which divides the sequence itself; set recompute to full."
    if config.train.recompute == "slices" and parallel.expert_parallel_size > 1:
        yield (
            f"train.recompute is slices with parallel.expert_parallel_size {parallel.expert_parallel_size}, whose ranks would exchange rows for "
            "every slice; set recompute to full."
        )


def _zero(config: RunConfig, world_size: int) -> Iterator[str]:
    zero, parallel = config.zero, config.parallel
    num_token_ranks = count_token_ranks(parallel, world_size=world_size)
    # Otherwise the topology is refused, with the world sizes that suit.
    is_divided = world_size % (parallel.tensor_parallel_size * parallel.context_parallel_size * parallel.pipeline_parallel_size) == 0
    if zero.shard_size is not None and zero.stage == 0:
        yield f"zero.shard_size is {zero.shard_size}, but zero.stage is 0 and shards nothing; leave it null or choose a stage."
    elif zero.shard_size is not None and is_divided and num_token_ranks % zero.shard_size:
        which = "the data-parallel size" if parallel.context_parallel_size == 1 else "the data-parallel size times parallel.context_parallel_size,"
        yield f"zero.shard_size {zero.shard_size} does not divide {which} {num_token_ranks}; choose a divisor."
    if zero.copy_engine_gather and zero.stage == 0:
        yield "zero.copy_engine_gather is true, but zero.stage is 0 and nothing is gathered; set it to false or choose a stage."
    elif zero.copy_engine_gather and zero.offload_params != "none":
        yield f"zero.copy_engine_gather is true, but zero.offload_params is {zero.offload_params}, which no GPU shares; set one of them back."
    if zero.offload_params != "none" and (zero.stage != 3 or zero.offload_optimizer == "none"):
        places = "cpu or nvme" if zero.offload_params == "nvme" else "cpu"
        yield (
            f"zero.offload_params is {zero.offload_params}, which needs zero.stage 3 and zero.offload_optimizer {places}, but they are {zero.stage} "
            f"and {zero.offload_optimizer}; set them, or set offload_params to none."
        )
    if zero.offload_gradients and zero.engine == "deepspeed":
        yield "zero.offload_gradients is true, but zero.engine is deepspeed, which sums gradients where the optimizer is; leave it false."
    elif zero.offload_gradients and zero.offload_params == "none":
        yield (
            "zero.offload_gradients is true, but zero.offload_params is none, and gradients are summed where parameters are; set offload_params to "
            "cpu, or offload_gradients to false."
        )


def _batch_and_pipeline(config: RunConfig, world_size: int) -> Iterator[str]:
    num_microbatches = None

    def suits(other: int) -> bool:
        return not [*_zero(config, other), *expert_problems(config, other), *_batch_and_pipeline(config, other)]

    try:
        topology = run_topology(config.parallel, world_size=world_size, suits=suits)
        num_microbatches = batch_shape(config.train, config.parallel, data_parallel_size=topology.data_parallel_size).num_microbatches
    except ConfigError as error:
        yield from error.problems
    yield from pipeline_problems(pipeline_of(config.parallel), num_layers=config.model.num_layers, num_microbatches=num_microbatches)


def _observe(observe: ObserveSection, train: TrainSection) -> Iterator[str]:
    if observe.profile_at_step is not None and observe.profile_at_step > train.num_steps:
        yield f"observe.profile_at_step {observe.profile_at_step} is after train.num_steps {train.num_steps}; leave it null or make it smaller."
    if observe.openmetrics is not None and not observe.openmetrics.endswith(".prom"):
        yield f"observe.openmetrics is {observe.openmetrics}, but Prometheus' node exporter reads files named *.prom only; add the suffix."
    if "/" in observe.project:
        yield f"observe.project is {observe.project}, but a project's name has no slash; name the team in observe.wandb_entity."


def _checkpoint(checkpoint: CheckpointSection) -> Iterator[str]:
    """All steps whose checkpoints are to be kept must be saved, unless all that are saved are kept."""
    saved, kept = checkpoint.every_n_steps, checkpoint.keep_every_n_steps
    if saved and kept is not None and kept % saved and saved % kept:
        yield (
            f"checkpoint.keep_every_n_steps {kept} is not a multiple of checkpoint.every_n_steps {saved}, so a checkpoint would be kept every "
            f"{math.lcm(saved, kept)} steps only; use {max(round(kept / saved), 1) * saved}, for example."
        )


def _not_built_yet(config: RunConfig) -> Iterator[str]:
    """Refuses keys whose feature is not implemented yet; none of them is ignored."""
    allowed = {
        "parallel.sequence_parallel": (config.parallel.sequence_parallel, (True,)),
    }
    for name, (value, values) in allowed.items():
        if value not in values:
            yield f"{name} is {describe_value(value)}, which is not supported yet; use {' or '.join(map(describe_value, values))}."
