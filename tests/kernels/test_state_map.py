import pytest
import torch

from phase8.kernels.gated_delta_rule import gated_delta_rule
from phase8.kernels.gated_linear_attention import added_state, gated_linear_attention, gated_linear_attention_backward
from phase8.kernels.state_map import DecayMap, decay_map, state_after, state_map
from tests.kernels.recurrences import initial_state, random_starts
from tests.kernels.test_gated_delta_rule import problem

RECURRENCES = {"delta": (gated_delta_rule, state_map, 5), "linear": (gated_linear_attention, decay_map, 4)}
SLICES = [slice(0, 70), slice(70, 134), slice(134, 200)]


def slow_problem(num_arguments):
    """Memories that outlast a slice, or else nothing of a state would be left of what a slice does to it."""
    q, k, v, log_decay, beta = problem(200)
    return [q, k, v, log_decay / 1000, beta / 50][:num_arguments]


def cut(x, part):
    return None if x is None else x[:, part]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_maps_of_slices_compose_to_the_whole_forwards_and_backwards(recurrence, packed):
    """What context parallelism rests on: slices know each other by their maps alone."""
    attend, map_of, num_arguments = RECURRENCES[recurrence]
    is_differentiable = recurrence == "delta"
    arguments = [x.requires_grad_(is_differentiable) for x in slow_problem(num_arguments)]
    state, starts = initial_state().requires_grad_(is_differentiable), random_starts(200) if packed else None
    maps = [map_of(*(cut(x, part) for x in (*arguments[1:], starts))) for part in SLICES]
    composed = maps[0].then(maps[1]).then(maps[2])
    entering = [state, maps[0](state), maps[0].then(maps[1])(state)]
    pieces = [attend(*(cut(x, part) for x in (*arguments, starts)), before)[0] for part, before in zip(SLICES, entering, strict=True)]
    y, final = attend(*arguments, starts, state)
    torch.testing.assert_close(torch.cat(pieces, 1), y)
    torch.testing.assert_close(composed(state), final)
    from_nothing = state_after(type(composed), *(torch.stack(parts) for parts in zip(*maps, strict=True)))
    torch.testing.assert_close(from_nothing, composed.added)
    assert not state_after(type(composed), composed.matrix[None][:0], composed.added[None][:0]).any()
    associated = maps[0].then(maps[1].then(maps[2]))
    torch.testing.assert_close((associated.matrix, associated.added), (composed.matrix, composed.added))
    if not is_differentiable:
        return

    weight, weight_of_state = torch.randn_like(y), torch.randn_like(final)
    inputs = [*arguments, state]
    expected = torch.autograd.grad((y * weight).sum() + (final * weight_of_state).sum(), inputs)
    found = torch.autograd.grad((torch.cat(pieces, 1) * weight).sum() + (composed(state) * weight_of_state).sum(), inputs)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_of_slices_of_linear_attention_are_those_of_the_whole(packed):
    """Each slice walks once, when it knows the state that enters it and the gradient of the state that leaves it."""
    arguments = [x.requires_grad_() for x in slow_problem(4)]
    state, starts = initial_state().requires_grad_(), random_starts(200) if packed else None
    y, final = gated_linear_attention(*arguments, starts, state)
    dy, dstate = torch.randn_like(y), torch.randn_like(final)
    expected = torch.autograd.grad((y, final), (*arguments, state), (dy, dstate))

    found, entering = [None] * len(SLICES), [state.detach()]
    pieces = [[cut(x, part) for x in (*(x.detach() for x in arguments), starts)] for part in SLICES]
    maps = [decay_map(*piece[1:]) for piece in pieces]
    for own in maps[:-1]:
        entering.append(own(entering[-1]))
    for number in reversed(range(len(SLICES))):
        piece, own_dy = pieces[number], dy[:, SLICES[number]]
        *found[number], _ = gated_linear_attention_backward(own_dy, dstate, *piece, entering[number])
        # The gradient of a state goes back as the state goes on.
        before = added_state(piece[0], own_dy, *piece[3:], backwards=True)
        dstate = DecayMap(maps[number].matrix, before)(dstate)
    for ours, theirs in zip([torch.cat(parts, 1) for parts in zip(*found, strict=True)] + [dstate], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
