"""Memory of one rank by kind. Pure arithmetic, no torch.

What the stages of ZeRO keep on the device, beside the activations, in numbers of 4 bytes. W is what the rank computes with, P its part of
it, R what lies in no block, B the largest block; in host memory instead where it is offloaded:

| | one rank, not divided | stages 0 and 1 | stage 2 | stage 3 |
|---|---|---|---|---|
| parameters between steps | W | P | P | P |
| parameters gathered in a step | | W | W | R and two blocks |
| gradients | W | W and a copy of B or R on its way, or P and those on their way | P and those on their way | as stage 2 |
| optimizer (of AdamW) | 2 W | 2 P | 2 P | 2 P |

In stage 0 P is as large as W: FSDP computes with a copy even where nothing is divided. Gradients of stages 0 and 1 stay whole from one
microbatch to the next; with a single one they leave as soon as they are complete. On their way are those of R, which are complete only at
the end, and of B twice: what backward computes, and the copy of the block before that is being summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from phase8.pipeline_parallel.schedules import Action, Kind

FP32_BYTES = 4
# Of the size that its vendor names, what the driver and the context of a process take of a GPU.
DRIVER_BYTES = 1 << 30
# A plan is within 2 % of what tensors hold at once; the allocator cannot use its last gaps.
USABLE_SHARE = 0.97
GAPS_BYTES = 256 << 20
# The blocks of a recording serve nothing else: with the above, more than the 0.66 to 1.05 GiB beyond tensors that were measured on an H100.
RECORDING_BYTES = 768 << 20


def free_bytes(total_bytes: int) -> int:
    """Memory that a GPU of a size has for a process."""
    return max(total_bytes - DRIVER_BYTES, 0)


def usable_bytes(free_bytes: int, *, is_recorded: bool) -> int:
    """Memory that a plan may fill.

    Args:
        free_bytes: That the process may take.
        is_recorded: The step is one CUDA graph.
    """
    return max(int(USABLE_SHARE * free_bytes) - GAPS_BYTES - RECORDING_BYTES * is_recorded, 0)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one rank by kind.

    Args:
        weights_bytes: fp32 master weights.
        gradients_bytes: fp32.
        optimizer_bytes: What the optimizer keeps of the parameters.
        activations_bytes: Kept for backward, weights cast to the compute dtype and messages between stages included.
        libraries_bytes: Workspaces of the libraries that multiply matrices.
        host_bytes: Of parameters, gradients and optimizer that are offloaded to host memory, and of the copies that are saved aside.
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
    """How data-parallel ranks divide what one of them computes with.

    Args:
        is_divided: FSDP holds the parameters: several data-parallel ranks, or offloaded parameters.
        zero_stage: 0 to 3.
        accumulates: A step has several microbatches.
        offload_optimizer: Optimizer states lie in host memory.
        offload_params: Parameters and gradients, too.
        pins_memory: Offloaded parameters and gradients lie in page-locked memory, which is allocated in powers of two.
        copies_state: Weights and optimizer are copied to host memory, from which they are saved while training goes on.
    """

    is_divided: bool = False
    zero_stage: int = 0
    accumulates: bool = True
    offload_optimizer: bool = False
    offload_params: bool = False
    pins_memory: bool = False
    copies_state: bool = False


class Held(NamedTuple):
    """Numbers of parameters of one rank that are gathered together: those of a block, or of a chunk in no block.

    Args:
        whole: Of each parameter, what the rank computes with: all of it, or a tensor-parallel rank's share.
        part: Of each, what the rank keeps between steps.
        state_bytes: Bytes that the optimizer keeps of all these parts.
    """

    whole: tuple[int, ...]
    part: tuple[int, ...]
    state_bytes: int


class ChunkActivations(NamedTuple):
    """What a chunk of the model keeps of one microbatch, in bytes.

    Args:
        kept: By its layers, from forward to backward.
        head: By final norm and loss, from forward to the beginning of backward.
        repeated: By a recomputed layer while it is recomputed in backward, besides.
        scratch: By the loss while it is computed, besides.
    """

    kept: int
    head: int = 0
    repeated: int = 0
    scratch: int = 0


def plan_memory(
    blocks: Sequence[Held], rests: Sequence[Held], *, activations_bytes: int, division: Division, libraries_bytes: int = 0
) -> MemoryPlan:
    """The memory of a rank that trains.

    Args:
        blocks: Parameters of its blocks.
        rests: Parameters of each of its chunks in no block.
        activations_bytes: From `peak_activation_bytes`, with whatever lies beside them.
        division: Over data-parallel ranks.
        libraries_bytes: Workspaces.
    """
    held = [*blocks, *rests]
    whole, part = sum(sum(each.whole) for each in held), sum(sum(each.part) for each in held)
    largest = sorted(sum(each.whole) for each in blocks)
    rest = sum(sum(each.whole) for each in rests)
    largest_rest = max((sum(each.whole) for each in rests), default=0)
    weights, gradients = whole, whole
    if division.is_divided:
        on_device = 0 if division.offload_params else part
        weights = on_device + (rest + sum(largest[-2:]) if division.zero_stage == 3 else whole)
        if division.zero_stage < 2 and division.accumulates:
            gradients = whole + max(largest[-1], largest_rest)
        else:
            gradients = on_device + rest + max(2 * largest[-1], largest_rest)
    elif not division.accumulates:
        # The gradients of a single microbatch take the place of its activations, layer by layer, and begin with those of one block.
        gradients = max(whole - activations_bytes // FP32_BYTES, largest[-1] if largest else 0)
    return MemoryPlan(
        weights_bytes=weights * FP32_BYTES,
        gradients_bytes=gradients * FP32_BYTES,
        optimizer_bytes=0 if division.offload_optimizer else sum(each.state_bytes for each in held),
        activations_bytes=activations_bytes,
        host_bytes=_host_bytes(held, division),
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
    kept = sum(1 << max(num_bytes - 1, 0).bit_length() for num_bytes in parts) if is_pinned else sum(parts)
    return copies + 2 * kept + state_bytes


def peak_activation_bytes(actions: Sequence[Action], chunks: Sequence[ChunkActivations]) -> int:
    """Activations at the moment when most exist.

    Args:
        actions: Of the rank's stage, in order.
        chunks: Of the stage.
    """
    held = peak = 0
    for action in actions:
        chunk = chunks[action.chunk]
        if action.kind is Kind.FORWARD:
            held += chunk.kept + chunk.head
            peak = max(peak, held + chunk.scratch)
        elif action.kind is Kind.BACKWARD:
            # The head's are gone when the first layer is recomputed.
            peak = max(peak, held - chunk.head + chunk.repeated)
            held -= chunk.kept + chunk.head
    return peak
