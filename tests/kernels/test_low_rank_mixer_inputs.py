"""The mixer's inputs from bottlenecks: the reference against its parts, its backward against autograd and the operator."""

import pytest
import torch

from phase8.kernels import low_rank_mixer_inputs as kernel
from phase8.kernels.reference.low_rank_mixer_inputs import low_rank_mixer_inputs, low_rank_mixer_inputs_backward
from phase8.kernels.reference.mixer_inputs import MixerInputs, mixer_inputs
from phase8.kernels.rotary import rotary_angles

EPS = 1e-5
# length, heads, head size, rank, taps (0: no convolution), radius given, documents, SiLU, SiLU of values
CASES = [
    (21, 2, 8, 3, 4, True, False, True, False), (17, 3, 12, 5, 4, False, True, False, True), (1, 1, 4, 1, 3, True, False, False, False),
    (9, 1, 6, 2, 0, False, True, True, True),
]  # fmt: skip


def problem(case, batch=2):
    """Arguments of the forward up to `radius`, options, and gradients of the five results; fp64."""
    length, heads, head_size, rank, num_taps, with_radius, packed, silu, silu_values = case
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    bottlenecks = draw(batch, length, 3 * rank).requires_grad_()
    ups = [draw(heads * head_size, rank).requires_grad_() for _ in range(3)]
    taps = draw(3 * heads * head_size, num_taps).requires_grad_() if num_taps else None
    radius = (1 + draw(heads).abs()).requires_grad_() if with_radius else None
    angles = rotary_angles(length, head_size, base=1e4, first_position=0, device=torch.device("cpu"))
    starts = torch.rand(batch, length, generator=generator) < 0.2 if packed else None
    options = {"num_heads": heads, "eps": EPS, "silu": silu, "silu_values": silu_values, "starts": starts}
    return [bottlenecks, ups, taps, angles, radius], options, [draw(batch, length, heads, head_size) for _ in MixerInputs._fields]


def trained(arguments):
    """The arguments that have gradients."""
    bottlenecks, ups, taps, _, radius = arguments
    return [x for x in (bottlenecks, *ups, taps, radius) if x is not None]


def detached(arguments):
    bottlenecks, ups, *rest = arguments
    return [bottlenecks.detach(), [up.detach() for up in ups], *(None if x is None else x.detach() for x in rest)]


@pytest.mark.parametrize("case", CASES)
def test_each_of_q_k_and_v_comes_from_its_own_bottleneck(case):
    arguments, options, _ = problem(case)
    bottlenecks, ups, taps, angles, radius = arguments
    q, k, v = (torch.einsum("btr,cr->btc", bottlenecks[..., i * case[3] : (i + 1) * case[3]], ups[i]) for i in range(3))
    qkv = torch.stack((q, k, v), dim=2).unflatten(3, (case[1], case[2]))
    expected, _ = mixer_inputs(qkv, taps, angles, radius, eps=EPS, **{name: options[name] for name in ("silu", "silu_values", "starts")})
    torch.testing.assert_close(low_rank_mixer_inputs(*arguments, **options), expected)


def test_weights_take_the_dtype_of_the_bottlenecks():
    arguments, options, _ = problem(CASES[0])
    bottlenecks, ups, *rest = detached(arguments)
    x, ups = bottlenecks.bfloat16(), [up.float() for up in ups]
    found = low_rank_mixer_inputs(x, ups, *rest, **options)
    assert all(each.dtype == torch.bfloat16 for each in found)
    torch.testing.assert_close(found, low_rank_mixer_inputs(x, [up.bfloat16() for up in ups], *rest, **options), rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_backward_is_that_of_autograd(case):
    arguments, options, gradients = problem(case)
    expected = torch.autograd.grad(low_rank_mixer_inputs(*arguments, **options), trained(arguments), gradients)
    dbottlenecks, dups, *rest = low_rank_mixer_inputs_backward(MixerInputs(*gradients), *detached(arguments), **options)
    for ours, theirs in zip([dbottlenecks, *dups, *(x for x in rest if x is not None)], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # angles are fp32, so a turn back is not quite the inverse


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_the_operator_are_those_of_the_reference(case):
    arguments, options, gradients = problem(case)
    results = []
    for function in (kernel.low_rank_mixer_inputs, low_rank_mixer_inputs):
        inputs = function(*arguments, **options)
        results.append((inputs, torch.autograd.grad(inputs, trained(arguments), gradients)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)  # as above


@pytest.mark.parametrize("case", CASES)
def test_opcheck(case):
    arguments, options, gradients = problem(case)
    rest = (options["starts"], options["num_heads"], EPS, options["silu"], options["silu_values"])
    torch.library.opcheck(kernel._forward, (*arguments, *rest))
    torch.library.opcheck(kernel._backward, (gradients, *detached(arguments), *rest))
