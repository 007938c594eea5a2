"""Size and cost of a model in words."""

from __future__ import annotations

from collections.abc import Sequence

from phase8.config.batch import BatchShape
from phase8.config.model_section import ModelSection
from phase8.exchanges import Operation
from phase8.formatting import format_bytes, format_count, format_flops, format_ratio, format_seconds
from phase8.model.flops import forward_flops_per_token, training_flops_per_token
from phase8.plan.communication import Collectives, Grid
from phase8.plan.memory import MemoryPlan
from phase8.plan.rank_memory import StageMemory, fullest
from phase8.topology import AxisName

Fact = tuple[str, str]


def model_facts(model: ModelSection, *, num_parameters: int) -> list[Fact]:
    """Shape, parameters and arithmetic."""
    rank = f", low rank {model.low_rank_rank}" if model.low_rank_rank else "" if any(model.has_experts) else ", dense"
    heads = f"{model.num_heads} heads of {model.head_width}" + (f" on {model.num_kv_heads} of keys" if model.queries_per_key > 1 else "")
    forward = sum(forward_flops_per_token(model).values())
    return [
        ("model", f"{model.block}, {model.num_layers} layers, width {model.d_model}, {heads}{rank}"),
        ("parameters", f"{format_count(num_parameters)} ({num_parameters:,}){_active(model, num_parameters)}"),
        *([("experts", _experts(model))] if any(model.has_experts) else []),
        ("FLOPs/token", f"{format_flops(training_flops_per_token(model))} training, {format_flops(forward)} forward"),
    ]


def _active(model: ModelSection, num_parameters: int) -> str:
    """Words about the parameters that compute a token, where those are not all."""
    if not any(model.has_experts):
        return ""
    unused = 3 * model.d_model * model.expert_width * (model.num_experts - model.top_k) * sum(model.has_experts)
    return f", of which {format_count(num_parameters - unused)} compute a token"


def _experts(model: ModelSection) -> str:
    capacity = "no limit of tokens" if model.capacity_factor is None else f"capacity factor {model.capacity_factor:g}"
    shared = f", {model.shared_experts} shared" if model.shared_experts else ""
    layers = f"{sum(model.has_experts)} of {model.num_layers} layers"
    return f"{model.num_experts} of width {model.expert_width} in {layers}, {model.top_k} compute a token{shared}, {capacity}"


def memory_fact(plan: MemoryPlan) -> Fact:
    """Planned memory by kind."""
    kinds = (
        ("weights", plan.weights_bytes),
        ("gradients", plan.gradients_bytes),
        ("optimizer", plan.optimizer_bytes),
        ("activations", plan.activations_bytes),
        ("libraries", plan.libraries_bytes),
    )
    listed = ", ".join(f"{name} {format_bytes(num_bytes)}" for name, num_bytes in kinds if num_bytes or name != "libraries")
    host = f"; on the host {format_bytes(plan.host_bytes)}" if plan.host_bytes else ""
    return "planned memory", f"{format_bytes(plan.total_bytes)}: {listed}{host}"


def memory_facts(stages: Sequence[StageMemory]) -> list[Fact]:
    """Planned memory of the fullest stage, and of several stages a line each."""
    name, memory = memory_fact(fullest(stages).memory)
    where = f" (stage {fullest(stages).stage})" if len(stages) > 1 else ""
    facts = [(f"{name} per rank{where}", memory)]
    if len(stages) > 1:
        facts += [
            (
                f"stage {each.stage}",
                f"layers {layers_in_words(each.layers)}, {format_count(each.num_parameters)} parameters of a rank, "
                f"{format_bytes(each.memory.total_bytes)}",
            )
            for each in stages
        ]
    return facts


def layers_in_words(layers: Sequence[range]) -> str:
    """First and last layer of each chunk: `0-7, 16-23`."""
    return ", ".join(f"{each.start}-{each.stop - 1}" if len(each) > 1 else str(each.start) for each in layers)


def batch_fact(shape: BatchShape, *, sequence_length: int) -> Fact:
    """Batch arithmetic."""
    return "batch", (
        f"{shape.global_batch_size} sequences of {sequence_length} = {shape.global_batch_size * sequence_length:,} tokens a step: "
        f"micro batch {shape.micro_batch_size} x {shape.num_microbatches} microbatches x {shape.data_parallel_size} data-parallel ranks"
    )


def communication_fact(table: Sequence[Collectives], grid: Grid) -> Fact:
    """Communication of a rank in a step, axis by axis.

    Args:
        table: The result of `step_communication`.
        grid: The ranks along each axis.
    """
    listed = []
    for axis in AxisName:
        own = [each for each in table if each.axis is axis]
        count = sum(each.count for each in own)
        sent = sum(each.sent_bytes(grid.size(axis)) for each in own)
        messages = sum(each.count for each in own if each.operation in (Operation.SEND, Operation.RECEIVE))
        kinds = [f"{number} {name}" for number, name in ((count - messages, "collectives"), (messages, "messages")) if number]
        if own:
            total = format_bytes(sum(each.num_bytes for each in own))
            listed.append(f"{axis} {' and '.join(kinds)} of {total}, {format_bytes(sent)} leave the rank")
    where = f" (stage {grid.stage})" if grid.pipeline > 1 else ""
    return "communication per step and rank" + where, "; ".join(listed)


def speed_fact(*, tokens_per_second: float, mfu: float, run_seconds: float, num_gpus: int, gpu: str) -> Fact:
    """Predicted speed, and the duration of the whole run.

    Args:
        tokens_per_second: Throughput of all GPUs together.
        mfu: Model FLOP/s over the peak of the GPUs.
        run_seconds: Duration of all steps, without evaluations and saves.
        num_gpus: Number of GPUs.
        gpu: Name of the GPU, and why it was assumed.
    """
    speed = f"{tokens_per_second:,.0f} tok/s, MFU {format_ratio(mfu)}"
    return "predicted speed", f"{speed}, {format_seconds(run_seconds)} for the whole run, on {num_gpus} x {gpu}"
