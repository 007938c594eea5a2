"""Products of 5 to 64 tokens in decoding: the Triton kernel against float64, on a GPU or in the interpreter; its tiles; its machine code."""

from dataclasses import replace
from math import ceil

import pytest
import torch

from phase8.kernels import decoding_product as dispatch
from phase8.kernels.limits import MAX_FEW_TOKENS, MAX_SEVERAL_TOKENS
from phase8.kernels.reference.decoding_product import gated, normed_product, product
from tests.kernels.offline import OfflineKernel, compile_offline

EPS = 1e-5
# Tokens, width, outputs, splits of the width: whole blocks of 16 outputs and 16 inputs, a rest of each, and splits that are beyond the width.
SMALL = [(5, 32, 16, 1), (17, 40, 42, 2), (33, 88, 20, 3), (64, 56, 70, 3)]


def draw(tokens, width, outputs, *, dtype=torch.float16, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    x, summand = torch.randn(2, tokens, width, generator=generator).to(dtype).to(device)
    weight = (torch.randn(outputs, width, generator=generator) * width**-0.5).to(dtype).to(device)
    return x, summand, torch.randn(width, generator=generator).to(device), EPS, weight


def error(mine, theirs):
    return ((mine.double().cpu() - theirs.cpu()).norm() / theirs.norm().cpu()).item()


@pytest.fixture
def small_tiles(monkeypatch):
    """Sets how many programs share the width, with blocks of 16 outputs of each product and of 16 inputs."""
    from phase8.kernels.gpu import decoding_product_of_several as gpu
    from phase8.kernels.gpu.decoding_product_tiling import Tile

    def set_splits(splits, *, inputs=16):
        monkeypatch.setattr(gpu, "tile_for", lambda shape, _: Tile(32 if shape.is_gated else 16, inputs, 4, 2, splits))
        return gpu

    return set_splits


@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_a_wide_product_equals_the_definition(shape, small_tiles, kernel_device, poisoned_memory):
    """In fp32, so that a product or a number too many shows."""
    *sizes, splits = shape
    x, *_, weight = draw(*sizes, device=kernel_device)
    gpu = small_tiles(splits)
    for _ in range(2):  # the second time from the counts that the first has left
        y = gpu.product(x, weight, is_wide=True)
        assert y.dtype == torch.float32
        assert error(y, product(x.double(), weight.double())) <= 1e-6
    assert torch.equal(gpu.product(x, weight), y.half())


@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_a_gate_is_rounded_as_in_the_definition(shape, small_tiles, kernel_device, poisoned_memory):
    *sizes, splits = shape
    x, *_, weight = draw(*sizes, device=kernel_device)
    found = small_tiles(splits).product(x, weight, is_gated=True)
    both = small_tiles(splits).product(x, weight)
    torch.testing.assert_close(found, gated(both), atol=1e-6, rtol=2e-3)
    assert (found == gated(both)).double().mean() >= 0.99  # silu may differ in its last place in fp32, rarely in fp16
    assert error(found, gated(product(x.double(), weight.double()))) <= 1e-3


def test_parts_are_added_in_the_order_of_the_width(small_tiles, kernel_device):
    x, *_, weight = draw(5, 48, 16, device=kernel_device)
    first, second, third = (small_tiles(1).product(*parts, is_wide=True) for parts in zip(x.split(16, 1), weight.split(16, 1), strict=True))
    found = small_tiles(3).product(x, weight, is_wide=True)
    assert torch.equal(found, first + second + third)
    assert not torch.equal(found, third + second + first)


@pytest.mark.parametrize("is_gated", [False, True])
def test_the_norm_comes_first(is_gated, small_tiles, kernel_device, poisoned_memory, monkeypatch):
    monkeypatch.setattr(dispatch, "uses_triton", lambda x: True)
    gpu = small_tiles(2)
    inputs = draw(6, 40, 20, device=kernel_device)
    called = []
    monkeypatch.setattr(gpu, "product", lambda *args, product=gpu.product, **kwargs: called.append(kwargs) or product(*args, **kwargs))
    x, y = dispatch.normed_product(*inputs, is_gated=is_gated)
    stream, expected = normed_product(*(part.double() if isinstance(part, torch.Tensor) else part for part in inputs), is_gated=is_gated)
    assert called == [{"is_gated": is_gated, "is_wide": False}]
    assert error(x, stream) <= 1e-3
    assert error(y, expected) <= 2e-3
    assert error(dispatch.product(inputs[0], inputs[-1]), product(inputs[0].double(), inputs[-1].double())) <= 1e-3
    assert len(called) == 2


@pytest.mark.parametrize(
    ("tokens", "width", "dtype", "is_kernel"),
    [
        (MAX_FEW_TOKENS + 1, 16, torch.bfloat16, True),
        (MAX_SEVERAL_TOKENS, 16, torch.float16, True),
        (MAX_SEVERAL_TOKENS + 1, 16, torch.bfloat16, False),
        (MAX_FEW_TOKENS, 16, torch.bfloat16, False),
        (8, 20, torch.bfloat16, False),
        (8, 16, torch.float32, False),
    ],
)
def test_what_the_kernel_is_made_for(tokens, width, dtype, is_kernel, monkeypatch):
    monkeypatch.setattr(dispatch, "uses_triton", lambda x: True)
    assert dispatch._are_several(torch.empty(tokens, width, dtype=dtype), torch.empty(8, width, dtype=dtype)) == is_kernel


SHAPES = [(2048, 6288, False), (2048, 2048, False), (2048, 10752, True), (5376, 2048, False), (2048, 32000, False)]  # of configs/phase8_1b.yaml


def test_tiles_fill_the_device_and_fit_into_it():
    pytest.importorskip("triton")
    from phase8.kernels.gpu.decoding_product_tiling import Device, Shape, candidates, tile_for

    hopper, smaller = Device(132, 227 * 1024), Device(84, 99 * 1024)
    for tokens in (16, 32, 64):
        for width, rows, is_gated in SHAPES:
            shape = Shape(tokens, width, rows, is_gated)
            assert 0.35 <= ceil(rows / tile_for(shape, hopper).rows) * tile_for(shape, hopper).splits / hopper.num_processors <= 2
            for device in (hopper, smaller):
                found = candidates(shape, device)
                assert 3 <= len(set(found)) == len(found) <= 12
                assert tile_for(shape, device) == found[0]
                assert all(tile.shared_bytes(tokens) <= device.shared_bytes for tile in found)
                assert all(tile.splits * tile.inputs <= width for tile in found)
    assert candidates(Shape(16, 8, 8, True), hopper)[0].splits == 1


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "shape"), [*((64, shape) for shape in SHAPES), (5, SHAPES[0]), (33, SHAPES[2]), (17, SHAPES[3])], ids=str)
def test_real_shapes_equal_the_definition(tokens, shape, kernel_device):
    width, outputs, is_gated = shape
    inputs = draw(tokens, width, outputs, dtype=torch.bfloat16, device=kernel_device)
    exact = [part.double() if isinstance(part, torch.Tensor) else part for part in inputs]
    for mine, theirs in zip(dispatch.normed_product(*inputs, is_gated=is_gated), normed_product(*exact, is_gated=is_gated), strict=True):
        assert error(mine, theirs) <= 1e-2


@pytest.mark.gpu
def test_a_wide_product_of_a_real_shape_is_not_rounded(kernel_device):
    x, *_, weight = draw(64, 2048, 6288, dtype=torch.bfloat16, device=kernel_device)
    assert error(dispatch.product(x, weight, is_wide=True), product(x.double(), weight.double())) <= 1e-5


@pytest.mark.gpu
def test_replays_of_a_recorded_step_count_from_zero(kernel_device, monkeypatch):
    from phase8.kernels.gpu import decoding_product_of_several as gpu
    from phase8.kernels.gpu.decoding_product_tiling import Tile

    monkeypatch.setattr(gpu, "_ARRIVALS", {})
    x, *_, weight = draw(64, 5376, 2048, dtype=torch.bfloat16, device=kernel_device)
    monkeypatch.setattr(gpu, "tile_for", lambda *_: Tile(128, 64, num_warps=4, num_stages=4, splits=4))
    for has_counts in (True, False):  # those of earlier launches, or those of the graph
        rounded, y = gpu.product(x, weight), gpu.product(x, weight, is_wide=True)
        if not has_counts:
            gpu._ARRIVALS.clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            rounded, y = gpu.product(x, weight), gpu.product(x, weight, is_wide=True)
        assert len(gpu._ARRIVALS) == has_counts
        for _ in range(3):
            y.fill_(float("nan"))
            graph.replay()
            assert error(y, product(x.double(), weight.double())) <= 1e-5
            assert torch.equal(rounded, y.bfloat16())


def offline(tile, *, width=2048, outputs=2048, tokens=64, is_gated=False, is_wide=False):
    steps = ceil(ceil(width / tile.inputs) / tile.splits)
    arguments = {
        "x": "*bf16", "weight": "*bf16", "y": "*fp32" if is_wide else "*bf16", "parts": "*fp32", "arrivals": "*i32", "num_tokens": tokens,
        "num_outputs": outputs // (2 if is_gated else 1), "WIDTH": width, "TOKENS": tokens, "BLOCK_F": tile.rows // (2 if is_gated else 1),
        "BLOCK_D": tile.inputs, "STEPS": steps, "SPLITS": tile.splits, "GATED": is_gated, "AHEAD": tile.ahead // tile.rows // 2, "OVERLAPS": True,
    }  # fmt: skip
    place = "phase8.kernels.gpu.decoding_product_of_several:_product_kernel"
    return OfflineKernel(place, arguments, num_warps=tile.num_warps, num_stages=tile.num_stages)


@pytest.fixture(scope="module")
def compiled():
    pytest.importorskip("triton")
    from phase8.kernels.gpu.decoding_product_tiling import TILES

    small, narrow, large, _ = TILES
    return compile_offline({
        "split": offline(replace(small, splits=5), outputs=6288, is_wide=True),
        "narrow": offline(replace(narrow, splits=8), width=5376, tokens=16),
        "gated, split": offline(replace(large, splits=3), outputs=10752, is_gated=True),
        "large": offline(large, outputs=32000),
    })  # fmt: skip


def test_machine_code(compiled):
    from phase8.kernels.gpu.decoding_product_tiling import TILES

    for name, kernel in compiled.items():
        # The matrix units read both operands from shared memory; a thread copies sixteen bytes at once; a part of the weight is asked for ahead.
        kernel.check(max_registers=168, contains=("HGMMA", "LDGSTS.E.BYPASS.128", "UBLKPF", "ACQBULK"), lacks=("HMMA",))
        assert kernel.count("LDGSTS") == kernel.count("LDGSTS.E.BYPASS.128")
        assert kernel.count("ATOMG") == (1 if "split" in name or name == "narrow" else 0)
    assert compiled["large"].shared == TILES[2].shared_bytes(64)
    assert compiled["narrow"].shared == TILES[1].shared_bytes(16)
