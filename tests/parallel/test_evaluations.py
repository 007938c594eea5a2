"""Evaluations between steps: they see the weights of their moment, and steps go on as if there had been none, launched or recorded."""

import os
from contextlib import closing

import pytest
import torch

from phase8.config.auto import without_auto
from phase8.config.load import load_config
from phase8.train.engine.fsdp import FsdpEngine
from tests.parallel import test_gpu_parity, training
from tests.parallel.pool import NCCL
from tests.parallel.test_gpu_parity import RECORDED, TOLERANCE, require_gpus
from tests.parallel.test_parity import BLOCKS, OFFLOADED, ranks
from tests.parallel.training import microbatches_of, new_train_state, take_step

LAYOUTS = {
    "dp2": ("default", ranks(dp=2)),
    "dp2 zero 1": ("default", ranks(dp=2, stage=1)),
    "dp2 zero 3": ("default", ranks(dp=2, stage=3)),
    "dp2 zero 3 offloaded": ("default", ranks(dp=2, more=OFFLOADED)),
    "one offloaded": ("default", ranks(more=OFFLOADED)),
    "cp2 zero 1": ("default", ranks(cp=2, stage=1)),
    "ep2 zero 1": ("experts", ranks(dp=2, ep=2, stage=1)),
    "pp2 dp2": ("default", ranks(pp=2, dp=2)),
}


def new_engine(settings, world_size, *, device_type="cpu", dtype=torch.float64, model=training.MODEL):
    config = without_auto(load_config(os.devnull, [*model, *settings]))
    return FsdpEngine(new_train_state(config, world_size, device_type=device_type, dtype=dtype), config), config


def loss_of_step(engine, config, number):
    return take_step(engine, config, number, how=engine.update).loss


def held_out_loss(engine, config):
    return engine.evaluate(microbatches_of(engine, config, 99))[0]


def losses_of_weights_that_python_does_not_see_change(settings, world_size):
    """A job. A replay changes the parts of the weights, and nothing of FSDP runs."""
    torch.set_default_dtype(torch.float64)
    engine, config = new_engine(settings, world_size)
    found = [loss_of_step(engine, config, 0), held_out_loss(engine, config)]
    for part in engine.train_state.shards.parts.values():
        part.detach().mul_(1.3)
    found += [held_out_loss(engine, config), loss_of_step(engine, config, 1), held_out_loss(engine, config)]
    torch.set_default_dtype(torch.float32)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_evaluation_sees_the_weights_of_its_moment(pool, layout):
    block, (world_size, settings) = LAYOUTS[layout]
    (expected,) = pool.run(losses_of_weights_that_python_does_not_see_change, BLOCKS[block], 1, world_size=1)
    for found in pool.run(losses_of_weights_that_python_does_not_see_change, (*BLOCKS[block], *settings), world_size, world_size=world_size):
        assert found == pytest.approx(expected, rel=1e-9)


def losses_on_gpus(settings, world_size):
    """A job: losses of twelve steps, with evaluations after the second, before a recording, and after each replay; a recording is freed once."""
    settings = (*settings, "precision.dtype=fp32")
    engine, config = new_engine(settings, world_size, device_type="cuda", dtype=torch.float32, model=test_gpu_parity.MODEL)
    with closing(engine):
        found = []
        for number in range(12):
            if number == 8:
                engine.close()
            found.append(loss_of_step(engine, config, number))
            if number >= 1:
                found.append(held_out_loss(engine, config))
        return found


RECORDED_LAYOUTS = {
    **{f"dp2 zero {stage}": ranks(dp=2, stage=stage) for stage in range(4)},
    "dp2 zero 3 gathered by copies": ranks(dp=2, stage=3, more=("zero.copy_engine_gather=true",)),
    "tp2 asynchronous": ranks(tp=2, more=("parallel.async_tensor_parallel=true",)),
    "cp2 zero 1": ranks(cp=2, stage=1),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", RECORDED_LAYOUTS)
def test_recorded_steps_and_evaluations_do_not_disturb_each_other(pool, name):
    require_gpus(2)
    world_size, settings = RECORDED_LAYOUTS[name]
    more = {"world_size": world_size, "backend": NCCL, "timeout_seconds": 240}
    (launched, _), (recorded, _) = (
        pool.run(losses_on_gpus, (*settings, *how), world_size, **more) for how in ((), (RECORDED,))
    )  # fmt: skip
    assert recorded == pytest.approx(launched, rel=TOLERANCE["fp32"][0])
