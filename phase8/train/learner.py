"""A model with its optimizer as one rank holds them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from phase8.config.schema import RunConfig, ZeroSection
from phase8.distributed.mesh import Mesh
from phase8.distributed.placement import gathered
from phase8.model.model import LanguageModel, build_model
from phase8.model.parameters import decayed_parameter_names, initialise
from phase8.optim.adamw import build_optimizer
from phase8.optim.shards import Shards
from phase8.precision.policy import compute_dtype
from phase8.zero.fsdp import shard_block, shard_model


@dataclass(frozen=True)
class Learner:
    """What takes the steps.

    Args:
        model: This rank's part of it.
        shards: What the optimizer of this rank updates.
        optimizer: Over the shards.
        mesh: The ranks it is divided over.
        zero: How data-parallel ranks divide it.
        device: Where the model computes; offloaded parameters lie elsewhere between uses.
    """

    model: LanguageModel
    shards: Shards
    optimizer: torch.optim.Optimizer
    mesh: Mesh
    zero: ZeroSection
    device: torch.device


def build_learner(config: RunConfig, *, mesh: Mesh, device: torch.device, dtype: torch.dtype) -> Learner:
    """The model of a config with its first weights, divided over the ranks, and its optimizer.

    Args:
        config: Model, optimizer, recomputation and ZeRO.
        mesh: The ranks.
        device: Where the model computes.
        dtype: Of the residual stream.
    """
    model = build_model(
        config.model,
        dtype=dtype,
        device=device,
        recompute=config.train.recompute,
        recompute_every_n_layers=config.train.recompute_every_n_layers,
        axis=mesh.tp,
    )
    initialise(model, seed=config.train.seed, axis=mesh.tp)
    decayed_names = decayed_parameter_names(model)
    for block in model.blocks:
        shard_block(block, config.zero, mesh)
    shard_model(model, config.zero, mesh)
    if isinstance(model, FSDPModule):
        register_fsdp_forward_method(model, "loss_sum")
    # Parameters that are in host memory themselves have their parts there already.
    offload = config.zero.offload_optimizer == "cpu" and config.zero.offload_params == "none"
    shards = Shards(model, tensor_axis=mesh.tp, other_axes=(mesh.shard, mesh.pp), offload=offload)
    optimizer = build_optimizer(shards.parts, config.optim, decayed_names=decayed_names)
    return Learner(model, shards, optimizer, mesh, config.zero, device)


def whole_model(learner: Learner, config: RunConfig) -> LanguageModel | None:
    """The model in one piece, on the first rank; None on the others, which help to gather it."""
    if learner.mesh.device_mesh is None:
        return learner.model
    is_main = learner.mesh.rank == 0
    parameters = gathered(dict(learner.model.named_parameters()), keep=is_main)
    if not is_main:
        return None
    model = build_model(config.model, dtype=compute_dtype(config.precision), device=learner.device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(parameters[name])
    return model
