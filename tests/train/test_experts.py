import os

import pytest
import torch

from phase8.config.load import load_config
from phase8.errors import ConfigError
from phase8.kernels import backends
from phase8.kernels.backends import GROUPED, Backend
from phase8.train.experts import experts_backend, with_recordable_experts

GPU = torch.device("cuda")
EXPERTS = ("model.ffn=moe", "precision.dtype=bf16")


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of a generation, whose kernels run."""

    def of(generation):
        found = {"cuda": Backend("triton", ""), "cpu": Backend("reference", "the Triton kernels need a GPU")}
        monkeypatch.setattr(backends, "kernel_backend", lambda device: found[device.type])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (generation, 0))

    return of


def config_of(*settings):
    return load_config(os.devnull, [*EXPERTS, *settings])


def test_torch_groups_bf16_on_hopper_and_blackwell(gpu):
    for generation, name in ((8, "one expert after the other"), (9, GROUPED), (10, GROUPED)):
        gpu(generation)
        assert experts_backend(config_of(), GPU).name == name
    gpu(9)
    assert "bf16, not float32" in experts_backend(config_of("precision.dtype=fp32"), GPU).reason
    assert "multiples of 8" in experts_backend(config_of("model.expert_ffn_size=100"), GPU).reason
    assert experts_backend(config_of(), torch.device("cpu")).reason == "the Triton kernels need a GPU"


def test_steps_are_recorded_where_the_device_counts_rows(gpu):
    gpu(9)
    assert with_recordable_experts(config_of(), GPU).train.cuda_graphs == "auto"
    assert with_recordable_experts(config_of("train.cuda_graphs=true"), GPU).train.cuda_graphs is True
    gpu(8)
    assert with_recordable_experts(config_of(), GPU).train.cuda_graphs is False
    assert with_recordable_experts(load_config(os.devnull), GPU).train.cuda_graphs == "auto"
    with pytest.raises(ConfigError, match=r"the host counts the rows of experts on this device: torch's grouped product is for Hopper and Blackwell"):
        with_recordable_experts(config_of("train.cuda_graphs=true"), GPU)
