"""The feed-forward between bottlenecks: the reference against its parts, its backward against autograd, the operator."""

import pytest
import torch
import torch.nn.functional as F

from phase8.kernels import low_rank_swiglu as kernel
from phase8.kernels.reference.low_rank_swiglu import low_rank_swiglu, low_rank_swiglu_backward

# tokens, rank, width
CASES = [(7, 3, 10), (1, 1, 1), (12, 16, 40)]


def problem(case):
    """Bottlenecks, the three weights, and a gradient of the result; fp64."""
    num_tokens, rank, width = case
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    return [draw(num_tokens, 2 * rank), draw(width, rank), draw(width, rank), draw(rank, width)], draw(num_tokens, rank).detach()


@pytest.mark.parametrize("case", CASES)
def test_each_token_passes_the_gate_the_factor_and_the_way_down(case):
    (bottlenecks, gate, up, down), _ = problem(case)
    y, rank = low_rank_swiglu(bottlenecks, gate, up, down), case[1]
    for token in range(case[0]):
        before, factor = gate @ bottlenecks[token, :rank], up @ bottlenecks[token, rank:]
        torch.testing.assert_close(y[token], down @ (before / (1 + torch.exp(-before)) * factor))


def test_weights_take_the_dtype_of_the_bottlenecks():
    (bottlenecks, *weights), _ = problem((5, 4, 8))
    x = bottlenecks.detach().bfloat16()
    gate, up, down = (weight.detach().float() for weight in weights)
    y = kernel.low_rank_swiglu(x, gate, up, down)
    expected = F.linear(F.silu(F.linear(x[:, :4], gate.bfloat16())) * F.linear(x[:, 4:], up.bfloat16()), down.bfloat16())
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)


@pytest.mark.parametrize("case", CASES)
def test_backward_is_that_of_autograd(case):
    arguments, dy = problem(case)
    expected = torch.autograd.grad(low_rank_swiglu(*arguments), arguments, dy)
    found = low_rank_swiglu_backward(dy, *(x.detach() for x in arguments))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("case", CASES)
def test_opcheck(case):
    arguments, dy = problem(case)
    torch.library.opcheck(kernel._forward, arguments)
    torch.library.opcheck(kernel._backward, (dy, *(x.detach() for x in arguments)))


def test_gradients_of_the_operator_are_those_of_the_reference():
    arguments, dy = problem((9, 5, 12))
    expected = torch.autograd.grad(low_rank_swiglu(*arguments), arguments, dy)
    for ours, theirs in zip(torch.autograd.grad(kernel._forward(*arguments), arguments, dy), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
