"""The Triton kernels: on a GPU on real shapes, without one in the interpreter on small ones, and their machine code."""

import pytest
import torch

from phase8.kernels.reference.low_rank_swiglu import low_rank_swiglu, low_rank_swiglu_backward
from tests.kernels.offline import OfflineKernel, compile_offline

# tokens, rank, width
SMALL = [(40, 16, 48), (17, 5, 20), (1, 1, 1), (33, 20, 16)]
LARGE = [(8192, 16, 1408), (4097, 32, 2752), (300, 64, 1000), (5000, 24, 130)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def exact(poisoned_memory):
    """Products of fp32 as exact as can be."""
    pytest.importorskip("triton")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def check(case, device, dtype):
    from phase8.kernels.gpu.low_rank_swiglu import feed_forward
    from phase8.kernels.gpu.low_rank_swiglu_backward import feed_forward_backward

    num_tokens, rank, width = case
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, dtype=torch.float32, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype).double()

    bottlenecks, dy = draw(num_tokens, 2 * rank, dtype=dtype), draw(num_tokens, rank, dtype=dtype)
    weights = [draw(width, rank, scale=rank**-0.5), draw(width, rank, scale=rank**-0.5), draw(rank, width, scale=width**-0.5)]
    rounded = [weight.to(dtype).double() for weight in weights]
    dbottlenecks, *dweights = low_rank_swiglu_backward(dy, bottlenecks, *rounded)
    expected = [low_rank_swiglu(bottlenecks, *rounded), dbottlenecks, *(each.flatten() for each in dweights)]
    x, gradient = bottlenecks.to(device, dtype), dy.to(device, dtype)
    on_device = [weight.to(device, torch.float32) for weight in weights]
    found_dbottlenecks, found_dweights = feed_forward_backward(gradient, x, *on_device)
    found = [feed_forward(x, *on_device), found_dbottlenecks, *found_dweights]
    assert found_dweights.dtype == torch.float32
    for name, ours, theirs in zip(("y", "dbottlenecks", "dgate", "dup", "ddown"), found, expected, strict=True):
        error = (ours.double().cpu() - theirs).norm() / (theirs.norm() + 1e-6)
        assert error <= TOLERANCE[dtype], f"{name}: {error:.1e}"


@pytest.mark.parametrize("case", SMALL)
def test_small_shapes_equal_the_reference(case, kernel_device):
    check(case, kernel_device, torch.float32)


def test_the_tokens_may_be_cut_into_segments(kernel_device, monkeypatch):
    from phase8.kernels.gpu import low_rank_swiglu_backward

    monkeypatch.setattr(low_rank_swiglu_backward, "num_processors", lambda device: 6)
    check((100, 8, 30), kernel_device, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", LARGE)
def test_real_shapes_equal_the_reference(case, dtype, kernel_device):
    check(case, kernel_device, dtype)


@pytest.fixture(scope="module")
def compiled():
    pytest.importorskip("triton")
    tiles = {"RANK": 16, "BLOCK_N": 64, "BLOCK_F": 64, "BLOCK_R": 16, "LOG2E": 1.4426950408889634, "FAST": True, "PRECISION": "tf32"}
    tensors = {"bottlenecks": "*bf16", "gate": "*fp32", "up": "*fp32", "down": "*fp32"}
    sizes = {"num_tokens": 8192, "width": 1408}
    backward = "phase8.kernels.gpu.low_rank_swiglu_backward"
    return compile_offline(
        {
            "forward": OfflineKernel(
                "phase8.kernels.gpu.low_rank_swiglu:_forward_kernel", {**tensors, "y": "*bf16", **sizes, **tiles}, num_warps=4
            ),
            "bottlenecks": OfflineKernel(
                f"{backward}:_bottlenecks_kernel", {"dy": "*bf16", **tensors, "dbottlenecks": "*bf16", **sizes, **tiles}, num_warps=4
            ),
            "weights": OfflineKernel(
                f"{backward}:_weights_kernel", {"dy": "*bf16", **tensors, "sums": "*fp32", **sizes, "segment_tokens": 768, **tiles}, num_warps=4
            ),
        }
    )


@pytest.mark.parametrize("name", ["forward", "bottlenecks", "weights"])
def test_machine_code(compiled, name):
    compiled[name].check(max_registers=170, contains=("HGMMA", "MUFU.EX2", "MUFU.RCP"))
