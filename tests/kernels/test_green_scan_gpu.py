"""The Triton kernels: in the interpreter on small shapes, on a GPU on real ones, and their machine code."""

import pytest
import torch

from phase8.kernels import green_scan as operator
from phase8.kernels.reference import green_scan as reference
from tests.kernels.offline import OfflineKernel, compile_offline

SMALL = [(2, 1, 3), (2, 63, 3), (1, 257, 2)]  # batch, tokens, heads
LARGE = [(8, 4096, 32), (2, 8209, 5), (1, 131072, 4), (3, 257, 16), (64, 512, 8), (5, 1, 32), (40, 2048, 12), (2, 63, 1)]
VARIANTS = ["plain", "packed with a state"]
ON_A_GPU = [pytest.param(*shape, marks=pytest.mark.gpu) for shape in LARGE]
SHAPES = pytest.mark.parametrize(("batch", "length", "heads"), [*SMALL, *ON_A_GPU])


def problem(batch, length, heads, variant):
    """Arguments of the forward, and a gradient of g: fp32 values in fp64, since g enlarges a rounding of its arguments up to 1/eta^2 times."""
    generator = torch.Generator().manual_seed(0)
    potential = 1.5 * torch.randn(batch, length, heads, generator=generator, dtype=torch.float64)
    energy = torch.linspace(-1.5, 1.5, heads, dtype=torch.float64)
    eta, hopping = (low + torch.rand(heads, generator=generator, dtype=torch.float64) for low in (0.1, 0.5))
    starts = state = None
    if variant != "plain":
        starts = torch.rand(batch, length, generator=generator) < 0.05
        state = torch.randn(batch, heads, 2, generator=generator, dtype=torch.float64)
        state[..., 1] = -state[..., 1].abs()
    grad = torch.randn(batch, length, heads, 2, generator=generator, dtype=torch.float64)
    arguments = (potential, energy, eta, hopping, starts, state)
    return [x if x is None or x.dtype == torch.bool else x.float().double() for x in arguments], grad


def to(device, *tensors):
    """fp64 to fp32, everything to the device."""
    return [None if x is None else x.to(device, torch.float32 if x.dtype == torch.float64 else None) for x in tensors]


@SHAPES
@pytest.mark.parametrize("variant", VARIANTS)
def test_g_is_that_of_the_fp64_reference(batch, length, heads, variant, kernel_device, poisoned_memory):
    from phase8.kernels.gpu.green_scan import green_scan

    arguments, _ = problem(batch, length, heads, variant)
    g = green_scan(*to(kernel_device, *arguments)).cpu().double()
    assert g.shape == (batch, length, heads, 2)
    # A rounding is enlarged by |g|^2 <= 1/eta^2, and a step has four of them.
    assert (g - reference.green_scan(*arguments)).abs().max() < 4 * 2**-24 / arguments[2].min() ** 2


@SHAPES
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_the_fp64_reference(batch, length, heads, variant, kernel_device, poisoned_memory):
    from phase8.kernels.gpu.green_scan_backward import green_scan_backward

    (*arguments, starts, state), grad = problem(batch, length, heads, variant)
    g = reference.green_scan(*arguments, starts, state)
    expected = reference.green_scan_backward(grad, g, arguments[-1], starts, state)
    dpotential, dscalars, dinitial = green_scan_backward(*to(kernel_device, grad, g, arguments[-1], starts, state))
    assert (dpotential.shape, dscalars.shape, dinitial.shape) == ((batch, length, heads), (3, heads), (batch, heads, 2))
    terms = expected[0].abs().sum((0, 1)).max()  # what cancels in the sums over tokens
    scales = [expected[0].abs().max(), terms, terms, terms, expected[4].abs().max()]
    for found, wanted, scale in zip((dpotential, *dscalars, dinitial), expected, scales, strict=True):
        assert (found.cpu().double() - wanted).abs().max() < 1e-5 * scale


@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_the_size_of_the_potential_does_not_overflow_the_maps(size, kernel_device):
    """A segment of 16 tokens multiplies sixteen matrices of about that size."""
    from phase8.kernels.gpu.green_scan import green_scan

    (potential, *rest), _ = problem(1, 40, 2, "plain")
    arguments = (potential * size, *rest)
    g, expected = green_scan(*to(kernel_device, *arguments)).cpu().double(), reference.green_scan(*arguments)
    assert ((g - expected).norm(dim=-1) < 1e-5 * expected.norm(dim=-1).clamp(max=1)).all()


@pytest.mark.parametrize("layout", ["heads before tokens", "columns of a wider tensor", "every third column", "one sequence for the batch"])
def test_strides_of_the_potential_do_not_matter(layout, kernel_device):
    from phase8.kernels.gpu.green_scan import green_scan

    (potential, *rest), _ = problem(2, 9, 3, "plain")
    potential, *rest = to(kernel_device, potential, *rest)
    wide = torch.full((2, 9, 9), float("nan"), device=kernel_device)
    strided = {
        "heads before tokens": potential.transpose(1, 2).contiguous().transpose(1, 2),
        "columns of a wider tensor": wide[:, :, 3:6].copy_(potential),
        "every third column": wide.clone()[:, :, 1::3].copy_(potential),
        "one sequence for the batch": potential[:1].expand(2, -1, -1),
    }[layout]
    assert not strided.is_contiguous()
    assert torch.equal(green_scan(strided, *rest), green_scan(strided.contiguous(), *rest))


@pytest.mark.parametrize("split", [1, 20, 63])
def test_pieces_with_carried_state_equal_the_whole(split, kernel_device):
    from phase8.kernels.gpu.green_scan import green_scan

    (potential, *rest, _, state), _ = problem(1, 70, 2, "packed with a state")
    potential, state, *rest = to(kernel_device, potential, state, *rest)
    whole = green_scan(potential, *rest, None, state)
    head = green_scan(potential[:, :split], *rest, None, state)
    tail = green_scan(potential[:, split:], *rest, None, head[:, -1])
    torch.testing.assert_close(torch.cat((head, tail), 1), whole, rtol=0, atol=1e-5)


@pytest.fixture
def through_triton(monkeypatch, kernel_device):
    monkeypatch.setattr(operator, "uses_triton", lambda x: True)
    return kernel_device


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_operator_runs_the_kernels_in_fp32_and_the_reference_in_fp64(variant, through_triton, monkeypatch):
    (*arguments, starts, state), grad = problem(2, 20, 3, variant)

    def run(dtype, device):
        leaves = [None if x is None else x.to(device, dtype).requires_grad_() for x in (*arguments, state)]
        g, last = operator.green_scan(*leaves[:4], None if starts is None else starts.to(device), leaves[4])
        assert torch.equal(last, g[:, -1])
        g.backward(grad.to(device, dtype))
        return [g.detach(), *(x.grad for x in leaves if x is not None)]

    with monkeypatch.context() as without:
        without.delattr(reference, "green_scan")
        without.delattr(reference, "green_scan_backward")
        found = run(torch.float32, through_triton)
    for ours, theirs in zip(found, run(torch.float64, torch.device("cpu")), strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("variant", VARIANTS)
def test_opcheck_through_the_kernels(variant, through_triton):
    arguments, grad = problem(1, 6, 2, variant)
    *arguments, starts, state, grad = to(through_triton, *arguments, grad)
    g = operator._forward(*arguments, starts, state)
    torch.library.opcheck(operator._forward, (*(x.requires_grad_() for x in arguments), starts, state))
    torch.library.opcheck(operator._backward, (grad, g, arguments[-1].detach(), starts, state))


@pytest.mark.gpu
def test_twice_the_same_bits():
    arguments, grad = problem(8, 4096, 32, "packed with a state")
    *arguments, starts, state, grad = to("cuda", *arguments, grad)
    g = operator._forward(*arguments, starts, state)
    assert torch.equal(g, operator._forward(*arguments, starts, state))
    first, second = (operator._backward(grad, g, arguments[-1], starts, state) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


SCHEDULED = [(8, 4096, 32), (1, 131072, 32), (16, 512, 8), (1, 1, 8), (4, 2048, 12), (64, 4096, 32)]


@pytest.fixture
def compiled_mode(monkeypatch):
    """As on a GPU: schedules are not those of the interpreter."""
    pytest.importorskip("triton")
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)


@pytest.mark.parametrize("shape", SCHEDULED)
def test_schedules_fit_registers_and_cut_no_more_than_needed(shape, compiled_mode):
    from phase8.kernels.gpu.green_scan import forward_schedule
    from phase8.kernels.gpu.green_scan_backward import backward_schedule

    forward = [forward_schedule(*shape, packed=packed) for packed in (False, True)]
    for schedule, held in [*((f, f.tokens) for f in forward), (b := backward_schedule(*shape), 4 * b.tokens)]:
        lanes_of_a_thread = schedule.segments * schedule.heads / (32 * schedule.num_warps)
        assert 1 <= lanes_of_a_thread <= 2 and held * lanes_of_a_thread <= 64 and schedule.num_warps <= 8
        assert schedule.segments * schedule.tokens < max(2 * shape[1], 1024)
    assert forward[1].tokens <= 16


FORWARD = {
    **dict.fromkeys(("potential", "energy", "eta", "hopping", "g"), "*fp32"),
    **{"starts": None, "initial_state": None, "length": 4096, "stride_b": 4096 * 32, "STRIDE_T": 32, "H": 32, "FAST": True},
}
BACKWARD = {
    **dict.fromkeys(("grad", "g", "hopping", "dpotential", "dscalars", "dinitial"), "*fp32"),
    **{"starts": None, "initial_state": None, "batch_size": 8, "length": 4096, "H": 32},
}
PACKED = {"starts": "*u8", "initial_state": "*fp32"}


@pytest.fixture(scope="module")
def compiled():
    """The kernels as they run for B 8, T 4096, H 32, and masked for a length that no tile divides."""
    pytest.importorskip("triton")
    from phase8.kernels.gpu.green_scan import forward_schedule
    from phase8.kernels.gpu.green_scan_backward import backward_schedule

    def kernel(name, arguments, schedule, length):
        sizes = {"N": schedule.heads, "S": schedule.segments, "L": schedule.tokens, "EVEN": schedule.divides(length, 32)}
        return OfflineKernel(f"phase8.kernels.gpu.{name}_kernel", {**arguments, **sizes, "length": length}, num_warps=schedule.num_warps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("triton.knobs.runtime.interpret", False)
        plain, packed = (forward_schedule(8, 4096, 32, packed=packed) for packed in (False, True))
        backward = backward_schedule(8, 4096, 32)
        odd = forward_schedule(8, 4099, 32, packed=False), backward_schedule(8, 4099, 32)
    forward_name, backward_name = "green_scan:forward", "green_scan_backward:backward"
    return compile_offline(
        {
            "forward": kernel(forward_name, FORWARD, plain, 4096),
            "forward, packed": kernel(forward_name, FORWARD | PACKED, packed, 4096),
            "forward, odd": kernel(forward_name, FORWARD, odd[0], 4099),
            "backward": kernel(backward_name, BACKWARD, backward, 4096),
            "backward, packed": kernel(backward_name, BACKWARD | PACKED, backward, 4096),
            "backward, odd": kernel(backward_name, BACKWARD, odd[1], 4099),
        }
    )


@pytest.mark.parametrize("name", ["forward", "forward, packed", "forward, odd", "backward", "backward, packed", "backward, odd"])
def test_machine_code_neither_spills_nor_moves_data_between_layouts(name, compiled):
    # Barriers: of the scans over the lanes, and of the sums. A layout conversion of a token would add two for each.
    compiled[name].check(max_registers=200, contains=["FFMA"], lacks=["HGMMA"])
    assert compiled[name].count("BAR") <= 24


def test_machine_code_of_the_forward_has_one_reciprocal_per_token_and_fused_products(compiled):
    forward = compiled["forward"]
    tokens = 2 * 32  # two chains of 32 tokens in a thread
    assert tokens <= forward.count("MUFU.RCP") <= tokens + 32
    assert forward.count("FFMA") == pytest.approx(1090, rel=0.1) and sum(forward.opcodes.values()) < 2800
    assert forward.count("LDG.E.64") >= 32 and forward.count("STG.E.128") == 32


def test_machine_code_of_the_backward_has_no_division_and_fused_products(compiled):
    backward = compiled["backward"]
    assert backward.count("MUFU") == 0
    assert 200 < backward.count("FFMA") < 350 and sum(backward.opcodes.values()) < 1200
