import pytest
import torch

from phase8.kernels.gated_delta_rule import gated_delta_rule
from phase8.kernels.gated_linear_attention import gated_linear_attention
from phase8.kernels.state_map import decay_map, state_map
from tests.kernels.recurrences import initial_state, random_starts
from tests.kernels.test_gated_delta_rule import problem

RECURRENCES = {"delta": (gated_delta_rule, state_map, 5), "linear": (gated_linear_attention, decay_map, 4)}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_maps_of_slices_compose_to_the_whole_forwards_and_backwards(recurrence, packed):
    """What context parallelism rests on: slices know each other by their maps alone."""
    attend, map_of, num_arguments = RECURRENCES[recurrence]
    arguments = [x.requires_grad_() for x in problem(200)[:num_arguments]]
    state, starts = initial_state().requires_grad_(), random_starts(200) if packed else None
    slices = [slice(0, 70), slice(70, 134), slice(134, 200)]

    def cut(x, part):
        return None if x is None else x[:, part]

    maps = [map_of(*(cut(x, part) for x in (*arguments[1:], starts))) for part in slices]
    composed = maps[0].then(maps[1]).then(maps[2])
    entering = [state, maps[0](state), maps[0].then(maps[1])(state)]
    pieces = [attend(*(cut(x, part) for x in (*arguments, starts)), before)[0] for part, before in zip(slices, entering, strict=True)]
    y, final = attend(*arguments, starts, state)
    torch.testing.assert_close(torch.cat(pieces, 1), y)
    torch.testing.assert_close(composed(state), final)
    associated = maps[0].then(maps[1].then(maps[2]))
    torch.testing.assert_close((associated.matrix, associated.added), (composed.matrix, composed.added))

    weight, weight_of_state = torch.randn_like(y), torch.randn_like(final)
    inputs = [*arguments, state]
    expected = torch.autograd.grad((y * weight).sum() + (final * weight_of_state).sum(), inputs)
    found = torch.autograd.grad((torch.cat(pieces, 1) * weight).sum() + (composed(state) * weight_of_state).sum(), inputs)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
