"""A second engine, torch's DistributedDataParallel over two ranks: the train loop, the saver and resuming know the protocol only."""

import math
import os
import socket
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from torch.nn.parallel import DistributedDataParallel

from phase8.checkpoint.load import list_checkpoints, open_checkpoint
from phase8.checkpoint.state import flat_state, restore_state
from phase8.model.model import build_model
from phase8.model.parameters import initialise
from phase8.train import build
from phase8.train.build import build_run
from phase8.train.engine.protocol import Replicas, StepResult
from phase8.train.loop import train
from tests.train.tiny_run import tiny_config

NUM_RANKS = 2
SETTINGS = ("checkpoint.every_n_steps=4", "train.check_replicas_every_n_steps=4", "train.num_steps=8", "train.evaluate_every_n_steps=4")


class LossSum(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model.loss_sum(batch.tokens, batch.targets, batch.starts)


class PlainEngine:
    """AdamW behind DDP. Every rank has as many targets, so DDP's mean of the gradients is that of the loss."""

    num_slow_updates = 1

    def __init__(self, config, *, mesh, device):
        self.mesh, self.device = mesh, device
        self.model = build_model(config.model, dtype=torch.float32, device=device)
        initialise(self.model, seed=config.train.seed)
        self.replica = DistributedDataParallel(LossSum(self.model))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)

    def update(self, microbatches, *, learning_rate, gradient_clip_norm, largest_loss=math.inf, stop=False, unreadable=False, report=None):
        self.optimizer.param_groups[0]["lr"] = learning_rate
        num_targets = sum(batch.num_valid for batch in microbatches)
        loss = torch.zeros(())
        for number, batch in enumerate(microbatches, start=1):
            with nullcontext() if number == len(microbatches) else self.replica.no_sync():
                part = self.replica(batch) / num_targets
                part.backward()
            loss += part.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), gradient_clip_norm or math.inf)
        told = torch.tensor([loss.item() / NUM_RANKS, float(stop), float(unreadable)])
        dist.all_reduce(told)
        counts = told[0].isfinite() and norm.isfinite() and told[0] <= largest_loss and told[2] == 0
        if counts:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return StepResult(told[0].item(), norm.item(), skipped=not counts, stop=bool(told[1]), unreadable=bool(told[2]))

    @torch.no_grad()
    def evaluate(self, microbatches):
        batches = list(microbatches)
        sums = torch.tensor([sum(self.replica.module(batch).item() for batch in batches), sum(batch.num_valid for batch in batches)])
        dist.all_reduce(sums)
        return (sums[0] / max(sums[1], 1)).item(), int(sums[1])

    def state(self):
        return flat_state(self.model, self.optimizer)

    def state_sizes(self):
        return [tensor.nbytes for tensor in self.state().values()]

    def restore(self, checkpoint, *, weights_only=False):
        restore_state(checkpoint, self.model, None if weights_only else self.optimizer, widen=weights_only)

    def replicas(self):
        return Replicas((), {})

    def whole_model(self):
        return self.model if self.mesh.rank == 0 else None

    def watch_gradients(self, look):
        self.optimizer.register_step_pre_hook(lambda *_: look({name: value.grad for name, value in self.model.named_parameters()}))

    def close(self):
        pass


def train_on_a_rank(rank, port, path, engine, runs):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=NUM_RANKS)
    if engine is not None:
        build.build_engine = engine
    for settings in runs:
        config = tiny_config(path, *SETTINGS, *settings)
        run = build_run(config, device=torch.device("cpu"), resume="auto", console=Console(quiet=True), world_size=NUM_RANKS)
        assert isinstance(run.engine, engine or object)
        train(run, resume_command="")
    dist.destroy_process_group()


def train_on_two_ranks(path, *runs, engine=None):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(train_on_a_rank, (port, path, engine, runs), nprocs=NUM_RANKS)


@pytest.mark.full  # tests/parallel/test_deepspeed.py does it in every run, with an engine that is used
def test_the_train_loop_runs_saves_and_resumes_with_a_second_engine(tiny):
    whole, cut = "run.name=whole", "run.name=cut"
    train_on_two_ranks(tiny, (whole,), (cut, "train.stop_at_step=5"), (cut,), engine=PlainEngine)
    root = tiny.parent / "runs"
    checkpoints = {name: open_checkpoint(list_checkpoints(root / name / "checkpoints")[0]) for name in ("whole", "cut")}
    assert {each.step for each in checkpoints.values()} == {8}
    expected, found = checkpoints["whole"], checkpoints["cut"]
    assert set(found.tensor_names) == set(expected.tensor_names)
    assert all(torch.equal(found.read(name), expected.read(name)) for name in expected.tensor_names)
