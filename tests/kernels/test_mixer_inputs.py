import pytest
import torch

from phase8.kernels import mixer_inputs as kernel
from phase8.kernels.reference.mixer_inputs import MixerInputs, mixer_inputs, mixer_inputs_backward
from phase8.kernels.rotary import rotary_angles

EPS = 1e-5
both_beginnings = pytest.mark.parametrize("continued", [False, True], ids=["begun", "continued"])
ACTIVATIONS = [{"silu": silu, "silu_values": values} for silu in (False, True) for values in (False, True)]
all_activations = pytest.mark.parametrize("activations", ACTIVATIONS, ids=["none", "values", "silu", "both"])
# length, heads, head size, taps (0: no convolution), radius given, documents
CASES = [(21, 2, 8, 4, True, False), (17, 3, 12, 4, False, True), (1, 1, 4, 3, True, False), (5, 2, 16, 1, True, True), (9, 1, 6, 0, False, False)]


def problem(case, batch=2):
    """Arguments of the forward up to `radius`, `starts`, and gradients of the five results; fp64."""
    length, heads, head_size, taps, with_radius, packed = case
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    qkv = draw(batch, length, 3, heads, head_size).requires_grad_()
    weight = draw(3 * heads * head_size, taps).requires_grad_() if taps else None
    radius = (1 + draw(heads).abs()).requires_grad_() if with_radius else None
    angles = rotary_angles(length, head_size, base=1e4, first_position=0, device=torch.device("cpu"))
    starts = torch.rand(batch, length, generator=generator) < 0.2 if packed else None
    return (qkv, weight, angles, radius), starts, [draw(batch, length, heads, head_size) for _ in MixerInputs._fields]


def projections_before(case, batch=2):
    """The projections before the first token [B, taps - 1, 3 H K]; None without a convolution."""
    _, heads, head_size, taps, *_ = case
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, taps - 1, 3 * heads * head_size, generator=generator, dtype=torch.float64).requires_grad_() if taps else None


def detached(arguments):
    return [None if x is None else x.detach() for x in arguments]


@all_activations
@pytest.mark.parametrize("case", CASES)
def test_lengths_and_angles_are_those_of_the_definition(case, activations):
    """In complex numbers: a rotation multiplies channel i + i' K/2 by e^(i angle)."""
    (qkv, weight, angles, radius), starts, _ = problem((*case[:3], 0, *case[4:]))
    inputs, _ = mixer_inputs(qkv, weight, angles, radius, eps=0.0, **activations, starts=starts)
    for part, local, shared in ((0, inputs.local_q, inputs.global_q), (1, inputs.local_k, inputs.global_k)):
        x = qkv[:, :, part]
        active = x / (1 + torch.exp(-x)) if activations["silu"] else x
        torch.testing.assert_close(shared, active * case[2] ** 0.5 / active.norm(dim=-1, keepdim=True))
        turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)[:, None]
        turned = torch.cat((turned.real, turned.imag), dim=-1)
        if radius is not None:
            turned = turned / turned.norm(dim=-1, keepdim=True) * radius[:, None]
        torch.testing.assert_close(local, turned, rtol=1e-6, atol=1e-6)  # angles are fp32
    v = qkv[:, :, 2]
    torch.testing.assert_close(inputs.v, v / (1 + torch.exp(-v)) if activations["silu_values"] else v)


@all_activations
@both_beginnings
@pytest.mark.parametrize("case", CASES)
def test_backward_is_that_of_autograd(case, continued, activations):
    arguments, starts, gradients = problem(case)
    before = projections_before(case) if continued else None
    inputs, _ = mixer_inputs(*arguments, eps=EPS, **activations, starts=starts, initial_state=before)
    wanted = [x for x in (*arguments, before) if x is not None and x.requires_grad]
    expected = [*torch.autograd.grad(inputs, wanted, gradients, allow_unused=True, materialize_grads=True)]  # one tap reads nothing before
    if before is not None:  # the projections before and those of the piece are one tensor
        expected[0] = torch.cat((expected.pop().unflatten(2, expected[0].shape[2:]), expected[0]), dim=1)
        before = before.detach()
    found = mixer_inputs_backward(MixerInputs(*gradients), *detached(arguments), eps=EPS, **activations, starts=starts, initial_state=before)
    for ours, theirs in zip([x for x in found if x is not None], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # angles are fp32, so a turn back is not quite the inverse


@all_activations
@pytest.mark.parametrize("pieces", [[1] * 12, [2, 1, 9], [5, 7]])
def test_pieces_with_carried_state_equal_the_whole(pieces, activations):
    (qkv, weight, angles, radius), _, _ = problem((12, 2, 8, 4, True, False))
    state, outputs, begin = torch.zeros(2, 3, 48, dtype=torch.float64), [], 0
    for size in pieces:
        piece = slice(begin, begin + size)
        inputs, state = kernel.mixer_inputs(qkv[:, piece], weight, angles[piece], radius, eps=EPS, **activations, initial_state=state)
        outputs.append(inputs)
        begin += size
    whole, _ = kernel.mixer_inputs(qkv, weight, angles, radius, eps=EPS, **activations)
    for ours, theirs in zip(map(torch.cat, zip(*outputs, strict=True), [1] * 5), whole, strict=True):
        torch.testing.assert_close(ours, theirs)


@all_activations
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [12, 2, 1])
def test_the_operator_takes_a_piece_as_plain_torch_does(length, packed, activations):
    case = (length, 2, 8, 4, True, packed)
    (qkv, weight, angles, radius), starts, gradients = problem(case)
    state = projections_before(case)
    results = []
    for function in (kernel._by_operator, mixer_inputs):
        inputs, carried = function(qkv, weight, angles, radius, eps=EPS, **activations, starts=starts, initial_state=state)
        results.append((inputs, carried, torch.autograd.grad(inputs, [qkv, weight, radius, state], gradients)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)  # as above


@all_activations
@pytest.mark.parametrize("case", CASES)
def test_opcheck(case, activations):
    arguments, starts, gradients = problem(case)
    before = projections_before(case) if activations["silu"] else None
    torch.library.opcheck(kernel._forward, (*arguments, starts, before, EPS, *activations.values()))
    torch.library.opcheck(kernel._backward, (gradients, *detached(arguments), starts, *detached([before]), EPS, *activations.values()))
