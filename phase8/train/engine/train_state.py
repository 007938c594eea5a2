"""One rank's part of a model and its optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from phase8.config.batch import batch_shape
from phase8.config.pipeline import pipeline_of
from phase8.config.schema import RunConfig
from phase8.distributed.collectives import ALONE
from phase8.distributed.mesh import Mesh, groups_of_holders
from phase8.distributed.placement import collected
from phase8.errors import ConfigError
from phase8.model.model import LanguageModel, build_model
from phase8.model.parameters import decayed_parameter_names, initialised_parts, rounded_parameters, shard_dims
from phase8.model.recomputation import apply_recomputation
from phase8.optim.adamw import build_optimizer
from phase8.optim.muon import Muon, matrices_of
from phase8.optim.state import DeclareState, declared_by
from phase8.optim.whole_matrices import WholeMatrices
from phase8.plan.stages import chunk_layers
from phase8.precision.policy import compute_dtype, number_format
from phase8.topology import HOLDERS
from phase8.train.engine.shards import Shards
from phase8.train.engine.stage import Stage
from phase8.zero.fsdp import arrivals_of_chunk, copies_of_chunk, shard_block, shard_model


@dataclass(frozen=True)
class TrainState:
    """One rank's part of a model and its optimizer.

    Args:
        stage: Pipeline stage of this rank.
        shards: Parts of the parameters that this rank's optimizer updates.
        optimizer: Optimizer of the shards.
    """

    stage: Stage
    shards: Shards
    optimizer: torch.optim.Optimizer

    @property
    def mesh(self) -> Mesh:
        """The mesh of the ranks over which the model is divided."""
        return self.stage.mesh

    @property
    def device(self) -> torch.device:
        """The device on which the model computes; offloaded parameters lie in host memory between uses."""
        return self.stage.device

    @property
    def model(self) -> LanguageModel:
        """This rank's part of the model, for a stage of a single chunk."""
        (model,) = self.stage.chunks
        return model


def build_train_state(config: RunConfig, *, mesh: Mesh, device: torch.device, dtype: torch.dtype) -> TrainState:
    """Builds the model of a config with its first weights, divided over the ranks, and its optimizer.

    Args:
        config: Config with model, optimizer, recomputation, pipeline and ZeRO.
        mesh: Mesh of the ranks.
        device: Device on which the model computes.
        dtype: Dtype of the residual stream.
    """
    chunks = build_chunks(config, mesh=mesh, device=device, dtype=dtype)
    decayed_names = set().union(*(decayed_parameter_names(chunk) for chunk in chunks))
    stage = Stage(chunks, pipeline_of(config.parallel), mesh, zero=config.zero, device=device)
    # Parameters in host memory (`zero.offload_params`) have their parts there already.
    offload = config.zero.offload_optimizer == "cpu" and config.zero.offload_params == "none"
    experts = mesh.ep if mesh.shard.size == 1 else ALONE  # the ranks of several shards are those of ep too
    shards = Shards(stage.module, tensor_axis=mesh.tp, holders=mesh.axes(HOLDERS), experts=experts, offload=offload, copies=stage.copies)
    if config.optim.name == "muon":
        matrices = WholeMatrices(matrices_of(shards.whole), groups_of_holders(mesh), device=device)
        size = config.model.head_width
        optimizer: torch.optim.Optimizer = Muon(
            shards.parts,
            config.optim,
            wholes=matrices,
            head_size=size,
            decayed_names=decayed_names,
            dtype=None if dtype == torch.bfloat16 else dtype,  # who trains in wider numbers wants no rounding
        )
    else:
        optimizer = build_optimizer(shards.parts, config.optim, decayed_names=decayed_names)
    require_divisible(shards, declared_by(optimizer))
    return TrainState(stage, shards, optimizer)


def require_divisible(shards: Shards, declare: DeclareState) -> None:
    """Refuses an optimizer that updates a parameter as a whole where ranks hold only parts of that parameter.

    Raises:
        ConfigError: There is such a parameter.
    """
    for name, whole in shards.whole.items():
        if shards.parts[name].shape != whole.shape and not declare(name, whole.shape).is_divisible:
            raise ConfigError(
                f"optim.name is an optimizer that updates {name} as a whole, but ranks divide it; set zero.stage to 0 and "
                "parallel.tensor_parallel_size to 1, or choose adamw."
            )


def build_chunks(config: RunConfig, *, mesh: Mesh, device: torch.device, dtype: torch.dtype) -> list[LanguageModel]:
    """Builds the chunks of this rank's stage with their first weights, divided over the ranks; on device `meta` they have shapes only."""
    layers_of_chunks = chunk_layers(config.model, pipeline_of(config.parallel), mesh.pp.index)
    chunks = [build_chunk(config, layers, mesh=mesh, dtype=dtype) for layers in layers_of_chunks]
    num_microbatches = batch_shape(config.train, config.parallel, data_parallel_size=mesh.topology.data_parallel_size).num_microbatches
    for chunk in chunks:
        parts, arrivals, copies = (*chunk.blocks.values(), chunk), arrivals_of_chunk(config.zero, mesh), copies_of_chunk(config.zero, mesh)
        for part in initialised_parts(chunk, parts, device=device, seed=config.train.seed, axis=mesh.tp, expert=mesh.ep):
            if part is chunk:
                shard_model(chunk, config.zero, mesh, num_microbatches=num_microbatches)
            else:
                dims, rounded = shard_dims(part), rounded_parameters(part)
                shard_block(
                    part, config.zero, mesh, dims,
                    rounded=rounded, dtype=dtype, num_microbatches=num_microbatches, arrivals=arrivals, copies=copies,
                )  # fmt: skip
        if isinstance(chunk, FSDPModule):
            register_fsdp_forward_method(chunk, "loss_sum")
    return chunks


def build_chunk(config: RunConfig, layers: range, *, mesh: Mesh, dtype: torch.dtype) -> LanguageModel:
    """Builds some layers of the model, with parameters of their global shapes on the meta device and with recomputation as the config says."""
    chunk = build_model(
        config.model,
        dtype=dtype,
        device=torch.device("meta"),
        axis=mesh.tp,
        number_format=number_format(config.precision),
        plain_layers=config.precision.bf16_layers,
        layers=layers,
        context=mesh.cp,
        expert=mesh.ep,
    )
    train = config.train
    apply_recomputation(
        chunk,
        train.recompute,
        every_n_layers=train.recompute_every_n_layers,
        slice_tokens=train.recompute_slice_tokens,
        offload_inputs=train.offload_activations == "cpu",
    )
    return chunk


def whole_model(train_state: TrainState, config: RunConfig) -> Callable[[], LanguageModel] | None:
    """Gathers the tensors of the whole model on the first rank, a collective of all ranks; returns what puts it together there, None elsewhere."""
    if train_state.mesh.device_mesh is None:
        return lambda: train_state.model
    tensors = collected(dict(train_state.stage.module.state_dict(keep_vars=True)), train_state.mesh)
    if train_state.mesh.rank != 0:
        return None
    return partial(model_with, tensors, config, train_state.device)


@torch.no_grad()
def model_with(tensors: Mapping[str, Tensor], config: RunConfig, device: torch.device) -> LanguageModel:
    """Builds a whole model on a device with copies of tensors, which are named as in its state."""
    model = build_model(config.model, dtype=compute_dtype(config.precision), device=device)
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensor.copy_(tensors[name])
    return model
