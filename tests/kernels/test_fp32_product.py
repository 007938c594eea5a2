"""Products of fp32 matrices on a CPU by either library, whatever the processor that runs the tests."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from phase8.kernels import fp32_product as module
from phase8.kernels.fp32_product import FEWEST_MULTIPLICATIONS, fp32_product, takes_products
from phase8.kernels.reference.grouped_product import grouped_product, grouped_product_backward
from phase8.precision.formats import OPERAND_DTYPE

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
LARGE = (128, 160, 96)
assert LARGE[0] * LARGE[1] * LARGE[2] >= FEWEST_MULTIPLICATIONS


@pytest.fixture(params=[pytest.param(True, marks=needs_onednn), False], ids=["onednn", "mkl"])
def by_onednn(request, monkeypatch):
    monkeypatch.setattr(module, "prefers_onednn", lambda: request.param)
    return request.param


class Products(TorchDispatchMode):
    """Names of the operators that multiply matrices."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        self.names += [name] if name in ("mkldnn_linear", "mm", "addmm") else []
        return operator(*args, **(kwargs or {}))


def numbers(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


@pytest.mark.parametrize("turned", [(), (0,), (1,), (0, 1)])
def test_equals_the_product_in_float64_by_the_library_that_is_faster(by_onednn, turned):
    rows, inner, columns = LARGE
    operands = [numbers(rows, inner), numbers(inner, columns)]
    for each in turned:
        operands[each] = operands[each].T.contiguous().T
    with Products() as products:
        found = fp32_product(*operands)
    assert products.names == ["mkldnn_linear" if by_onednn else "mm"]
    assert found.is_contiguous() and found.layout is torch.strided
    torch.testing.assert_close(found.double(), operands[0].double() @ operands[1].double(), rtol=1e-5, atol=1e-4)


@needs_onednn
@pytest.mark.parametrize(("shape", "dtype"), [((8, 160, 96), torch.float32), (LARGE, torch.float64), (LARGE, torch.bfloat16)])
def test_small_products_and_other_dtypes_are_torchs_own(monkeypatch, shape, dtype):
    monkeypatch.setattr(module, "prefers_onednn", lambda: True)
    rows, inner, columns = shape
    left, right = numbers(rows, inner, dtype=dtype), numbers(inner, columns, dtype=dtype)
    with Products() as products:
        assert torch.equal(fp32_product(left, right), left @ right)
    assert takes_products(left) is (dtype is torch.float32)
    assert products.names == ["mm", "mm"]


def test_tensors_without_memory_have_products_too(by_onednn):
    with FakeTensorMode():
        x, weight = torch.empty(2, 64, 160, requires_grad=True), torch.empty(96, 160, requires_grad=True)
        y = OPERAND_DTYPE.linear(x, weight)
        y.sum().backward()
    assert (y.shape, x.grad.shape, weight.grad.shape) == ((2, 64, 96), x.shape, weight.shape)


def test_a_linear_layer_and_its_gradients_are_those_of_torch(by_onednn):
    rows, inner, columns = LARGE
    x, weight, grad = numbers(2, rows // 2, inner).requires_grad_(), numbers(columns, inner).requires_grad_(), numbers(2, rows // 2, columns)
    expected = F.linear(x, weight)
    with Products() as products:
        found = OPERAND_DTYPE.linear(x, weight)
        gradients = torch.autograd.grad(found, (x, weight), grad)
    assert products.names.count("mkldnn_linear") == (3 if by_onednn else 0)
    for ours, theirs in zip((found, *gradients), (expected, *torch.autograd.grad(expected, (x, weight), grad)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_products_of_experts_and_their_gradients_are_those_of_float64(by_onednn, groups):
    rows, inner, columns = LARGE
    ends = torch.tensor([rows, 2 * rows][:groups], dtype=torch.int32)
    arguments = [numbers(groups * rows + 3, inner), numbers(groups, columns, inner)]
    dy = numbers(groups * rows + 3, columns)
    exact = [each.double().requires_grad_() for each in arguments]
    y = grouped_product(*exact, ends)
    expected = (y, *torch.autograd.grad(y, exact, dy.double()))
    with Products() as products:
        found = grouped_product(*arguments, ends), *grouped_product_backward(dy, *arguments, ends)
    assert products.names == [("mkldnn_linear" if by_onednn else "mm")] * 3 * groups
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-4)


@needs_onednn
def test_a_layer_is_read_in_inference_mode(monkeypatch):
    monkeypatch.setattr(module, "prefers_onednn", lambda: True)
    rows, inner, columns = LARGE
    x, weight = numbers(1, rows, inner), numbers(columns, inner)
    with torch.inference_mode():
        found = OPERAND_DTYPE.linear(x, weight)
    torch.testing.assert_close(found, F.linear(x, weight), rtol=1e-5, atol=1e-4)
