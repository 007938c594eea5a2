"""The residual stream and its norm: the definition, and the Triton kernel on a GPU or in the interpreter."""

import pytest
import torch

from phase8.kernels.reference.residual_norm import normalised, residual_norm
from tests.kernels.offline import OfflineKernel, compile_offline

EPS = 1e-5


def draw(rows, width, *, adds, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x, summand, weight = torch.randn(3, rows, width, generator=generator, dtype=torch.float64)
    return x.to(dtype), summand.to(dtype) if adds else None, weight[0].to(torch.promote_types(dtype, torch.float32))


@pytest.mark.parametrize("adds", [True, False])
def test_the_norm_is_that_of_the_sum(adds):
    x, summand, weight = draw(3, 10, adds=adds)
    summed, normed = residual_norm(x, summand, weight, EPS)
    expected = x + summand if adds else x
    torch.testing.assert_close(summed, expected)
    torch.testing.assert_close(normalised(expected, EPS), torch.nn.functional.rms_norm(expected, (10,), eps=EPS))
    torch.testing.assert_close(normed, expected / (expected.square().mean(-1, keepdim=True) + EPS).sqrt() * weight)


@pytest.mark.parametrize(("rows", "width", "adds"), [(3, 24, True), (1, 40, False), (2, 64, True)])
def test_the_kernel_equals_the_reference(rows, width, adds, kernel_device, poisoned_memory):
    from phase8.kernels.gpu import residual_norm as gpu

    x, summand, weight = draw(rows, width, adds=adds, dtype=torch.float32)
    found = gpu.residual_norm(*(None if part is None else part.to(kernel_device) for part in (x, summand, weight)), EPS)
    for ours, theirs in zip(found, residual_norm(x, summand, weight, EPS), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [2048, 5000, 16384])
def test_real_rows_equal_the_reference(width, kernel_device):
    from phase8.kernels.residual_norm import residual_norm as chosen

    inputs = [part.to(kernel_device) for part in draw(64, width, adds=True, dtype=torch.bfloat16)]
    for ours, theirs in zip(chosen(*inputs, EPS), residual_norm(*(part.double() for part in inputs), EPS), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-2, atol=2e-2)


def test_machine_code():
    pytest.importorskip("triton")
    arguments = {"x": "*bf16", "summand": "*bf16", "summand_stride": 2048, "weight": "*fp32", "summed": "*bf16", "normed": "*bf16", "eps": 1e-5}
    arguments |= {"WIDTH": 2048, "BLOCK": 2048, "ADDS": True, "OVERLAPS": True}
    kernel = OfflineKernel("phase8.kernels.gpu.residual_norm:_norm_kernel", arguments, num_warps=8)
    compile_offline({"norm": kernel})["norm"].check(max_registers=64)
