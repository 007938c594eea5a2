"""An auxiliary loss that blocks return is minimised beside the main loss and measured, the same on every topology."""

import os
from contextlib import nullcontext

import pytest
import torch

from phase8.config.auto import without_auto
from phase8.config.load import load_config
from phase8.distributed.placement import collected
from phase8.model import model
from tests.parallel.mutations import replaced
from tests.parallel.test_parity import INTERLEAVED, ranks
from tests.parallel.training import MODEL, new_train_state, take_step

NUM_STEPS = 2
TOPOLOGIES = {
    "pp2": ranks(pp=2, more=("model.num_layers=4",)),
    "pp2 interleaved": ranks(pp=2, more=(*INTERLEAVED, "model.num_layers=4")),
    "tp2 pp2": ranks(tp=2, pp=2, more=("model.num_layers=4",)),
    "pp2 dp2 zero 3": ranks(pp=2, dp=2, stage=3, more=("model.num_layers=4",)),
    "tp2, recomputed": ranks(tp=2, more=("model.num_layers=4", "train.recompute=full")),
}


class LoudBlock(model.Block):
    """A block that finds its stream too large; the last two of four layers, a stage of their own, do not know one of the losses."""

    @staticmethod
    def auxiliary_losses(section):
        return ("square", "fourth")

    def __init__(self, section, layer, **options):
        super().__init__(section, layer, **options)
        self.layer = layer

    def forward(self, x, angles, starts=None, state=None, embedded=None):
        x, state, _ = super().forward(x, angles, starts, state, embedded)
        square = 0.1 * x.square().mean(-1).sum()
        return x, state, {"square": square, "fourth": (x**4).mean(-1).sum()} if self.layer < 2 else {"square": square}


def train(settings, world_size, loud=True):
    """Numbers of each step, and the final weights on rank 0."""
    torch.set_default_dtype(torch.float64)
    try:
        with replaced((model, "Block"), by=lambda old: LoudBlock) if loud else nullcontext():
            config = without_auto(load_config(os.devnull, [*MODEL, *settings]))
            learner = new_train_state(config, world_size, device_type="cpu", dtype=torch.float64)
            results = [take_step(learner, config, step) for step in range(NUM_STEPS)]
            weights = collected({name: parameter.detach() for name, parameter in learner.stage.module.named_parameters()}, learner.mesh)
    finally:
        torch.set_default_dtype(torch.float32)
    measured = [(result.loss, result.grad_norm, result.auxiliary_losses) for result in results]
    return measured, {name: weight.clone() for name, weight in weights.items()}


@pytest.fixture(scope="module")
def alone(pool):
    return pool.run(train, ("model.num_layers=4",), 1, world_size=1)[0]


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_equals_one_process(pool, alone, name):
    world_size, settings = TOPOLOGIES[name]
    (measured, weights), *others = pool.run(train, settings, world_size, world_size=world_size)
    assert all(other == measured for other, _ in others)
    for (loss, norm, auxiliary), (expected_loss, expected_norm, expected) in zip(measured, alone[0], strict=True):
        assert (loss, norm) == pytest.approx((expected_loss, expected_norm), rel=1e-10)
        assert list(auxiliary) == ["square", "fourth"] and auxiliary == pytest.approx(expected, rel=1e-10)
    for weight_name, weight in alone[1].items():
        torch.testing.assert_close(weights[weight_name], weight, rtol=1e-8, atol=1e-8)


def test_they_change_what_is_learnt_and_are_not_part_of_the_loss(pool, alone):
    measured, _ = pool.run(train, ("model.num_layers=4",), 1, False, world_size=1)[0]
    assert measured[0][0] == alone[0][0][0] and measured[0][2] == {}
    assert measured[0][1] != pytest.approx(alone[0][0][1], rel=1e-3) and measured[-1][0] != pytest.approx(alone[0][-1][0], rel=1e-6)
