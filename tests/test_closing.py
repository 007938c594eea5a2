"""What fails last is said, and decides nothing."""

import pytest

from phase8.closing import Tolerated
from phase8.errors import StorageError


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device"), "OSError: [Errno 28] No space left on device"),
        (StorageError("cannot write it\nnor that"), "cannot write it"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_an_error_is_a_sentence(error, reason):
    said = []
    with Tolerated("no report", said.append):
        raise error
    assert said == [f"no report: {reason}"]


def test_an_earlier_error_stays_the_one_that_counts():
    said = []
    with pytest.raises(ZeroDivisionError):
        try:
            1 / 0  # noqa: B018
        finally:
            with Tolerated("not closed", said.append):
                raise OSError
    assert said == ["not closed: OSError"]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_what_asks_the_process_to_end_goes_through(kind):
    with pytest.raises(kind), Tolerated("no report", print):
        raise kind


def test_a_sentence_that_cannot_be_shown_is_given_up():
    def say(text):
        raise OSError

    with Tolerated("no report", say):
        raise RuntimeError
