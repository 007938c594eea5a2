"""The planned memory of the first rank of each pipeline stage, which has the largest part where parts differ in size."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from phase8.accelerator import has_kernels, locks_pages, reaches_peers
from phase8.config.batch import BatchShape
from phase8.config.model_section import LayerKind, ModelSection
from phase8.config.pipeline import Pipeline
from phase8.config.schema import TrainSection, ZeroSection
from phase8.distributed.peer_memory import ROUNDS, ROUNDS_IN_PLACE
from phase8.division import DividedShape, Place
from phase8.kernels.loss_chunks import scratch_bytes
from phase8.optim.state import DeclareState
from phase8.pipeline_parallel.schedules import build_schedule
from phase8.plan.activations import ActivationBytes, bytes_within_budget, trace_activations
from phase8.plan.chunks import chunk_parameters
from phase8.plan.communication import Chunk, messages_of_stage
from phase8.plan.deepspeed_host import DeepSpeedBuffers, page_locked_bytes
from phase8.plan.expert_memory import expert_activation_bytes
from phase8.plan.kept_states import kept_of_exchanges, states_of_slices
from phase8.plan.memory import (
    FP32_BYTES,
    ChunkActivations,
    Division,
    Held,
    MemoryPlan,
    peak_activation_bytes,
    peak_offloaded_bytes,
    plan_memory,
)
from phase8.plan.stages import chunk_layers
from phase8.precision.formats import NumberFormat
from phase8.topology import Topology
from phase8.zero.deepspeed import BUCKET, OFFLOADED_GROUP
from phase8.zero.fsdp import shard_size

# Buffers per message between stages: one in use, and one that is arriving or has not left yet.
_COPIES_OF_MESSAGE = 2
# torch.compile specialises on a microbatch of one sequence.
_TRACED_SIZES = (2, 4)
# Workspaces of cuBLAS for the training stream and for a recording's stream, and of cuBLASLt, measured on an H100.
LIBRARIES_BYTES = 128 << 20


@dataclass(frozen=True)
class StageMemory:
    """The planned memory of a pipeline stage's first rank.

    Args:
        stage: Number of the stage.
        layers: Layers of each chunk of the stage.
        num_parameters: Number of parameters that this rank keeps between steps.
        memory: Memory of this rank.
    """

    stage: int
    layers: tuple[range, ...]
    num_parameters: int
    memory: MemoryPlan


@dataclass(frozen=True)
class Workload:
    """The parts of a config that determine memory.

    Args:
        model: Model section with the shapes.
        train: Section with the recomputation.
        zero: ZeRO section, by which data-parallel ranks divide the model.
        pipeline: Pipeline settings.
        topology: Topology of the ranks.
        shape: Shape of the batch.
        dtype: Dtype of the residual stream.
        number_format: Format that computes the products of the linear layers; the few blocks that keep the dtype are counted like the others.
        packed: Whether attention and states are reset at document boundaries.
        declare_state: Declaration of the state that the optimizer keeps for each parameter.
        device_type: Type of device: those without kernels keep more for backward.
        saves_aside: Whether checkpoints are saved asynchronously, from copies in host memory.
        async_tensor_parallel: Whether tensor-parallel GPUs exchange tokens through each other's memory.
        device_bytes: Memory of the device, which limits how many logits exist at once; None: a large device.
        gathered_dtype: Dtype in which weights of blocks that layers round are gathered.
    """

    model: ModelSection
    train: TrainSection
    zero: ZeroSection
    pipeline: Pipeline
    topology: Topology
    shape: BatchShape
    dtype: torch.dtype
    number_format: NumberFormat
    packed: bool
    declare_state: DeclareState
    device_type: str
    saves_aside: bool = False
    async_tensor_parallel: bool = False
    device_bytes: int | None = None
    gathered_dtype: torch.dtype = torch.float32

def plan_each_stage(work: Workload) -> tuple[StageMemory, ...]:
    """Plans the stages in order.

    Raises:
        ConfigError: There are too few layers, or the microbatches do not fit the schedule.
    """
    name, P, V = work.pipeline
    schedule = build_schedule(name, num_stages=P, num_microbatches=work.shape.num_microbatches, num_chunks=V)
    traced, division = _trace_kinds(work), _division(work)
    stages = []
    for stage in range(P):
        chunks = [chunk_parameters(work.model, layers) for layers in chunk_layers(work.model, work.pipeline, stage)]
        blocks = [held for chunk in chunks for block, times in chunk.counted_blocks for held in [_held(block, work)] * times]
        rests = [_held(chunk.rest, work) for chunk in chunks]
        actions = schedule.actions[stage]
        activations = [_chunk_activations(work, chunk, traced) for chunk in chunks]
        beside = _messages(work, traced, num_chunks=len(chunks), stage=stage)
        beside += _inputs_on_their_way(work, chunks, traced) + _peer_memory(work, chunks, traced)
        first, peak = activations[0], peak_activation_bytes(actions, activations)
        stages.append(
            StageMemory(
                stage=stage,
                layers=tuple(chunk.layers for chunk in chunks),
                num_parameters=sum(sum(each.part) for each in (*blocks, *rests)),
                memory=plan_memory(
                    blocks,
                    rests,
                    activations_bytes=peak.ever + beside,
                    backward_bytes=peak.in_backward + beside,
                    first_layer_bytes=first.kept // len(chunks[0].layers) + first.repeated + beside,
                    division=division,
                    libraries_bytes=LIBRARIES_BYTES if has_kernels(work.device_type) else 0,
                    offloaded_bytes=peak_offloaded_bytes(actions, activations),
                ),
            )
        )
    return tuple(stages)


def fullest(stages: Sequence[StageMemory]) -> StageMemory:
    """The stage whose rank needs the most device memory."""
    return max(stages, key=lambda each: each.memory.total_bytes)


def _division(work: Workload) -> Division:
    zero = work.zero
    return Division(
        is_divided=work.topology.num_token_ranks > 1 or zero.offload_params != "none",
        zero_stage=zero.stage,
        accumulates=work.shape.num_microbatches > 1,
        offload_gradients=zero.offload_gradients,
        offload_optimizer=zero.offload_optimizer != "none",
        offload_params=zero.offload_params != "none",
        pins_memory=locks_pages(work.device_type),
        copies_state=work.saves_aside,
        deepspeed=_deepspeed_buffers(zero, work.dtype.itemsize) if zero.engine == "deepspeed" else None,
    )


def _deepspeed_buffers(zero: ZeroSection, element_bytes: int) -> DeepSpeedBuffers:
    swaps = {"swaps_optimizer": zero.offload_optimizer == "nvme", "swaps_params": zero.offload_params == "nvme"}
    return DeepSpeedBuffers(element_bytes, BUCKET, OFFLOADED_GROUP, **swaps)


def _held(parameters: Mapping[str, DividedShape], work: Workload) -> Held:
    """The first rank's part of some parameters, and the bytes of their optimizer state."""
    shards = Place(shard_size(work.zero, num_token_ranks=work.topology.num_token_ranks))
    places = {axis: Place(degree) for axis, degree in work.topology.degrees.items()} | {"ep": Place(work.topology.expert_parallel_size)}
    whole = [parameter.region(places).num_elements for parameter in parameters.values()]
    part = tuple(parameter.held(places, shards).num_elements for parameter in parameters.values())
    kept = zip(parameters.items(), part, strict=True)
    state_bytes = sum(_state_bytes(name, shape, number, work.declare_state) for (name, shape), number in kept)
    rounded = sum(number for parameter, number in zip(parameters.values(), whole, strict=True) if parameter.is_rounded)
    return Held(tuple(whole), part, state_bytes, rounded * (FP32_BYTES - work.gathered_dtype.itemsize))


def _state_bytes(name: str, parameter: DividedShape, num_elements: int, declare: DeclareState) -> int:
    """Bytes of the optimizer state for a rank's elements of a parameter; scalars are too small to count."""
    tensors = [tensor for tensor in declare(name, parameter.shape).tensors if not tensor.is_scalar]
    return sum(tensor.num_bytes(num_elements, parameter_bytes=FP32_BYTES) for tensor in tensors)


def _trace_kinds(work: Workload) -> dict[LayerKind, ActivationBytes]:
    """Activations of each kind of layer: plain torch keeps the scores of the window for backward, kernels keep the same for all windows."""
    kinds = set(work.model.layer_kinds)
    if not has_kernels(work.device_type):
        return {kind: _trace_kind(work, kind) for kind in kinds}
    largest = max(work.model.window_sizes)
    alike = {kind: kind._replace(window=largest) if kind.window else kind for kind in kinds}
    traced = {kind: _trace_kind(work, kind) for kind in set(alike.values())}
    return {kind: traced[stand_in] for kind, stand_in in alike.items()}


def _trace_kind(work: Workload, kind: LayerKind) -> ActivationBytes:
    """Activations of a layer of a kind; what ranks that share experts or divide them keep differs from what one rank keeps."""
    model = work.model.of_kind(kind)
    found = _trace(work, model)
    if not kind.has_experts:
        return found
    num_tokens = work.shape.micro_batch_size * _tokens_at_once(work)
    style = {"element_bytes": work.dtype.itemsize, "keeps_weights": work.dtype != work.gathered_dtype}
    change = expert_activation_bytes(model, work.topology, num_tokens=num_tokens, **style)
    kept = (found.block, found.block_without_mixer, found.block_within_budget)
    return ActivationBytes(*(each + change for each in kept), found.block_input, found.head)


def _trace(work: Workload, model: ModelSection) -> ActivationBytes:
    """Activations of a layer of a model whose layers are all alike.

    For compiled layers two microbatch sizes are traced, and other sizes are interpolated linearly. A budget is traced at the
    actual size, because it selects whole tensors, and because cast weights do not grow with the microbatch.
    """
    train, size, num_tensor_ranks = work.train, work.shape.micro_batch_size, work.topology.tensor_parallel_size
    rounded = {"gathers_rounded": work.gathered_dtype != torch.float32}
    same = {"dtype": work.dtype, "packed": work.packed, "number_format": work.number_format, **rounded}
    where = {"device_type": work.device_type, "num_tensor_ranks": num_tensor_ranks, "tokens_at_once": _tokens_at_once(work)}
    trace = partial(trace_activations, model, **same, **where, without_mixer=train.recompute == "selective")
    if not train.compile.enabled or not has_kernels(work.device_type):
        return trace(micro_batch_size=size)
    small, large = (trace(micro_batch_size=traced, is_compiled=True) for traced in _TRACED_SIZES)
    share = (size - _TRACED_SIZES[0]) / (_TRACED_SIZES[1] - _TRACED_SIZES[0])
    pairs = zip(vars(small).values(), vars(large).values(), strict=True)
    found = ActivationBytes(*(round(before + share * (after - before)) for before, after in pairs))
    if train.recompute != "budget":
        return found
    within = bytes_within_budget(model, train.activation_memory_budget, micro_batch_size=size, **same)
    return replace(found, block_within_budget=within // num_tensor_ranks)


def _tokens_at_once(work: Workload) -> int:
    """Tokens of a sequence whose activations a block has at the same time."""
    length = work.model.sequence_length
    return min(length, work.train.recompute_slice_tokens) if work.train.recompute == "slices" else length


def _messages(work: Workload, traced: Mapping[LayerKind, ActivationBytes], *, num_chunks: int, stage: int) -> int:
    """Bytes of a stage's messages."""
    message_bytes = next(iter(traced.values())).block_input
    sides = sum(number > 0 for number in messages_of_stage(num_stages=work.pipeline.num_stages, num_chunks=num_chunks, stage=stage))
    # Activations leave after the last chunk and gradients arrive there; before the first chunk it is the reverse.
    return 2 * sides * _COPIES_OF_MESSAGE * message_bytes * work.model.num_streams


def _recomputed_layers(work: Workload) -> range:
    return range(0, work.model.num_layers, work.train.recompute_every_n_layers) if work.train.recompute != "none" else range(0)


def _offloaded_layers(work: Workload, chunk: Chunk) -> list[int]:
    """Layers whose input waits in host memory; that of a chunk is held on the device by the pipeline, or by blocks that add the embedding."""
    if work.train.offload_activations == "none":
        return []
    recomputed, begins_on_host = _recomputed_layers(work), chunk.layers.start == 0 and not work.model.embedding_scalars
    return [layer for layer in chunk.layers if layer in recomputed and (begins_on_host or layer > chunk.layers.start)]


def _offloaded_bytes(work: Workload, block_input: int) -> int:
    """Bytes of the copy of a block's input in host memory, which consists of a tensor for each slice."""
    if not locks_pages(work.device_type):
        return block_input
    length, at_once = work.model.sequence_length, _tokens_at_once(work)
    num_whole, rest = divmod(length, at_once)
    of_tokens = [page_locked_bytes(block_input * tokens // length) for tokens in (at_once, rest)]
    return num_whole * of_tokens[0] + (of_tokens[1] if rest else 0)


def _inputs_on_their_way(work: Workload, chunks: Sequence[Chunk], traced: Mapping[LayerKind, ActivationBytes]) -> int:
    """Bytes of offloaded inputs on the device: of the block that is computed and the one beside it, and the last one of every other chunk.

    Of inputs that come and go slice by slice there is no more than one at a time.
    """
    offloaded = [len(_offloaded_layers(work, chunk)) for chunk in chunks]
    num_inputs = sum(min(each, 1) for each in offloaded) + (max(offloaded) > 1 and work.train.recompute == "full")
    return num_inputs * next(iter(traced.values())).block_input


def _peer_memory(work: Workload, chunks: Sequence[Chunk], traced: Mapping[LayerKind, ActivationBytes]) -> int:
    """Bytes of memory that other GPUs write to: tokens of every tensor-parallel rank, their summands, and gathered blocks of each chunk."""
    places = 0
    if reaches_peers(work.device_type) and work.async_tensor_parallel:
        own_tokens = next(iter(traced.values())).block_input
        places += 2 * ROUNDS * work.topology.tensor_parallel_size * own_tokens
    if reaches_peers(work.device_type) and work.zero.copy_engine_gather:
        places += ROUNDS_IN_PLACE * sum(max(_held(block, work).gathered_bytes for block, _ in chunk.counted_blocks) for chunk in chunks)
    return places


def _kept_when_recomputed(block: ActivationBytes, train: TrainSection) -> int:
    if train.recompute == "budget":
        return block.block_within_budget
    return block.block_input if train.recompute == "full" else block.block_without_mixer


def _gradients_in_a_block(work: Workload) -> int:
    """Bytes of the gradients of gate, up and residual stream, in layers with experts of their rows: the largest beside a recomputed block."""
    if not has_kernels(work.device_type):
        return 0
    model = work.model
    width = 0 if all(model.has_experts) else 2 * model.feed_forward_width + model.d_model
    if any(model.has_experts):
        width = max(width, model.top_k * (2 * model.expert_width + model.d_model))
    return work.shape.micro_batch_size * _tokens_at_once(work) * width * work.dtype.itemsize // work.topology.tensor_parallel_size


def _loss_scratch(work: Workload) -> int:
    """Bytes of the normalised stream, which waits for its loss, of the logits of a chunk, and of the cast head.

    With several tensor-parallel ranks or on a CPU, chunks are too short to count.
    """
    if not has_kernels(work.device_type) or work.topology.tensor_parallel_size > 1:
        return 0
    tokens, width = work.shape.micro_batch_size * work.model.sequence_length, work.model.d_model
    of_loss = scratch_bytes(tokens, work.model.vocab_size, width, element_bytes=work.dtype.itemsize, device_bytes=work.device_bytes)
    return tokens * width * work.dtype.itemsize + of_loss


def _chunk_activations(work: Workload, chunk: Chunk, traced: Mapping[LayerKind, ActivationBytes]) -> ChunkActivations:
    train, model = work.train, work.model
    recomputed, offloaded = _recomputed_layers(work), _offloaded_layers(work, chunk)
    sizes = {"batch_size": work.shape.micro_batch_size, "element_bytes": work.dtype.itemsize}
    kept, repeated, kind_of = 0, 0, model.layer_kinds
    for (kind, is_recomputed), times in Counter((kind_of[layer], layer in recomputed) for layer in chunk.layers).items():
        found = traced[kind]
        if train.recompute == "slices" and is_recomputed:
            num_slices = math.ceil(model.sequence_length / _tokens_at_once(work))
            kept += times * (found.block_input + states_of_slices(model.of_window(kind.window), num_slices=num_slices, **sizes))
            # The outputs of the slices and what they are joined to, or in backward their gradients and those of the slices of the input.
            repeated = max(repeated, found.block + 2 * found.block_input + _gradients_in_a_block(work))
            continue
        rest = _kept_when_recomputed(found, train) + kept_of_exchanges(model.of_kind(kind), work.topology, recompute=train.recompute, **sizes)
        kept += times * (rest if is_recomputed else found.block)
        repeated = max(repeated, found.block - rest + _gradients_in_a_block(work) if is_recomputed else 0)
    any_layer = traced[kind_of[0]]
    if model.embedding_scalars:  # all blocks share the embedding's output and add to its gradient
        kept, repeated = kept + any_layer.block_input, repeated + any_layer.block_input
    kept -= len(offloaded) * any_layer.block_input
    on_host = len(offloaded) * _offloaded_bytes(work, any_layer.block_input)
    if chunk.layers.stop == model.num_layers:
        return ChunkActivations(kept, any_layer.head, repeated, _loss_scratch(work), offloaded=on_host)
    # The residual stream that leaves the chunk is kept too, because backward begins there.
    return ChunkActivations(kept + model.num_streams * any_layer.block_input, repeated=repeated, offloaded=on_host)
