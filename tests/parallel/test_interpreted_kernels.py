"""Ranks compute with the Triton kernels, interpreted, what one process computes with plain torch.

Parity on CPUs runs the references; the kernels see what ranks make of their inputs, such as views of a whole batch, on GPUs and here.
"""

import importlib
import itertools
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
SLICES = ("train.recompute=slices", "train.recompute_slice_tokens=64")
CASES = {
    "default cp2": ("default", ranks(cp=2)),
    "delta cp2": ("delta", ranks(cp=2)),
    "values cp2": ("values", ranks(cp=2)),
    "values tp2": ("values", ranks(tp=2)),
    "whole tp2": ("whole", ranks(tp=2)),
    "low-rank tp2": ("low-rank", ranks(tp=2)),
    "low-rank cp2": ("low-rank", ranks(cp=2)),
    "whole in slices": ("whole", ranks(more=SLICES)),
    "delta-options in slices": ("delta-options", ranks(more=SLICES)),
    "experts ep2": ("experts", ranks(dp=2, ep=2, more=("train.global_batch_size=4",))),
}
QUICK = ("default cp2",)


@contextmanager
def interpreted_kernels():
    """Every operation runs its Triton kernels on the CPU, as training on a GPU does."""
    modules = [module.name for module in pkgutil.iter_modules(phase8.kernels.__path__, "phase8.kernels.") if not module.ispkg]
    answers = {"uses_triton": lambda x: True, "keeps_for_backward": lambda x: False}
    with ExitStack() as stack:
        for module, (name, answer) in itertools.product((*modules, "phase8.model.mixer"), answers.items()):
            if not module.endswith(".backends") and hasattr(place := importlib.import_module(module), name):
                stack.enter_context(patch.object(place, name, answer))
        yield


def train(settings, num_steps, world_size, interpreted):
    with interpreted_kernels() if interpreted else ExitStack():
        return train_steps(settings, num_steps, world_size, dtype=torch.float32, model=MODEL)


@pytest.mark.parametrize("case", [pytest.param(name, marks=() if name in QUICK else pytest.mark.full) for name in CASES])
def test_ranks_equal_one_process(pool, case):
    block, (world_size, settings) = CASES[case]
    block = (*BLOCKS[block], *(key for key in settings if key.startswith("train.global_batch_size")))
    found = pool.run(train, (*block, *settings), 1, world_size, True, world_size=world_size, timeout_seconds=240)[0]
    found = difference(found, train(block, 1, 1, False), train(block, 0, 1, False))
    assert found.within(TOLERANCE["fp32"]), found
