"""Steps of training with linear layers in fp8, on any topology, as a job of the pool: what tests/parallel/test_fp8_layouts.py compares.

Widths from 16 on are multiplied in fp8 here, not from 256 on, so that a model of a few thousand weights has every kind of such layers, and a slice
of two sequences has rows enough. Weights of a matrix grow along both of its dims, so that the parts of ranks have unlike largest numbers.
"""

import os
from contextlib import contextmanager, nullcontext
from unittest import mock

import torch

from phase8.checkpoint.load import open_checkpoint
from phase8.checkpoint.save import save_checkpoint
from phase8.config import precision
from phase8.config.auto import without_auto
from phase8.config.load import load_config
from phase8.config.validate import validate
from phase8.distributed.placement import collected
from phase8.precision import fp8
from tests.parallel.mutations import MUTATIONS_OF_FP8
from tests.parallel.test_checkpoints import restore, save, state_of
from tests.parallel.training import MODEL, new_train_state, own_slice, take_step

FP8_MODEL = (
    *MODEL, "model.d_model=64", "model.ffn_size=64", "model.sequence_length=32", "precision.linear=fp8", "precision.bf16_layers=0",
    "train.micro_batch_size=2", "optim.gradient_clip_norm=1e9",
)  # fmt: skip


@contextmanager
def thin_layers_too():
    """Layers from sixteen features on are multiplied in fp8."""
    with mock.patch.object(precision, "LEAST_WIDTH", 16), mock.patch.object(fp8, "LEAST_WIDTH", 16):
        yield


def start(settings, world_size, dtype):
    """A valid config and a train state."""
    torch.set_default_dtype(torch.float32 if dtype == torch.bfloat16 else dtype)
    config = without_auto(load_config(os.devnull, [*FP8_MODEL, *settings]))
    validate(config, world_size=world_size)
    train_state = new_train_state(config, world_size, device_type="cpu", dtype=dtype)
    slope(train_state)
    return config, train_state


@torch.no_grad()
def slope(train_state):
    """Multiplies matrices by numbers that grow along both dims, by the same on every topology."""
    for name, part in train_state.shards.parts.items():
        whole = train_state.shards.whole[name]
        if whole.ndim == 2:
            rows, columns = (torch.linspace(0.5, 2.0, size) for size in whole.shape)
            part *= own_slice(rows[:, None] * columns, whole).to(part.device)
    train_state.shards.write_back()


def whole_state(train_state):
    """Everything that a checkpoint would hold, on the first rank."""
    return {name: tensor.clone() for name, tensor in collected(state_of(train_state), train_state.mesh).items()}


def fp8_steps(settings, num_steps, world_size=1, mutation=None, dtype=torch.float64):
    """Losses and gradient norms of steps, and the whole state after them, on the first rank."""
    try:
        with thin_layers_too(), MUTATIONS_OF_FP8[mutation]() if mutation else nullcontext():
            config, train_state = start(settings, world_size, dtype)
            results = [take_step(train_state, config, step) for step in range(num_steps)]
            return [(each.loss, each.grad_norm) for each in results], whole_state(train_state)
    finally:
        torch.set_default_dtype(torch.float32)


def go_on(settings, world_size, root, dtype=torch.bfloat16):
    """A second step after a first one, and the same after the first one was saved and read by a new train state: result and state of each."""
    found = []
    try:
        with thin_layers_too():
            config, train_state = start(settings, world_size, dtype)
            take_step(train_state, config, 0)
            save(train_state, root, step=1)
            _, resumed = start(settings, world_size, dtype)
            restore(resumed, root / "step-0000000001")
            for each in (train_state, resumed):
                result = take_step(each, config, 1)
                found.append(((result.loss, result.grad_norm), whole_state(each)))
    finally:
        torch.set_default_dtype(torch.float32)
    return found


def steps_with_an_engine(settings, world_size, root):
    """Loss and gradient norm of two steps, and of the second one by a new engine that begins with a checkpoint of the first."""
    from tests.parallel.test_deepspeed import new_engine, step, whole_tensors

    results, states = [], []
    with thin_layers_too():
        for number in range(2):
            engine, config = new_engine((*FP8_MODEL, "optim.eps=1e-3", *settings), world_size)  # why: tests/parallel/test_deepspeed.py
            if number == 0:
                results.append(step(engine, config, 0))
                save_checkpoint(root, step=1, tensors=engine.state(), metadata={}, attachments={})
            else:
                engine.restore(open_checkpoint(root / "step-0000000001"))
            results.append(step(engine, config, 1))
            states.append(whole_tensors(engine))
    first, second = states
    assert first.keys() == second.keys() and all(torch.equal(second[name], tensor) for name, tensor in first.items())
    return [(each.loss, each.grad_norm) for each in results]
