"""Ranks that share sequences compute with the Triton kernels, interpreted, what one process computes with plain torch.

Parity on CPUs runs the references; the kernels see what ranks make of their inputs, such as views of a whole batch, on GPUs and here.
"""

import importlib
import pkgutil
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import pytest
import torch

import phase8.kernels
from tests.parallel.test_gpu_parity import TOLERANCE, difference
from tests.parallel.test_parity import BLOCKS, ranks
from tests.parallel.training import train_steps

# Slices of 64 tokens, which the kernels take, in microbatches of two sequences.
MODEL = (
    "model.d_model=16", "model.num_layers=1", "model.num_heads=2", "model.head_size=8", "model.vocab_size=31", "model.sequence_length=128",
    "model.ffn_size=16", "model.local_window_size=20", "train.global_batch_size=2", "train.seed=3", "precision.dtype=fp32",
    "optim.learning_rate=1e-3", "optim.eps=1e-3", "optim.gradient_clip_norm=1.0", "train.micro_batch_size=2",
)  # fmt: skip


@contextmanager
def interpreted_kernels():
    """Every operation runs its Triton kernels on the CPU."""
    from phase8.kernels import mixer_inputs, window_attention

    with ExitStack() as stack:
        for module in pkgutil.iter_modules(phase8.kernels.__path__, "phase8.kernels."):
            if not module.ispkg and hasattr(place := importlib.import_module(module.name), "uses_triton"):
                stack.enter_context(patch.object(place, "uses_triton", lambda x: True))
        for place in (mixer_inputs, window_attention):  # on a CPU their functions are the references
            name = place.__name__.rpartition(".")[2]
            stack.enter_context(patch(f"phase8.model.mixer.{name}", place._by_operator))
        yield


def train(settings, num_steps, world_size, interpreted):
    with interpreted_kernels() if interpreted else ExitStack():
        return train_steps(settings, num_steps, world_size, dtype=torch.float32, model=MODEL)


@pytest.mark.parametrize("block", ["default", pytest.param("delta", marks=pytest.mark.full)])
def test_slices_equal_one_process(pool, block):
    world_size, settings = ranks(cp=2)
    found = pool.run(train, (*BLOCKS[block], *settings), 1, world_size, True, world_size=world_size, timeout_seconds=240)[0]
    found = difference(found, train(BLOCKS[block], 1, 1, False), train(BLOCKS[block], 0, 1, False))
    assert found.within(TOLERANCE["fp32"]), found
