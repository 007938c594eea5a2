import pytest
import torch
import torch.nn.functional as F

from phase8.kernels.reference.cross_entropy import IGNORED_TARGET, linear_cross_entropy


def problem(num_tokens=13, width=5, vocabulary=11):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, width, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(vocabulary, (num_tokens,), generator=generator)
    targets[[2, 7]] = IGNORED_TARGET
    return hidden, weight, targets


@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
def test_equals_torch_with_both_gradients(chunk_tokens):
    hidden, weight, targets = problem()
    loss = linear_cross_entropy(hidden, weight, targets, chunk_tokens)
    expected = F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORED_TARGET, reduction="sum")
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(*(torch.autograd.grad(3 * x, (hidden, weight)) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_without_gradients():
    hidden, weight, targets = problem()
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets).requires_grad


def test_all_tokens_ignored_is_zero_with_zero_gradients():
    hidden, weight, targets = problem()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, IGNORED_TARGET))
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert loss == 0 and all((x == 0).all() for x in gradients)


def test_low_precision_weight_gradient_accumulates_in_fp32():
    hidden, weight, targets = problem(num_tokens=512)
    half = hidden.detach().bfloat16().requires_grad_()
    master = weight.detach().float().requires_grad_()
    linear_cross_entropy(half, master, targets, 8).backward()
    exact_hidden, exact_weight = half.detach().double().requires_grad_(), master.detach().bfloat16().double().requires_grad_()
    linear_cross_entropy(exact_hidden, exact_weight, targets).backward()
    assert master.grad.dtype == torch.float32 and half.grad.dtype == torch.bfloat16
    # Rounding each chunk's contribution is allowed (eps of bf16 is 2^-8), losing small contributions to a large sum is not.
    for ours, exact in ((master.grad, exact_weight.grad), (half.grad, exact_hidden.grad)):
        assert (ours.double() - exact).norm() < 2**-7 * exact.norm()
