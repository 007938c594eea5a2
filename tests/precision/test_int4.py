"""Whole numbers of four bits: as near as they can be, packed bit for bit, and products of every layout that equal each other's."""

import pytest
import torch

from phase8.precision import int4
from phase8.precision.int4 import FEW_TOKENS, Int4, Int4OfTorch, block_of_torch, in_blocks
from tests.precision.test_int8 import numbers

FORMAT = Int4(group=32)
HALF_A_STEP = 0.5 + 8 / 2**8  # the scale is rounded to bf16, which moves the eighth step by as much
needs_operator = pytest.mark.skipif(block_of_torch() is None, reason="torch's operator has no fast product on this CPU")


def weight_of(stored, inputs):
    """The weight that numbers and scales stand for, fp64 [F, D], read as docs/checkpoint_format.md says, byte by byte."""
    packed, scale = stored["weight"].int(), stored["scale"].double()
    found = torch.zeros(len(packed), scale.shape[1] * 32, dtype=torch.float64)
    for place in range(packed.shape[1]):
        group, i = divmod(place, 16)
        found[:, group * 32 + i] = (packed[:, place] % 16 - 8) * scale[:, group]
        found[:, group * 32 + i + 16] = (packed[:, place] // 16 - 8) * scale[:, group]
    return found[:, :inputs]


@pytest.mark.parametrize("inputs", [32, 96, 40, 5])
def test_every_weight_is_within_half_a_step_of_its_number(inputs):
    weight = numbers(6, inputs)
    weight[1], weight[2, 3], weight[3], weight[4, :2] = 0.0, -1e4, weight[3].abs(), torch.tensor([3.0, -2.99])
    stored = FORMAT.quantized(weight)
    assert {name: (each.dtype, tuple(each.shape)) for name, each in stored.items()} == FORMAT.tensors((6, inputs))
    steps = stored["scale"].abs().double().repeat_interleave(32, dim=1)[:, :inputs]
    error = (weight_of(stored, inputs) - weight.double()).abs()
    assert (error <= HALF_A_STEP * steps).all() and (error[1] == 0).all() and (stored["scale"][1] == 0).all()
    assert (stored["weight"][1] == 0x88).all()  # numbers 0, not what is left of a division by 0
    assert (steps <= weight.abs().amax(1, keepdim=True) / 7.4).all()  # no step is coarser


def test_what_four_bits_hold_is_held_exactly():
    values = torch.randint(-8, 8, (5, 64), generator=torch.Generator().manual_seed(1))
    values[:, 0], values[:, 32] = -8, -8
    for scale in (0.25, -0.25):
        stored = FORMAT.quantized(values * scale)
        assert torch.equal(FORMAT.unpacked(stored["weight"]).flatten(1), values.to(torch.int8))
        assert torch.equal(stored["scale"].float(), torch.full((5, 2), scale))
        again = FORMAT.quantized(weight_of(stored, 64))
        assert all(torch.equal(again[name], stored[name]) for name in stored)


def test_all_numbers_survive_every_layout_bit_for_bit():
    values = torch.randint(-8, 8, (128, 64), generator=torch.Generator().manual_seed(2), dtype=torch.int8)
    values[:, ::32] = -8  # so that every group needs its sixteen numbers
    packed = FORMAT.quantized(values.float())["weight"]
    assert torch.equal(FORMAT.unpacked(packed).view(128, 64), values)
    for block in (64, 32):
        assert torch.equal(Int4OfTorch(32, block)._unpacked(in_blocks(values, block)), values.T)


@pytest.mark.parametrize(("capability", "block"), [("AVX512", 64), ("AVX2", 32)])
def test_the_layouts_of_torch_are_known(capability, block):
    if torch.backends.cpu.get_cpu_capability() != capability:
        pytest.skip(f"torch does not compute with {capability} here")
    assert block_of_torch() == block


@needs_operator
def test_the_layout_is_torchs():
    values = torch.randint(-8, 8, (192, 96), generator=torch.Generator().manual_seed(3), dtype=torch.int8)
    expected = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values.int() + 8, 1)
    assert torch.equal(in_blocks(values, block_of_torch()).flatten(), expected.flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "inputs", "outputs"), [((1,), 64, 128), ((2, 3), 100, 64), ((40,), 40, 192), ((7,), 64, 60), ((0,), 64, 64)])
def test_products_are_those_of_the_numbers_they_stand_for(shape, inputs, outputs, dtype):
    x, stored = numbers(*shape, inputs, dtype=dtype), FORMAT.quantized(numbers(outputs, inputs, seed=1))
    expected = x.double() @ weight_of(stored, inputs).T
    arranged, weight, scale = FORMAT.arranged(**stored)
    if block_of_torch() is not None:
        assert isinstance(arranged, Int4 if outputs == 60 else Int4OfTorch)
    is_rounded = isinstance(arranged, Int4OfTorch) and 0 < x[..., 0].numel() <= FEW_TOKENS
    for found, rounding in ((FORMAT.product(x, **stored), dtype), (arranged.product(x, weight, scale), torch.bfloat16 if is_rounded else dtype)):
        assert found.dtype == dtype and found.shape == (*shape, outputs)
        bound = 1e-5 if rounding == torch.float32 else 0.01
        assert (found.double() - expected).norm() <= bound * expected.norm() + 1e-12


@needs_operator
def test_few_tokens_are_multiplied_by_torchs_operator_and_memory_holds_the_numbers_once(monkeypatch):
    called = []
    original = torch.ops.aten._weight_int4pack_mm_for_cpu
    monkeypatch.setattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu", lambda x, *rest: called.append(len(x)) or original(x, *rest))
    product, weight, scale = FORMAT.arranged(**FORMAT.quantized(numbers(64, 64)))
    for rows in (0, 1, FEW_TOKENS, FEW_TOKENS + 1):
        product.product(numbers(rows, 64), weight, scale)
    assert called == [1, FEW_TOKENS]
    assert weight.nbytes == 64 * 64 // 2 and scale.nbytes == 64 * 2 * 2 * 2  # beside each scale stands a zero


def test_without_torchs_layout_weights_stay_as_they_are_stored(monkeypatch):
    monkeypatch.setattr(int4, "block_of_torch", lambda: None)
    stored = FORMAT.quantized(numbers(64, 64))
    product, weight, scale = FORMAT.arranged(**stored)
    assert product is FORMAT and weight is stored["weight"] and scale is stored["scale"]


@pytest.mark.gpu
def test_a_gpu_multiplies_the_same_numbers():
    x, stored = numbers(9, 100), FORMAT.quantized(numbers(64, 100, seed=1))
    product, weight, scale = FORMAT.arranged(**{name: each.cuda() for name, each in stored.items()})
    torch.testing.assert_close(product.product(x.cuda(), weight, scale).cpu(), FORMAT.product(x, **stored), rtol=1e-3, atol=1e-3)
