import os

import pytest
import torch

from phase8.config.schema import ZeroSection
from phase8.processes.bootstrap import World
from phase8.train.device import select_device, share_cores

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


@pytest.mark.parametrize("given", [{}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": ""}])
def test_segments_grow_on_a_gpu_unless_the_user_has_configured_the_allocator(monkeypatch, given):
    environment = dict(given)
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    select_device("cpu")
    assert environment == given
    assert select_device("auto") == GPU
    assert environment == (given or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})
