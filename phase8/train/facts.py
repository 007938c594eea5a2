"""What the banner and the report say about a run."""

from __future__ import annotations

import torch

from phase8.config.batch import BatchShape
from phase8.config.schema import RunConfig
from phase8.plan.dry_run import plan_run_memory
from phase8.plan.facts import Fact, batch_fact, memory_fact, model_facts
from phase8.train.device import device_name


def run_facts(config: RunConfig, *, device: torch.device, shape: BatchShape, num_parameters: int) -> list[Fact]:
    """Everything but the data."""
    compiled = config.train.compile
    every = f" every {config.train.recompute_every_n_layers} layers" if config.train.recompute_every_n_layers > 1 else ""
    return [
        ("device", f"{device_name(device)}, torch {torch.__version__}"),
        ("precision", f"{config.precision.dtype} matmuls, fp32 master weights" + (", tf32 allowed" if config.precision.tf32 else "")),
        *model_facts(config.model, num_parameters=num_parameters),
        ("attention", attention_backend(config)),
        batch_fact(shape, sequence_length=config.model.sequence_length),
        ("steps", f"{config.train.num_steps:,}, {config.optim.schedule} schedule, {config.optim.warmup_steps} warmup"),
        ("recomputation", config.train.recompute + every),
        ("torch.compile", f"{compiled.mode}{', fullgraph' if compiled.fullgraph else ''}" if compiled.enabled else "off"),
        memory_fact(plan_run_memory(config, num_parameters=num_parameters, micro_batch_size=shape.micro_batch_size)),
    ]


def attention_backend(config: RunConfig) -> str:
    """Which implementation runs the mixer, and why."""
    if config.model.block == "transformer":
        masked = ", with a document mask" if config.data.reset_at_document_boundaries else ""
        return f"torch scaled_dot_product_attention (full causal attention{masked})"
    return f"plain torch reference ({config.model.score} window, gated linear recurrence): no faster kernel exists yet"
