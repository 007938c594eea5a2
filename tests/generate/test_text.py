"""Text in pieces: what is handed out, what is held back, and what ends it."""

import pytest

from phase8.generate.text import TextEnd


def handed_out(stops, pieces):
    """Text that comes out for each piece until a stop text has come, and whether one has."""
    end, found = TextEnd(stops), []
    for piece in pieces:
        text, is_stopped = end.feed(piece)
        found.append(text)
        if is_stopped:
            return found, True
    return [*found, end.flush()], False


@pytest.mark.parametrize(
    ("stops", "pieces", "expected", "is_stopped"),
    [
        ((), ["ab", "c"], ["ab", "c", ""], False),
        (("END",), ["a", "bEN", "Dc"], ["a", "b", ""], True),
        (("END",), ["aE", "N", "x"], ["a", "", "ENx", ""], False),
        (("END",), ["aE", "EN"], ["a", "E", "EN"], False),
        (("aab",), ["aa", "ab"], ["", "a"], True),
        (("cd", "bc"), ["abcd"], ["a"], True),
        (("x", "long stop"), ["a long", " sx"], ["a ", "long s"], True),
    ],
)
def test_stop_texts(stops, pieces, expected, is_stopped):
    assert handed_out(stops, pieces) == (expected, is_stopped)
