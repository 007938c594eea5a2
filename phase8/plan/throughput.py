"""Predicted seconds of a training step over all ranks: microbatches through the stages, communication, and the optimizer. No torch.

Without a CUDA graph the host launches every kernel, and a microbatch takes about as long as the slower of GPU and host. Communication counts
in full even beside computation, because products slow down by about what a collective beside them takes
(docs/performance.md, "Several GPUs").
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import NamedTuple

from phase8.config.batch import BatchShape
from phase8.config.model_section import ModelSection
from phase8.config.pipeline import Pipeline
from phase8.config.schema import ParallelSection, TrainSection, ZeroSection
from phase8.exchanges import Operation
from phase8.observe.devices import Gpu
from phase8.plan.communication import Collectives, Grid
from phase8.plan.layer_cost import Cost, Microbatch, Rates, ends_cost, layer_cost, weights_cost
from phase8.plan.memory import FP32_BYTES
from phase8.plan.update_cost import UpdateWork, device_cost, host_bytes, sent_bytes
from phase8.topology import AxisName

# A copy on an H100 reaches 3.02 of 3.35 TB/s.
MEMORY_SHARE = 0.90
# Share of the link: all-gathers and reduce-scatters between two H200 carry 200 to 260 GB/s of 450, between four more.
LINK_SHARE = 0.635
# Bytes/s of a GPU's share of the network between hosts, 400 Gbit/s; assumed, not measured.
NETWORK_RATE = 50e9
GPUS_PER_HOST = 8
# Share of the exchange through peer memory that products beside it do not hide.
ASYNC_SHARE = 0.42
# FSDP copies gathered data out of a buffer, and data to be reduced into one: bytes read and written for each byte.
COPIES_OF_SHARDS = 2
# Share of the pipeline's bubble ceiling that stages reach: 0.90 to 0.96 measured.
PIPELINE_SHARE = 0.97
# Exponent of a sum of powers: within a microbatch GPU and host alternate in being the slower one.
TURNS_EXPONENT = 8
# Offloading: PCIe 5 to page-locked memory, and the memory of the host.
HOST_LINK_RATE = 47e9
# Bytes/s of an NVMe disk for each GPU; assumed, not measured.
NVME_RATE = 6e9
# The share of offloaded parameters, or their gradients, that travels beside nothing: embedding and head, the first block, and what copies the others.
ARRIVING_ALONE = 0.15
# A layer that is recomputed whole takes the time of two forwards, and of a backward that takes as long as two more.
FORWARD_SHARE = 0.25
HOST_MEMORY_RATE = 64e9


class StageWork(NamedTuple):
    """Work of a pipeline stage on its first rank.

    Args:
        layers: Layers of all its chunks.
        num_computed: Parameters that the rank computes with.
        update: What the optimizer does for those it keeps.
        collectives: Communication of the rank in a step.
        grid: Place of the rank in the grid.
    """

    layers: tuple[int, ...]
    num_computed: float
    update: UpdateWork
    collectives: tuple[Collectives, ...]
    grid: Grid


@dataclass(frozen=True)
class StepWork:
    """Work of a step on all ranks.

    Args:
        model: Model section with the shapes.
        train: Section with recomputation, compilation and recording.
        parallel: Section that says how ranks exchange tokens.
        zero: Section that says what is offloaded.
        shape: Sequences and microbatches of a step.
        dtype: `bf16`, `fp32`, or `tf32` for fp32 on tf32 units.
        fp8_layers: Layers whose linear layers compute in fp8.
        pipeline: The pipeline settings.
        stages: One of each kind.
    """

    model: ModelSection
    train: TrainSection
    parallel: ParallelSection
    zero: ZeroSection
    shape: BatchShape
    dtype: str
    fp8_layers: range
    pipeline: Pipeline
    stages: tuple[StageWork, ...]


def step_seconds(work: StepWork, gpu: Gpu, *, host_ratio: float = 1.0) -> float:
    """Predicted seconds of a step.

    Args:
        work: The work of the step.
        gpu: GPU of each rank.
        host_ratio: Kernel launch time of the host over that of the host on which the constants were measured.
    """
    rates, microbatch, once = _rates(work, gpu), [], []
    for stage in work.stages:
        cost = _microbatch_cost(work, stage, rates)
        computing = cost.gpu
        cost = cost.plus(Cost(_fetching_seconds(work, stage, computing)))
        microbatch.append(_slower(cost, work, host_ratio))
        exchanged = sum(_exchange_seconds(each, work, stage.grid, gpu, rates) for each in stage.collectives)
        once.append(_optimizer_seconds(work, stage, gpu, host_ratio, computing) + exchanged)
    P, V = work.pipeline.num_stages, work.pipeline.num_chunks
    seconds = max(microbatch) * (work.shape.num_microbatches + (P - 1) / V)
    return seconds / (PIPELINE_SHARE if P > 1 else 1.0) + max(once)


def optimizer_seconds(work: StepWork, gpu: Gpu, *, host_ratio: float = 1.0) -> float:
    """Predicted seconds of the optimizer in a step, on the stage where it takes longest; arguments as of `step_seconds`."""
    rates = _rates(work, gpu)
    return max(_optimizer_seconds(work, stage, gpu, host_ratio, _microbatch_cost(work, stage, rates).gpu) for stage in work.stages)


def _rates(work: StepWork, gpu: Gpu) -> Rates:
    return Rates((gpu.peak_flops(work.dtype) or gpu.fp32 * 1e12) * gpu.sustained, gpu.memory * 1e9 * MEMORY_SHARE)


def _element_bytes(work: StepWork) -> int:
    return 2 if work.dtype == "bf16" else FP32_BYTES


def _slower(cost: Cost, work: StepWork, host_ratio: float) -> float:
    if work.train.cuda_graphs:
        return cost.gpu
    return float((cost.gpu**TURNS_EXPONENT + (cost.host * host_ratio) ** TURNS_EXPONENT) ** (1 / TURNS_EXPONENT))


def _microbatch_cost(work: StepWork, stage: StageWork, rates: Rates) -> Cost:
    """Cost of one microbatch in all chunks of a stage, without communication."""
    model, train = work.model, work.train
    batch = Microbatch(
        model,
        size=work.shape.micro_batch_size,
        tensor_ranks=stage.grid.tensor,
        element_bytes=_element_bytes(work),
        is_compiled=bool(train.compile.enabled),
        rates=rates,
        context_ranks=stage.grid.context,
        expert_ranks=stage.grid.expert,
    )
    costs = [weights_cost(batch, stage.num_computed, accumulates=work.shape.num_microbatches > 1)]
    recomputed, kind_of = range(0, model.num_layers, train.recompute_every_n_layers), model.layer_kinds
    kinds = Counter((kind_of[layer], train.recompute if layer in recomputed else "none", layer in work.fp8_layers) for layer in stage.layers)
    for (kind, recompute, is_fp8), count in kinds.items():
        cost = layer_cost(replace(batch, is_fp8=is_fp8), kind, recompute=recompute, budget=train.activation_memory_budget)
        gpu = _beside_copies(cost.gpu, batch) if recompute in ("full", "slices") and train.offload_activations != "none" else cost.gpu
        costs.append(Cost(gpu * count, cost.host * count))
    if model.num_layers - 1 in stage.layers:
        costs.append(ends_cost(batch))
    return Cost().plus(*costs)


def _beside_copies(gpu_seconds: float, batch: Microbatch) -> float:
    """Seconds of a recomputed layer whose input is copied to the host during its forward, and back during the backward of the layer after it."""
    copied = batch.tokens / batch.tensor_ranks * batch.model.d_model * batch.element_bytes / HOST_LINK_RATE
    return max(gpu_seconds * FORWARD_SHARE, copied) + max(gpu_seconds * (1 - FORWARD_SHARE), copied)


def _optimizer_seconds(work: StepWork, stage: StageWork, gpu: Gpu, host_ratio: float, gpu_seconds: float) -> float:
    """Seconds of a step in which weights are updated, with what is exchanged and copied for that alone; the GPU computes a microbatch so long."""
    is_offloaded, size = work.zero.offload_optimizer != "none", _element_bytes(work)
    update = device_cost(stage.update, _rates(work, gpu), element_bytes=size, is_offloaded=is_offloaded)
    sent = sum(number * size / _link_rate(axis, stage.grid, gpu) for axis, number in stage.update.muon.sent)
    return _slower(update, work, host_ratio) + sent + (_offloading_seconds(work, stage, gpu_seconds) if is_offloaded else 0.0)


def _exchange_seconds(each: Collectives, work: StepWork, grid: Grid, gpu: Gpu, rates: Rates) -> float:
    if each.operation is Operation.RECEIVE:
        return 0.0  # it is hidden behind the sends
    seconds = each.sent_bytes(grid.size(each.axis)) / _link_rate(each.axis, grid, gpu)
    if each.axis is AxisName.PIPELINE:
        # Messages travel while the action before their consumer is computed, so only the bubble becomes longer.
        return seconds * (grid.pipeline - 1) / work.shape.num_microbatches / work.pipeline.num_chunks
    if each.axis is AxisName.TENSOR:
        return seconds * (ASYNC_SHARE if work.parallel.async_tensor_parallel else 1.0)
    return seconds + each.num_bytes * COPIES_OF_SHARDS / rates.memory


def _link_rate(axis: AxisName, grid: Grid, gpu: Gpu) -> float:
    """Bytes/s between ranks of an axis: of the link if all of them are in one host, otherwise of the network."""
    span = 1
    for each in reversed(AxisName):
        if each in (AxisName.CONTEXT, AxisName.EXPERT) and each is not axis:
            continue  # its ranks are among those of shard and replicate
        span *= grid.size(each)
        if each is axis:
            break
    link = gpu.link * 1e9 * LINK_SHARE
    return link if span <= GPUS_PER_HOST else min(link, NETWORK_RATE)


def _fetching_seconds(work: StepWork, stage: StageWork, gpu_seconds: float) -> float:
    """Seconds in which a microbatch waits for parameters from the host, which arrive while forward and backward compute, once for each."""
    return sum(_arriving_seconds(work, stage, share * gpu_seconds) for share in (FORWARD_SHARE, 1 - FORWARD_SHARE))


def _arriving_seconds(work: StepWork, stage: StageWork, computing_seconds: float) -> float:
    """Seconds in which a forward or a backward that computes so long waits for parameters from the host."""
    if work.zero.offload_params == "none":
        return 0.0
    rate = NVME_RATE if work.zero.offload_params == "nvme" else HOST_LINK_RATE
    return _exposed(stage.update.num_updated * FP32_BYTES / rate, computing_seconds)


def _exposed(travelling_seconds: float, beside_seconds: float) -> float:
    """Seconds that blocks travel while nothing else happens, beside work of a length."""
    return ARRIVING_ALONE * travelling_seconds + max(0.0, travelling_seconds - beside_seconds)


def _offloading_seconds(work: StepWork, stage: StageWork, gpu_seconds: float) -> float:
    """Seconds of a step in which gradients go to the host, parameters there are updated, and those that do not stay there come back.

    Muon orthogonalises on the device, so directions come there and back besides.
    """
    leaving = stage.update.num_updated * FP32_BYTES / HOST_LINK_RATE
    if work.zero.offload_params == "none":
        leaving *= 2  # what was updated comes back
    elif work.zero.engine == "fsdp":
        # Block by block in the last backward, against the direction in which parameters arrive.
        computing = (1 - FORWARD_SHARE) * gpu_seconds
        leaving = _exposed(leaving, computing + _arriving_seconds(work, stage, computing))
    # The sum so far comes back in the direction in which parameters arrive; the new one goes the other way meanwhile.
    num_added = work.shape.num_microbatches - 1 if work.zero.offload_gradients else 0
    copied = stage.update.num_updated * num_added * FP32_BYTES + stage.update.muon.num_parts * 2 * _element_bytes(work) + sent_bytes(stage.update)
    moved = host_bytes(stage.update)
    return leaving + copied / HOST_LINK_RATE + moved / HOST_MEMORY_RATE + (moved / NVME_RATE if work.zero.offload_optimizer == "nvme" else 0.0)
