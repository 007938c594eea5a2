"""The Triton kernel of a decoding step: on a GPU on real shapes, without one in the interpreter on small ones, and its machine code."""

from dataclasses import replace

import pytest
import torch

from phase8.kernels.gpu.mixer_step_tiling import CANDIDATES, CHOICES, Tiling, tiling_for
from phase8.kernels.reference.mixer_step import mixer_step
from tests.kernels.mixer_steps import StepCase, draw_step
from tests.kernels.offline import OfflineKernel, compile_offline, count

SMALL = [
    StepCase(), StepCase(batch=1, window=0), StepCase(global_path=None, global_tokens=3), StepCase(delta=True, global_tokens=2, taps=2, silu=True),
    StepCase(head_size=12, heads=3, taps=1, scaled=False, channels=False), StepCase(floor=-5.0, rotary=False, positions=(0, 1)),
    StepCase(window=5, global_tokens=3, positions=(2, 40)), StepCase(delta=True, channels=False, silu=True, positions=(5, 6)),
    StepCase(heads=6, key_heads=2, taps=1, global_path=None, global_tokens=2),
    StepCase(heads=4, key_heads=1, taps=1, global_path=None, scaled=False, positions=(2, 9)),
    StepCase(silu=True, silu_values="global", silu_gate=True), StepCase(silu_values="global", silu_gate=True, channels=False, delta=True),
    StepCase(silu=True, silu_values="global", silu_gate=True, skip=True, window=0), StepCase(skip=True, head_size=12),
    StepCase(silu_values="all", skip=True), StepCase(heads=4, key_heads=2, taps=1, global_path=None, silu_values="all"),
]  # fmt: skip
LARGE = [
    StepCase(batch=3, heads=16, head_size=128, window=2048, positions=(1, 2047, 90_000)),
    StepCase(batch=2, heads=8, head_size=64, window=300, global_tokens=4, delta=True, positions=(299, 301)),
    StepCase(batch=1, heads=5, head_size=96, window=128, floor=-5.0, positions=(131_072,)),
    StepCase(
        batch=2, heads=16, head_size=128, window=128, rank=128, silu=True, silu_values="global", silu_gate=True, skip=True, positions=(127, 400)
    ),
    StepCase(batch=2, heads=32, key_heads=8, head_size=128, window=4096, taps=1, global_path=None, scaled=False, positions=(1500, 4095)),
]
TILES = [  # of which windows have several
    StepCase(window=70, positions=(3, 200)), StepCase(window=50, global_path=None, global_tokens=3, positions=(60, 0)),
    StepCase(window=50, heads=6, key_heads=2, taps=1, global_path=None, positions=(49, 7)),
]  # fmt: skip
EVERYTHING = StepCase(window=70, rank=40, head_size=12, global_tokens=3, delta=True, silu=True, positions=(69, 200))
SEVERAL_OF_A_HEAD = Tiling(slots=16, columns=4, part_tiles=1)
CHOSEN = list(dict.fromkeys(tiling for _, tiling in CHOICES))
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
STEPS = 2


@pytest.fixture(autouse=True)
def poisoned(poisoned_memory):
    """Memory that a kernel does not write shows as NaN."""
    pytest.importorskip("triton")


@pytest.fixture
def tile(monkeypatch):
    """Makes a tiling the one that is chosen."""
    from phase8.kernels.gpu import mixer_step as gpu

    return lambda tiling: monkeypatch.setattr(gpu, "tiling_for", lambda num_heads, num_processors: tiling)


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


def test_few_heads_are_divided_and_many_are_not():
    few, many = tiling_for(16, 132), tiling_for(64 * 16, 132)
    assert not few.is_whole and few.window_parts(16, 2048) >= 16 and few.window_parts(16, 0) == 0
    assert many.is_whole and many.window_parts(64 * 16, 2048) == 1 and many.window_parts(64 * 16, 0) == 0
    assert tiling_for(1, 10_000) == few, "there is a choice for every number of heads"
    assert [least for least, _ in CHOICES] == sorted((least for least, _ in CHOICES), reverse=True) and {*CHOSEN} <= {*CANDIDATES}


@pytest.mark.parametrize("tiling", CHOSEN, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_small_shapes_equal_the_reference(case, tiling, kernel_device, tile):
    tile(tiling)
    check(case, kernel_device, torch.float32)


OTHERS = [tiling for tiling in CANDIDATES if tiling not in CHOSEN]


@pytest.mark.full
@pytest.mark.parametrize("tiling", OTHERS, ids=str)
def test_every_other_candidate_equals_the_reference(tiling, kernel_device, tile):
    tile(tiling)
    check(EVERYTHING, kernel_device, torch.float32)


@pytest.mark.parametrize("tiling", [SEVERAL_OF_A_HEAD, Tiling(is_whole=True, gate_tile=2)], ids=str)
@pytest.mark.parametrize("case", TILES, ids=str)
def test_parts_and_tiles_of_a_window_are_merged(case, tiling, kernel_device, tile):
    assert tiling.is_whole or tiling.window_parts(case.batch * case.heads, case.window) == case.window // 16
    tile(tiling)
    check(case, kernel_device, torch.float32)


@pytest.mark.parametrize("tiling", CHOSEN, ids=str)
@pytest.mark.parametrize("case", [StepCase(delta=True, channels=False), StepCase(silu=True)], ids=str)
def test_results_of_a_joint_product_are_rounded(case, tiling, kernel_device, tile):
    tile(tiling)
    check(case, kernel_device, torch.bfloat16, is_joint=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tiling", CHOSEN, ids=str)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_real_shapes_equal_the_reference(case, tiling, dtype, kernel_device, tile):
    tile(tiling)
    check(case, kernel_device, dtype, is_joint=dtype == torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("tiling", CHOSEN, ids=str)
def test_a_recorded_step_equals_the_launched_one(tiling, kernel_device, tile):
    """Parts are merged by the program that comes last, whichever it is, and kernels overlap: many steps in a row show a race."""
    from phase8.kernels.gpu import decoding_product
    from phase8.kernels.gpu import mixer_step as gpu

    tile(tiling)
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


def kernel(tiling, **changes):
    """The kernel of a tiling for one sequence if it divides heads, for 64 if not."""
    types = {
        "qkv": "*fp32", "before": "*bf16", "taps": "*fp32", "cosines": "*fp32", "sines": "*fp32", "scale": "*fp32", "keys": "*bf16",
        "values": "*bf16", "positions": "*i64", "scalars": "*fp32", "channels": "*fp32", "gate_up": "*bf16",
        "decay_bias": "*fp32", "gate_bias": "*fp32", "skip": "*fp32", "norm_weight": "*fp32",
        "memory": "*fp32", "out": "*bf16", "parts": "*fp32", "arrivals": "*i32",
    }  # fmt: skip
    numbers = {
        "qkv_stride": 6288, "scalars_stride": 6288, "channels_stride": 6288, "window": 2048, "global_tokens": 0, "score_scale": 0.088, "eps": 1e-5,
        "decay_floor": -5.0,
    }  # fmt: skip
    window_parts = tiling.window_parts(16, 2048)
    columns = 128 if tiling.is_whole else tiling.columns
    constants = {
        "NUM_HEADS": 16, "KEY_HEADS": 16, "HEAD_SIZE": 128, "BLOCK_K": 128, "TAPS": 4, "BLOCK_J": tiling.slots, "ROWS": max(4, tiling.num_warps),
        "BLOCK_V": columns, "BLOCK_P": window_parts, "WINDOW_PARTS": window_parts, "MEMORY_PARTS": 128 // columns, "IS_WHOLE": tiling.is_whole,
        "ROTARY": True, "SCALE": True, "GLOBALS": False, "RANK": 128, "BLOCK_R": 128, "TILE_R": tiling.gate_tile, "SILU": True, "SCALARS": 1,
        "DELTA": False, "FLOOR": False, "SILU_VALUES": "none", "SILU_GATE": False, "SKIP": False, "OVERLAPS": True,
    }  # fmt: skip
    options = {"maxnreg": tiling.max_registers}
    return OfflineKernel(
        "phase8.kernels.gpu.mixer_step:_step_kernel", types | numbers | constants | changes, num_warps=tiling.num_warps, options=options
    )


DELTA = {"DELTA": True, "SCALARS": 2, "GLOBALS": True, "global_tokens": 4}
MAMBA2 = {"SILU_VALUES": "global", "SILU_GATE": True, "SKIP": True}
SHARED_KEYS = {"NUM_HEADS": 32, "KEY_HEADS": 8, "TAPS": 1, "MEMORY_PARTS": 0, "OVERLAPS": False}
FEW_BYTES = 32  # of a thread, written once and read at the end


@pytest.fixture(scope="module")
def compiled():
    whole = next(tiling for tiling in CHOSEN if tiling.is_whole)
    kernels = {(tiling, "linear"): kernel(tiling) for tiling in CHOSEN} | {(tiling, "delta"): kernel(tiling, **DELTA) for tiling in CHOSEN}
    kernels |= {(tiling, "linear with SiLU and a skip"): kernel(tiling, **MAMBA2) for tiling in CHOSEN}
    kernels[whole, "linear with SiLU of all values"] = kernel(whole, **MAMBA2 | {"SILU_VALUES": "all"})
    kernels[whole, "shared keys"] = kernel(whole, **SHARED_KEYS)
    found = compile_offline({str(key): value for key, value in kernels.items()})
    return {key: found[str(key)] for key in kernels}


@pytest.mark.full
def test_machine_code_of_every_other_candidate_keeps_to_its_registers():
    found = compile_offline({str(tiling): kernel(tiling) for tiling in OTHERS})
    for tiling in OTHERS:
        found[str(tiling)].check(max_registers=tiling.max_registers)


def test_machine_code_keeps_to_its_registers(compiled):
    """A processor has several programs, which wait for memory in turns; what spills takes the way to memory that the state needs."""
    for (tiling, rule), code in compiled.items():
        if rule == "delta":
            assert code.stack <= FEW_BYTES and code.registers <= tiling.max_registers, tiling
        else:
            code.check(max_registers=tiling.max_registers)


def test_machine_code_of_the_window_has_no_barrier(compiled):
    """Warps go through the tiles of a window without each other, each with loads of 16 bytes a thread on their way."""
    for key, code in compiled.items():
        (loop,) = (loop for loop in code.loops if count(loop, "LDG.E.128") and count(loop, "FFMA"))
        assert not count(loop, "BAR") and count(loop, "LDG") == count(loop, "LDG.E.128"), key
