"""A few steps of training on any topology, as a job of the pool and in one process: what parity compares."""

import functools
import os
import zlib
from contextlib import closing, nullcontext

import torch

from phase8.config.auto import without_auto
from phase8.config.batch import run_topology
from phase8.config.load import load_config
from phase8.config.validate import validate
from phase8.data.microbatch import split_sample
from phase8.distributed.mesh import build_mesh
from phase8.distributed.placement import collected, own_region
from phase8.kernels.backends import select_kernels
from phase8.precision.policy import set_matmul_precision
from phase8.train.engine.captured_step import CapturedStep
from phase8.train.engine.compilation import compile_modules
from phase8.train.engine.step import train_step
from phase8.train.engine.train_state import build_train_state
from phase8.zero.fsdp import shard_size
from tests.parallel.mutations import MUTATIONS

MODEL = (
    "train.global_batch_size=8", "model.d_model=24", "model.num_layers=2", "model.num_heads=4", "model.vocab_size=61", "model.sequence_length=24",
    "model.ffn_size=40", "model.local_window_size=[5,12]", "optim.learning_rate=1e-2", "optim.gradient_clip_norm=1.0", "train.seed=3",
)  # fmt: skip


def train_steps(settings, num_steps, world_size=1, mutation=None, *, device_type="cpu", dtype=torch.float64, model=MODEL):
    """Losses, gradient norms and final weights; weights are whole, on the host, on rank 0, and missing elsewhere.

    Args:
        settings: Overrides of the config, after those of `model`.
        num_steps: Optimizer steps.
        world_size: Ranks, of which this is one.
        mutation: Name of a mistake to make meanwhile.
        device_type: `cuda`: the current device, with the kernels of training.
        dtype: Of the residual stream; weights have it too, but are float32 for bfloat16.
        model: Model, batch and optimizer.
    """
    torch.set_default_dtype(torch.float32 if dtype == torch.bfloat16 else dtype)
    try:
        with MUTATIONS[mutation]() if mutation else nullcontext():
            config = without_auto(load_config(os.devnull, [*model, *settings]))
            validate(config, world_size=world_size)
            return _train_steps(config, num_steps, world_size, device_type, dtype)
    finally:
        torch.set_default_dtype(torch.float32)


def _train_steps(config, num_steps, world_size, device_type, dtype):
    train_state = new_train_state(config, world_size, device_type=device_type, dtype=dtype)
    torch._dynamo.reset()  # processes of the pool have compiled the blocks of earlier cases
    compile_modules(train_state.stage.chunks, config)
    with closing(CapturedStep(train_state)) if config.train.cuda_graphs else nullcontext() as recorded:
        results = [take_step(train_state, config, step, how=recorded) for step in range(num_steps)]
    weights = collected({name: parameter.detach() for name, parameter in train_state.stage.module.named_parameters()}, train_state.mesh)
    return [(result.loss, result.grad_norm) for result in results], {name: value.to("cpu", copy=True) for name, value in weights.items()}


def new_train_state(config, world_size, *, device_type, dtype):
    """A train state whose parameters have none of their initial values."""
    device = torch.device(device_type, torch.cuda.current_device()) if device_type == "cuda" else torch.device(device_type)
    set_matmul_precision(config.precision)
    select_kernels(config.train.kernels, device)
    topology = run_topology(config.parallel, world_size=world_size)
    size = shard_size(config.zero, num_token_ranks=topology.num_token_ranks)
    mesh = build_mesh(topology, device_type=device_type, shard_size=size, async_tensor_parallel=config.parallel.async_tensor_parallel)
    train_state = build_train_state(config, mesh=mesh, device=device, dtype=dtype)
    perturb(train_state)
    return train_state


def take_step(train_state, config, step, how=None):
    """One optimizer step on the sequences of that number, by `train_step` or something else."""
    microbatches, how = microbatches_of(train_state, config, step), how or functools.partial(train_step, train_state)
    return how(microbatches, learning_rate=config.optim.learning_rate, gradient_clip_norm=config.optim.gradient_clip_norm)


def microbatches_of(train_state, config, step):
    """Packed documents of unequal numbers, ten in the last sequence, so that microbatches differ in how many targets count."""
    generator = torch.Generator().manual_seed(step)
    length, batch = config.model.sequence_length + 1, config.train.global_batch_size
    tokens = torch.randint(0, config.model.vocab_size, (batch, length), generator=generator)
    starts = torch.rand(batch, length, generator=generator) < torch.linspace(0.0, 10 / length, batch)[:, None]
    starts[:, 0] = True
    index, readers = train_state.mesh.data_parallel_index, train_state.mesh.topology.data_parallel_size
    at_least = batch // readers // 2 if train_state.mesh.pp.size == 1 else 2  # two microbatches accumulate as more do; stages pass on more of them
    micro = config.train.micro_batch_size or max(2, at_least)
    own = train_state.mesh.own_slice
    return [
        microbatch_of_slice(tokens[first : first + micro], starts[first : first + micro], own)
        for first in range(index * micro, batch, readers * micro)
    ]


def microbatch_of_slice(tokens, starts, own_slice):
    """The microbatch of a slice of whole sequences, tokens and starts of documents [B, T + 1]; no starts: boundaries are not reset."""
    own = own_slice.tokens(tokens.shape[1] - 1)
    sample = {"tokens": tokens[:, own.start : own.stop + 1], "document_starts": starts}
    return split_sample(sample, reset_at_document_boundaries=starts is not None, own_slice=own_slice)


def own_slice(value, whole):
    """What this rank holds of `whole`, of a tensor of its shape."""
    own = own_region(whole)
    for dim, (offset, length) in enumerate(zip(own.offsets, own.shape, strict=True)):
        value = value.narrow(dim, offset, length)
    return value


@torch.no_grad()
def perturb(train_state):
    """Moves every parameter off its initial value, by a function of its place that every topology computes alike: zeros hide errors."""
    for name, part in train_state.shards.parts.items():
        whole = train_state.shards.whole[name]
        noise = 0.1 * torch.randn(whole.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        part += own_slice(noise, whole).to(part.device)
    train_state.shards.write_back()
