"""What a rank communicates in one training step: how many collectives over which axis, and how many bytes. Pure arithmetic, no torch.

The bytes of an all-gather are those of its gathered output, of a reduce-scatter and of an all-reduce those of its input, of a send and of
a receive those of the message; `Collectives.sent_bytes` says what leaves the rank. Groups of one rank communicate nothing.

    N  tokens of a microbatch    D  width of the residual stream    n  numbers per token that a layer declares
    c  bytes of the compute dtype, at least four where it says C

| over | what | in a microbatch | bytes of each |
|---|---|---|---|
| tp | what layers declare (`exchanges.py`) | 1, or 1 for so many tokens | N n c, N n C where the numbers are wide |
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

A block that is recomputed declares what that repeats; a compiled block that is recomputed whole repeats its last exchange as well, which
is not counted. ADR 16 says why layers declare their exchanges instead of being watched.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from phase8.config.schema import ModelSection
from phase8.division import DividedShape, Place, padded_size, region_of_rank
from phase8.exchanges import Exchange, Operation
from phase8.plan.memory import FP32_BYTES
from phase8.topology import EVERYBODY, HOLDERS, LOSS, TOKENS, AxisName

_TARGETS_BYTES = _AGREEMENT_BYTES = 8




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
        expert: Data-parallel ranks that hold different experts.
        context: Ranks that share each sequence.
        tensor: Tensor-parallel ranks.
        stage: Where it stands on the axis of pipeline.
        shard_index: On that of shard.
        tensor_index: On that of tensor.
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

    def size(self, axis: AxisName) -> int:
        """Ranks along an axis."""
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
        """The place of this rank on the axes whose ranks divide what parameters declare."""
        return {AxisName.TENSOR: Place(self.tensor, self.tensor_index)}


@dataclass(frozen=True)
class Step:
    """How a step is computed.

    Args:
        num_microbatches: Of a rank.
        micro_batch_size: Sequences of a microbatch.
        compute_bytes: Of a number of the residual stream.
        zero_stage: 0 to 3.
        offload_params: Parameters lie in host memory, so that FSDP sums gradients even where there is one data-parallel rank.
    """

    num_microbatches: int
    micro_batch_size: int
    compute_bytes: int
    zero_stage: int = 0
    offload_params: bool = False


@dataclass(frozen=True)
class Chunk:
    """The parameters of consecutive layers, with the ends of the model if they are its first or last.

    Args:
        layers: Their numbers.
        blocks: Parameters of each, by name.
        rest: Parameters in no block.
    """

    layers: range
    blocks: tuple[Mapping[str, DividedShape], ...]
    rest: Mapping[str, DividedShape]

    @property
    def parameters(self) -> dict[str, DividedShape]:
        """All of them, by name."""
        return {name: shape for group in (*self.blocks, self.rest) for name, shape in group.items()}


def step_communication(
    model: ModelSection, chunks: Sequence[Chunk], exchanges: Iterable[Exchange], *, step: Step, grid: Grid
) -> tuple[Collectives, ...]:
    """The collectives of a step of one rank by axis and operation, those that happen.

    Args:
        model: Shapes.
        chunks: Of the stage of the rank.
        exchanges: What the layers of these chunks exchange for a microbatch, forward and backward.
        step: How it is computed.
        grid: The ranks.
    """
    found = [*_scalars(), *_messages(model, step, grid, num_chunks=len(chunks)), *_copies_of_embedding(model, chunks, grid)]
    found += [*_exchanges(model, exchanges, step, grid), *_whole_gradients(chunks, step, grid)]
    for chunk in chunks:
        found += [*_parameters(chunk, step, grid)]
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


def _copies_of_embedding(model: ModelSection, chunks: Sequence[Chunk], grid: Grid) -> Iterator[Collectives]:
    if model.tie_embeddings and grid.stage in (0, grid.pipeline - 1):
        (embedding,) = (chunk.rest["embedding.weight"] for chunk in chunks if "embedding.weight" in chunk.rest)
        part = region_of_rank(embedding.region(grid.places), 0, Place(grid.shard, grid.shard_index))
        yield Collectives(AxisName.PIPELINE, Operation.ALL_REDUCE, 1, part.num_elements * FP32_BYTES)


def _scalars() -> Iterator[Collectives]:
    """The sums of scalars: each goes over the axes of its set."""
    loss = norm = FP32_BYTES
    flags = 2 * FP32_BYTES  # asked to stop, cannot read
    for num_bytes, axes in ((flags, EVERYBODY), (loss, LOSS), (norm, HOLDERS), (_TARGETS_BYTES, TOKENS)):
        for axis in axes:
            yield Collectives(axis, Operation.ALL_REDUCE, 1, num_bytes)


def _exchanges(model: ModelSection, exchanges: Iterable[Exchange], step: Step, grid: Grid) -> Iterator[Collectives]:
    """What the layers declare."""
    num_tokens = step.micro_batch_size * model.sequence_length
    for exchange, times in Counter(exchanges).items():
        axis, repeats = AxisName(exchange.axis), times * step.num_microbatches
        number_bytes = max(step.compute_bytes, FP32_BYTES) if exchange.is_wide else step.compute_bytes
        tokens_at_once = num_tokens if exchange.tokens_per_rank is None else exchange.tokens_per_rank * grid.size(axis)
        count, num_bytes = math.ceil(num_tokens / tokens_at_once), num_tokens * exchange.numbers_per_token * number_bytes
        yield Collectives(axis, exchange.operation, repeats * count, repeats * num_bytes)


def _whole_gradients(chunks: Sequence[Chunk], step: Step, grid: Grid) -> Iterator[Collectives]:
    """Gradients of parameters that tensor-parallel ranks have whole: each rank has a summand. FSDP sums them one by one before it divides them."""
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters.values()]
    sizes = [math.prod(parameter.shape) * FP32_BYTES for parameter in parameters if AxisName.TENSOR not in parameter.divided]
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
        num_bytes = sum(_padded_numbers(parameter, grid) for parameter in parameters.values()) * FP32_BYTES
        count = num_gathers * num_uses
        yield Collectives(AxisName.SHARD, Operation.ALL_GATHER, count, count * num_bytes)
        yield Collectives(AxisName.SHARD, Operation.REDUCE_SCATTER, num_sums, num_sums * num_bytes)
        yield Collectives(AxisName.REPLICATE, Operation.ALL_REDUCE, 1, num_bytes // grid.shard)


def _padded_numbers(parameter: DividedShape, grid: Grid) -> int:
    """Numbers of this tensor-parallel rank's part, its first dim rounded up to a multiple of the ranks that divide it further."""
    rows, *others = parameter.region(grid.places).shape
    return padded_size(rows, grid.shard) * math.prod(others)
