"""An optimizer that keeps other state of matrices than of vectors: saved by some ranks, rewritten for others, resumed there bit for bit."""

import math
import os
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from phase8.checkpoint.load import open_checkpoint
from phase8.checkpoint.reshard.reshard import reshard
from phase8.config.auto import without_auto
from phase8.config.batch import run_topology
from phase8.config.load import load_config
from phase8.config.pipeline import pipeline_of
from phase8.distributed.placement import collected
from phase8.errors import CheckpointCorruptError, CheckpointError, CheckpointMismatchError, ConfigError
from phase8.optim.state import ParameterState, StateTensor, adamw_state, declared_by
from phase8.plan.chunks import stage_tensors
from phase8.train.engine import train_state as train_state_module
from phase8.train.engine.train_state import require_divisible
from tests.parallel.test_checkpoints import BLOCK, TOPOLOGIES, load_and_go_on, restore, start, state_of, train_and_save
from tests.parallel.training import MODEL


def two_kinds(name, shape):
    """One buffer for a matrix, two moments and no counter for anything else."""
    return ParameterState((StateTensor("momentum"),) if len(shape) > 1 else (StateTensor("exp_avg"), StateTensor("exp_avg_sq")))


class TwoKinds(torch.optim.Optimizer):
    """Momentum for matrices and RMS for the rest; clips and skips as torch's fused optimizers do."""

    def __init__(self, groups, whole_dims):
        super().__init__(groups, {"lr": 0.0})
        self.whole_dims = whole_dims

    def declare_state(self, name, shape):
        return two_kinds(name, shape)

    @torch.no_grad()
    def step(self):
        if self.found_inf.item():
            return
        for group in self.param_groups:
            for part in group["params"]:
                gradient, state = part.grad / self.grad_scale, self.state[part]
                keys = [tensor.key for tensor in two_kinds("", [1] * self.whole_dims[part]).tensors]
                for key in keys:
                    state.setdefault(key, torch.zeros_like(part))
                first = state[keys[0]].mul_(0.9).add_(gradient)
                if len(keys) > 1:
                    first = first / state["exp_avg_sq"].mul_(0.9).addcmul_(gradient, gradient).sqrt().add_(1e-3)
                part.add_(first, alpha=-1e-3 * group["lr"])


@contextmanager
def optimizing_two_kinds():
    original = train_state_module.build_optimizer

    def build(parameters, section, *, decayed_names):
        return TwoKinds([{"params": list(parameters.values())}], {part: part.dim() for part in parameters.values()})

    train_state_module.build_optimizer = build
    try:
        yield
    finally:
        train_state_module.build_optimizer = original


def with_two_kinds(job, *arguments):
    with optimizing_two_kinds():
        return job(*arguments)


def load(settings, world_size, path):
    """What all ranks have restored together (on the first one)."""
    _, train_state = start(settings, world_size)
    restore(train_state, path)
    return {name: tensor.clone() for name, tensor in collected(state_of(train_state), train_state.mesh).items()}


@pytest.mark.parametrize("there", ["tp2", "dp2 zero 3 offloaded"])
def test_it_is_saved_rewritten_and_resumed_bit_for_bit(pool, tmp_path, there):
    world_size, settings = TOPOLOGIES["dp4 zero 1"]
    (saved, loss), *_ = pool.run(with_two_kinds, train_and_save, settings, world_size, tmp_path, world_size=world_size)
    source = open_checkpoint(tmp_path / "step-0000000002")
    kept = {name for name in saved if name.startswith("optimizer.")}
    assert "optimizer.head.weight.momentum" in kept or "optimizer.embedding.weight.momentum" in kept
    assert {"optimizer.norm.weight.exp_avg", "optimizer.norm.weight.exp_avg_sq"} <= kept and "optimizer.norm.weight.momentum" not in kept

    num_ranks, options = TOPOLOGIES[there]
    config = without_auto(load_config(os.devnull, [*MODEL, *BLOCK, *options]))
    layout = {"stages": stage_tensors(config.model, pipeline_of(config.parallel)), "topology": run_topology(config.parallel, world_size=num_ranks)}
    with pytest.raises(CheckpointMismatchError, match="is nothing that its optimizer keeps"):
        reshard(source, tmp_path / "c", **layout, declare=adamw_state, on_progress=lambda *_: None)
    copy = reshard(source, tmp_path / "d", **layout, declare=two_kinds, on_progress=lambda *_: None)
    restored, *_ = pool.run(with_two_kinds, load, options, num_ranks, copy.path, world_size=num_ranks)
    assert restored.keys() == saved.keys() and all(torch.equal(restored[name], tensor) for name, tensor in saved.items())
    resumed, *_ = pool.run(with_two_kinds, load_and_go_on, settings, world_size, copy.path, world_size=world_size)
    assert resumed == loss and math.isfinite(loss)


def test_a_checkpoint_of_adamw_does_not_fit_it(pool, tmp_path):
    world_size, settings = TOPOLOGIES["tp2"]
    pool.run(train_and_save, settings, world_size, tmp_path, world_size=world_size)
    found = pool.run(refusal, settings, world_size, tmp_path / "step-0000000002", world_size=world_size)
    assert all("that the optimizer keeps of this parameter" in each for each in found)


def refusal(settings, world_size, path):
    with optimizing_two_kinds():
        _, train_state = start(settings, world_size)
    with pytest.raises((CheckpointMismatchError, CheckpointCorruptError)) as caught:
        restore(train_state, path)
    return str(caught.value)


def test_an_optimizer_that_needs_whole_matrices_is_refused_where_they_are_divided():
    whole, part = torch.zeros(4, 2), torch.zeros(2, 2)

    def declare(name, shape):
        return ParameterState((StateTensor("momentum"),), is_divisible=len(shape) < 2)

    require_divisible(SimpleNamespace(whole={"w": whole}, parts={"w": whole}), declare)
    require_divisible(SimpleNamespace(whole={"w": whole[0]}, parts={"w": part[0]}), declare)
    require_divisible(SimpleNamespace(whole={"w": whole}, parts={"w": part}), adamw_state)
    with pytest.raises(ConfigError, match="updates w as a whole, but ranks divide it"):
        require_divisible(SimpleNamespace(whole={"w": whole}, parts={"w": part}), declare)


def test_an_optimizer_that_declares_nothing_is_refused():
    with pytest.raises(CheckpointError, match="SGD does not declare what it keeps"):
        declared_by(torch.optim.SGD([torch.zeros(1, requires_grad=True)]))
