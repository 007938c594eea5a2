"""Facts about a run for the banner and the report."""

from __future__ import annotations

from importlib.metadata import version

import torch

from phase8.accelerator import records_steps
from phase8.config.batch import BatchShape
from phase8.config.pipeline import pipeline_of
from phase8.config.schema import PrecisionSection, RunConfig, ZeroSection
from phase8.kernels.backends import ONEDNN, apex_hint, attention_backend, fp32_backend, kernel_backend
from phase8.kernels.limits import MAX_HEAD_SIZE
from phase8.plan.cost_facts import Fact, batch_fact, model_facts
from phase8.plan.optimizer_work import optimizer_fact
from phase8.precision.policy import compute_dtype
from phase8.topology import Topology
from phase8.train.device import device_name
from phase8.train.experts import experts_backend


def run_facts(config: RunConfig, *, device: torch.device, shape: BatchShape, num_parameters: int, topology: Topology) -> list[Fact]:
    """All facts except the data and the planned memory."""
    compiled = config.train.compile
    ranks = [("topology", describe_topology(config, topology))] if topology.world_size > 1 else []
    return [
        *ranks,
        *([("engine", _deepspeed(config.zero))] if config.zero.engine == "deepspeed" else []),
        ("device", f"{device_name(device)}, torch {torch.__version__}"),
        ("precision", _precision(config.precision)),
        *model_facts(config.model, num_parameters=num_parameters),
        *implementation_facts(config, device=device),
        batch_fact(shape, sequence_length=config.model.sequence_length),
        ("steps", f"{config.train.num_steps:,}, {config.optim.schedule} schedule, {config.optim.warmup_steps} warmup"),
        ("recomputation", config.train.recomputation),
        ("torch.compile", f"{compiled.mode}{', fullgraph' if compiled.fullgraph else ''}" if compiled.enabled else "off"),
        *([("CUDA graphs", "the whole step" if records_steps(device.type) else "off: no GPU")] if config.train.cuda_graphs else []),
    ]


def _precision(precision: PrecisionSection) -> str:
    """Formats of products and weights."""
    linear = f", linear layers of all but {2 * precision.bf16_layers} blocks in {precision.linear} ({precision.fp8_scaling} scaling)"
    return f"{precision.dtype} matmuls{linear if precision.linear else ''}, fp32 master weights{', tf32 allowed' if precision.tf32 else ''}"


def _deepspeed(zero: ZeroSection) -> str:
    """The engine, what it offloads, and whose AdamW updates the weights where."""
    places = {"optimizer": zero.offload_optimizer, "parameters": zero.offload_params}
    offloaded = [f"{what} on {where}" for what, where in places.items() if where != "none"]
    update = "on the host" if zero.offload_optimizer != "none" else "on the device"
    return ", ".join((f"DeepSpeed {version('deepspeed')}, ZeRO stage {zero.stage}", *offloaded, f"torch's fused AdamW {update}"))


def describe_topology(config: RunConfig, topology: Topology) -> str:
    """Degrees of the axes, the pipeline's schedule, and what data-parallel ranks shard, in words."""
    zero, (schedule, num_stages, num_chunks) = config.zero, pipeline_of(config.parallel)
    degrees = " x ".join(f"{axis} {degree}" for axis, degree in topology.degrees.items() if degree > 1)
    chunks = f" of {num_chunks} chunks" if num_chunks > 1 else ""
    num_expert_ranks = topology.expert_parallel_size
    offloaded = [what for what, where in (("optimizer", zero.offload_optimizer), ("parameters", zero.offload_params)) if where != "none"]
    offloaded += ["sums of gradients"] * zero.offload_gradients
    return ", ".join(
        [
            degrees,
            *([f"experts shared by {num_expert_ranks}"] if num_expert_ranks > 1 else []),
            *([f"{schedule} schedule{chunks}"] if num_stages > 1 else []),
            f"ZeRO stage {zero.stage}",
            *([f"{' and '.join(offloaded)} offloaded"] if offloaded else []),
        ]
    )


def implementation_facts(config: RunConfig, *, device: torch.device) -> list[Fact]:
    """The implementations of mixer, loss and optimizer, and why they were chosen."""
    model, backend, hint = config.model, kernel_backend(device), apex_hint()
    implementation = "Triton" if backend.name == "triton" else "plain torch references"
    if model.block == "transformer":
        packed = config.data.reset_at_document_boundaries
        attention = attention_backend(device, dtype=compute_dtype(config.precision), masked=packed)
        mixer = f"full causal attention{', with a document mask' if packed else ''}: {attention.name} ({attention.reason})"
    elif backend.name == "triton" and model.head_width > MAX_HEAD_SIZE:
        mixer = f"plain torch references, Green chain in Triton ({model.score} window): head size {model.head_width} is above {MAX_HEAD_SIZE}"
    else:
        recurrence = {"delta": ", gated delta rule", "linear": ", gated linear recurrence", "none": ""}[model.global_path]
        mixer = f"{implementation} ({model.score} window{recurrence}): {backend.reason}"
    facts = [("mixer", mixer), ("loss", f"{implementation}: {backend.reason}")]
    if device.type == "cpu" and backend.name != "triton" and compute_dtype(config.precision) == torch.float32:
        facts.append(("products of fp32", _fp32_products(compiles=config.train.compile.enabled is True)))
    if any(model.has_experts):
        found = experts_backend(config, device)
        facts.append(("products of experts", f"{found.name} ({found.reason})"))
    name, words = optimizer_fact(config.optim, config.zero, model)
    return [*facts, (name, words if hint is None else f"{words}, torch's fused AdamW; {hint}")]


def _fp32_products(*, compiles: bool) -> str:
    found = fp32_backend()
    return f"{found.name}{', MKL in linear layers of compiled blocks' if compiles and found.name == ONEDNN else ''} ({found.reason})"
