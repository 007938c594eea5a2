"""The Triton kernels: on a GPU on real shapes, without one in the interpreter on small ones, and their machine code."""

import pytest
import torch

from phase8.kernels.reference.mixer_inputs import MixerInputs, mixer_inputs, mixer_inputs_backward
from phase8.kernels.rotary import rotary_angles
from tests.kernels.offline import OfflineKernel, compile_offline, count

# batch, length, heads, head size, taps (0: no convolution), radius given, documents, projections before the first token given
SMALL = [
    (2, 21, 2, 8, 4, True, False, False), (2, 17, 3, 12, 4, False, True, False), (1, 1, 1, 4, 3, True, False, False),
    (1, 5, 2, 16, 1, True, True, False), (2, 9, 1, 6, 0, False, False, False), (1, 2, 2, 8, 4, True, True, False),
    (2, 12, 4, 4, 4, True, True, False), (1, 16, 2, 4, 3, False, False, False),
    (2, 21, 2, 8, 4, True, False, True), (2, 17, 3, 12, 4, False, True, True), (2, 1, 1, 4, 4, True, False, True),
    (1, 2, 2, 8, 4, True, True, True), (1, 16, 2, 4, 3, False, False, True), (2, 5, 1, 4, 1, True, False, True),
]  # fmt: skip
LARGE = [
    (2, 2048, 8, 128, 4, True, True, False), (1, 1537, 16, 64, 4, False, False, False), (3, 257, 6, 96, 3, True, False, False),
    (2, 63, 4, 256, 4, False, True, False), (1, 4096, 16, 128, 4, True, False, True), (2, 1537, 8, 64, 4, True, True, True),
]  # fmt: skip
EPS = 1e-5
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def poisoned(poisoned_memory):
    """Memory that a kernel does not write shows as NaN."""
    pytest.importorskip("triton")


def check(case, device, dtype, *, silu, silu_values):
    from phase8.kernels.gpu.mixer_inputs import prepare
    from phase8.kernels.gpu.mixer_inputs_backward import prepare_backward

    batch, length, heads, head_size, taps, with_radius, packed, continued = case
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).double()

    qkv, gradients = draw(batch, length, 3, heads, head_size), [draw(batch, length, heads, head_size) for _ in MixerInputs._fields]
    weight = draw(3 * heads * head_size, taps, dtype=torch.float32) if taps else None
    radius = 1 + draw(heads, dtype=torch.float32).abs() if with_radius else None
    angles = rotary_angles(length, head_size, base=1e4, first_position=0, device=torch.device("cpu"))
    starts = torch.rand(batch, length, generator=generator) < 0.1 if packed else None
    if starts is not None:
        starts[:, [length // 8, -1]] = True  # near the projections before, and where a read before the next sequence would end
    before = draw(batch, taps - 1, 3 * heads * head_size) if continued else None
    options = {"eps": EPS, "silu": silu, "silu_values": silu_values, "starts": starts, "initial_state": before}
    expected = [*mixer_inputs(qkv, weight, angles, radius, **options)[0]]
    backward = mixer_inputs_backward(MixerInputs(*gradients), qkv, weight, angles, radius, **options)
    expected += [x for x in backward if x is not None]

    def moved(x, dtype):
        return None if x is None else x.to(device, dtype)

    arguments = (moved(qkv, dtype), *(moved(x, torch.float32) for x in (weight, angles, radius)), moved(starts, torch.bool), moved(before, dtype))
    arguments += (EPS, silu, silu_values)
    found = [*prepare(*arguments), *prepare_backward([moved(x, dtype) for x in gradients], *arguments)]
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        error = (ours.double().cpu() - theirs).norm() / (theirs.norm() + 1e-6)
        assert error <= TOLERANCE[dtype], f"result {index}: {error:.1e}"
        assert ours.is_contiguous(), f"result {index}"  # as compiled code, which has seen the reference only, takes for granted


# Every case with one choice of the activations, in turns; with each in the full tests.
@pytest.mark.parametrize(
    ("case", "silu", "silu_values"),
    [
        pytest.param(case, silu, values, marks=[] if (silu, values) == (number % 2 == 0, number // 2 % 2 == 0) else [pytest.mark.full])
        for number, case in enumerate(SMALL)
        for silu in (False, True)
        for values in (False, True)
    ],
)
def test_small_shapes_equal_the_reference(case, silu, silu_values, kernel_device):
    check(case, kernel_device, torch.float32, silu=silu, silu_values=silu_values)


@pytest.mark.gpu
@pytest.mark.parametrize(("silu", "silu_values"), [(False, False), (True, False), (True, True)], ids=["none", "silu", "both"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", LARGE)
def test_real_shapes_equal_the_reference(case, dtype, silu, silu_values, kernel_device):
    check(case, kernel_device, dtype, silu=silu, silu_values=silu_values)


@pytest.fixture(scope="module")
def compiled():
    pytest.importorskip("triton")
    shape = {"NUM_HEADS": 16, "HEAD_SIZE": 128, "BLOCK_HALF": 64, "TAPS": 4, "CONVOLUTION": True, "RADIUS": True, "SILU": False}
    shape |= {"SILU_VALUES": False, "DOCUMENTS": False, "CONTINUED": False, "FAST": True}
    common = dict.fromkeys(("weight", "cosines", "sines", "radius"), "*fp32")
    common |= {"qkv": "*bf16", "starts": None, "initial": None, "length": 4096, "eps": 1e-5}
    continued = {"initial": "*bf16", "CONTINUED": True, "SILU": True, "radius": None, "RADIUS": False}  # a slice of the default block
    results = dict.fromkeys(("local_q", "local_k", "global_q", "global_k", "v"), "*bf16") | {"BLOCK_T": 32}
    gradients = dict.fromkeys(("dlocal_q", "dlocal_k", "dglobal_q", "dglobal_k", "dv", "dqkv"), "*bf16")
    gradients |= {"dtaps_parts": "*fp32", "dradius_parts": "*fp32", "HEADS": 1, "PIECE": 128, "TOKENS": 4, "STAGES": 3}
    active = {"SILU": True, "SILU_VALUES": True}
    backward = "phase8.kernels.gpu.mixer_inputs_backward:_backward_kernel"
    return compile_offline(
        {
            "forward": OfflineKernel("phase8.kernels.gpu.mixer_inputs:_prepare_kernel", common | results | shape, num_warps=8),
            "forward, silu": OfflineKernel("phase8.kernels.gpu.mixer_inputs:_prepare_kernel", common | results | shape | {"SILU": True}, num_warps=8),
            "forward, values": OfflineKernel("phase8.kernels.gpu.mixer_inputs:_prepare_kernel", common | results | shape | active, num_warps=8),
            "forward, continued": OfflineKernel(
                "phase8.kernels.gpu.mixer_inputs:_prepare_kernel", common | results | shape | continued, num_warps=8
            ),
            "backward, continued": OfflineKernel(backward, common | gradients | shape | continued, num_warps=1),
            "backward, silu": OfflineKernel(backward, common | gradients | shape | {"SILU": True}, num_warps=1),
            "backward, values": OfflineKernel(backward, common | gradients | shape | active, num_warps=1),
            "backward, continued, values": OfflineKernel(backward, common | gradients | shape | continued | active, num_warps=1),
            "backward, dot, silu": OfflineKernel(
                backward, common | gradients | shape | {"radius": None, "RADIUS": False, "SILU": True}, num_warps=1
            ),
            "backward": OfflineKernel(backward, common | gradients | shape, num_warps=1),
            "backward, dot": OfflineKernel(backward, common | gradients | shape | {"radius": None, "RADIUS": False}, num_warps=1),
            "backward, documents": OfflineKernel(backward, common | gradients | shape | {"starts": "*i1", "DOCUMENTS": True}, num_warps=1),
        }
    )


@pytest.mark.parametrize("name", ["forward", "forward, silu", "forward, values", "forward, continued"])
def test_machine_code_of_forward_has_no_spills_and_loads_whole_vectors(compiled, name):
    code = compiled[name]
    code.check(max_registers=160)  # twelve warps on a multiprocessor at least
    # Few single loads: weights and tensors come in vectors.
    assert code.count("LDG.E.128") > code.count("LDG.E") - code.count("LDG.E.128")


@pytest.mark.parametrize(
    "name",
    [
        "backward", "backward, dot", "backward, documents", "backward, silu", "backward, values", "backward, dot, silu", "backward, continued",
        "backward, continued, values",
    ],
)  # fmt: skip
def test_machine_code_of_backward_has_no_spills_and_reads_and_writes_everything_once(compiled, name):
    # Sixteen warps on a multiprocessor, twelve where both paths have a normalisation of their own; of bf16 no single channel, so that a warp
    # reads and writes whole lines.
    compiled[name].check(max_registers=168 if name in ("backward, silu", "backward, values") else 128, lacks=("LDG.E.U16", "STG.E.U16"))
    for loop, tensors in zip(compiled[name].loops, (4, 2), strict=True):  # q or k with two gradients and the angles, v with one
        assert count(loop, "LDGSTS.E") == 4 * 2 * tensors  # of four tokens, both halves
        assert count(loop, "STG.E") == 4 * 2
