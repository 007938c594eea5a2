"""What a rank communicates in one training step: how many collectives over which axis, and how many bytes. Pure arithmetic, no torch.

The bytes of an all-gather are those of its gathered output, of a reduce-scatter and of an all-reduce those of its input, of a send and of
a receive those of the message; `Collectives.sent_bytes` says what leaves the rank. Groups of one rank communicate nothing.

    N  tokens of a microbatch    D  width of the residual stream    R  low rank    S  scalars per token of the global path
    c  bytes of the compute dtype, at least four where it says C

| over | what | in a microbatch | bytes of each |
|---|---|---|---|
| tp | dense columns (q, k, v together; gate, up together): gather; in backward gather again, scatter | 3 | N D c |
| tp | dense rows (out; down): scatter; in backward gather | 2 | N D c |
| tp | k low-rank columns together, a low-rank row: gather and scatter the bottleneck | 2, 2 | N k R c, N R c |
| tp | scalars of the global path: gather; in backward scatter | 2 a layer | N S C |
| tp | embedding: scatter; in backward gather. Final hidden states: the reverse | 2, 2 | N D c |
| tp | loss: all-reduces of the largest logit, and of normaliser and the target's logit | 2 each chunk of rows | N C, 2 N C in all |
| tp | gradients of parameters that every rank has whole, together: all-reduce | once a step | 4 a number |
| tp | with several data-parallel ranks each of them: all-reduce | 1, with ZeRO 0 and 1 once a step | 4 a number |
| shard | parameters of a block: gather | 2 with ZeRO 3, below once a step | 4 a number, padded |
| shard | parameters in no block, together: gather | 1 with ZeRO 3, below once a step | 4 a number, padded |
| shard | their gradients: reduce-scatter | 1, with ZeRO 0 and 1 once a step | 4 a number, padded |
| replicate | the rank's part of the gradients: all-reduce | once a step | 4 a number, padded |
| pp | residual stream and its gradient: send and receive | `messages_of_stage` | N D c / tensor ranks |
| pp | what the ends of a channel agree about: send or receive | once a step | 8 |
| pp | gradient of an embedding that is the head, too: all-reduce over first and last stage | once a step | 4 a number of the rank's part |
| all | targets, loss, flags (stop, unreadable), norm: all-reduces of scalars | once a step | 8, 4, 8, 4 |

Recomputation repeats what the forward exchanges, except a dense row at the very end: autograd then has all it needs, and stops.
(A compiled block that is recomputed whole does not stop there.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from phase8.config.schema import ModelSection
from phase8.plan.memory import FP32_BYTES

_TARGETS_BYTES = _AGREEMENT_BYTES = 8


class AxisName(StrEnum):
    """Ranks that communicate, from the farthest to the nearest."""

    PIPELINE = "pp"
    REPLICATE = "replicate"
    SHARD = "shard"
    TENSOR = "tp"


class Operation(StrEnum):
    """What they do."""

    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_REDUCE = "all_reduce"
    SEND = "send"
    RECEIVE = "receive"


@dataclass(frozen=True)
class Collectives:
    """All collectives of one kind.

    Args:
        axis: Who takes part.
        operation: What they do.
        count: How many.
        num_bytes: Of all together, as the head of the file defines them.
    """

    axis: AxisName
    operation: Operation
    count: int
    num_bytes: int

    def sent_bytes(self, num_ranks: int) -> int:
        """What leaves this rank when collectives go round a ring of `num_ranks`."""
        if self.operation in (Operation.SEND, Operation.RECEIVE):
            return self.num_bytes if self.operation is Operation.SEND else 0
        return (1 + (self.operation is Operation.ALL_REDUCE)) * self.num_bytes * (num_ranks - 1) // num_ranks


@dataclass(frozen=True)
class Grid:
    """Ranks along the axes, and the place of this rank where parts differ.

    Args:
        pipeline: Stages.
        replicate: Data-parallel ranks that hold the same shards.
        shard: Data-parallel ranks that hold different shards.
        tensor: Tensor-parallel ranks.
        stage: Where it stands on the axis of pipeline.
        shard_index: On that of shard.
        tensor_index: On that of tensor.
    """

    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    tensor: int = 1
    stage: int = 0
    shard_index: int = 0
    tensor_index: int = 0

    def size(self, axis: AxisName) -> int:
        """Ranks along an axis."""
        sizes = {
            AxisName.PIPELINE: self.pipeline,
            AxisName.REPLICATE: self.replicate,
            AxisName.SHARD: self.shard,
            AxisName.TENSOR: self.tensor,
        }
        return sizes[axis]


@dataclass(frozen=True)
class Step:
    """How a step is computed.

    Args:
        num_microbatches: Of a rank.
        micro_batch_size: Sequences of a microbatch.
        compute_bytes: Of a number of the residual stream.
        loss_chunk_tokens: Rows of logits that the loss has at a time.
        recompute: `none`, `full`, `selective` or (one tensor-parallel rank only) `budget`.
        recompute_every_n_layers: Recompute layers 0, n, 2n, ...
        zero_stage: 0 to 3.
        offload_params: Parameters lie in host memory, so that FSDP sums gradients even where there is one data-parallel rank.
    """

    num_microbatches: int
    micro_batch_size: int
    compute_bytes: int
    loss_chunk_tokens: int
    recompute: str = "none"
    recompute_every_n_layers: int = 1
    zero_stage: int = 0
    offload_params: bool = False


class Parameter(NamedTuple):
    """The shape of a parameter on all ranks together, and the dim that tensor-parallel ranks divide; None: each has it whole; and its name."""

    shape: tuple[int, ...]
    shard_dim: int | None
    name: str


@dataclass(frozen=True)
class Chunk:
    """Consecutive layers of the model, with the ends of the model if they are its first or last.

    Args:
        layers: Their numbers.
        blocks: Parameters of each.
        rest: Parameters in no block.
    """

    layers: range
    blocks: tuple[tuple[Parameter, ...], ...]
    rest: tuple[Parameter, ...]


def step_communication(model: ModelSection, chunks: Sequence[Chunk], *, step: Step, grid: Grid) -> tuple[Collectives, ...]:
    """The collectives of a step of one rank by axis and operation, those that happen.

    Args:
        model: Shapes.
        chunks: Of the stage of the rank.
        step: How it is computed.
        grid: The ranks.
    """
    found = [*_scalars(grid), *_messages(model, step, grid, num_chunks=len(chunks)), *_copies_of_embedding(model, grid)]
    found += _whole_gradients(chunks, step, grid)
    for chunk in chunks:
        found += [*_activations(model, chunk, step), *_parameters(chunk, step, grid)]
    table: dict[tuple[AxisName, Operation], Collectives] = {}
    several = {axis for axis in AxisName if grid.size(axis) > 1}
    for each in found:
        key = (each.axis, each.operation)
        if each.axis in several and each.count:
            before = table.get(key, Collectives(*key, 0, 0))
            table[key] = Collectives(*key, before.count + each.count, before.num_bytes + each.num_bytes)
    return tuple(table[key] for key in sorted(table))


def messages_of_stage(*, num_stages: int, num_chunks: int, stage: int) -> tuple[int, int]:
    """Boundaries between virtual stages over which a stage sends each microbatch.

    Returns:
        Those behind its chunks: activations leave, gradients come in. Those before its chunks: gradients leave, activations come in.
    """
    if num_stages == 1:
        return 0, 0
    return num_chunks - (stage == num_stages - 1), num_chunks - (stage == 0)


def _messages(model: ModelSection, step: Step, grid: Grid, *, num_chunks: int) -> Iterator[Collectives]:
    message_bytes = step.micro_batch_size * model.sequence_length // grid.tensor * model.d_model * step.compute_bytes
    for boundaries in messages_of_stage(num_stages=grid.pipeline, num_chunks=num_chunks, stage=grid.stage):
        agreements, count = bool(boundaries), boundaries * step.num_microbatches
        for operation in (Operation.SEND, Operation.RECEIVE):
            yield Collectives(AxisName.PIPELINE, operation, agreements + count, agreements * _AGREEMENT_BYTES + count * message_bytes)


def _copies_of_embedding(model: ModelSection, grid: Grid) -> Iterator[Collectives]:
    if model.tie_embeddings and grid.stage in (0, grid.pipeline - 1):
        rows = _part(_part(model.vocab_size, grid.tensor, grid.tensor_index), grid.shard, grid.shard_index)
        yield Collectives(AxisName.PIPELINE, Operation.ALL_REDUCE, 1, rows * model.d_model * FP32_BYTES)


def _scalars(grid: Grid) -> Iterator[Collectives]:
    """Flags over all axes; loss where ranks have summands of it; targets where they read others; the norm where they have other parts."""
    loss = norm = FP32_BYTES
    flags = 2 * FP32_BYTES  # asked to stop, cannot read
    for axis, scalars in (
        (AxisName.PIPELINE, (flags, loss, norm)),
        (AxisName.REPLICATE, (flags, loss, _TARGETS_BYTES)),
        (AxisName.SHARD, (flags, loss, norm, _TARGETS_BYTES)),
        (AxisName.TENSOR, (flags, norm)),
    ):
        yield Collectives(axis, Operation.ALL_REDUCE, len(scalars), sum(scalars))


_Exchanges = list[tuple[Operation, int]]  # collectives of all tokens of a microbatch, with their bytes per token


class _Half(NamedTuple):
    """What mixer or feed-forward exchanges: in forward, in backward, and in a recomputation that ends with it."""

    forward: _Exchanges
    backward: _Exchanges
    repeated: _Exchanges


def _half_block(width: int, step: Step, *, num_columns: int, rank: int, num_scalars: int = 0) -> _Half:
    columns, row = (num_columns * rank or width) * step.compute_bytes, (rank or width) * step.compute_bytes
    scalars = num_scalars * max(step.compute_bytes, FP32_BYTES)
    forward = [(Operation.ALL_GATHER, columns), (Operation.ALL_GATHER, scalars), (Operation.REDUCE_SCATTER, row)]
    forward = [exchange for exchange in forward if exchange[1]]
    dual = {Operation.ALL_GATHER: Operation.REDUCE_SCATTER, Operation.REDUCE_SCATTER: Operation.ALL_GATHER}
    backward = [(dual[operation], num_bytes) for operation, num_bytes in reversed(forward)]
    return _Half(forward, backward, forward) if rank else _Half(forward, [*backward, (Operation.ALL_GATHER, columns)], forward[:-1])


def _activations(model: ModelSection, chunk: Chunk, step: Step) -> Iterator[Collectives]:
    """Tokens that tensor-parallel ranks gather and scatter, and the numbers of the loss."""
    has_path = model.has_global_path
    num_scalars = model.num_heads * (2 if model.chain == "none" else 3) if has_path else 0
    mixer = _half_block(model.d_model, step, num_columns=3, rank=model.low_rank_rank, num_scalars=num_scalars)
    feed_forward = _half_block(model.d_model, step, num_columns=2, rank=model.feed_forward_rank)
    recomputed = range(0, model.num_layers, step.recompute_every_n_layers)
    repeated = {"none": [], "budget": [], "selective": mixer.repeated, "full": mixer.forward + feed_forward.repeated}[step.recompute]
    stream = [(operation, model.d_model * step.compute_bytes) for operation in (Operation.ALL_GATHER, Operation.REDUCE_SCATTER)]
    exchanges: _Exchanges = stream * ((chunk.layers.start == 0) + _ends(chunk, model))
    for layer in chunk.layers:
        exchanges += mixer.forward + mixer.backward + feed_forward.forward + feed_forward.backward
        exchanges += repeated if layer in recomputed else []
    num_tokens = step.micro_batch_size * model.sequence_length
    for operation, num_bytes in exchanges:
        yield Collectives(AxisName.TENSOR, operation, step.num_microbatches, step.num_microbatches * num_tokens * num_bytes)
    if _ends(chunk, model):
        count = 2 * step.num_microbatches * math.ceil(num_tokens / step.loss_chunk_tokens)
        num_bytes = 3 * step.num_microbatches * num_tokens * max(step.compute_bytes, FP32_BYTES)
        yield Collectives(AxisName.TENSOR, Operation.ALL_REDUCE, count, num_bytes)


def _whole_gradients(chunks: Sequence[Chunk], step: Step, grid: Grid) -> Iterator[Collectives]:
    """Gradients of parameters that tensor-parallel ranks have whole: each rank has a summand. FSDP sums them one by one before it divides them."""
    sizes = [
        math.prod(parameter.shape) * FP32_BYTES
        for chunk in chunks
        for parameter in (parameter for group in (*chunk.blocks, chunk.rest) for parameter in group)
        if parameter.shard_dim is None
    ]
    if grid.replicate * grid.shard > 1 or step.offload_params:
        repeats = step.num_microbatches if step.zero_stage >= 2 else 1
        yield Collectives(AxisName.TENSOR, Operation.ALL_REDUCE, repeats * len(sizes), repeats * sum(sizes))
    elif sizes:
        yield Collectives(AxisName.TENSOR, Operation.ALL_REDUCE, 1, sum(sizes))


def _parameters(chunk: Chunk, step: Step, grid: Grid) -> Iterator[Collectives]:
    """What FSDP does with the parameters of each block and those of the rest, which a forward does not free."""
    num_gathers = step.num_microbatches if step.zero_stage == 3 else 1
    num_sums = step.num_microbatches if step.zero_stage >= 2 else 1
    groups = [(block, 2 if step.zero_stage == 3 else 1) for block in chunk.blocks] + [(chunk.rest, 1)] * bool(chunk.rest)
    for parameters, num_uses in groups:
        num_bytes = sum(_padded_numbers(parameter, grid) for parameter in parameters) * FP32_BYTES
        count = num_gathers * num_uses
        yield Collectives(AxisName.SHARD, Operation.ALL_GATHER, count, count * num_bytes)
        yield Collectives(AxisName.SHARD, Operation.REDUCE_SCATTER, num_sums, num_sums * num_bytes)
        yield Collectives(AxisName.REPLICATE, Operation.ALL_REDUCE, 1, num_bytes // grid.shard)


def _padded_numbers(parameter: Parameter, grid: Grid) -> int:
    """Numbers of this tensor-parallel rank's part, its first dim rounded up to a multiple of the ranks that divide it further."""
    shape = list(parameter.shape)
    if parameter.shard_dim is not None:
        shape[parameter.shard_dim] = _part(shape[parameter.shard_dim], grid.tensor, grid.tensor_index)
    return -(-shape[0] // grid.shard) * grid.shard * math.prod(shape[1:])


def _part(size: int, num_ranks: int, index: int) -> int:
    """Rows of a rank when `size` rows are cut as `torch.chunk` does it: the last parts may be smaller or empty."""
    rows = -(-size // num_ranks)
    return max(0, min(rows, size - index * rows))


def _ends(chunk: Chunk, model: ModelSection) -> bool:
    return chunk.layers.stop == model.num_layers
