"""Products in fp8: within the bound of their rounding on friendly and hostile numbers, gradients included; three products are the linear one."""

import pytest
import torch
import torch.nn.functional as F

from phase8.config.schema import PrecisionSection
from phase8.errors import ConfigError
from phase8.precision import policy
from phase8.precision.formats import linear_by_products
from phase8.precision.fp8 import E4M3, E5M2, Fp8, scale_of

SCALINGS = ["row", "tensor"]
N, D, F_ = 320, 256, 272


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def matrices(kind):
    """An input [N, D], a weight [F, D] and a gradient [N, F], friendly or hostile."""
    x, weight, grad = numbers(N, D), numbers(F_, D, seed=1) / 16, numbers(N, F_, seed=2)
    if kind == "outlier channels":
        x[:, 7] *= 300
        grad[:, 3] *= 300
    elif kind == "outlier rows":
        x[5] *= 1e4
        weight[9] *= 1e3
    elif kind == "zeros":
        x[:100], weight[40:60], grad[:, :30] = 0, 0, 0
    elif kind == "all zero":
        x, grad = torch.zeros_like(x), torch.zeros_like(grad)
    elif kind == "huge":
        x, grad = x * 1e15, grad * 1e15
    elif kind == "tiny":
        x, grad = x * 1e-18, grad * 1e-18
    return x, weight, grad


KINDS = ["friendly", "outlier channels", "outlier rows", "zeros", "all zero", "huge", "tiny"]


def bound(left, right, dtype_of_left, *, by_row):
    """How far the product of rounded factors [M, K] and [N, K] may be from the exact one: the error of each factor times the other one.

    A number is rounded by at most half a last bit, a number below the normal ones by half the distance of those.
    """
    errors = []
    for x, dtype in ((left, dtype_of_left), (right, E4M3)):
        facts, scale = torch.finfo(dtype), scale_of(x, dtype, dim=-1 if by_row else None).double()
        errors.append((x.double().abs() * facts.eps / 2).maximum(scale * facts.smallest_normal * facts.eps / 2))
    a, b = left.double().abs(), right.double().abs()
    return errors[0] @ b.T + a @ errors[1].T + errors[0] @ errors[1].T


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_products_and_gradients_are_within_the_bound_of_rounding(kind, scaling):
    x, weight, grad = matrices(kind)
    x.requires_grad_(), weight.requires_grad_()
    y = Fp8(scaling).linear(x, weight)
    dx, dweight = torch.autograd.grad(y, (x, weight), grad)
    x, weight = x.detach(), weight.detach()
    of_gradients, by_row = (E4M3, True) if scaling == "row" else (E5M2, False)
    for found, left, right, dtype in ((y, x, weight, E4M3), (dx, grad, weight.T, of_gradients), (dweight, grad.T, x.T, of_gradients)):
        exact = left.double() @ right.double().T
        assert found.isfinite().all()
        rounding_of_sums = 1e-5 * (left.double().abs() @ right.double().abs().T)
        assert ((found.double() - exact).abs() <= bound(left, right, dtype, by_row=by_row) + rounding_of_sums).all()
        if kind == "friendly":  # as rounding errors of random signs add up, and with gradients of two bits
            assert (found.double() - exact).norm() < (0.05 if dtype == E4M3 else 0.09) * exact.norm()


@pytest.mark.parametrize("scaling", SCALINGS)
def test_one_product_with_gradients_is_three_products(scaling):
    x, weight, grad = matrices("friendly")
    x.requires_grad_(), weight.requires_grad_()
    number_format = Fp8(scaling)
    expected = linear_by_products(x, weight, number_format)
    gradients = torch.autograd.grad(expected, (x, weight), grad)
    found = number_format.linear(x.unflatten(0, (4, 80)), weight)
    assert torch.equal(found.flatten(0, 1), expected)
    for ours, theirs in zip(torch.autograd.grad(found, (x, weight), grad.unflatten(0, (4, 80))), gradients, strict=True):
        assert torch.equal(ours, theirs)


def test_scales_of_rows_keep_what_an_outlier_elsewhere_hides():
    x, weight, _ = matrices("friendly")
    x[5] *= 1e7
    exact = x @ weight.T
    quiet = torch.ones(N, dtype=torch.bool)
    quiet[5] = False
    error = {scaling: (Fp8(scaling).output(x, weight) - exact)[quiet].norm() / exact[quiet].norm() for scaling in SCALINGS}
    assert error["row"] < 0.05 and error["tensor"] > 0.9


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_not_hidden(scaling, value):
    x, weight, _ = matrices("friendly")
    x[3, 4] = value
    assert not Fp8(scaling).output(x, weight)[3].isfinite().any()


@pytest.mark.parametrize("shapes", [((N, D), (128, D)), ((N, 264), (F_, 264)), ((7, D), (F_, D)), ((0, D), (F_, D))])
def test_thin_and_uneven_products_keep_the_dtype_of_their_operands(shapes):
    (rows, width), (outputs, _) = shapes
    x, weight, grad = numbers(rows, width).requires_grad_(), numbers(outputs, width, seed=1), numbers(rows, outputs, seed=2)
    number_format = Fp8("tensor")
    assert torch.equal(number_format.linear(x, weight), F.linear(x, weight))
    for found, expected in ((number_format.input_gradient(grad, weight), grad @ weight), (number_format.weight_gradient(grad, x), grad.T @ x)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_results_go_where_they_are_wanted_with_what_is_added():
    (x, weight, grad), number_format = matrices("friendly"), Fp8("tensor")
    for product, arguments in (
        (number_format.output, (x, weight)),
        (number_format.input_gradient, (grad, weight)),
        (number_format.weight_gradient, (grad, x)),
    ):
        plain = product(*arguments)
        out, plus = torch.full_like(plain, float("nan")), numbers(*plain.shape, seed=3)
        assert product(*arguments, out=out, plus=plus) is out
        assert torch.equal(out, plain + plus)


def test_a_config_chooses_the_format():
    assert policy.number_format(PrecisionSection()) is policy.OPERAND_DTYPE
    for scaling in SCALINGS:
        chosen = policy.number_format(PrecisionSection(linear="fp8", fp8_scaling=scaling))
        assert chosen.name == f"fp8-{scaling}" and chosen is policy.format_named(chosen.name)


def test_a_gpu_without_such_matrix_units_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    section, gpu = PrecisionSection(linear="fp8"), torch.device("cuda", 0)
    for capability, allowed in (((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        policy.require_matrix_units(PrecisionSection(), gpu)
        policy.require_matrix_units(section, torch.device("cpu"))
        if allowed:
            policy.require_matrix_units(section, gpu)
        else:
            with pytest.raises(ConfigError, match=r"linear is fp8, but NVIDIA A100 \(compute capability 8\.\d\) .* set precision.linear to null"):
                policy.require_matrix_units(section, gpu)


@pytest.mark.gpu
@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_gpu_computes_what_a_cpu_does(scaling):
    x, weight, grad = (each.bfloat16() for each in matrices("friendly"))
    found = []
    for device in ("cpu", "cuda"):
        leaves = x.to(device).requires_grad_(), weight.to(device).requires_grad_()
        y = Fp8(scaling).linear(*leaves)
        found.append([y, *torch.autograd.grad(y, leaves, grad.to(device))])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(theirs.cpu().float(), ours.float(), rtol=0.02, atol=0.02 * ours.float().abs().max().item())
