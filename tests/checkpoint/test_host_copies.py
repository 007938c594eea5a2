import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phase8.checkpoint.host_copies import ALIGNMENT_BYTES, HostCopies

CPU = torch.device("cpu")


def of_size(*sizes):
    return {str(number): torch.full((size,), number, dtype=torch.uint8) for number, size in enumerate(sizes)}


@given(sizes=st.lists(st.integers(0, 700), max_size=12), later=st.lists(st.integers(0, 700), max_size=12))
def test_copies_are_equal_and_lie_apart_whatever_came_before(sizes, later):
    copies = HostCopies(CPU, slab_bytes=512)
    for tensors in (of_size(*sizes), of_size(*later)):
        found = copies.copy(tensors)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())  # written one after the other: none over another


def test_copies_do_not_follow_and_keep_dtype_and_shape():
    tensors = {
        "matrix": torch.arange(6.0).view(2, 3).T,
        "half": torch.ones(5, dtype=torch.bfloat16),
        "number": torch.tensor(7.0, dtype=torch.float64),
        "parameter": torch.nn.Parameter(torch.ones(3)),
    }
    expected = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    found = HostCopies(CPU).copy(tensors)
    for tensor in tensors.values():
        tensor.detach().fill_(-1)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype and not found[name].requires_grad


def test_memory_is_taken_once():
    copies, taken = HostCopies(CPU, slab_bytes=4 * ALIGNMENT_BYTES), []
    take = copies._take
    copies._take = lambda num_bytes: taken.append(num_bytes) or take(num_bytes)
    copies.reserve([3 * ALIGNMENT_BYTES, 2 * ALIGNMENT_BYTES, 9 * ALIGNMENT_BYTES])
    assert taken == [4 * ALIGNMENT_BYTES, 4 * ALIGNMENT_BYTES, 9 * ALIGNMENT_BYTES]
    for _ in range(2):
        copies.copy(of_size(3 * ALIGNMENT_BYTES, 2 * ALIGNMENT_BYTES, 9 * ALIGNMENT_BYTES))
    assert len(taken) == 3


@pytest.mark.gpu
def test_copies_of_a_gpu_are_page_locked_and_complete():
    copies = HostCopies(torch.device("cuda"), slab_bytes=2**20)
    for value in (1.0, 2.0):
        tensors = {name: torch.full((size,), value, device="cuda") for name, size in (("small", 3), ("large", 5_000_000))}
        found = copies.copy(tensors)
        for name, tensor in tensors.items():
            assert found[name].is_pinned() and torch.equal(found[name], tensor.cpu())
