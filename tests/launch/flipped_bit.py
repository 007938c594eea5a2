"""launch/pretrain.py on hardware that fails: after four steps one bit of a weight of rank 1 is another."""

import os
import runpy

import torch

from phase8.train.trainer import Trainer
from tests.processes.launched import ROOT

take_step = Trainer._take_step


def take_step_and_flip(trainer, *arguments, **options):
    result = take_step(trainer, *arguments, **options)
    if os.environ["RANK"] == "1" and trainer.run.position.step == 4:
        weight = next(iter(trainer.run.engine.train_state.shards.parts.values())).detach()
        weight.view(-1)[:1].view(torch.int32).bitwise_xor_(1)
    return result


if __name__ == "__main__":
    Trainer._take_step = take_step_and_flip
    runpy.run_path(str(ROOT / "launch" / "pretrain.py"), run_name="__main__")
