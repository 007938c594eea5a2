"""The step of a mixer on its own: the whole block's is compared with whole sequences in tests/generate/test_decode.py."""

import torch

from phase8.kernels.mixer_step import mixer_step
from phase8.kernels.reference import mixer_step as reference
from tests.kernels.mixer_steps import StepCase, draw_step


def test_on_a_cpu_it_is_the_reference():
    case = StepCase(delta=True, global_tokens=2, positions=(1, 30))
    ours, theirs = (draw_step(case, torch.float64, steps=1) for _ in range(2))
    torch.testing.assert_close(mixer_step(*ours.arguments(0)), reference.mixer_step(*theirs.arguments(0)), rtol=0, atol=0)
    assert all(torch.equal(mine, vars(theirs.state)[name]) for name, mine in vars(ours.state).items() if mine is not None)


def test_rows_do_not_see_each_other():
    whole, other = (draw_step(StepCase(batch=2, positions=(3, 20)), torch.float64, steps=1) for _ in range(2))
    y = reference.mixer_step(*whole.arguments(0))
    for part in (*other.inputs[0], *vars(other.state).values()):
        if part is not None:
            part[1] += 1
    torch.testing.assert_close(reference.mixer_step(*other.arguments(0))[0], y[0], rtol=0, atol=0)
