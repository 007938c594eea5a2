"""Whole numbers of eight bits: as near as they can be, and products that equal those of the numbers they stand for."""

import pytest
import torch

from phase8.precision.int8 import int8_product, quantized


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_numbers_are_the_nearest_with_the_scale_of_their_row():
    x = numbers(5, 64)
    x[1], x[2, 3] = 0.0, -1e4
    values, scale = quantized(x)
    assert values.dtype == torch.int8 and values.abs().amax(1).tolist() == [127, 0, 127, 127, 127] and values.min() >= -127
    assert scale.shape == (5, 1) and scale[1] == 0 and values[2, 3] == -127
    assert ((values * scale - x).abs() <= 0.5001 * scale).all()


def test_what_eight_bits_hold_is_held_exactly():
    values = torch.randint(-127, 128, (3, 16), generator=torch.Generator().manual_seed(1))
    values[:, 0] = 127
    found, scale = quantized(values * 0.5)
    assert torch.equal(found, values.to(torch.int8)) and torch.equal(scale, torch.full((3, 1), 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "width", "outputs"), [((1,), 64, 128), ((2, 3), 128, 64), ((7,), 100, 60), ((40,), 64, 64), ((0,), 64, 64)])
@pytest.mark.parametrize("is_dynamic", [False, True])
def test_products_are_those_of_the_numbers_they_stand_for(shape, width, outputs, dtype, is_dynamic):
    x, (weight, scale) = numbers(*shape, width, dtype=dtype), quantized(numbers(outputs, width, seed=1))
    y = int8_product(x, weight, scale.squeeze(-1), is_dynamic=is_dynamic)
    values, scale_of_token = quantized(x) if is_dynamic else (x, torch.ones(1))
    expected = (values.double() * scale_of_token.double()) @ (weight.double() * scale.double()).T
    assert y.dtype == dtype and y.shape == (*shape, outputs)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5 if dtype == torch.float32 else 0.02, atol=1e-4 if dtype == torch.float32 else 0.2)


def test_few_tokens_in_bf16_are_multiplied_by_packed_weights(monkeypatch):
    called = []
    original = torch.ops.aten._weight_int8pack_mm
    monkeypatch.setattr(torch.ops.aten, "_weight_int8pack_mm", lambda *arguments: called.append(len(arguments[0])) or original(*arguments))
    weight, scale = quantized(numbers(64, 64))
    for rows in (1, 8, 9):
        int8_product(numbers(rows, 64, dtype=torch.bfloat16), weight, scale.squeeze(-1), is_dynamic=False)
    int8_product(numbers(1, 64), weight, scale.squeeze(-1), is_dynamic=False)
    int8_product(numbers(1, 60, dtype=torch.bfloat16), weight[:, :60].contiguous(), scale.squeeze(-1), is_dynamic=False)  # torch would crash
    assert called == [1, 8]


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 17, 200])
@pytest.mark.parametrize("is_dynamic", [False, True])
def test_a_gpu_multiplies_the_same_numbers(rows, is_dynamic):
    x, (weight, scale) = numbers(rows, 128), quantized(numbers(64, 128, seed=1))
    found = int8_product(x.cuda(), weight.cuda(), scale.squeeze(-1).cuda(), is_dynamic=is_dynamic)
    torch.testing.assert_close(found.cpu(), int8_product(x, weight, scale.squeeze(-1), is_dynamic=is_dynamic and rows > 16), rtol=1e-3, atol=1e-3)
