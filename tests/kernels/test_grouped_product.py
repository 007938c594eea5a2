"""Grouped products: the reference against its parts, its backward against autograd, the operator."""

import pytest
import torch

from phase8.kernels import grouped_product as kernel
from phase8.kernels.reference.grouped_product import grouped_product, grouped_product_backward

# rows, ends of the groups, inner width, outer width
CASES = [(7, [3, 3, 6], 4, 5), (5, [0, 5], 2, 3), (4, [0, 0, 0], 3, 2), (0, [0, 0], 3, 2), (1, [1], 1, 1), (6, [4], 3, 2), (3, [0], 2, 2)]


def problem(case):
    """Rows, weights and ends, and a gradient of the products; fp64."""
    num_rows, ends, inner, outer = case
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    return [draw(num_rows, inner), draw(len(ends), outer, inner)], torch.tensor(ends, dtype=torch.int32), draw(num_rows, outer).detach()


@pytest.mark.parametrize("case", CASES)
def test_each_row_meets_the_weight_of_its_group(case):
    (rows, weight), ends, _ = problem(case)
    y = grouped_product(rows, weight, ends)
    for row in range(case[0]):
        group = int((ends <= row).sum())
        torch.testing.assert_close(y[row], weight[group] @ rows[row] if group < len(ends) else torch.zeros_like(y[row]))


@pytest.mark.parametrize("case", CASES)
def test_backward_is_that_of_autograd(case):
    (rows, weight), ends, dy = problem(case)
    expected = torch.autograd.grad(grouped_product(rows, weight, ends), (rows, weight), dy)
    found = grouped_product_backward(dy, rows.detach(), weight.detach(), ends)
    operator = torch.autograd.grad(kernel.grouped_product(rows, weight, ends), (rows, weight), dy)
    for ours, theirs, its in zip(found, expected, operator, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert torch.equal(ours, its)


@pytest.mark.parametrize("case", CASES)
def test_opcheck(case):
    (rows, weight), ends, dy = problem(case)
    torch.library.opcheck(kernel._forward, (rows, weight, ends))
    torch.library.opcheck(kernel._backward, (dy, rows.detach(), weight.detach(), ends))


def test_products_have_the_dtype_of_their_operands():
    (rows, weight), ends, _ = problem(CASES[0])
    y = kernel.grouped_product(rows.detach().bfloat16(), weight.detach().bfloat16(), ends)
    assert y.dtype == torch.bfloat16 and torch.equal(y[:3], rows[:3].bfloat16() @ weight[0].bfloat16().T)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1024, [100, 100, 900, 1024], 64, 192), (77, [5, 70], 128, 64)])
def test_bf16_on_a_gpu_equals_float64(shape):
    """Each element to the rounding of bf16; rows after the last group may hold anything and are left out, an empty group has no gradient."""
    (rows, weight), ends, dy = problem(shape)
    operands = [x.detach().bfloat16().cuda().requires_grad_() for x in (rows, weight)]
    exact = [x.detach().double().requires_grad_() for x in operands]
    y, expected = kernel.grouped_product(*operands, ends.cuda()), grouped_product(*exact, ends.cuda())
    dy = dy.bfloat16().cuda()
    found, wanted = torch.autograd.grad(y, operands, dy), torch.autograd.grad(expected, exact, dy.double())
    for ours, theirs in ((y[: ends[-1]], expected[: ends[-1]]), (found[0][: ends[-1]], wanted[0][: ends[-1]]), (found[1], wanted[1])):
        scale = theirs.abs().max()
        assert (ours.double() - theirs).abs().max() <= 2**-8 * scale
