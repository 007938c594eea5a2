import math

import pytest
import torch
from torch import nn

from phase8.optim.clip import _parts, clipping_divisor, gradient_norm, step_clipped


def parameters_with_gradients(scale=1.0):
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (5,), (2, 2, 2), (7,))]
    for parameter in parameters[:3]:  # the last one has no gradient
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
    return parameters


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1, eps=1e-2, fused=True)


def state(optimizer):
    return [(key, value.clone()) for entry in optimizer.state.values() for key, value in entry.items()]


def gradients(parameters):
    return (parameter.grad for parameter in parameters)


def test_the_norm_is_that_of_all_gradients():
    parameters = parameters_with_gradients(scale=10.0)
    expected = math.sqrt(sum(p.grad.double().square().sum().item() for p in parameters[:3]))
    assert gradient_norm(gradients(parameters)).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("max_norm", [0.5, 3.0, 1e3])
def test_a_step_equals_one_with_gradients_clipped_by_torch(max_norm):
    ours, theirs = parameters_with_gradients(), parameters_with_gradients()
    for parameters, optimizer in ((ours, adamw(ours)), (theirs, adamw(theirs))):
        for _ in range(3):
            if parameters is ours:
                step_clipped(optimizer, gradient_norm(gradients(ours)), max_norm=max_norm, counts=torch.tensor(True))
            else:
                nn.utils.clip_grad_norm_(theirs, max_norm)
                optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not torch.equal(ours[0], parameters_with_gradients()[0])


@pytest.mark.parametrize(("norm", "max_norm", "divisor"), [(4.0, 2.0, 2.0), (1.0, 2.0, 1.0), (9.0, 0.0, 1.0), (0.0, 1.0, 1.0)])
def test_divisor(norm, max_norm, divisor):
    assert clipping_divisor(torch.tensor(norm), max_norm=max_norm).item() == pytest.approx(divisor, rel=1e-5)


def test_a_step_that_is_not_finite_leaves_weights_and_state_alone():
    parameters = parameters_with_gradients()
    optimizer = adamw(parameters)
    step_clipped(optimizer, gradient_norm(gradients(parameters)), max_norm=1.0, counts=torch.tensor(True))
    weights, before = [p.detach().clone() for p in parameters], state(optimizer)
    parameters[0].grad[0, 0] = torch.nan
    norm = gradient_norm(gradients(parameters))
    assert norm.isnan()
    step_clipped(optimizer, norm, max_norm=1.0, counts=norm.isfinite())
    assert all(torch.equal(a, b) for a, b in zip(weights, parameters, strict=True))
    assert all(key == name and torch.equal(a, b) for (key, a), (name, b) in zip(before, state(optimizer), strict=True))


def test_no_gradient_at_all_has_norm_zero():
    assert gradient_norm(gradients([nn.Parameter(torch.zeros(2))])).item() == 0.0


@pytest.mark.parametrize("count", [16 << 16, (17 << 16) + 5])
def test_the_norm_of_a_large_gradient_on_the_host_is_taken_by_rows(count):
    gradient = torch.randn(count, generator=torch.Generator().manual_seed(0))
    parts = _parts(gradient)
    assert [part.numel() for part in parts] == [count >> 16, count % (1 << 16)]
    torch.testing.assert_close(gradient_norm([gradient, torch.ones(3)]).double(), (gradient.double().square().sum() + 3).sqrt(), rtol=1e-6, atol=0)
    gradient[-1] = math.nan
    assert gradient_norm([gradient]).isnan()
    few = torch.ones((16 << 16) - 1)
    assert _parts(few)[0] is few
