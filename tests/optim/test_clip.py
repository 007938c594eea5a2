import math

import pytest
import torch
from torch import nn

from phase8.optim.clip import clip_gradients


def parameters_with_gradients(scale=1.0):
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,), (2, 2, 2), (7,))]
    for parameter in parameters[:3]:  # the last one has no gradient
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
    return parameters


def gradients(parameters):
    return [None if p.grad is None else p.grad.clone() for p in parameters]


@pytest.mark.parametrize("max_norm", [0.5, 3.0, 1e3])
def test_equals_clip_grad_norm(max_norm):
    ours, theirs = parameters_with_gradients(), parameters_with_gradients()
    norm = clip_gradients(ours, max_norm=max_norm)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(theirs, max_norm), rtol=0, atol=0)
    for a, b in zip(gradients(ours), gradients(theirs), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_the_norm_is_that_of_all_gradients_before_clipping_and_afterwards_at_most_the_limit():
    parameters = parameters_with_gradients(scale=10.0)
    expected = math.sqrt(sum(g.double().square().sum().item() for g in gradients(parameters) if g is not None))
    assert clip_gradients(iter(parameters), max_norm=2.0).item() == pytest.approx(expected, rel=1e-6)
    assert clip_gradients(parameters, max_norm=0.0).item() == pytest.approx(2.0, rel=1e-4)


@pytest.mark.parametrize("max_norm", [0.0, 1e4])
def test_gradients_within_the_limit_are_left_alone_and_zero_measures_only(max_norm):
    parameters = parameters_with_gradients()
    before = gradients(parameters)
    assert clip_gradients(parameters, max_norm=max_norm) > 0
    assert all(torch.equal(a, b) for a, b in zip(before[:3], gradients(parameters)[:3], strict=True))


def test_a_norm_that_is_not_finite_is_returned():
    parameters = parameters_with_gradients()
    parameters[0].grad[0, 0] = torch.nan
    assert clip_gradients(parameters, max_norm=1.0).isnan()


def test_no_gradient_at_all_has_norm_zero():
    assert clip_gradients([nn.Parameter(torch.zeros(2))], max_norm=1.0).item() == 0.0
