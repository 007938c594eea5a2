"""Pieces: every token is predicted exactly once, with as much context as the window allows."""

import itertools

import pytest

from phase8.evaluate.pieces import Piece, Range, batches, evenly_spread_pieces, windows


@pytest.mark.parametrize(("number", "length", "stride"), [(1, 8, 8), (8, 8, 8), (9, 8, 8), (50, 8, 8), (50, 8, 3), (50, 8, 1), (7, 8, 3)])
def test_every_token_is_predicted_once_and_all_windows_but_short_texts_are_full(number, length, stride):
    found = list(windows(2, Range(100, number), length=length, stride=stride))
    predicted = [position for piece in found for position in range(piece.first + piece.num_context, piece.first + piece.length)]
    assert predicted == list(range(100, 100 + number))
    assert {piece.length for piece in found} == {min(length, number)} and {piece.source for piece in found} == {2}
    assert all(piece.first >= 100 and piece.num_context >= length - stride for piece in found[1:])


def test_windows_without_a_stride_follow_each_other():
    assert list(windows(0, Range(0, 20), length=8, stride=8)) == [Piece(0, 0, 8, 0), Piece(0, 8, 8, 0), Piece(0, 12, 8, 4)]


def test_spread_windows_are_those_of_an_evaluation_during_training():
    found = evenly_spread_pieces([81, 30], weights=[1, 1], num_pieces=6, length=8)
    assert found == [*(Piece(0, window * 8, 8) for window in (0, 3, 6)), *(Piece(1, window * 8, 8) for window in (0, 1, 2))]
    found = evenly_spread_pieces([81, 30], weights=[2, 1], num_pieces=6, length=8)
    assert found == [*(Piece(0, window * 8, 8) for window in (0, 2, 5, 7)), *(Piece(1, window * 8, 8) for window in (0, 1))]


def test_batches_depend_on_the_pieces_alone():
    pieces = [Piece(source, first, length) for source, first, length in [(0, 0, 5), (0, 5, 9), (1, 0, 9), (1, 9, 2), (0, 14, 5)]]
    expected = batches(pieces, 2)
    assert all(batches(order, 2) == expected for order in itertools.permutations(pieces))
    assert [[piece.length for piece in batch] for batch in expected] == [[9, 9], [5, 5], [2]]


def test_pieces_side_by_side_have_about_the_same_length_and_short_ones_fill_a_batch():
    pieces = [Piece(0, 1000 * i, length) for i, length in enumerate([1000, 600, 499, 300, 240, 100, 90, *[9] * 5])]
    assert [[piece.length for piece in batch] for batch in batches(pieces, 2)] == [[1000, 600], [499, 300], [240], [100, 90], [9, 9], [9, 9], [9]]
    filled = batches(pieces, 2, tokens_at_once=400)
    assert [[piece.length for piece in batch] for batch in filled] == [[1000, 600], [499, 300], [240], [100, 90, 9, 9], [9, 9, 9]]
