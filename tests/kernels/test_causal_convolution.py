import itertools

import pytest
import torch
import torch.nn.functional as F

from phase8.kernels.causal_convolution import causal_convolution, inputs_to_carry


def problem(length, taps):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, length, 6, generator=generator, dtype=torch.float64), torch.randn(6, taps, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 3, 63])
def test_equals_conv1d_padded_on_the_left(length, taps):
    x, weight = problem(length, taps)
    y, _ = causal_convolution(x, weight)
    torch.testing.assert_close(y, F.conv1d(F.pad(x.transpose(1, 2), (taps - 1, 0)), weight[:, None], groups=6).transpose(1, 2))


def test_channels_stay_side_by_side():
    """What follows reads the channels of a token, which on a CPU takes several times as long where they are apart in memory."""
    x, weight = problem(63, 4)
    assert causal_convolution(x, weight)[0].is_contiguous()


def test_identity_taps_change_nothing():
    x, weight = problem(10, 4)
    weight.zero_()[:, -1] = 1
    assert torch.equal(causal_convolution(x, weight)[0], x)


@pytest.mark.parametrize("begins", [None, [0, 4], [2, 3, 11]])
@pytest.mark.parametrize("pieces", [[1] * 12, [2, 1, 9], [5, 7]])
def test_pieces_with_carried_state_equal_the_whole(pieces, begins):
    x, weight = problem(12, 4)
    starts = None if begins is None else torch.zeros(2, 12, dtype=torch.bool)
    if begins is not None:
        starts[:, begins] = True
    state, outputs = torch.zeros(2, 3, 6, dtype=torch.float64), []
    for place, piece in enumerate(x.split(pieces, dim=1)):
        y, state = causal_convolution(piece, weight, None if starts is None else starts.split(pieces, dim=1)[place], state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), causal_convolution(x, weight, starts)[0])


@pytest.mark.parametrize("begins", [[0, 5], [1, 2, 3], [4, 5, 9], [11]])
def test_packed_documents_equal_separate_ones(begins):
    x, weight = problem(12, 4)
    starts = torch.zeros(2, 12, dtype=torch.bool)
    starts[:, begins] = True
    bounds = sorted({0, *begins, 12})
    separate = [causal_convolution(x[:, a:b], weight)[0] for a, b in itertools.pairwise(bounds)]
    torch.testing.assert_close(causal_convolution(x, weight, starts)[0], torch.cat(separate, 1))


def test_inputs_of_an_earlier_document_are_not_carried():
    padded, starts = torch.ones(2, 3 + 2, 1), torch.tensor([[False, True], [True, False]])
    carried = inputs_to_carry(padded[:, starts.shape[1] :], starts)[..., 0]
    assert carried.tolist() == [[0, 0, 1], [0, 1, 1]]
