import pytest
import torch

from phase8.kernels.running_sum import running_sum


@pytest.mark.parametrize("from_end", [False, True])
def test_sums_and_their_gradients(from_end):
    x = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    reach = torch.ones(7, 7, dtype=torch.float64).tril() if not from_end else torch.ones(7, 7, dtype=torch.float64).triu()
    torch.testing.assert_close(running_sum(x, from_end=from_end), torch.einsum("ts,bsc->btc", reach, x))
    torch.autograd.gradcheck(lambda x: running_sum(x, from_end=from_end), x)


def test_marks_are_counted_as_integers():
    marks = torch.tensor([[True, False, True, True]])
    assert running_sum(marks).tolist() == [[1, 1, 2, 3]] and running_sum(marks, from_end=True).tolist() == [[3, 2, 2, 1]]
    assert running_sum(marks).dtype == torch.int32


def test_it_is_one_operator_to_torch_compile():
    torch.library.opcheck(torch.ops.phase8.running_sum.default, (torch.randn(2, 5, 3, requires_grad=True), True))
    torch.library.opcheck(torch.ops.phase8.running_sum.default, (torch.ones(2, 5, dtype=torch.int32), False))
