"""Suggests layouts of a config for a number of GPUs: which of them fit, and how fast each is predicted to train.

Predicting is cheap and planning memory is not. So all layouts are predicted, then planned from the fastest on until enough of them fit. The
largest microbatch that fits is found by bisection; it is skipped if the smallest one with full recomputation does not fit.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

from phase8.accelerator import GPU
from phase8.config.batch import batch_shape, run_topology
from phase8.config.dotted import replaced, values_of
from phase8.config.model_section import ModelSection
from phase8.config.schema import RunConfig
from phase8.config.validate import find_problems
from phase8.errors import ConfigError
from phase8.observe.devices import Gpu
from phase8.observe.formatting import format_bytes
from phase8.plan.candidates import MOST_TOKENS, Device, divisors
from phase8.plan.memory import free_bytes, usable_bytes
from phase8.plan.prediction import StepPrediction, predict_step, recorded_where_it_pays
from phase8.plan.rank_memory import fullest
from phase8.plan.throughput import GPUS_PER_HOST
from phase8.plan.whole_config import plan_stages

LARGEST_MICROBATCH = 128
# In the order from the least to the most memory.
RECOMPUTATIONS = ("slices", "full", "selective", "budget", "none")
CHUNKS = (1, 2, 4)
# NVLink lets GPUs use each other's memory; PCIe is slower.
PEER_LINK = 100
# For pipelines: ZeRO 2 and 3 communicate for every microbatch, which costs more than they save.
MOST_ZERO_IN_PIPELINE = 1
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
    "train.micro_batch_size",
    "train.recompute",
    "train.recompute_every_n_layers",
    "train.compile.enabled",
    "train.cuda_graphs",
)


@dataclass(frozen=True)
class Suggestion:
    """A layout that fits.

    Args:
        config: The config with the layout's settings.
        world_size: Number of GPUs.
        prediction: Predicted speed.
        planned_bytes: Memory of the fullest rank.
    """

    config: RunConfig
    world_size: int
    prediction: StepPrediction
    planned_bytes: int

    def changes(self, before: RunConfig) -> dict[str, Any]:
        """Settings, by dotted name, that differ from the original config."""
        own, other = settings_of(self.config), settings_of(before)
        return {name: value for name, value in own.items() if value != other[name]}

    @property
    def layout(self) -> str:
        """The layout in words: `tensor 2 x pipeline 4 (interleaved, 2 chunks) x data 8, ZeRO 1`."""
        return layout_in_words(self.config, self.world_size)


def suggest(config: RunConfig, *, world_size: int, gpu: Gpu, memory_bytes: int, most: int = 10) -> list[Suggestion]:
    """The fastest layouts that fit, the best first; only some for each division into tensor, pipeline and data ranks.

    Args:
        config: Model, batch and precision; layout, microbatch and recomputation are replaced.
        world_size: Number of GPUs.
        gpu: Kind of GPU.
        memory_bytes: Memory of each GPU, of which `train.device_memory_gib` may leave a part.
        most: Maximum number of suggestions.

    Raises:
        ConfigError: No layout can run, or none fits.
    """
    return _Search(config, world_size, gpu, memory_bytes).best(most)


def settings_of(config: RunConfig) -> dict[str, Any]:
    """The settings that a layout sets, by dotted name."""
    return values_of(config, SETTINGS)


def layout_in_words(config: RunConfig, world_size: int) -> str:
    """The ranks along each axis, and what data-parallel ranks shard, in words."""
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
        shards = f" in shards of {zero.shard_size}" if zero.shard_size is not None else ""
        experts = f", experts shared by {topology.expert_parallel_size}" if topology.expert_parallel_size > 1 else ""
        parts.append(f"data {topology.data_parallel_size}, ZeRO {zero.stage}{shards}{experts}")
    return " x ".join(parts) or "one GPU"


@dataclass(frozen=True)
class _Candidate:
    """A layout with its predicted speed, before memory is planned.

    Args:
        config: The config with the layout's settings.
        prediction: Predicted speed.
    """

    config: RunConfig
    prediction: StepPrediction

    @property
    def degrees(self) -> tuple[int, ...]:
        """The division of ranks: candidates that differ here are different layouts to a reader."""
        parallel = self.config.parallel
        return parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.pipeline_chunks, parallel.expert_parallel_size

    @property
    def family(self) -> tuple[object, ...]:
        """Key shared by layouts that differ only in microbatch and recomputation; recording is part of it because it changes usable memory."""
        return (*self.degrees, self.config.zero.stage, self.config.zero.shard_size, self.config.train.cuda_graphs)

    @property
    def size(self) -> int:
        """Sequences per microbatch."""
        assert self.config.train.micro_batch_size is not None
        return self.config.train.micro_batch_size


class _Search:
    """The search for the fastest candidates that fit.

    Args:
        config: The config to lay out.
        world_size: Number of GPUs.
        gpu: Kind of GPU.
        memory_bytes: Memory of each GPU, of which `train.device_memory_gib` may leave a part.
    """

    def __init__(self, config: RunConfig, world_size: int, gpu: Gpu, memory_bytes: int):
        self._config, self._world_size, self._gpu = config, world_size, gpu
        whole = Device(GPU, gpu.name, memory_bytes=free_bytes(memory_bytes), total_bytes=memory_bytes)
        self._device = whole.limited_to(config.train.device_memory_gib)
        self._planned: dict[RunConfig, int] = {}
        self._smallest: dict[tuple[object, ...], _Candidate] = {}
        self._largest_sizes: dict[tuple[object, ...], int] = {}

    def best(self, most: int) -> list[Suggestion]:
        """The fastest candidates that fit."""
        found: list[Suggestion] = []
        shown: dict[tuple[int, ...], int] = {}
        most_of_a_layout = max(2, most // len({each.degrees for each in self._candidates}))
        for each in self._candidates:
            if len(found) == most:
                break
            if shown.get(each.degrees, 0) == most_of_a_layout or not self._fits(each):
                continue
            shown[each.degrees] = shown.get(each.degrees, 0) + 1
            found.append(Suggestion(each.config, self._world_size, each.prediction, self._plan(each)))
        if not found:
            raise ConfigError(self._nothing_fits())
        return found

    @cached_property
    def _candidates(self) -> list[_Candidate]:
        """All candidates that can run, the fastest first; of equally fast ones, the lowest ZeRO stage first."""
        found = list(self._predicted())
        if not found:
            raise ConfigError(find_problems(self._config, world_size=self._world_size) or [self._nothing_divides()])
        return sorted(found, key=lambda each: (-each.prediction.tokens_per_second, each.config.zero.stage))

    def _predicted(self) -> Iterator[_Candidate]:
        for layout in layouts(self._config, world_size=self._world_size, has_peer_memory=self._gpu.link >= PEER_LINK):
            for settled in microbatches(layout, world_size=self._world_size):
                best = _Candidate(*recorded_where_it_pays(settled, self._world_size, self._gpu))
                yield best
                if settled.train.recompute == "full" and best.config.train.cuda_graphs:  # it needs less memory
                    yield _Candidate(settled, predict_step(settled, self._world_size, self._gpu))

    def _plan(self, candidate: _Candidate) -> int:
        """Planned memory of the fullest rank."""
        if candidate.config not in self._planned:
            stages = plan_stages(candidate.config, world_size=self._world_size, device_type=GPU, device_bytes=self._device.total_bytes)
            self._planned[candidate.config] = fullest(stages).memory.total_bytes
        return self._planned[candidate.config]

    def _usable(self, candidate: _Candidate) -> int:
        """Bytes that the plan may fill."""
        return usable_bytes(self._device.memory_bytes, is_recorded=candidate.config.train.cuda_graphs is True)

    def _has_room(self, candidate: _Candidate) -> bool:
        return self._plan(candidate) <= self._usable(candidate)

    def _fits(self, candidate: _Candidate) -> bool:
        key = (*candidate.family, candidate.config.train.recompute)
        if key not in self._largest_sizes:
            self._largest_sizes[key] = self._largest_size(candidate)
        return candidate.size <= self._largest_sizes[key]

    def _largest_size(self, candidate: _Candidate) -> int:
        """The largest microbatch that fits with the candidate's other settings; 0 if none fits."""
        family = [each for each in self._candidates if each.family == candidate.family]
        if candidate.family not in self._smallest:
            self._smallest[candidate.family] = min(family, key=lambda each: (each.size, RECOMPUTATIONS.index(each.config.train.recompute)))
        if not self._has_room(self._smallest[candidate.family]):
            return 0
        alike = sorted((each for each in family if each.config.train.recompute == candidate.config.train.recompute), key=lambda each: each.size)
        num_fitting = bisect_left(alike, True, key=lambda each: not self._has_room(each))
        return alike[num_fitting - 1].size if num_fitting else 0

    def _nothing_fits(self) -> str:
        smallest = min(self._smallest.values(), key=lambda each: (self._plan(each), -self._usable(each)))
        layout = layout_in_words(smallest.config, self._world_size)
        how = f"train.micro_batch_size {smallest.size} and train.recompute {smallest.config.train.recompute}"
        gpus = "one GPU" if self._world_size == 1 else f"{self._world_size} GPUs"
        return (
            f"no layout of {self._config.run.name} fits on {gpus} of {format_bytes(self._device.total_bytes)}: the smallest planned, "
            f"{layout} with {how}, takes {format_bytes(self._plan(smallest))} of {format_bytes(self._usable(smallest))} that can be used; "
            "take more or larger GPUs, or a smaller model."
        )

    def _nothing_divides(self) -> str:
        return (
            f"no layout of {self._world_size} ranks divides train.global_batch_size {self._config.train.global_batch_size} and the layers and heads "
            "of the model; choose another number of ranks or another batch."
        )


def layouts(config: RunConfig, *, world_size: int, has_peer_memory: bool) -> Iterator[RunConfig]:
    """Every division of the ranks with compiled blocks and the config's own context parallelism, before microbatch and recomputation are chosen."""
    for tensor in divisors(world_size, GPUS_PER_HOST):
        for stages in divisors(world_size // tensor, config.model.num_layers):
            num_token_ranks = world_size // tensor // stages
            if num_token_ranks % config.parallel.context_parallel_size:
                continue
            expert_sizes = _expert_sizes(config.model, num_token_ranks // config.parallel.context_parallel_size)
            zero_stages = _zero_stages(num_token_ranks, tensor, stages)
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


def _zero_stages(num_token_ranks: int, tensor: int, stages: int) -> Iterator[tuple[int, int | None]]:
    """ZeRO stages, each with the number of ranks that share one copy: all ranks, or those of a host."""
    yield 0, None
    for stage in range(1, 4) if num_token_ranks > 1 else ():
        if stages > 1 and stage > MOST_ZERO_IN_PIPELINE:
            break
        yield stage, None
        on_host = GPUS_PER_HOST // tensor
        if 1 < on_host < num_token_ranks and num_token_ranks % on_host == 0:
            yield stage, on_host
