"""What a model is and costs, in words."""

from __future__ import annotations

from phase8.config.batch import BatchShape
from phase8.config.schema import ModelSection
from phase8.model.flops import forward_flops_per_token, training_flops_per_token
from phase8.observe.formatting import format_bytes, format_count, format_flops
from phase8.plan.memory import MemoryPlan

Fact = tuple[str, str]


def model_facts(model: ModelSection, *, num_parameters: int) -> list[Fact]:
    """Shape, parameters and arithmetic."""
    rank = f"low rank {model.low_rank_rank}" if model.low_rank_rank else "dense"
    forward = sum(forward_flops_per_token(model).values())
    return [
        ("model", f"{model.block}, {model.num_layers} layers, width {model.d_model}, {model.num_heads} heads of {model.head_width}, {rank}"),
        ("parameters", f"{format_count(num_parameters)} ({num_parameters:,})"),
        ("FLOPs/token", f"{format_flops(training_flops_per_token(model))} training, {format_flops(forward)} forward"),
    ]


def memory_fact(plan: MemoryPlan) -> Fact:
    """Planned memory by kind."""
    kinds = (
        ("weights", plan.weights_bytes),
        ("gradients", plan.gradients_bytes),
        ("optimizer", plan.optimizer_bytes),
        ("activations", plan.activations_bytes),
    )
    listed = ", ".join(f"{name} {format_bytes(num_bytes)}" for name, num_bytes in kinds)
    return "planned memory", f"{format_bytes(plan.total_bytes)}: {listed}"


def batch_fact(shape: BatchShape, *, sequence_length: int) -> Fact:
    """Batch arithmetic."""
    return "batch", (
        f"{shape.global_batch_size} sequences of {sequence_length} = {shape.global_batch_size * sequence_length:,} tokens a step: "
        f"micro batch {shape.micro_batch_size} x {shape.num_microbatches} microbatches x {shape.data_parallel_size} data-parallel ranks"
    )
