import pytest
import torch

from phase8.kernels.window_state import empty_window_state, visible_keys

WINDOW, GLOBALS = 5, 3


def carried(lengths, starts=None):
    """Pieces whose keys are their positions, one after the other."""
    total = sum(lengths)
    positions = torch.arange(total, dtype=torch.float32).view(1, total, 1, 1)
    state, begin = empty_window_state(1, 1, 1, like=positions), 0
    for length in lengths:
        piece = positions[:, begin : begin + length]
        seen = visible_keys(piece, -piece, global_tokens=GLOBALS, starts=None if starts is None else starts[:, begin : begin + length], state=state)
        state, begin = seen.carried(WINDOW, length), begin + length
    return state


@pytest.mark.parametrize("lengths", [[20], [1] * 20, [2, 11, 7]])
def test_the_last_window_and_the_first_tokens_are_kept(lengths):
    state = carried(lengths)
    assert state.keys.flatten().tolist() == [16, 17, 18, 19] and state.values.flatten().tolist() == [-16, -17, -18, -19]
    assert state.global_keys.flatten().tolist() == [0, 1, 2] and state.num_seen == 20


@pytest.mark.parametrize("lengths", [[8], [1] * 8, [3, 5]])
def test_documents_are_numbered_from_the_newest_back(lengths):
    starts = torch.tensor([[True, False, True, False, False, False, True, False]])
    state = carried(lengths, starts)
    assert state.documents.tolist() == [[-1, -1, 0, 0]]
    assert state.global_documents.tolist() == [[-2, -2, -1]]


def test_fewer_tokens_than_window_and_globals():
    state = carried([2])
    assert state.keys.flatten().tolist() == [0, 1] and state.global_keys.flatten().tolist() == [0, 1]


def test_without_a_state_nothing_is_copied():
    k = torch.randn(2, 6, 1, 4)
    seen = visible_keys(k, k, global_tokens=GLOBALS, starts=None, state=None)
    assert seen.keys is k and seen.global_keys.data_ptr() == k.data_ptr() and seen.documents is None
