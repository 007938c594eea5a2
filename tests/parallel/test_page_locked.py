"""Page-locked host memory: its tensors do not overlap, and a GPU copies to it beside other work."""

import gc

import pytest
import torch

from phase8 import accelerator
from phase8.page_locked import PageLocked


def likes(device="cpu"):
    shapes = {"a": (3, 5), "scalar": (), "none": (0, 4), "b": (129,)}
    return {name: torch.zeros(shape, device=device, dtype=torch.float64 if name == "b" else torch.float32) for name, shape in shapes.items()}


def test_tensors_are_like_those_given_and_do_not_overlap():
    like = likes()
    memory = PageLocked(like)
    for number, (name, tensor) in enumerate(memory.tensors.items()):
        assert tensor.shape == like[name].shape and tensor.dtype == like[name].dtype and tensor.is_contiguous()
        tensor.fill_(number)
    assert all((tensor == number).all() for number, tensor in enumerate(memory.tensors.values()))


def test_nothing_is_like_nothing():
    assert PageLocked({}).tensors == {}


class Runtime:
    """A runtime that locks nothing, and raises the error of a call at the next kernel, whoever launches it."""

    def __init__(self):
        self.last_error = 0

    def cudaHostRegister(self, *_):
        self.last_error = 712
        return self.last_error

    def launch(self, *_):
        error, self.last_error = self.last_error, 0
        if error != 0:
            raise RuntimeError(f"CUDA error {error}")


def test_no_kernel_raises_the_error_of_pages_that_cannot_be_locked(monkeypatch, capfd):
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(accelerator, "own_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(accelerator, "locks_pages", lambda device_type: True)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "fill_", runtime.launch)
        memory = PageLocked(likes())
    assert runtime.last_error == 0
    assert "1.51 KiB of host memory for what is offloaded cannot be page-locked (error 712)" in capfd.readouterr().err
    assert memory.tensors["a"].fill_(1).sum() == 15


@pytest.mark.gpu
def test_a_gpu_goes_on_where_pages_cannot_be_locked():
    memory = torch.empty(1000)
    try:
        assert accelerator.lock_pages(memory) == 0
        assert accelerator.lock_pages(memory) != 0  # they are locked already
        assert torch.ones(2, device="cuda").add_(1).sum() == 4
    finally:
        accelerator.unlock_pages(memory)


@pytest.mark.gpu
def test_pages_are_locked_as_long_as_they_are_held():
    memory = PageLocked(likes("cuda"))
    tensor = memory.tensors["b"]
    assert tensor.is_pinned() and tensor.device.type == "cpu"
    copy = tensor.copy_(torch.arange(129.0, device="cuda", dtype=torch.float64), non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(copy, torch.arange(129.0, dtype=torch.float64))
    del memory
    gc.collect()
    assert not tensor.is_pinned()
