import pytest
import torch

from phase8.kernels.reference.gated_linear_attention import gated_linear_attention


def problem(length, *, dtype=torch.float64, batch=2, heads=3, key_size=4, value_size=5):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(batch, length, heads, key_size, generator=generator, dtype=torch.float64) for _ in range(2))
    v = torch.randn(batch, length, heads, value_size, generator=generator, dtype=torch.float64)
    # From a memory of one token to one of thousands.
    log_decay = -torch.exp(4 * torch.randn(batch, length, heads, generator=generator, dtype=torch.float64) - 2)
    return [x.to(dtype) for x in (q, k, v, log_decay)]


def recurrence(q, k, v, log_decay, starts=None, state=None):
    """The defining loop over tokens."""
    batch, length, heads, size = q.shape
    state = q.new_zeros(batch, heads, size, v.shape[-1]) if state is None else state
    outputs = []
    for i in range(length):
        if starts is not None:
            state = state * (~starts[:, i])[:, None, None, None]
        alpha = log_decay[:, i].exp()[..., None, None]
        state = alpha * state + (1 - alpha) * k[:, i, :, :, None] * v[:, i, :, None, :] / size**0.5
        outputs.append((state * q[:, i, :, :, None]).sum(2))
    return torch.stack(outputs, 1), state


def random_starts(length, batch=2):
    return torch.rand(batch, length, generator=torch.Generator().manual_seed(3)) < 0.05


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 257])
def test_equals_the_recurrence_with_every_gradient(length, packed):
    arguments = [x.requires_grad_() for x in problem(length)]
    state = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    starts = random_starts(length) if packed else None
    y, final = gated_linear_attention(*arguments, starts, state)
    expected, expected_final = recurrence(*arguments, starts, state)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(final, expected_final)
    weights, state_weights = torch.randn_like(y), torch.randn_like(final)
    sums = [(a * weights).sum() + (b * state_weights).sum() for a, b in ((y, final), (expected, expected_final))]
    for ours, theirs in zip(*(torch.autograd.grad(total, [*arguments, state]) for total in sums), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_gradcheck():
    arguments = [x.requires_grad_() for x in problem(5, batch=1, heads=1, key_size=2, value_size=2)]
    assert torch.autograd.gradcheck(lambda *a: gated_linear_attention(*a)[0], arguments)


@pytest.mark.parametrize("split", [1, 64, 100])
def test_chunks_with_carried_state_equal_the_whole(split):
    arguments = problem(130)
    whole, final = gated_linear_attention(*arguments)
    head, carried = gated_linear_attention(*(x[:, :split] for x in arguments))
    tail, last = gated_linear_attention(*(x[:, split:] for x in arguments), None, carried)
    torch.testing.assert_close(torch.cat((head, tail), 1), whole)
    torch.testing.assert_close(last, final)


def test_decay_of_zero_and_of_one_are_finite():
    q, k, v, log_decay = problem(80, dtype=torch.float32)
    for value in (-1e30, 0.0):
        decay = torch.full_like(log_decay, value, requires_grad=True)
        y, state = gated_linear_attention(q, k, v, decay)
        (y.sum() + state.sum()).backward()
        assert y.isfinite().all() and state.isfinite().all() and decay.grad.isfinite().all()


def test_low_precision_inputs_accumulate_in_fp32():
    q, k, v, log_decay = problem(257, dtype=torch.float32)
    rounded = [x.bfloat16() for x in (q, k, v)]
    y, state = gated_linear_attention(*rounded, log_decay)
    exact, _ = recurrence(*(x.double() for x in rounded), log_decay.double())
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    # One rounding of the output: eps of bf16 is 2^-8.
    assert ((y.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-4).all()
