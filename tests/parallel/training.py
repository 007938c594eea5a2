"""A few steps of training on any topology, as a job of the pool and in one process: what parity compares."""

import os
from contextlib import nullcontext

import torch
from mutations import MUTATIONS

from phase8.config.batch import run_topology
from phase8.config.load import load_config
from phase8.config.validate import validate
from phase8.distributed.mesh import build_mesh
from phase8.distributed.placement import gathered, own_slice
from phase8.train.learner import build_learner
from phase8.train.step import split_sample, train_step
from phase8.zero.fsdp import shard_size

CPU = torch.device("cpu")
GLOBAL_BATCH = 8
MODEL = (
    "model.d_model=24", "model.num_layers=2", "model.num_heads=4", "model.vocab_size=61", "model.sequence_length=24", "model.ffn_size=40",
    "model.local_window_size=[5,12]", "optim.learning_rate=1e-2", "optim.gradient_clip_norm=1.0", "train.seed=3",
)  # fmt: skip


def train_steps(settings, num_steps, world_size=1, mutation=None):
    """Losses, gradient norms and final weights and moments, in float64; weights are whole on rank 0, None elsewhere."""
    with MUTATIONS[mutation]() if mutation else nullcontext():
        return _train_steps(settings, num_steps, world_size)


def _train_steps(settings, num_steps, world_size):
    torch.set_default_dtype(torch.float64)
    try:
        config = load_config(os.devnull, [*MODEL, f"train.global_batch_size={GLOBAL_BATCH}", *settings])
        validate(config, world_size=world_size)
        topology = run_topology(config.parallel, world_size=world_size)
        size = shard_size(config.zero, data_parallel_size=topology.data_parallel_size)
        mesh = build_mesh(topology, device_type="cpu", shard_size=size)
        learner = build_learner(config, mesh=mesh, device=CPU, dtype=torch.float64)
        perturb(learner)
        results = [_step(learner, config, step) for step in range(num_steps)]
        state = {name: parameter.detach() for name, parameter in learner.model.named_parameters()}
        weights = gathered(state, keep=mesh.rank == 0)
        return [(result.loss, result.grad_norm) for result in results], {name: value.clone() for name, value in weights.items()}
    finally:
        torch.set_default_dtype(torch.float32)


def _step(learner, config, step):
    """Packed documents of unequal numbers, so that microbatches differ in how many targets count."""
    generator = torch.Generator().manual_seed(step)
    length, micro = config.model.sequence_length + 1, config.train.micro_batch_size or 2
    tokens = torch.randint(0, config.model.vocab_size, (GLOBAL_BATCH, length), generator=generator)
    starts = torch.rand(GLOBAL_BATCH, length, generator=generator) < torch.linspace(0.0, 0.4, GLOBAL_BATCH)[:, None]
    starts[:, 0] = True
    index, readers = learner.mesh.data_parallel_index, learner.mesh.topology.data_parallel_size
    microbatches = [
        split_sample({"tokens": tokens[first : first + micro], "document_starts": starts[first : first + micro]}, reset_at_document_boundaries=True)
        for first in range(index * micro, GLOBAL_BATCH, readers * micro)
    ]
    return train_step(learner, microbatches, learning_rate=1e-2, gradient_clip_norm=config.optim.gradient_clip_norm)


@torch.no_grad()
def perturb(learner):
    """Moves every parameter off its initial value, by a function of its place that every topology computes alike: zeros hide errors."""
    for number, (name, part) in enumerate(learner.shards.parts.items()):
        whole = learner.shards.whole[name]
        noise = 0.1 * torch.randn(whole.shape, generator=torch.Generator().manual_seed(number))
        part += own_slice(noise, whole)
    learner.shards.write_back()
