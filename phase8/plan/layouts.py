"""Layouts of a config that may be suggested: every division of the ranks, what lies in host memory, microbatches and recomputation."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from phase8.config.batch import batch_shape, run_topology
from phase8.config.dotted import replaced, values_of
from phase8.config.model_section import ModelSection
from phase8.config.schema import RunConfig, ZeroSection
from phase8.config.validate import find_problems
from phase8.errors import ConfigError
from phase8.plan.candidates import MOST_TOKENS, divisors
from phase8.plan.throughput import GPUS_PER_HOST

LARGEST_MICROBATCH = 128
# In the order from the least to the most memory.
RECOMPUTATIONS = ("slices", "full", "selective", "budget", "none")
CHUNKS = (1, 2, 4)
# For pipelines: ZeRO 2 and 3 communicate for every microbatch, which costs more than they save.
MOST_ZERO_IN_PIPELINE = 1
# Keys that put something into host memory, each of which needs those before it.
OFFLOADING: dict[str, Any] = {"zero.offload_optimizer": "cpu", "zero.offload_params": "cpu", "zero.offload_gradients": True}
# Keys of all that may be in host memory; inputs of layers that are recomputed are most of what is on the device where sequences are long.
PLACES = (*OFFLOADING, "train.offload_activations")
# Keys that a layout sets.
SETTINGS = (
    "parallel.tensor_parallel_size",
    "parallel.async_tensor_parallel",
    "parallel.pipeline_parallel_size",
    "parallel.pipeline_schedule",
    "parallel.pipeline_chunks",
    "parallel.expert_parallel_size",
    "parallel.num_microbatches",
    "zero.stage",
    "zero.shard_size",
    *PLACES,
    "train.global_batch_size",
    "train.micro_batch_size",
    "train.recompute",
    "train.recompute_every_n_layers",
    "train.compile.enabled",
    "train.cuda_graphs",
)


def settings_of(config: RunConfig) -> dict[str, Any]:
    """The settings that a layout sets, by dotted name."""
    return values_of(config, SETTINGS)


def layout_in_words(config: RunConfig, world_size: int) -> str:
    """The ranks along each axis, what data-parallel ranks shard, and what lies in host memory, in words."""
    parallel, zero = config.parallel, config.zero
    topology = run_topology(parallel, world_size=world_size)
    parts = []
    if topology.tensor_parallel_size > 1:
        parts.append(f"tensor {topology.tensor_parallel_size}" + (" asynchronous" if parallel.async_tensor_parallel else ""))
    if topology.pipeline_parallel_size > 1:
        chunks = f", {parallel.pipeline_chunks} chunks" if parallel.pipeline_chunks > 1 else ""
        parts.append(f"pipeline {topology.pipeline_parallel_size} ({parallel.pipeline_schedule}{chunks})")
    if topology.context_parallel_size > 1:
        parts.append(f"context {topology.context_parallel_size}")
    if topology.data_parallel_size > 1:
        parts.append(f"data {topology.data_parallel_size}")
    shards = f", ZeRO {zero.stage}" if topology.data_parallel_size > 1 or zero.stage > 0 else ""
    shards += f" in shards of {zero.shard_size}" if zero.shard_size is not None else ""
    experts = f", experts shared by {topology.expert_parallel_size}" if topology.expert_parallel_size > 1 else ""
    return (" x ".join(parts) or "one GPU") + shards + experts + _offloaded_in_words(zero)


def _offloaded_in_words(zero: ZeroSection) -> str:
    gradients = "cpu" if zero.offload_gradients else "none"
    places = {"optimizer": zero.offload_optimizer, "parameters": zero.offload_params, "gradients": gradients}
    words = []
    for place, name in (("cpu", "on the host"), ("nvme", "on NVMe")):
        *others, last = [what for what, where in places.items() if where == place] or [""]
        words += [f"{', '.join(others)}{' and ' if others else ''}{last} {name}"] if last else []
    return "".join(f", {each}" for each in words)


def offloaded(config: RunConfig) -> list[RunConfig]:
    """The config with its optimizer in host memory, with its parameters there too, and with sums of gradients, as far as its keys leave that open.

    Where a sequence has several slices, each of these and the config itself are there with inputs of layers in host memory, too.
    """
    found, own, train = [], config, config.train
    for name, value in OFFLOADING.items():
        key = name.removeprefix("zero.")
        if getattr(config.zero, key) in ("none", False):
            if key in config.zero.model_fields_set:
                break
            config = replaced(config, {name: value})
            found.append(config)
    is_long = config.model.sequence_length > train.recompute_slice_tokens
    if is_long and train.offload_activations == "none" and "offload_activations" not in train.model_fields_set:
        found += [replaced(each, {"train.offload_activations": "cpu"}) for each in (own, *found)]
    return found


def layouts(config: RunConfig, *, world_size: int, has_peer_memory: bool) -> Iterator[RunConfig]:
    """Every division of the ranks with compiled blocks and the config's own context parallelism, before microbatch and recomputation are chosen."""
    for tensor in divisors(world_size, GPUS_PER_HOST):
        for stages in divisors(world_size // tensor, config.model.num_layers):
            num_token_ranks = world_size // tensor // stages
            if num_token_ranks % config.parallel.context_parallel_size:
                continue
            expert_sizes = _expert_sizes(config.model, num_token_ranks // config.parallel.context_parallel_size)
            zero_stages = _zero_stages(config.zero, num_token_ranks, tensor, stages)
            for chunks, (stage, shard_size), experts in product(CHUNKS if stages > 1 else CHUNKS[:1], zero_stages, expert_sizes):
                yield replaced(
                    config,
                    {
                        "parallel.tensor_parallel_size": tensor,
                        "parallel.async_tensor_parallel": tensor > 1 and has_peer_memory,
                        "parallel.pipeline_parallel_size": stages,
                        "parallel.pipeline_schedule": "interleaved" if chunks > 1 else "1f1b",
                        "parallel.pipeline_chunks": chunks,
                        "parallel.expert_parallel_size": experts,
                        "parallel.num_microbatches": None,
                        "zero.stage": stage,
                        "zero.shard_size": shard_size,
                        "train.compile.enabled": True,
                    },
                )


def _expert_sizes(model: ModelSection, num_data_ranks: int) -> list[int]:
    """Numbers of ranks of a host that may share the experts."""
    if model.ffn != "moe":
        return [1]
    return [size for size in divisors(num_data_ranks, min(model.num_experts, GPUS_PER_HOST)) if model.num_experts % size == 0]


def _zero_stages(zero: ZeroSection, num_token_ranks: int, tensor: int, stages: int) -> list[tuple[int, int | None]]:
    """ZeRO stages that the section's other keys allow, each with the number of ranks that share one copy: all ranks, or those of a host."""
    least = _least_stage(zero)
    most = 3 if num_token_ranks > 1 or zero.engine == "deepspeed" else least
    if stages > 1:
        most = min(most, max(least, MOST_ZERO_IN_PIPELINE))
    on_host = GPUS_PER_HOST // tensor
    has_shards = 1 < on_host < num_token_ranks and num_token_ranks % on_host == 0 and zero.engine != "deepspeed"
    found: list[tuple[int, int | None]] = []
    for stage in range(least, most + 1):
        found += [(stage, None), *([(stage, on_host)] if stage and has_shards else [])]
    return found


def _least_stage(zero: ZeroSection) -> int:
    """The lowest stage with which the section's other keys can be, even on one rank."""
    if zero.offload_params != "none" or zero.offload_optimizer == "nvme":
        return 3
    return int(zero.engine == "deepspeed" or zero.copy_engine_gather)


def microbatches(layout: RunConfig, *, world_size: int) -> Iterator[RunConfig]:
    """A layout with every microbatch and recomputation that can run."""
    topology = run_topology(layout.parallel, world_size=world_size)
    whole = replaced(layout, {"train.micro_batch_size": 1, "train.cuda_graphs": False})
    try:
        per_rank = batch_shape(whole.train, whole.parallel, data_parallel_size=topology.data_parallel_size).num_microbatches
    except ConfigError:
        return
    for size in divisors(per_rank, LARGEST_MICROBATCH):
        if size > 1 and size * layout.model.sequence_length > MOST_TOKENS:
            break
        is_one_slice = layout.model.sequence_length <= layout.train.recompute_slice_tokens
        for recompute in RECOMPUTATIONS[is_one_slice:]:
            settled = replaced(whole, {"train.micro_batch_size": size, "train.recompute": recompute, "train.recompute_every_n_layers": 1})
            if not find_problems(settled, world_size=world_size):
                yield settled
