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


def plan_memory(*, num_parameters: int, activations_bytes: int) -> MemoryPlan:
    """The memory of training in one process.

    Args:
        num_parameters: Of the model.
        activations_bytes: From `peak_activation_bytes`.
    """
    return MemoryPlan(
        weights_bytes=num_parameters * FP32_BYTES,
        gradients_bytes=num_parameters * FP32_BYTES,
        optimizer_bytes=num_parameters * FP32_BYTES * ADAMW_MOMENTS,
        activations_bytes=activations_bytes,
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
