"""The communication of a rank in one training step: collectives and messages over each axis, and their bytes. Pure arithmetic, no torch.

Bytes of an all-gather are those of its gathered output, bytes of a reduce-scatter, an all-reduce or an all-to-all those of its input, bytes of a
send or a receive those of the message. `Collectives.sent_bytes` computes the bytes that leave the rank. Groups of one rank communicate nothing.

    N  tokens of a microbatch    D  width of the residual stream    n  numbers per token that a layer declares
    c  bytes of the compute dtype
    C  the larger of c and 4   g  4, with ZeRO 3 c for weights that layers round to the compute dtype (`zero.gather_dtype`)

| axis | collectives | number per microbatch | bytes of each |
|---|---|---|---|
| tp | exchanges that layers declare (`exchanges.py`) | 1, or 1 per `tokens_per_rank` tokens of each rank | N n c, or N n C for wide numbers |
| cp | tokens that a layer fetches from before its slice, and their gradients: all-to-all | 1 each way | c per number that leaves |
| cp | what slices do to a recurrence's state: all-gather, in backward reduce-scatter or all-gather | 1 each way | C per number, for all slices |
| tp | one rank that reads tokens: all-reduce of all gradients of parameters that every rank has whole | once a step | 4 per number |
| tp | several ranks that read different tokens: all-reduce of each of these gradients | 1; with ZeRO 0 and 1 once a step | 4 per number |
| shard | parameters of a block: all-gather | 2 with ZeRO 3; below once a step | g per number, padded |
| shard | all parameters outside blocks: all-gather | 1 with ZeRO 3; below once a step | 4 per number, padded |
| shard | gradients of either group of parameters: reduce-scatter | 1; with ZeRO 0 and 1 once a step | 4 per number, padded |
| replicate | the rank's part of the gradients: all-reduce | once a step | 4 per number, padded |
| pp | residual stream and its gradient: send and receive | `messages_of_stage` | N D c / tensor ranks |
| pp | hash of the form on which the ends of a channel agree: send or receive | once a step | 8 |
| pp | gradient of a tied embedding: all-reduce over first and last stage | once a step | 4 per number of the rank's part |
| each set | targets, loss, flags (stop, unreadable), norm: all-reduces of scalars | once a step | 8, 4, 8, 4 |

A recomputed block declares the exchanges that the recomputation repeats; what slices of a sequence exchanged is kept instead, but where
tensor-parallel ranks divide a block that is recomputed whole. A compiled block that is recomputed whole also repeats its last
exchange, which is not counted. ADR 16 says why layers declare their exchanges instead of being watched.
Tokens that travel as numbers of fp8 (ADR 30) are counted in the compute dtype.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from phase8.config.model_section import ModelSection
from phase8.division import DividedShape, Place, padded_size
from phase8.exchanges import AnyExchange, ExpertExchange, Operation, RingExchange, SliceExchange, groups_of_rows
from phase8.plan.memory import FP32_BYTES
from phase8.shared_sequence import num_sent, wanted_tokens
from phase8.topology import EVERYBODY, HOLDERS, LOSS, TOKENS, AxisName

_TARGETS_BYTES = _AGREEMENT_BYTES = 8
# Auxiliary losses of routers, and bytes of a number that they measure or that ranks tell each other about rows.
_ROUTER_LOSSES, _ROUTING_BYTES = 2, 8


@dataclass(frozen=True)
class Collectives:
    """All collectives of one operation over one axis.

    Args:
        axis: Axis whose ranks take part.
        operation: Kind of the collectives.
        count: Number of collectives.
        num_bytes: Bytes of all of them, as the head of this file defines bytes.
        num_ranks: Ranks that take part, where those are fewer than the axis has: experts that ranks share are divided over fewer ranks; 0: all.
    """

    axis: AxisName
    operation: Operation
    count: int
    num_bytes: int
    num_ranks: int = 0

    def sent_bytes(self, ranks_of_axis: int) -> int:
        """Bytes that leave this rank where collectives use a ring."""
        num_ranks = self.num_ranks or ranks_of_axis
        is_between_experts = self.axis is AxisName.EXPERT and self.operation is Operation.ALL_TO_ALL  # a rank keeps its own share
        if not is_between_experts and self.operation in (Operation.SEND, Operation.RECEIVE, Operation.ALL_TO_ALL):
            return 0 if self.operation is Operation.RECEIVE else self.num_bytes
        return (1 + (self.operation is Operation.ALL_REDUCE)) * self.num_bytes * (num_ranks - 1) // num_ranks


@dataclass(frozen=True)
class Grid:
    """The number of ranks along each axis, and the position of this rank on the axes where parts differ in size.

    Args:
        pipeline: Number of pipeline stages.
        replicate: Number of data-parallel ranks that hold the same shards.
        shard: Number of data-parallel ranks that hold different shards.
        expert: Number of ranks that share the experts, which are a part of those that read different tokens.
        context: Number of ranks that share each sequence.
        tensor: Number of tensor-parallel ranks.
        stage: Position of this rank on the pipeline axis.
        shard_index: Position of this rank on the shard axis.
        tensor_index: Position of this rank on the tensor axis.
        context_index: Position of this rank among those that share its sequences.
        expert_index: Position of this rank among those that share the experts.
    """

    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1
    stage: int = 0
    shard_index: int = 0
    tensor_index: int = 0
    context_index: int = 0
    expert_index: int = 0

    def size(self, axis: AxisName) -> int:
        """The number of ranks along an axis."""
        sizes = {
            AxisName.PIPELINE: self.pipeline,
            AxisName.REPLICATE: self.replicate,
            AxisName.SHARD: self.shard,
            AxisName.EXPERT: self.expert,
            AxisName.CONTEXT: self.context,
            AxisName.TENSOR: self.tensor,
        }
        return sizes[axis]

    @property
    def places(self) -> dict[str, Place]:
        """The place of this rank on each axis that a parameter may name in its division."""
        return {AxisName.TENSOR: Place(self.tensor, self.tensor_index), AxisName.EXPERT: Place(self.expert, self.expert_index)}

    @property
    def shards(self) -> Place:
        """The place of this rank among those that divide one copy of the model."""
        return Place(self.shard, self.shard_index)


@dataclass(frozen=True)
class Step:
    """The settings of a step that determine its communication.

    Args:
        num_microbatches: Number of microbatches of a rank.
        micro_batch_size: Number of sequences in a microbatch.
        compute_bytes: Bytes per number of the residual stream.
        zero_stage: ZeRO stage, 0 to 3.
        offload_params: Whether parameters lie in host memory, so that FSDP sums gradients even with one data-parallel rank.
        offload_gradients: Whether gradients go there after every microbatch, once they are summed over all ranks.
        gathered_bytes: Bytes per number of a block's weights that layers round, while they are gathered.
    """

    num_microbatches: int
    micro_batch_size: int
    compute_bytes: int
    zero_stage: int = 0
    offload_params: bool = False
    offload_gradients: bool = False
    gathered_bytes: int = FP32_BYTES


@dataclass(frozen=True)
class Chunk:
    """The parameters of consecutive layers, with embedding, norm and head where these layers begin or end the model.

    Args:
        layers: Numbers of the layers.
        blocks: Parameters of each layer's block by name.
        rest: Parameters outside blocks by name.
    """

    layers: range
    blocks: tuple[Mapping[str, DividedShape], ...]
    rest: Mapping[str, DividedShape]

    @property
    def parameters(self) -> dict[str, DividedShape]:
        """All parameters of the chunk by name."""
        return {name: shape for group in (*self.blocks, self.rest) for name, shape in group.items()}

    @cached_property
    def counted_blocks(self) -> list[tuple[Mapping[str, DividedShape], int]]:
        """A block of each kind, and how many there are; blocks that share their shapes, as those of `chunk_parameters` do, are of one kind."""
        counted: dict[tuple[int, ...], list[Mapping[str, DividedShape]]] = {}
        for block in self.blocks:
            counted.setdefault(tuple(map(id, block.values())), []).append(block)
        return [(alike[0], len(alike)) for alike in counted.values()]

    @property
    def counted_parameters(self) -> Iterator[tuple[DividedShape, int]]:
        """A parameter of each kind, and how many there are."""
        for block, times in (*self.counted_blocks, (self.rest, 1)):
            yield from ((parameter, times) for parameter in block.values())


def step_communication(
    model: ModelSection, chunks: Sequence[Chunk], exchanges: Iterable[AnyExchange] | Mapping[AnyExchange, int], *, step: Step, grid: Grid
) -> tuple[Collectives, ...]:
    """The collectives of one rank in a step, joined by axis and operation; axes of one rank are left out.

    Args:
        model: Model section with the shapes.
        chunks: Chunks of the rank's stage.
        exchanges: Exchanges of the layers of these chunks for a microbatch, forward and backward, one by one or counted.
        step: Settings of the step.
        grid: Rank grid with the place of the rank.
    """
    found = [*_scalars(model, grid), *_messages(model, step, grid, num_chunks=len(chunks)), *_copies_of_embedding(model, chunks, grid)]
    found += [*_exchanges(model, exchanges, step, grid), *_whole_gradients(chunks, step, grid)]
    for chunk in chunks:
        found += [*_parameters(chunk, step, grid)]
    table: dict[tuple[AxisName, Operation, int], Collectives] = {}
    several = {axis for axis in AxisName if grid.size(axis) > 1}
    for each in found:
        key = (each.axis, each.operation, each.num_ranks)
        if each.axis in several and each.count:
            before = table.get(key, replace(each, count=0, num_bytes=0))
            table[key] = replace(before, count=before.count + each.count, num_bytes=before.num_bytes + each.num_bytes)
    return tuple(table[key] for key in sorted(table))


def messages_of_stage(*, num_stages: int, num_chunks: int, stage: int) -> tuple[int, int]:
    """The number of boundaries between virtual stages over which a stage exchanges messages for each microbatch.

    Returns:
        The boundaries after its chunks, where activations leave and gradients arrive, and those before its chunks, where gradients leave
        and activations arrive.
    """
    if num_stages == 1:
        return 0, 0
    return num_chunks - (stage == num_stages - 1), num_chunks - (stage == 0)


def _messages(model: ModelSection, step: Step, grid: Grid, *, num_chunks: int) -> Iterator[Collectives]:
    num_tokens = step.micro_batch_size * model.sequence_length // (grid.context * grid.tensor)
    message_bytes = num_tokens * model.num_streams * model.d_model * step.compute_bytes
    for boundaries in messages_of_stage(num_stages=grid.pipeline, num_chunks=num_chunks, stage=grid.stage):
        agreements, count = bool(boundaries), boundaries * step.num_microbatches
        for operation in (Operation.SEND, Operation.RECEIVE):
            yield Collectives(AxisName.PIPELINE, operation, agreements + count, agreements * _AGREEMENT_BYTES + count * message_bytes)


def _copies_of_embedding(model: ModelSection, chunks: Sequence[Chunk], grid: Grid) -> Iterator[Collectives]:
    if model.tie_embeddings and grid.stage in (0, grid.pipeline - 1):
        (embedding,) = (chunk.rest["embedding.weight"] for chunk in chunks if "embedding.weight" in chunk.rest)
        part = embedding.held(grid.places, grid.shards)
        yield Collectives(AxisName.PIPELINE, Operation.ALL_REDUCE, 1, part.num_elements * FP32_BYTES)


def _scalars(model: ModelSection, grid: Grid) -> Iterator[Collectives]:
    """The sums of scalars; each runs over the axes of its set, one after the other."""
    loss = norm = FP32_BYTES
    flags = 2 * FP32_BYTES  # the flags stop and unreadable
    sums = [(flags, EVERYBODY), (loss, LOSS), (norm, HOLDERS), (_TARGETS_BYTES, TOKENS)]
    if any(model.has_experts):
        losses, routing = _ROUTER_LOSSES * FP32_BYTES, sum(model.has_experts) * model.numbers_of_routing * _ROUTING_BYTES
        sums += [(losses, EVERYBODY), (routing, EVERYBODY)]
        if grid.shard == 1:
            sums.append((norm, (AxisName.EXPERT,)))
    for num_bytes, axes in sums:
        for axis in axes:
            yield Collectives(axis, Operation.ALL_REDUCE, 1, num_bytes)


def _exchanges(
    model: ModelSection, exchanges: Iterable[AnyExchange] | Mapping[AnyExchange, int], step: Step, grid: Grid
) -> Iterator[Collectives]:
    """The collectives of the exchanges that the layers declare."""
    slice_length = model.sequence_length // grid.context
    num_tokens = step.micro_batch_size * slice_length
    for exchange, times in Counter(exchanges).items():
        axis, repeats = AxisName(exchange.axis), times * step.num_microbatches
        if isinstance(exchange, ExpertExchange):
            yield from _rows_of_experts(model, exchange, repeats, step, grid)
            continue
        number_bytes = max(step.compute_bytes, FP32_BYTES) if exchange.is_wide else step.compute_bytes
        if isinstance(exchange, RingExchange):
            messages = grid.context if exchange.operation is Operation.ALL_TO_ALL else 1
            num_bytes = num_tokens * grid.context * exchange.numbers_per_token // grid.tensor * number_bytes
            yield Collectives(axis, exchange.operation, repeats * messages, repeats * num_bytes)
            continue
        if isinstance(exchange, SliceExchange):
            parts = _parts_of_slices(exchange, slice_length, grid)
            numbers = step.micro_batch_size * parts * exchange.numbers // (grid.tensor if exchange.is_divided else 1)
            yield Collectives(axis, exchange.operation, repeats, repeats * numbers * number_bytes)
            continue
        tokens_at_once = num_tokens if exchange.tokens_per_rank is None else exchange.tokens_per_rank * grid.size(axis)
        count, num_bytes = math.ceil(num_tokens / tokens_at_once), num_tokens * exchange.numbers_per_token * number_bytes
        yield Collectives(axis, exchange.operation, repeats * count, repeats * num_bytes)


def _rows_of_experts(model: ModelSection, exchange: ExpertExchange, repeats: int, step: Step, grid: Grid) -> Iterator[Collectives]:
    """Exchanges of rows: with a capacity the slots of all experts, otherwise what tokens choose; and of how many of them hold a token."""
    axis, is_counted = AxisName(exchange.axis), model.has_counted_rows(context_parallel_size=grid.context)
    num_tokens = step.micro_batch_size * model.sequence_length // grid.context
    rows = round(num_tokens * model.rows_per_token(model.sequence_length, is_padded=not is_counted))
    groups = 1 if is_counted else math.prod(groups_of_rows(exchange.num_experts // grid.expert, step.micro_batch_size))
    yield Collectives(axis, exchange.operation, repeats * groups, repeats * rows * exchange.numbers_per_row * step.compute_bytes)
    if exchange.tells_counts:
        num_counts = exchange.num_experts * (1 if is_counted else step.micro_batch_size)
        yield Collectives(axis, exchange.operation, repeats, repeats * num_counts * _ROUTING_BYTES)


def _parts_of_slices(exchange: SliceExchange, slice_length: int, grid: Grid) -> int:
    """The number of tokens, or of ranks' parts, by which an exchange of slices multiplies its numbers."""
    if exchange.before is None:
        return grid.context
    wanted = wanted_tokens(slice_length, grid.context, before=exchange.before, first=exchange.first)
    return sum(map(len, wanted[grid.context_index])) if exchange.is_return else num_sent(wanted, grid.context_index, slice_length)


def _whole_gradients(chunks: Sequence[Chunk], step: Step, grid: Grid) -> Iterator[Collectives]:
    """Sums of the gradients of parameters that tensor-parallel ranks have whole. FSDP sums each of them by itself before it divides it."""
    parameters = [(parameter, times) for chunk in chunks for parameter, times in chunk.counted_parameters]
    whole = [(math.prod(parameter.shape) * FP32_BYTES, times) for parameter, times in parameters if AxisName.TENSOR not in parameter.divided]
    count, num_bytes = sum(times for _, times in whole), sum(size * times for size, times in whole)
    if grid.replicate * grid.shard > 1 or step.offload_params:
        repeats = step.num_microbatches if step.zero_stage >= 2 else 1
        yield Collectives(AxisName.TENSOR, Operation.ALL_REDUCE, repeats * count, repeats * num_bytes)
    elif whole:
        yield Collectives(AxisName.TENSOR, Operation.ALL_REDUCE, 1, num_bytes)


def _parameters(chunk: Chunk, step: Step, grid: Grid) -> Iterator[Collectives]:
    """FSDP's collectives for the parameters of each block, and for the rest, which stays gathered from forward to backward."""
    num_gathers = step.num_microbatches if step.zero_stage == 3 else 1
    num_sums = step.num_microbatches if step.zero_stage >= 2 else 1
    blocks = [(group, times) for block, times in chunk.counted_blocks for group in _by_ranks(block, grid) if group]
    groups = [(block, times, 2 if step.zero_stage == 3 else 1, step.gathered_bytes) for block, times in blocks]
    groups += [(chunk.rest, 1, 1, FP32_BYTES)] * bool(chunk.rest)
    for parameters, times, num_uses, rounded_bytes in groups:
        numbers = {name: _padded_numbers(parameter, grid) for name, parameter in parameters.items()}
        gathered = sum(number * (rounded_bytes if parameters[name].is_rounded else FP32_BYTES) for name, number in numbers.items())
        num_bytes = sum(numbers.values()) * FP32_BYTES
        count, num_shards = num_gathers * num_uses, next(iter(parameters.values())).shards(grid.places, grid.shards).size
        has_divided_experts = grid.expert > 1 and AxisName.EXPERT in next(iter(parameters.values())).divided
        num_replicas = grid.replicate * grid.shard // (num_shards * (grid.expert if has_divided_experts else 1))
        of_shards, of_replicas = (num_shards, num_replicas) if has_divided_experts else (0, 0)
        if num_shards > 1:
            yield Collectives(AxisName.SHARD, Operation.ALL_GATHER, times * count, times * count * gathered, of_shards)
            yield Collectives(AxisName.SHARD, Operation.REDUCE_SCATTER, times * num_sums, times * num_sums * num_bytes, of_shards)
        if num_replicas > 1:
            count = num_sums if step.offload_gradients else 1
            yield Collectives(AxisName.REPLICATE, Operation.ALL_REDUCE, times * count, times * (count * num_bytes // num_shards), of_replicas)


def _by_ranks(block: Mapping[str, DividedShape], grid: Grid) -> tuple[Mapping[str, DividedShape], ...]:
    """The parameters of a block that FSDP handles together: those of experts that ranks share, and all others."""
    divided = {name: each for name, each in block.items() if grid.expert > 1 and AxisName.EXPERT in each.divided}
    return divided, {name: each for name, each in block.items() if name not in divided}


def _padded_numbers(parameter: DividedShape, grid: Grid) -> int:
    """The size of this rank's part, the dim that ZeRO divides rounded up to a multiple of the shards."""
    shape, dim = list(parameter.region(grid.places).shape), parameter.shard_dim
    shape[dim] = padded_size(shape[dim], parameter.shards(grid.places, grid.shards).size)
    return math.prod(shape)
