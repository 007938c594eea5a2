"""The Triton kernel of a decoding step: on a GPU on real shapes, without one in the interpreter on small ones, and its machine code."""

from dataclasses import replace

import pytest
import torch

from phase8.kernels.reference.mixer_step import mixer_step
from tests.kernels.mixer_steps import StepCase, draw_step
from tests.kernels.offline import OfflineKernel, compile_offline

SMALL = [
    StepCase(), StepCase(batch=1, window=0), StepCase(global_path=None, global_tokens=3), StepCase(delta=True, global_tokens=2, taps=2, silu=True),
    StepCase(head_size=12, heads=3, taps=1, scaled=False, channels=False), StepCase(floor=-5.0, rotary=False, positions=(0, 1)),
    StepCase(window=5, global_tokens=3, positions=(2, 40)), StepCase(delta=True, channels=False, silu=True, positions=(5, 6)),
    StepCase(heads=6, key_heads=2, taps=1, global_path=None, global_tokens=2),
    StepCase(heads=4, key_heads=1, taps=1, global_path=None, scaled=False, positions=(2, 9)),
]  # fmt: skip
LARGE = [
    StepCase(batch=3, heads=16, head_size=128, window=2048, positions=(1, 2047, 90_000)),
    StepCase(batch=2, heads=8, head_size=64, window=300, global_tokens=4, delta=True, positions=(299, 301)),
    StepCase(batch=1, heads=5, head_size=96, window=128, floor=-5.0, positions=(131_072,)),
    StepCase(batch=2, heads=32, key_heads=8, head_size=128, window=4096, taps=1, global_path=None, scaled=False, positions=(1500, 4095)),
]
PARTS = [
    StepCase(window=70, positions=(3, 200)), StepCase(window=50, global_path=None, global_tokens=3, positions=(60, 0)),
    StepCase(window=50, heads=6, key_heads=2, taps=1, global_path=None, positions=(49, 7)),
]  # fmt: skip
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
STEPS = 3


@pytest.fixture(autouse=True)
def poisoned(poisoned_memory):
    """Memory that a kernel does not write shows as NaN."""
    pytest.importorskip("triton")


def check(case, device, dtype, *, is_joint=False):
    from phase8.kernels.gpu import mixer_step as gpu

    steps, wide = replace(draw_step(case, dtype, steps=STEPS), is_joint=is_joint), torch.float64
    ours, exact = steps.moved(device, dtype), steps.moved(torch.device("cpu"), wide)
    for step in range(STEPS):
        found, expected = (run(*each.arguments(step)) for run, each in ((gpu.mixer_step, ours), (mixer_step, exact)))
        results = {"y": (found, expected), **{name: (vars(ours.state)[name], tensor) for name, tensor in vars(exact.state).items()}}
        for name, (mine, theirs) in results.items():
            if theirs is None or theirs.numel() == 0:
                continue
            error = (mine.double().cpu() - theirs).norm() / (theirs.double().norm() + 1e-6)
            assert error <= TOLERANCE[dtype], f"step {step}, {name}: {error:.1e}"


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_small_shapes_equal_the_reference(case, kernel_device):
    check(case, kernel_device, torch.float32)


@pytest.mark.parametrize("case", PARTS, ids=str)
def test_parts_of_a_window_are_merged(case, kernel_device, monkeypatch):
    from phase8.kernels.gpu import mixer_step as gpu

    monkeypatch.setattr(gpu, "TILING", gpu.Tiling(slots=16, columns=4))
    assert gpu.num_parts(case.batch * case.heads, case.window) == case.window // 16
    check(case, kernel_device, torch.float32)


@pytest.mark.parametrize("case", [StepCase(delta=True, channels=False), StepCase(silu=True)], ids=str)
def test_results_of_a_joint_product_are_rounded(case, kernel_device):
    check(case, kernel_device, torch.bfloat16, is_joint=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_real_shapes_equal_the_reference(case, dtype, kernel_device):
    check(case, kernel_device, dtype, is_joint=dtype == torch.bfloat16)


@pytest.mark.gpu
def test_a_recorded_step_equals_the_launched_one(kernel_device):
    """Parts are merged by the program that comes last, whichever it is, and kernels overlap: many steps in a row show a race."""
    from phase8.kernels.gpu import decoding_product
    from phase8.kernels.gpu import mixer_step as gpu

    case = StepCase(batch=4, heads=16, head_size=128, window=2048, rank=128, silu=True, positions=(1, 2047, 90_000, 500))
    launched, recorded = (draw_step(case, torch.bfloat16, steps=1).moved(kernel_device, torch.bfloat16) for _ in range(2))
    expected = [gpu.mixer_step(*launched.arguments(0)) for _ in range(60)]
    arguments, weight = recorded.arguments(0), torch.randn(512, 2048, device=kernel_device, dtype=torch.bfloat16)

    def step_of_a_model():
        y = gpu.mixer_step(*arguments)
        decoding_product.product(y, weight, is_wide=False)  # the layer that follows, after which the state may be read again
        return y

    for _ in range(2):
        step_of_a_model()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [step_of_a_model() for _ in range(2)]
    for step in range(2, 60, 2):
        graph.replay()
        for ours, theirs in zip(found, expected[step : step + 2], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert not recorded.state.arrivals.any()


@pytest.fixture(scope="module")
def compiled():
    types = {
        "qkv": "*fp32", "before": "*bf16", "taps": "*fp32", "cosines": "*fp32", "sines": "*fp32", "scale": "*fp32", "keys": "*bf16",
        "values": "*bf16", "positions": "*i64", "scalars": "*fp32", "channels": "*fp32", "gate_up": "*bf16",
        "decay_bias": "*fp32", "gate_bias": "*fp32", "norm_weight": "*fp32",
        "memory": "*fp32", "out": "*bf16", "parts": "*fp32", "arrivals": "*i32",
    }  # fmt: skip
    numbers = {
        "qkv_stride": 6288, "scalars_stride": 6288, "channels_stride": 6288, "window": 2048, "global_tokens": 0, "score_scale": 0.088, "eps": 1e-5,
        "decay_floor": -5.0,
    }  # fmt: skip
    constants = {
        "NUM_HEADS": 16, "KEY_HEADS": 16, "HEAD_SIZE": 128, "BLOCK_HALF": 64, "BLOCK_K": 128, "TAPS": 4, "BLOCK_J": 32, "BLOCK_V": 32, "BLOCK_G": 1,
        "BLOCK_P": 64, "WINDOW_PARTS": 64, "MEMORY_PARTS": 4, "ROTARY": True, "SCALE": True, "GLOBALS": False, "RANK": 128, "BLOCK_R": 128,
        "SILU": True, "SCALARS": 1, "DELTA": False, "FLOOR": False, "OVERLAPS": True,
    }  # fmt: skip
    kernel = OfflineKernel("phase8.kernels.gpu.mixer_step:_step_kernel", types | numbers | constants, num_warps=4, options={"maxnreg": 128})
    short = replace(kernel, arguments={**kernel.arguments, "WINDOW_PARTS": 1, "BLOCK_P": 1})
    delta = replace(kernel, arguments={**kernel.arguments, "DELTA": True, "SCALARS": 2, "GLOBALS": True, "global_tokens": 4, "BLOCK_G": 4})
    shared = replace(kernel, arguments={**kernel.arguments, "NUM_HEADS": 32, "KEY_HEADS": 8, "TAPS": 1, "MEMORY_PARTS": 0, "OVERLAPS": False})
    return compile_offline({"linear": kernel, "short": short, "delta": delta, "shared": shared})


def test_machine_code(compiled):
    """So few registers leave a processor several programs, which wait for memory in turns."""
    for kernel in compiled.values():
        kernel.check(max_registers=128)
