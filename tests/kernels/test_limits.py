"""What is larger than the Triton kernels take goes to torch, where the compiler sees it."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from phase8.kernels import green_scan
from phase8.kernels.limits import MAX_BOTTLENECK_RANK, MAX_RANK, takes_bottlenecks
from phase8.kernels.low_rank_swiglu import low_rank_swiglu


class Operators(TorchDispatchMode):
    """Remembers the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("rank", "is_kernel"), [(MAX_RANK, True), (MAX_RANK + 1, False)])
def test_a_rank_above_the_limit_is_left_to_the_compiler(rank, is_kernel):
    with FakeTensorMode(), Operators() as operators:
        weights = [torch.empty(shape, device="cuda") for shape in ((24, rank), (24, rank), (rank, 24))]
        y = low_rank_swiglu(torch.empty(3, 5, 2 * rank, device="cuda", dtype=torch.bfloat16), *weights)
    assert y.shape == (3, 5, rank)
    assert ("phase8::low_rank_swiglu" in operators.names) == is_kernel


def test_what_the_kernel_of_bottlenecks_is_not_made_for_is_left_to_a_product():
    usual = {"rank": MAX_BOTTLENECK_RANK, "head_size": 64, "num_taps": 4, "num_outputs": 1 << 20, "element_bytes": 2}
    assert takes_bottlenecks(**usual)
    others = {"rank": MAX_BOTTLENECK_RANK + 1, "head_size": 128, "num_taps": 5, "num_outputs": 1 << 31, "element_bytes": 4}
    assert [name for name, value in others.items() if takes_bottlenecks(**(usual | {name: value}))] == []


@pytest.mark.parametrize(("length", "stride", "is_kernel"), [(2**26 - 1, 16, True), (2**26, 16, False), (2**25, 64, False)])
def test_the_scan_counts_places_in_32_bits(length, stride, is_kernel, monkeypatch):
    """The places are those of a g without gaps, or of a potential of 16 heads that steps over other channels."""
    monkeypatch.setattr(green_scan, "uses_triton", lambda x: True)
    potential = torch.empty_strided((1, length, 16), (0, stride, 1), device="meta")
    assert green_scan._takes_triton(potential) == is_kernel
    if stride == 16:
        assert green_scan._takes_triton(torch.empty(1, length, 16, 2, device="meta")) == is_kernel
