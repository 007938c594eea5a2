"""Page-locked host memory: its tensors do not overlap, and a GPU copies to it beside other work."""

import gc

import pytest
import torch

from phase8.zero.page_locked import PageLocked


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
