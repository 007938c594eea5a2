"""The step of a mixer on its own: the whole block's is compared with whole sequences in tests/generate/test_decode.py."""

from dataclasses import replace

import pytest
import torch

from phase8.kernels import mixer_step as dispatch
from phase8.kernels.mixer_step import mixer_step
from phase8.kernels.reference import mixer_step as reference
from tests.kernels.mixer_steps import StepCase, draw_step


def test_on_a_cpu_it_is_the_reference():
    case = StepCase(delta=True, global_tokens=2, positions=(1, 30))
    ours, theirs = (draw_step(case, torch.float64, steps=1) for _ in range(2))
    torch.testing.assert_close(mixer_step(*ours.arguments(0)), reference.mixer_step(*theirs.arguments(0)), rtol=0, atol=0)
    assert all(torch.equal(mine, vars(theirs.state)[name]) for name, mine in vars(ours.state).items() if mine is not None)


def test_shared_keys_are_as_many_equal_heads_of_keys():
    """Heads of queries that share a head of keys see what each would see of a head of its own with the same numbers."""
    case = StepCase(heads=6, key_heads=2, global_path=None, global_tokens=2, positions=(3, 20))
    shared, own = (draw_step(case, torch.float64, steps=3) for _ in range(2))

    def repeated(x, dim):
        """Each head of keys and values three times, along the dim of channels."""
        heads = x.unflatten(dim, (10, 8))
        q, k, v = heads.split((6, 2, 2), dim)
        return torch.cat((q, k.repeat_interleave(3, dim), v.repeat_interleave(3, dim)), dim).flatten(dim, dim + 1)

    constants = own.constants
    lengths = torch.cat((constants.scale[:6], constants.scale[6:].repeat_interleave(3)))
    state = own.state
    own = replace(
        own,
        inputs=[(repeated(qkv, 1), None, None) for qkv, _, _ in own.inputs],
        constants=replace(constants, taps=repeated(constants.taps, 1), scale=lengths, num_key_heads=6),
        state=replace(
            state, convolution=repeated(state.convolution, 2), keys=state.keys.repeat_interleave(3, 2), values=state.values.repeat_interleave(3, 2)
        ),
    )
    for step in range(3):
        torch.testing.assert_close(mixer_step(*shared.arguments(step)), mixer_step(*own.arguments(step)))
        torch.testing.assert_close(shared.state.keys.repeat_interleave(3, 2), own.state.keys)


def test_rows_do_not_see_each_other():
    whole, other = (draw_step(StepCase(batch=2, positions=(3, 20)), torch.float64, steps=1) for _ in range(2))
    y = reference.mixer_step(*whole.arguments(0))
    for part in (*other.inputs[0], *vars(other.state).values()):
        if part is not None:
            part[1] += 1
    torch.testing.assert_close(reference.mixer_step(*other.arguments(0))[0], y[0], rtol=0, atol=0)


def test_wide_projections_are_rounded_to_the_dtype_of_the_state():
    steps, narrow, cpu = draw_step(StepCase(rotary=False), torch.bfloat16, steps=1), torch.bfloat16, torch.device("cpu")
    y = mixer_step(*steps.moved(cpu, narrow).arguments(0))
    qkv, scalars, channels, *rest = replace(steps, is_joint=True).moved(cpu, narrow).arguments(0)
    assert y.dtype == narrow and qkv.dtype == channels.dtype == torch.float32
    unseen = 1 + 2.0**-12  # it moves no number to another one of bf16
    torch.testing.assert_close(mixer_step(qkv * unseen, scalars, channels * unseen, *rest), y, rtol=0, atol=0)


@pytest.mark.parametrize(("key_heads", "taps", "expected"), [(None, 4, True), (1, 1, True), (1, 4, False)])
def test_shared_keys_with_a_convolution_take_the_plain_operations(key_heads, taps, expected, monkeypatch):
    monkeypatch.setattr(dispatch, "uses_triton", lambda x: True)
    qkv, _, _, constants, *_ = draw_step(StepCase(key_heads=key_heads, taps=taps, global_path=None), torch.float32, steps=1).arguments(0)
    assert dispatch._runs_on_gpu(qkv.float(), constants) is expected
