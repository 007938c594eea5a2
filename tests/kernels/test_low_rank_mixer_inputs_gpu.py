"""The Triton kernels: on a GPU on real shapes, without one in the interpreter on small ones, and their machine code."""


import pytest
import torch

from phase8.kernels.reference.low_rank_mixer_inputs import low_rank_mixer_inputs, low_rank_mixer_inputs_backward
from phase8.kernels.reference.mixer_inputs import MixerInputs
from phase8.kernels.rotary import rotary_angles
from tests.kernels.offline import OfflineKernel, compile_offline, count

# batch, length, heads, head size, rank, taps (0: no convolution), radius given, documents, SiLU, SiLU of values
SMALL = [
    (2, 21, 2, 32, 16, 4, True, False, True, True), (3, 17, 1, 32, 24, 4, False, True, False, True), (2, 9, 1, 64, 5, 0, True, False, False, True),
    (1, 1, 1, 32, 16, 3, True, False, False, False), (2, 13, 1, 32, 16, 2, False, True, True, False), (1, 35, 1, 64, 32, 4, True, True, True, True),
    (2, 6, 2, 32, 16, 1, False, True, False, False), (5, 4, 1, 32, 16, 4, True, True, False, True),
    (16, 16, 1, 32, 16, 4, True, False, True, True),
]  # fmt: skip
LARGE = [
    (16, 512, 8, 64, 16, 4, True, False, True, True), (64, 128, 2, 64, 16, 4, True, False, True, False),
    (3, 1537, 4, 64, 32, 4, True, True, True, True), (5, 257, 6, 64, 24, 3, False, False, False, False),
    (2, 63, 4, 32, 16, 4, True, True, False, True), (1, 4096, 2, 64, 16, 0, True, False, True, False),
    (70, 100, 2, 32, 32, 2, False, True, True, True),
]  # fmt: skip
EPS = 1e-5
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def exact(poisoned_memory):
    """Products of fp32 as exact as can be; memory that a kernel does not write shows as NaN."""
    pytest.importorskip("triton")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def results_of(case, device, dtype):
    """What the kernels and the reference make of the same numbers: the five results, then gradients."""
    from phase8.kernels.gpu.low_rank_mixer_inputs import prepare
    from phase8.kernels.gpu.low_rank_mixer_inputs_backward import prepare_backward

    batch, length, heads, head_size, rank, num_taps, with_radius, packed, silu, silu_values = case
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, dtype=torch.float32, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype).double()

    bottlenecks = draw(batch, length, 3 * rank, dtype=dtype)
    gradients = [draw(batch, length, heads, head_size, dtype=dtype) for _ in MixerInputs._fields]
    ups = [draw(heads * head_size, rank, scale=rank**-0.5) for _ in range(3)]
    taps = draw(3 * heads * head_size, num_taps) if num_taps else None
    radius = 1 + draw(heads).abs() if with_radius else None
    angles = rotary_angles(length, head_size, base=1e4, first_position=0, device=torch.device("cpu"))
    starts = torch.rand(batch, length, generator=generator) < 0.1 if packed else None
    if starts is not None:
        starts[:, [length // 8, -1]] = True  # near the beginning, and where a read before the next sequence would end
    options = {"num_heads": heads, "eps": EPS, "silu": silu, "silu_values": silu_values, "starts": starts}
    expected = [*low_rank_mixer_inputs(bottlenecks, ups, taps, angles, radius, **options)]
    dbottlenecks, dups, dtaps, dradius = low_rank_mixer_inputs_backward(
        MixerInputs(*gradients), bottlenecks, ups, taps, angles, radius, **options
    )
    expected += [dbottlenecks, *(x.flatten() for x in (*dups, dtaps, dradius) if x is not None)]

    def moved(x, dtype=torch.float32):
        return None if x is None else x.to(device, dtype)

    arguments = (moved(bottlenecks, dtype), [moved(up) for up in ups], moved(taps), moved(angles), moved(radius), moved(starts, torch.bool))
    found = [*prepare(*arguments, heads, EPS, silu, silu_values)]
    ours, row = prepare_backward([moved(x, dtype) for x in gradients], *arguments, heads, EPS, silu, silu_values)
    if with_radius:
        row = torch.cat((row[: -2 * heads], row[-2 * heads :].view(2, heads).sum(0)))
    found += [ours, *row.split([x.numel() for x in expected[6:]])]
    return found, expected


def check(case, device, dtype):
    for index, (ours, theirs) in enumerate(zip(*results_of(case, device, dtype), strict=True)):
        error = (ours.double().cpu() - theirs).norm() / (theirs.norm() + 1e-6)
        assert error <= TOLERANCE[dtype], f"result {index}: {error:.1e}"
        assert ours.is_contiguous(), f"result {index}"


@pytest.mark.parametrize("case", SMALL)
def test_small_shapes_equal_the_reference(case, kernel_device):
    check(case, kernel_device, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE)
def test_real_shapes_equal_the_reference(case, kernel_device):
    check(case, kernel_device, torch.bfloat16)


@pytest.mark.gpu
def test_programs_may_take_several_tiles(kernel_device, monkeypatch):
    monkeypatch.setattr("phase8.kernels.gpu.low_rank_mixer_inputs.MANY_TILES", 0)
    check((6, 192, 2, 64, 16, 4, True, False, True, True), kernel_device, torch.bfloat16)


@pytest.mark.gpu
def test_fp32_equals_the_reference(kernel_device):
    check(SMALL[0], kernel_device, torch.float32)


@pytest.mark.gpu
def test_the_same_arguments_give_the_same_bits(kernel_device):
    first, second = (results_of(LARGE[0], kernel_device, torch.bfloat16)[0] for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.fixture(scope="module")
def compiled():
    pytest.importorskip("triton")
    names = ("up_q", "up_k", "up_v", "taps", "cosines", "sines", "radius", "sums")
    fp32, tokens = dict.fromkeys(names, "*fp32"), {"bottlenecks": "*bf16", "folded": "*bf16", "starts": None, "length": 512, "eps": 1e-5}
    shape = {"NUM_HEADS": 8, "HEAD_SIZE": 64, "RANK": 16, "BLOCK_R": 16, "TAPS": 4, "BLOCK_TAPS": 4, "RADIUS": True, "SILU": True, "DOCUMENTS": False}
    shape |= {"SILU_VALUES": False, "FAST": True, "PRECISION": "tf32"}
    medium = {"NUM_HEADS": 16, "RANK": 32, "BLOCK_R": 32, "length": 1024}
    forward = {name: fp32[name] for name in ("cosines", "sines", "radius")} | tokens | shape
    forward |= dict.fromkeys(("local_q", "local_k", "global_q", "global_k", "v"), "*bf16") | {"batch": 16, "BLOCK_N": 64, "STEPS": 1, "EVEN": True}
    backward = fp32 | tokens | shape | dict.fromkeys(("dlocal_q", "dlocal_k", "dglobal_q", "dglobal_k", "dv", "by_head", "owed"), "*bf16")
    backward |= {"num_streams": 1024, "batch": 16, "piece": 8, "num_sums": 30736, "CONVOLUTION": True}
    backward |= {"ROWS": 64, "STAGES": 3, "EVEN": True, "ALIGNED": False}
    documents, plain = {"starts": "*i1", "DOCUMENTS": True}, {"SILU": False, "radius": None, "RADIUS": False}
    values = {"SILU_VALUES": True}
    aligned = {"batch": 256, "num_streams": 2048, "piece": 64, "ALIGNED": True}
    module = "phase8.kernels.gpu.low_rank_mixer_inputs"
    sizes = {"num_tokens": 8192, "num_streams": 1024, "batch": 16, "length": 512, "piece": 8, "NUM_HEADS": 8, "RANK": 16, "BLOCK_R": 16, "TAPS": 4}
    return compile_offline(
        {
            "forward": OfflineKernel(f"{module}:_forward_kernel", forward, num_warps=4),
            "forward, four sequences": OfflineKernel(f"{module}:_forward_kernel", forward | {"STEPS": 4}, num_warps=4),
            "forward, values": OfflineKernel(f"{module}:_forward_kernel", forward | values, num_warps=4),
            "forward, documents": OfflineKernel(f"{module}:_forward_kernel", forward | documents, num_warps=4),
            "forward, medium": OfflineKernel(f"{module}:_forward_kernel", forward | medium, num_warps=4),
            "backward": OfflineKernel(f"{module}_backward:_backward_kernel", backward, num_warps=4),
            "backward, aligned": OfflineKernel(f"{module}_backward:_backward_kernel", backward | aligned, num_warps=4),
            "backward, plain": OfflineKernel(f"{module}_backward:_backward_kernel", backward | plain, num_warps=4),
            "backward, values": OfflineKernel(f"{module}_backward:_backward_kernel", backward | values, num_warps=4),
            "backward, documents": OfflineKernel(f"{module}_backward:_backward_kernel", backward | documents, num_warps=4),
            "backward, medium": OfflineKernel(f"{module}_backward:_backward_kernel", backward | medium | {"STAGES": 2}, num_warps=4),
            "sum": OfflineKernel(
                f"{module}_backward:_sum_kernel",
                sizes | dict.fromkeys(("by_head", "owed", "dbottlenecks"), "*bf16") | {"BLOCK_N": 64},
                num_warps=2,
            ),
            "fold": OfflineKernel(
                f"{module}:_fold_kernel",
                {name: fp32[name] for name in ("up_q", "up_k", "up_v", "taps")}
                | {"folded": "*bf16", "width": 512, "RANK": 16, "BLOCK_R": 16, "TAPS": 4, "BLOCK_TAPS": 4, "CONVOLUTION": True, "BLOCK_C": 64},
                num_warps=4,
            ),
        }
    )


@pytest.mark.parametrize("name", ["forward", "forward, four sequences", "forward, values", "forward, documents", "forward, medium"])
def test_machine_code_of_forward_has_no_spills_and_moves_whole_vectors(compiled, name):
    code = compiled[name]
    code.check(max_registers=168 if name == "forward, four sequences" else 128, contains=("HGMMA",), lacks=("LDG.E.U16", "STG.E.U16"))
    assert code.count("STG.E.128") == code.count("STG.E") == 5 * 4  # five results of a tile of 64 tokens: halves of 32 channels, two rows a thread
    assert code.count("LDG.E.128") > 0.7 * code.count("LDG.E")


@pytest.mark.parametrize("name", ["backward", "backward, aligned", "backward, plain", "backward, values", "backward, documents"])
def test_machine_code_of_backward_has_no_spills_and_reads_ahead(compiled, name):
    compiled[name].check(contains=("HGMMA",), lacks=("LDG.E.U16", "STG.E.U16", "RED", "ATOM"))  # eight warps on a multiprocessor
    assert 2 * compiled[name].shared <= 227 * 1024  # two programs on a multiprocessor
    of_values = 20 if name == "backward, values" else 12  # of v, for which nothing is computed again unless it passes SiLU
    for loop, products in zip(compiled[name].loops, (20, of_values), strict=True):
        assert count(loop, "HGMMA") == products and count(loop, "LDGSTS.E") >= 8 and count(loop, "BAR") <= 4


def test_a_rank_of_32_spills_only_what_a_walk_reads(compiled):
    """Its gradients of weights and debts take 112 registers."""
    loops = compiled["backward, medium"].loops
    assert [count(loop, "STL") for loop in loops] == [0, 0] and count(loops[0], "LDL") < 0.03 * sum(loops[0].values())


def test_machine_code_of_the_small_kernels(compiled):
    for name in ("sum", "fold"):
        compiled[name].check(max_registers=96, lacks=("LDG.E.U16", "STG.E.U16"))
