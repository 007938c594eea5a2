import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from phase8.kernels.cross_entropy import _forward, linear_cross_entropy
from phase8.kernels.reference import cross_entropy as reference
from phase8.kernels.reference.cross_entropy import IGNORED_TARGET, linear_cross_entropy_gradients


def problem(num_tokens=13, width=5, vocabulary=11, *, dtype=torch.float64, weight_dtype=None):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64).to(weight_dtype or dtype).requires_grad_()
    targets = torch.randint(vocabulary, (num_tokens,), generator=generator)
    targets[[2, 7]] = IGNORED_TARGET
    return hidden, weight, targets


@pytest.mark.parametrize("chunk_tokens", [1, 4, 13, 100, None])
@pytest.mark.parametrize("implementation", [linear_cross_entropy, reference.linear_cross_entropy], ids=["operator", "reference"])
def test_equals_torch_with_both_gradients(implementation, chunk_tokens):
    hidden, weight, targets = problem()
    loss = implementation(hidden, weight, targets, chunk_tokens)
    expected = F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORED_TARGET, reduction="sum")
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(*(torch.autograd.grad(3 * x, (hidden, weight)) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_hand_written_gradients_are_those_of_the_reference():
    hidden, weight, targets = problem()
    loss, *gradients = linear_cross_entropy_gradients(hidden.detach(), weight.detach(), targets, 4)
    expected = reference.linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_hidden_states_may_have_any_strides():
    hidden, weight, targets = problem()
    strided = hidden.detach().T.contiguous().T.requires_grad_()
    ours, theirs = (torch.autograd.grad(linear_cross_entropy(x, weight, targets, 4), x)[0] for x in (strided, hidden))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)])
def test_only_the_wanted_gradients_are_formed(needs):
    hidden, weight, targets = problem()
    with FlopCounterMode(display=False) as counter:
        linear_cross_entropy_gradients(hidden.detach(), weight.detach(), targets, 4, needs_dhidden=needs[0], needs_dweight=needs[1])
    assert counter.get_total_flops() == (1 + sum(needs)) * 2 * hidden.numel() * weight.shape[0]
    loss = linear_cross_entropy(hidden.detach().requires_grad_(needs[0]), weight.detach().requires_grad_(needs[1]), targets)
    assert loss.requires_grad == any(needs)
    saved = loss.grad_fn.saved_tensors if loss.requires_grad else ()
    assert sorted(x.numel() for x in saved if x.numel()) == sorted(x.numel() for x, needed in zip((hidden, weight), needs, strict=True) if needed)


def test_only_the_loss_is_differentiable():
    hidden, weight, targets = problem()
    assert [x.requires_grad for x in _forward(hidden, weight, targets, 4, True, True)] == [True, False, False]


def test_without_gradients():
    hidden, weight, targets = problem()
    expected = linear_cross_entropy(hidden, weight, targets)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets)
    assert loss == expected and not loss.requires_grad


def test_all_tokens_ignored_is_zero_with_zero_gradients():
    hidden, weight, targets = problem()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, IGNORED_TARGET))
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert loss == 0 and all((x == 0).all() for x in gradients)


def test_no_tokens_at_all():
    hidden, weight, targets = (x.detach() for x in problem())
    loss, dhidden, dweight = linear_cross_entropy_gradients(hidden[:0], weight, targets[:0])
    assert loss == 0 and dhidden.shape == (0, 5) and (dweight == 0).all() and dweight.shape == weight.shape


def test_a_target_out_of_range_is_an_error():
    hidden, weight, targets = problem()
    targets[4] = weight.shape[0]
    with pytest.raises(IndexError):
        linear_cross_entropy(hidden, weight, targets)


def test_low_precision_weight_gradient_accumulates_in_fp32():
    half, master, targets = problem(num_tokens=512, dtype=torch.bfloat16, weight_dtype=torch.float32)
    linear_cross_entropy(half, master, targets, 8).backward()
    exact_hidden, exact_weight = half.detach().double().requires_grad_(), master.detach().bfloat16().double().requires_grad_()
    linear_cross_entropy(exact_hidden, exact_weight, targets).backward()
    assert master.grad.dtype == torch.float32 and half.grad.dtype == torch.bfloat16
    # Rounding each chunk's contribution is allowed (eps of bf16 is 2^-8), losing small contributions to a large sum is not.
    for ours, exact in ((master.grad, exact_weight.grad), (half.grad, exact_hidden.grad)):
        assert (ours.double() - exact).norm() < 2**-7 * exact.norm()


def test_the_incoming_gradient_is_not_rounded_to_the_dtype_of_the_hidden_states():
    hidden, weight, targets = problem(dtype=torch.bfloat16, weight_dtype=torch.float32)
    scale = torch.tensor(1 / 3)
    assert scale.bfloat16() != scale
    unscaled, _ = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), (hidden, weight))
    scaled, _ = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets) * scale, (hidden, weight))
    assert torch.equal(scaled, (unscaled.float() * scale).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_kept_graph_gives_the_same_gradients_again(dtype):
    hidden, weight, targets = problem(dtype=dtype, weight_dtype=torch.float32)
    loss = linear_cross_entropy(hidden, weight, targets) / 7
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    copies = [x.clone() for x in first]
    second = torch.autograd.grad(loss, (hidden, weight))
    for x, y, z in zip(first, copies, second, strict=True):
        assert torch.equal(x, y) and torch.equal(y, z)


def test_the_gradient_of_the_weight_is_handed_over_not_copied():
    hidden, weight, targets = problem()
    received = []
    weight.register_hook(lambda gradient: received.append(gradient.data_ptr()))
    (linear_cross_entropy(hidden, weight, targets) / 7).backward()
    assert [weight.grad.data_ptr()] == received


def test_differentiating_twice_is_refused():
    hidden, weight, targets = problem()
    (gradient,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets) ** 2, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
def test_is_a_well_behaved_operator(dtype, needs):
    hidden, weight, targets = problem(dtype=dtype, weight_dtype=torch.promote_types(dtype, torch.float32))
    hidden, weight = hidden.detach().requires_grad_(needs[0]), weight.detach().requires_grad_(needs[1])
    torch.library.opcheck(_forward, (hidden, weight, targets, 4, *needs))


def test_compiles_without_a_graph_break():
    hidden, weight, targets = problem(dtype=torch.float32)
    compiled = torch.compile(lambda *x: linear_cross_entropy(2 * x[0], *x[1:]) / 7, fullgraph=True, backend="aot_eager")
    expected = linear_cross_entropy(2 * hidden, weight, targets) / 7
    torch.testing.assert_close(compiled(hidden, weight, targets), expected)
    gradients = (torch.autograd.grad(x, (hidden, weight)) for x in (compiled(hidden, weight, targets), expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
