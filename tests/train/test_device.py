import os

import pytest
import torch

from phase8.config.schema import ZeroSection
from phase8.processes.bootstrap import World
from phase8.train.device import share_cores

OFFLOADED, GPU = ZeroSection(stage=3, offload_optimizer="cpu"), torch.device("cuda", 0)
TWO_OF_TORCHRUN = World(world_size=4, local_world_size=2, launcher="torchrun")


@pytest.mark.parametrize(
    ("zero", "world", "device", "threads_set", "expected"),
    [
        (OFFLOADED, TWO_OF_TORCHRUN, GPU, "1", 6),
        (OFFLOADED, TWO_OF_TORCHRUN, GPU, "4", None),  # somebody has chosen
        (OFFLOADED, TWO_OF_TORCHRUN, torch.device("cpu"), "1", None),
        (OFFLOADED, World(), GPU, "1", None),
        (ZeroSection(stage=3), TWO_OF_TORCHRUN, GPU, "1", None),
        (OFFLOADED, World(world_size=32, local_world_size=32, launcher="torchrun"), GPU, "1", 1),
    ],
)
def test_an_optimizer_on_the_host_gets_its_share_of_the_cores(monkeypatch, zero, world, device, threads_set, expected):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)))
    monkeypatch.setenv("OMP_NUM_THREADS", threads_set)
    share_cores(zero, world, device)
    assert asked == ([] if expected is None else [expected])
