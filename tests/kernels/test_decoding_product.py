"""Products of decoding: the definition, and the Triton kernel on a GPU or in the interpreter."""

import pytest
import torch

from phase8.kernels import decoding_product as dispatch
from phase8.kernels.reference.decoding_product import gated, normed_product, product
from tests.kernels.offline import OfflineKernel, compile_offline

EPS = 1e-5
SMALL = [(1, 24, 10), (3, 40, 6), (4, 64, 34)]  # tokens, width, outputs


def draw(tokens, width, outputs, *, dtype=torch.float64, adds=True):
    generator = torch.Generator().manual_seed(0)
    x, summand = torch.randn(2, tokens, width, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(outputs, width, generator=generator, dtype=torch.float64) * width**-0.5
    norm_weight = torch.randn(width, generator=generator, dtype=torch.float64).to(torch.promote_types(dtype, torch.float32))
    return x, summand if adds else None, norm_weight, EPS, weight.to(dtype)


def to(device, dtype, inputs):
    """Inputs on a device: those of the kernel, or in fp64 those of the definition."""
    wide = torch.promote_types(dtype, torch.float32)
    x, summand, norm_weight, eps, weight = inputs
    moved = (None if part is None else part.to(device, dtype) for part in (x, summand, weight))
    return *(next(moved), next(moved)), norm_weight.to(device, wide), eps, next(moved)


@pytest.mark.parametrize("adds", [True, False])
def test_a_gate_is_the_silu_of_the_first_outputs(adds):
    x, summand, norm_weight, eps, weight = draw(3, 10, 8, adds=adds)
    stream = x + summand if adds else x
    normed = stream / (stream.square().mean(-1, keepdim=True) + eps).sqrt() * norm_weight
    first, second = normed @ weight[:4].T, normed @ weight[4:].T
    found, y = dispatch.normed_product(x, summand, norm_weight, eps, weight, is_gated=True)
    torch.testing.assert_close(found, stream)
    torch.testing.assert_close(y, first / (1 + (-first).exp()) * second)
    torch.testing.assert_close(dispatch.product(normed, weight), normed @ weight.T)


def test_a_wide_product_is_not_rounded():
    x, summand, norm_weight, eps, weight = draw(2, 64, 6, dtype=torch.bfloat16)
    assert dispatch.product(x, weight).dtype == torch.bfloat16
    torch.testing.assert_close(dispatch.product(x, weight, is_wide=True), x.float() @ weight.float().T)
    assert dispatch.normed_product(x, summand, norm_weight, eps, weight, is_wide=True)[1].dtype == torch.float32


def check(inputs, *, is_gated, is_wide, tolerance, device):
    from phase8.kernels.gpu import decoding_product as gpu

    dtype, options = inputs[0].dtype, {"is_gated": is_gated, "is_wide": is_wide}
    ours, exact = to(device, dtype, inputs), to("cpu", torch.float64, inputs)
    pairs = [*zip(gpu.normed_product(*ours, **options), normed_product(*exact, **options), strict=True)]
    pairs.append((gpu.product(ours[0], ours[-1], is_wide=is_wide), product(exact[0], exact[-1])))
    assert [mine.dtype for mine, _ in pairs] == [dtype, *2 * [torch.float32 if is_wide else dtype]]
    for mine, theirs in pairs:
        error = (mine.double().cpu() - theirs).norm() / theirs.norm()
        assert error <= tolerance, f"{error:.1e}"


@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("adds", [False, True])
def test_the_kernel_equals_the_definition(shape, is_gated, adds, kernel_device, poisoned_memory, monkeypatch):
    from phase8.kernels.gpu import decoding_product as gpu

    monkeypatch.setattr(gpu, "TILE", gpu.Tile(256, 4))  # a few rows for each program, and some left for the last one
    check(draw(*shape, dtype=torch.float32, adds=adds), is_gated=is_gated, is_wide=adds, tolerance=1e-5, device=kernel_device)


def test_gates_of_many_tokens(kernel_device, poisoned_memory, monkeypatch):
    from phase8.kernels.gpu import decoding_product as gpu

    monkeypatch.setattr(gpu, "GATED_BLOCK", 16)
    y = torch.randn(5, 2 * 40, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(gpu.gated(y.to(kernel_device)).cpu(), gated(y))


@pytest.mark.gpu
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("shape", [(1, 2048, 6288), (4, 5376, 2048), (3, 8192, 1000), (1, 2048, 32000), (64, 2048, 10752)], ids=str)
def test_real_shapes_equal_the_definition(shape, is_gated, kernel_device):
    inputs = to(kernel_device, torch.bfloat16, draw(*shape, dtype=torch.bfloat16))
    exact = to("cpu", torch.float64, inputs)
    for mine, theirs in zip(dispatch.normed_product(*inputs, is_gated=is_gated), normed_product(*exact, is_gated=is_gated), strict=True):
        error = (mine.double().cpu() - theirs).norm() / theirs.norm()
        assert error <= 1e-2, f"{error:.1e}"


@pytest.fixture(scope="module")
def compiled():
    pytest.importorskip("triton")
    arguments = {
        "x": "*bf16", "summand": "*bf16", "summand_stride": 2048, "norm_weight": "*fp32", "weight": "*bf16", "summed": "*bf16", "y": "*bf16",
        "num_outputs": 5376, "eps": 1e-5,
    }  # fmt: skip
    normed = {"TOKENS": 1, "WIDTH": 2048, "BLOCK_D": 2048, "BLOCK_F": 4, "ADDS": True, "NORMS": True, "GATED": True, "OVERLAPS": True}
    plain = {**normed, "WIDTH": 5376, "BLOCK_D": 8192, "BLOCK_F": 2, "ADDS": False, "NORMS": False, "GATED": False, "OVERLAPS": False}
    place = "phase8.kernels.gpu.decoding_product:_product_kernel"
    few = {**normed, "TOKENS": 4, "BLOCK_F": 2}
    return compile_offline({name: OfflineKernel(place, {**arguments, **each}) for name, each in (("normed", normed), ("plain", plain), ("few", few))})


def test_machine_code(compiled):
    for kernel in compiled.values():
        kernel.check(max_registers=128)
    # A thread loads its whole tile, sixteen bytes at once, and nothing beyond the end of a row.
    assert [compiled[name].count("LDG.E.EF.128") for name in ("normed", "plain", "few")] == [16, 12, 8]
    assert [compiled[name].count("ACQBULK") for name in ("normed", "plain", "few")] == [1, 0, 1]
