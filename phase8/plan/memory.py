"""Memory of one rank by kind. Pure arithmetic, no torch.

The table shows what each ZeRO stage keeps on the device besides activations, in numbers of 4 bytes. W is what the rank computes with, P its
part of W, R what lies in no block, B the largest block. Offloaded entries are in host memory instead.

| | one rank, not divided | stages 0 and 1 | stage 2 | stage 3 |
|---|---|---|---|---|
| parameters between steps | W | P | P | P |
| parameters gathered in a step | | W | W | R and two blocks (half of their weights that layers round to bf16) |
| gradients | W | W and a copy of B or R on its way, or P and those on their way | P and those on their way | as stage 2 |
| optimizer (of AdamW) | 2 W | 2 P | 2 P | 2 P |

In stage 0 P is as large as W: FSDP computes with a copy even where nothing is divided. Gradients of stages 0 and 1 stay whole from one
microbatch to the next; with a single one they leave as soon as they are complete. Sums over microbatches are on the device even where
parameters are offloaded, and go to the host with the last one, unless gradients are offloaded too. On their way are those of R, which are
complete only at the end, and of B twice: what backward computes, and the copy of the block before that is being summed. They are so only during
a backward, when what the loss needed is gone: the plan is that of the moment that needs more.

DeepSpeed computes with copies of the parameters in the compute dtype (c bytes a number) beside fp32 master weights:

| | stage 1 | stage 2 | stage 3 |
|---|---|---|---|
| copies | c W | c W | c P, and c (R and two blocks) gathered in a step |
| master weights and optimizer (of AdamW) | 12 P | 12 P | 12 P |
| gradients | c W | 4 P, and c (R and two blocks) on their way | as stage 2 |
| buckets in which gradients are summed | two | two | two |

What it offloads takes more on the host than it leaves on the device (`deepspeed_host.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from phase8.pipeline_parallel.schedules import Action, Kind
from phase8.plan.deepspeed_host import DeepSpeedBuffers, deepspeed_host_bytes, page_locked_bytes

FP32_BYTES = 4
# Share of a GPU's nominal memory that driver and context of a process take.
DRIVER_BYTES = 1 << 30
# Plans are within 2 % of what tensors hold at once; the allocator cannot use its last gaps.
USABLE_SHARE = 0.97
GAPS_BYTES = 256 << 20
# Blocks of a recording serve nothing else. Together with the above this exceeds the 0.66 to 1.05 GiB beyond tensors measured on an H100.
RECORDING_BYTES = 768 << 20


def free_bytes(total_bytes: int) -> int:
    """Memory that a GPU of this size has for a process."""
    return max(total_bytes - DRIVER_BYTES, 0)


def usable_bytes(free_bytes: int, *, is_recorded: bool) -> int:
    """Memory that a plan may fill.

    Args:
        free_bytes: Memory that the process may take.
        is_recorded: The step is one CUDA graph.
    """
    return max(int(USABLE_SHARE * free_bytes) - GAPS_BYTES - RECORDING_BYTES * is_recorded, 0)


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of one rank by kind, in bytes.

    Args:
        weights_bytes: fp32 master weights, and what is gathered of them.
        gradients_bytes: Gradients, fp32.
        optimizer_bytes: What the optimizer keeps of the parameters.
        activations_bytes: Kept for backward, weights cast to the compute dtype and messages between stages included.
        libraries_bytes: Workspaces of the libraries that multiply matrices.
        host_bytes: Offloaded parameters, gradients, optimizer and activations, and the copies for asynchronous saves, in host memory.
    """

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    host_bytes: int = 0
    libraries_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All kinds on the device together: the planned peak."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.activations_bytes + self.libraries_bytes


@dataclass(frozen=True)
class Division:
    """How data-parallel ranks divide the model.

    Args:
        is_divided: FSDP holds the parameters: there are several data-parallel ranks, or parameters are offloaded.
        zero_stage: 0 to 3.
        accumulates: A step has several microbatches.
        offload_optimizer: Optimizer states are in host memory.
        offload_params: Parameters are in host memory too, and gradients after the last microbatch.
        offload_gradients: And after every other one.
        pins_memory: Offloaded parameters and gradients are in page-locked memory, which is allocated in powers of two.
        copies_state: Weights and optimizer are copied to host memory for asynchronous saves.
        deepspeed: What DeepSpeed holds differently; None: the engine is FSDP.
    """

    is_divided: bool = False
    zero_stage: int = 0
    accumulates: bool = True
    offload_optimizer: bool = False
    offload_params: bool = False
    offload_gradients: bool = False
    pins_memory: bool = False
    copies_state: bool = False
    deepspeed: DeepSpeedBuffers | None = None


class Held(NamedTuple):
    """Sizes of parameters that are gathered together: those of a block, or those of a chunk outside of blocks.

    Args:
        whole: Numbers of each parameter with which the rank computes: all of it, or its tensor-parallel part.
        part: Numbers of each parameter that the rank keeps between steps.
        state_bytes: Bytes that the optimizer keeps of all these parts.
        narrow_bytes: Bytes that gathering some of them in a narrower dtype than fp32 saves, with ZeRO 3.
    """

    whole: tuple[int, ...]
    part: tuple[int, ...]
    state_bytes: int
    narrow_bytes: int = 0

    @property
    def gathered_bytes(self) -> int:
        """Bytes of what the rank computes with, while it is gathered."""
        return sum(self.whole) * FP32_BYTES - self.narrow_bytes


class ChunkActivations(NamedTuple):
    """Bytes that a chunk of the model keeps for one microbatch.

    Args:
        kept: Kept by its layers, from forward to backward.
        head: Kept by final norm and loss, from forward to the beginning of backward.
        repeated: Added by a recomputed layer while backward recomputes it.
        scratch: Added by the loss while it is computed.
        offloaded: Kept by its layers in host memory, from forward to backward.
    """

    kept: int
    head: int = 0
    repeated: int = 0
    scratch: int = 0
    offloaded: int = 0


def plan_memory(
    blocks: Sequence[Held],
    rests: Sequence[Held],
    *,
    activations_bytes: int,
    division: Division,
    backward_bytes: int | None = None,
    first_layer_bytes: int = 0,
    libraries_bytes: int = 0,
    offloaded_bytes: int = 0,
) -> MemoryPlan:
    """The memory of a rank that trains.

    Args:
        blocks: Parameters of the rank's blocks.
        rests: Parameters outside of blocks, for each of the rank's chunks.
        activations_bytes: The result of `peak_activation_bytes`, plus whatever is allocated beside it.
        division: Division over data-parallel ranks.
        backward_bytes: The same while backward computes a block, which is when gradients are on their way; None: as many.
        first_layer_bytes: Activations that exist while backward computes the first layer, the last one that it comes to.
        libraries_bytes: Workspaces of libraries.
        offloaded_bytes: The result of `peak_offloaded_bytes`.
    """
    if division.deepspeed is not None:
        sizes = {"activations_bytes": activations_bytes, "offloaded_bytes": offloaded_bytes, "libraries_bytes": libraries_bytes}
        return _plan_of_deepspeed(blocks, rests, division, division.deepspeed, **sizes)
    held = [*blocks, *rests]
    whole, part = sum(sum(each.whole) for each in held), sum(sum(each.part) for each in held)
    largest = sorted(sum(each.whole) for each in blocks)
    rest = sum(sum(each.whole) for each in rests)
    largest_rest = max((sum(each.whole) for each in rests), default=0)
    weights_bytes, gradients = whole * FP32_BYTES, whole
    if division.is_divided:
        on_device = 0 if division.offload_params else part
        blocks_bytes = sorted(each.gathered_bytes for each in blocks)
        in_a_step = rest * FP32_BYTES + sum(blocks_bytes[-2:]) if division.zero_stage == 3 else whole * FP32_BYTES
        # Where one rank has offloaded parameters alone, the largest of a block arrives as it lies on the host.
        is_alone = division.offload_params and part == whole
        arriving = max(chain.from_iterable(each.whole for each in blocks), default=0) if is_alone else 0
        weights_bytes = (on_device + arriving) * FP32_BYTES + in_a_step
        if division.zero_stage < 2 and division.accumulates:
            gradients = whole + max(largest[-1], largest_rest)
        else:
            # FSDP sums over microbatches on the device and offloads the sum, unless it is told to offload each summand.
            sums = part if division.accumulates and not division.offload_gradients else on_device
            # What FSDP gives to its reduction, and, of one rank, what the reduction of the block before has left on its way to the host.
            num_copies = 3 if is_alone else 2
            passing = rest + max(num_copies * largest[-1], largest_rest)
            gradients, activations_bytes = _heavier_moment(sums, passing, activations_bytes, backward_bytes)
    elif not division.accumulates:
        gradients = _beside_activations(whole, largest[-1] if largest else 0, activations_bytes, first_layer_bytes)
    return MemoryPlan(
        weights_bytes=weights_bytes,
        gradients_bytes=gradients * FP32_BYTES,
        optimizer_bytes=0 if division.offload_optimizer else sum(each.state_bytes for each in held),
        activations_bytes=activations_bytes,
        host_bytes=_host_bytes(held, division) + offloaded_bytes,
        libraries_bytes=libraries_bytes,
    )


def _beside_activations(whole: int, of_a_block: int, activations_bytes: int, first_layer_bytes: int) -> int:
    """Numbers of gradients beside the largest activations, where those of a single microbatch replace its activations layer by layer.

    Most memory is needed with all activations and the gradients of one block, with those of all blocks but one and the activations of that one, or
    with all gradients.
    """
    return max(of_a_block, whole - min(activations_bytes // FP32_BYTES, of_a_block + (activations_bytes - first_layer_bytes) // FP32_BYTES))


def _heavier_moment(sums: int, passing: int, activations_bytes: int, backward_bytes: int | None) -> tuple[int, int]:
    """Numbers of gradients, and bytes of activations, of a backward or of a forward, whichever needs more.

    Between a backward and the next forward no gradients are on their way (`passing`), but those that stay (`sums`): what the loss needs is never
    beside the former. Other arguments as of `plan_memory`.
    """
    in_backward = activations_bytes if backward_bytes is None else backward_bytes
    if passing * FP32_BYTES + in_backward > activations_bytes:
        return sums + passing, in_backward
    return sums, activations_bytes


def _plan_of_deepspeed(
    blocks: Sequence[Held],
    rests: Sequence[Held],
    division: Division,
    buffers: DeepSpeedBuffers,
    *,
    activations_bytes: int,
    offloaded_bytes: int,
    libraries_bytes: int,
) -> MemoryPlan:
    """The memory of a rank that trains under DeepSpeed; arguments as of `plan_memory`."""
    held, size = [*blocks, *rests], buffers.element_bytes
    whole, part = sum(sum(each.whole) for each in held), sum(sum(each.part) for each in held)
    in_use = sum(sum(each.whole) for each in rests) + sum(sorted(sum(each.whole) for each in blocks)[-2:])
    is_divided, sums_whole = division.zero_stage == 3, division.zero_stage == 1
    copies = size * ((0 if division.offload_params else part) + in_use if is_divided else whole)
    masters, states = FP32_BYTES * part, sum(each.state_bytes for each in held)
    sums = size * whole if sums_whole else FP32_BYTES * part
    passing = 2 * size * min(buffers.bucket, whole) + (0 if sums_whole else size * in_use)
    on_host = 0
    if division.offload_optimizer:
        on_host = deepspeed_host_bytes(
            buffers,
            part,
            stage=division.zero_stage,
            state_bytes=states,
            largest=max(number for each in held for number in each.whole),
            offload_params=division.offload_params,
            pins_memory=division.pins_memory,
        )
    saved = masters + states if division.copies_state else 0
    return MemoryPlan(
        weights_bytes=copies + (0 if division.offload_optimizer else masters),
        gradients_bytes=passing + (0 if division.offload_optimizer and not sums_whole else sums),
        optimizer_bytes=0 if division.offload_optimizer else states,
        activations_bytes=activations_bytes,
        host_bytes=on_host + saved + offloaded_bytes,
        libraries_bytes=libraries_bytes,
    )


def _host_bytes(held: Sequence[Held], division: Division) -> int:
    """Offloaded parameters, gradients and state of the optimizer; copies of parameters and that state."""
    parts = [number * FP32_BYTES for each in held for number in each.part]
    state_bytes = sum(each.state_bytes for each in held)
    copies = sum(parts) + state_bytes if division.copies_state else 0
    if not division.offload_optimizer:
        return copies
    is_pinned = division.offload_params and division.pins_memory
    kept = sum(map(page_locked_bytes, parts)) if is_pinned else sum(parts)
    # A new sum of a block's gradients arrives while the one before is read.
    passing = max(sum(page_locked_bytes(number * FP32_BYTES) for number in each.part) for each in held) if division.offload_gradients else 0
    return copies + 2 * kept + state_bytes + (passing if is_pinned and division.accumulates else 0)


def peak_offloaded_bytes(actions: Sequence[Action], chunks: Sequence[ChunkActivations]) -> int:
    """Activations in host memory at the moment when most are there; arguments as of `peak_activation_bytes`."""
    held = peak = 0
    for action in actions:
        if action.kind is Kind.FORWARD:
            held += chunks[action.chunk].offloaded
            peak = max(peak, held)
        elif action.kind is Kind.BACKWARD:
            held -= chunks[action.chunk].offloaded
    return peak


class PeakActivations(NamedTuple):
    """Activations at the moment when most exist, and while backward computes a block when most exist then."""

    ever: int
    in_backward: int


def peak_activation_bytes(actions: Sequence[Action], chunks: Sequence[ChunkActivations]) -> PeakActivations:
    """The largest activations of a stage.

    Args:
        actions: Actions of the rank's stage, in order.
        chunks: Chunks of the stage.
    """
    held = peak = in_backward = 0
    for action in actions:
        chunk = chunks[action.chunk]
        if action.kind is Kind.FORWARD:
            held += chunk.kept + chunk.head
            peak = max(peak, held + chunk.scratch)
        elif action.kind is Kind.BACKWARD:
            # The activations of the head are freed before the first layer is recomputed.
            in_backward = max(in_backward, held - chunk.head + chunk.repeated)
            held -= chunk.kept + chunk.head
    return PeakActivations(max(peak, in_backward), in_backward)
