"""Memory of one rank by kind. Pure arithmetic, no torch."""

from __future__ import annotations

from dataclasses import dataclass

FP32_BYTES = 4
ADAMW_MOMENTS = 2


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one rank by kind.

    Args:
        weights_bytes: fp32 master weights.
        gradients_bytes: fp32.
        optimizer_bytes: Moments of AdamW, fp32.
        activations_bytes: Kept for backward, for one microbatch; weights cast to the compute dtype included.
    """

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int

    @property
    def total_bytes(self) -> int:
        """All kinds together: the planned peak."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.activations_bytes


@dataclass(frozen=True)
class Division:
    """Among how many ranks what is divided.

    Args:
        num_tensor_ranks: Tensor-parallel ranks: parameters and activations.
        num_shard_ranks: Data-parallel ranks that divide the optimizer, and from ZeRO stage 2 on the gradients, in stage 3 the parameters.
        zero_stage: 0 to 3.
        offload_optimizer: Optimizer states lie in host memory.
        offload_params: Parameters and gradients, too.
    """

    num_tensor_ranks: int = 1
    num_shard_ranks: int = 1
    zero_stage: int = 0
    offload_optimizer: bool = False
    offload_params: bool = False


def plan_memory(*, num_parameters: int, num_layers: int, activations_bytes: int, division: Division) -> MemoryPlan:
    """The device memory of a rank that trains.

    Args:
        num_parameters: Of the model. The few that tensor-parallel ranks have whole are counted as divided.
        num_layers: Of the model; stage 3 holds two of them gathered, the one that computes and the one that comes.
        activations_bytes: From `peak_activation_bytes`, of one process.
        division: Over the ranks.
    """
    whole = -(-num_parameters // division.num_tensor_ranks) * FP32_BYTES
    part = -(-whole // division.num_shard_ranks)
    two_layers = min(2 * whole // num_layers, whole)
    on_device = 0 if division.offload_params else part
    weights, gradients = part, whole
    if division.zero_stage == 3:
        weights, gradients = on_device + two_layers, on_device + two_layers // 2
    elif division.num_shard_ranks > 1:
        weights, gradients = part + whole, part + two_layers // 2 if division.zero_stage == 2 else whole
    return MemoryPlan(
        weights_bytes=weights,
        gradients_bytes=gradients,
        optimizer_bytes=0 if division.offload_optimizer else part * ADAMW_MOMENTS,
        activations_bytes=-(-activations_bytes // division.num_tensor_ranks),
    )


def peak_activation_bytes(*, num_layers: int, num_recomputed: int, block: int, recomputed_block: int, head: int) -> int:
    """Activations at the moment when most exist.

    Args:
        num_layers: Blocks in all.
        num_recomputed: Blocks that keep only part of their activations.
        block: Bytes that a block keeps.
        recomputed_block: Bytes that a recomputed block keeps.
        head: Bytes kept by final norm and loss.
    """
    kept = (num_layers - num_recomputed) * block + num_recomputed * recomputed_block
    # Either the head's activations exist, or, in backward, those of the one block that is being recomputed.
    return kept + max(head, block - recomputed_block if num_recomputed else 0)
