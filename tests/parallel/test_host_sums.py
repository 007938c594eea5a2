"""Sums of gradients in host memory: the device adds, so the host has a new sum after each microbatch, bit for bit the one that FSDP makes there."""

import os
from unittest import mock

import pytest
import torch

from phase8.config.auto import without_auto
from phase8.config.load import load_config
from phase8.train.engine import stage as stage_module
from phase8.zero import fsdp
from phase8.zero.fsdp import sum_gradients_after
from tests.parallel import training
from tests.parallel.test_parity import OFFLOADED, SUMS_OFFLOADED, ranks
from tests.parallel.training import new_train_state, take_step

# Vocabulary and widths do not divide by two evenly everywhere, so ranks have parts of unequal sizes.
LAYOUTS = {
    "one": ranks(),
    "dp2": ranks(dp=2),
    "dp4 in pairs": ranks(dp=4, more=("zero.shard_size=2",)),
    "ep2": ranks(dp=2, ep=2, more=("model.ffn=moe", "model.num_experts=4", "model.expert_ffn_size=16")),
}


def sums_of_a_step(settings, world_size, how):
    """A job: the sums of three microbatches, of how many parameters the host has kept a sum's memory, and how many have one."""
    torch.set_default_dtype(torch.float64)
    config = without_auto(load_config(os.devnull, [*training.MODEL, *settings, *OFFLOADED, SUMS_OFFLOADED, "train.micro_batch_size=1"]))
    state = new_train_state(config, world_size, device_type="cpu", dtype=torch.float64)
    parts, before, kept, sums = dict(state.model.named_parameters()), {}, [], {}
    if how == "one is frozen":
        state.model.blocks["0"].get_parameter("mixer_norm.weight").requires_grad_(False)

    def watched(model, zero, *, is_last):
        now = {name: part.grad._local_tensor for name, part in parts.items() if part.grad is not None}
        kept.append(sum(now[name].data_ptr() == tensor.data_ptr() for name, tensor in before.items()))
        before.update(now)
        sum_gradients_after(model, zero, is_last=is_last)

    take = state.shards.take_gradients

    def remembered():
        sums.update({name: part.grad._local_tensor.clone() for name, part in parts.items() if part.grad is not None})
        take()

    adding = mock.patch.object(fsdp, "add_on_device", lambda model: None) if how == "fsdp" else mock.MagicMock()
    with mock.patch.object(stage_module, "sum_gradients_after", watched), mock.patch.object(state.shards, "take_gradients", remembered), adding:
        take_step(state, config, 0)
    torch.set_default_dtype(torch.float32)
    return kept, len(parts), sums


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_device_adds_what_fsdp_would_add_on_the_host(pool, name):
    world_size, settings = LAYOUTS[name]
    settings = (*settings, f"train.global_batch_size={3 * world_size}")
    of_ranks, of_fsdp = (pool.run(sums_of_a_step, settings, world_size, how, world_size=world_size) for how in ("device", "fsdp"))
    for (kept, number, sums), (kept_by_fsdp, _, expected) in zip(of_ranks, of_fsdp, strict=True):
        assert kept == [0, 0, 0] and kept_by_fsdp == [0, 0, number]
        assert len(sums) == number and all(torch.equal(sums[key], value) for key, value in expected.items())


def test_where_a_parameter_has_no_gradient_fsdp_adds(pool):
    settings = ("train.global_batch_size=3",)
    (found,), (expected,) = (pool.run(sums_of_a_step, settings, 1, how, world_size=1) for how in ("one is frozen", "fsdp"))
    assert 0 < found[0][2] < found[1]
    assert len(found[2]) == found[1] - 1 and all(torch.equal(value, expected[2][key]) for key, value in found[2].items())
