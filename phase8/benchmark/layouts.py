"""Layouts by name, such as `tp2-pp2-interleaved-micro1`: the number of ranks and the config keys that a name stands for.

| part | meaning |
|---|---|
| `one` | one rank |
| `tp2`, `pp2`, `cp2`, `dp2` | tensor, pipeline, context and data parallelism of that degree (1 where not named) |
| `ep2` | number of ranks, among those that read different tokens, that share the experts |
| `gpipe`, `1f1b`, `interleaved` | schedule of the pipeline; interleaved has two chunks |
| `chunks4` | chunks per stage |
| `zero3`, `shard2` | ZeRO stage, and how many ranks share one copy |
| `offload` | the optimizer in host memory; with `zero3` parameters and gradients too |
| `deepspeed` | DeepSpeed's engine in the place of FSDP's |
| `nvme` | DeepSpeed's engine with the optimizer under `zero.nvme_path`; with `zero3` parameters in host memory |
| `async` | tensor-parallel ranks exchange tokens while they compute |
| `copy` | FSDP gathers blocks by copy engines |
| `graph` | the step is one CUDA graph |
| `micro4` | sequences per forward |

Degrees, schedule and ZeRO that a layout does not name are the defaults, whatever the config says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from phase8.config.auto import without_auto
from phase8.config.batch import batch_shape, run_topology
from phase8.config.load import with_settings
from phase8.config.schema import ParallelSection, RunConfig, ZeroSection
from phase8.errors import ConfigError
from phase8.pipeline_parallel.schedules import SCHEDULES, bubble_ratio

ONE, OFFLOAD, NVME, DEEPSPEED, ASYNC, COPY, GRAPH = "one", "offload", "nvme", "deepspeed", "async", "copy", "graph"
DEGREES = {"tp": "parallel.tensor_parallel_size", "pp": "parallel.pipeline_parallel_size", "cp": "parallel.context_parallel_size", "dp": None}
NUMBERS = {
    "zero": "zero.stage",
    "shard": "zero.shard_size",
    "ep": "parallel.expert_parallel_size",
    "chunks": "parallel.pipeline_chunks",
    "micro": "train.micro_batch_size",
}
_PART_WITH_NUMBER = re.compile(rf"({'|'.join((*DEGREES, *NUMBERS))})(\d+)")
_RESET = {
    "parallel.tensor_parallel_size": 1,
    "parallel.pipeline_parallel_size": 1,
    "parallel.async_tensor_parallel": False,
    "parallel.pipeline_schedule": ParallelSection().pipeline_schedule,
    "parallel.pipeline_chunks": 1,
    "parallel.context_parallel_size": 1,
    "parallel.expert_parallel_size": 1,
    "parallel.num_microbatches": None,
    **{f"zero.{name}": value for name, value in ZeroSection().model_dump(exclude={"engine"}).items()},
}


@dataclass(frozen=True)
class Layout:
    """A division of the work over ranks.

    Args:
        name: The name that was parsed.
        world_size: Ranks.
        settings: Config keys by dotted name.
    """

    name: str
    world_size: int
    settings: Mapping[str, object]


def parse_layout(name: str) -> Layout:
    """Parses the name of a layout.

    Raises:
        ConfigError: A part is unknown or given twice, or no part sets the number of ranks.
    """
    world_size, named = 1, set()
    settings: dict[str, object] = {}
    for part in name.split("-"):
        kind, found = _read_part(part, layout=name)
        if kind in named:
            raise ConfigError(f"--layouts: {name!r} names {kind} twice; name each once.")
        named.add(kind)
        if kind in DEGREES:
            world_size *= int(part.removeprefix(kind))
        settings |= found
    if not named & {ONE, *DEGREES}:
        raise ConfigError(f"--layouts: {name!r} does not say how many ranks there are; begin with one, tp2, pp2, cp2 or dp2, for example.")
    if settings.get("parallel.pipeline_schedule") == "interleaved":
        settings.setdefault("parallel.pipeline_chunks", 2)
    if OFFLOAD in named and settings.get("zero.stage") == 3:
        settings["zero.offload_params"] = "cpu"
    return Layout(name, world_size, settings)


def layout_config(config: RunConfig, layout: Layout, *, sequences_per_rank: int) -> RunConfig:
    """The config of a layout in which every rank has the same number of tokens per step.

    Tensor, pipeline and context ranks work on the same sequences: t x p x c such ranks together take as many sequences as t x p x c data-parallel
    ranks, in more microbatches of the same size.

    Args:
        config: What is trained.
        layout: The division over ranks.
        sequences_per_rank: Sequences of a step per rank; without train.micro_batch_size also the microbatch.

    Raises:
        ConfigError: A key does not take a value, or sizes do not divide.
    """
    config = without_auto(config)
    micro_batch_size = config.train.micro_batch_size or sequences_per_rank
    batch = {"train.micro_batch_size": micro_batch_size, "train.global_batch_size": sequences_per_rank * layout.world_size}
    disk = {"zero.nvme_path": config.zero.nvme_path} if layout.settings.get("zero.offload_optimizer") == NVME else {}
    changed = with_settings(config, {**_RESET, **batch, **disk, **layout.settings})
    topology = run_topology(changed.parallel, world_size=layout.world_size)
    batch_shape(changed.train, changed.parallel, data_parallel_size=topology.data_parallel_size)
    return changed


def throughput_ceiling(config: RunConfig, *, num_microbatches: int) -> float | None:
    """Share of one rank's throughput left by the bubble of a pipeline, by the formula of its schedule; None without a pipeline."""
    parallel = config.parallel
    if parallel.pipeline_parallel_size == 1:
        return None
    return 1 - bubble_ratio(
        parallel.pipeline_schedule,
        num_stages=parallel.pipeline_parallel_size,
        num_microbatches=num_microbatches,
        num_chunks=parallel.pipeline_chunks,
    )


def _read_part(part: str, *, layout: str) -> tuple[str, dict[str, object]]:
    """The kind of a part, and the keys it sets."""
    simple: dict[str, tuple[str, dict[str, object]]] = {
        ONE: (ONE, {}),
        ASYNC: (ASYNC, {"parallel.async_tensor_parallel": True}),
        COPY: (COPY, {"zero.copy_engine_gather": True}),
        GRAPH: (GRAPH, {"train.cuda_graphs": True}),
        OFFLOAD: (OFFLOAD, {"zero.offload_optimizer": "cpu"}),
        DEEPSPEED: (DEEPSPEED, {"zero.engine": "deepspeed"}),
        NVME: (OFFLOAD, {"zero.engine": "deepspeed", "zero.offload_optimizer": "nvme"}),
        **{schedule: ("a schedule", {"parallel.pipeline_schedule": schedule}) for schedule in SCHEDULES},
    }
    if part in simple:
        return simple[part]
    found = _PART_WITH_NUMBER.fullmatch(part)
    if found is None or (found[1] in DEGREES and int(found[2]) < 1):
        known = ", ".join((*simple, *(f"{kind}N" for kind in (*DEGREES, *NUMBERS))))
        raise ConfigError(f"--layouts: {layout!r} has the part {part!r}, but the parts are {known}; correct it.")
    kind, number = found[1], int(found[2])
    key = {**DEGREES, **NUMBERS}[kind]
    return kind, {} if key is None else {key: number}
