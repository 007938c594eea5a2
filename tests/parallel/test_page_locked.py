"""Page-locked host memory: its tensors do not overlap, and a GPU copies to it beside other work."""

import gc
import weakref

import pytest
import torch
from torch import nn

from phase8 import accelerator, page_locked
from phase8.config.schema import OptimSection
from phase8.optim.adamw_fp8 import AdamWFp8
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


@pytest.fixture
def calls(monkeypatch):
    """What a GPU, played here, is asked to lock and to unlock, by address."""
    found = {"lock": [], "unlock": []}
    monkeypatch.setattr(accelerator, "locks_pages", lambda device_type: device_type == "cuda")
    monkeypatch.setattr(accelerator, "lock_pages", lambda memory: found["lock"].append(memory.data_ptr()) or 0)
    monkeypatch.setattr(accelerator, "unlock_pages", lambda memory: found["unlock"].append(memory.data_ptr()))
    monkeypatch.setattr(page_locked, "_OWN_PAGES", 1000)
    return found


def test_a_large_tensor_is_locked_where_it_is_and_freed_with_its_pages(calls):
    tensor = torch.zeros(100, 10)
    assert page_locked.locked(tensor, torch.device("cuda")) is tensor and calls == {"lock": [tensor.data_ptr()], "unlock": []}
    storage = weakref.ref(tensor.untyped_storage())
    del tensor
    gc.collect()
    assert calls["unlock"] == calls["lock"] and storage() is None


def test_moments_in_host_memory_are_freed_with_their_optimizer(calls):
    """As after a trial of settings, whose moments would lie beside those of the run for as long as it trains."""
    weights = nn.Parameter(torch.zeros(100, 20))
    optimizer = AdamWFp8({"w": weights}, OptimSection(learning_rate=1e-3, state_dtype="fp8"), decayed_names=["w"])
    optimizer._counted_state(weights, torch.device("cuda"))
    assert len(calls["lock"]) == 2 and calls["unlock"] == []
    del optimizer
    gc.collect()
    assert sorted(calls["unlock"]) == sorted(calls["lock"])


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
