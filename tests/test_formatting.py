from __future__ import annotations

import pytest

from phase8.formatting import format_bytes, format_count, format_epochs, format_flops, format_ratio, format_seconds


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (7, "7"), (999, "999"), (1000, "1k"), (12_345, "12.3k"), (999_499, "999k"), (999_999, "1M"), (1.3e9, "1.3B"), (2e12, "2T"),
     (5e16, "50000T"), (-1500, "-1.5k"), (6e-4, "0.0006"), (float("nan"), "nan")],
)  # fmt: skip
def test_a_count_has_three_digits_and_rolls_over_to_the_next_unit(count, text):
    assert format_count(count) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (3.4 * 2**20, "3.4 MiB"), (2**30 - 1, "1 GiB"), (5.21 * 2**30, "5.21 GiB"), (2**40, "1 TiB")],
)
def test_bytes_use_binary_units(num_bytes, text):
    assert format_bytes(num_bytes) == text


def test_flops_keep_room_for_a_rate_or_a_cost():
    assert format_flops(989.5e12) + "/s" == "990 TFLOP/s"
    assert format_flops(75.6e6) + "/token" == "75.6 MFLOP/token"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0 ms"), (0.0853, "85.3 ms"), (0.9999, "1.0 s"), (12.34, "12.3 s"), (59.97, "1 min 00 s"), (192, "3 min 12 s"), (3599.7, "1 h 00 min"),
     (7500, "2 h 05 min"), (86_400 * 3 + 4 * 3600, "3 d 04 h")],
)  # fmt: skip
def test_a_duration_shows_its_two_largest_units(seconds, text):
    assert format_seconds(seconds) == text


def test_a_ratio_is_per_cent():
    assert format_ratio(0.4123) == "41.2 %"


def test_epochs_name_their_sources_where_there_are_several_and_of_many_those_repeated_most():
    assert format_epochs({"web": 1.269}) == "1.27"
    assert format_epochs({"web": 0.309, "code": 2.04}, max_sources=2) == "web 0.31, code 2.04"
    many = {"web": 0.3, "code": 2, "books": 0.1, "mail": 3.5}
    assert format_epochs(many) == "web 0.30, code 2.00, books 0.10, mail 3.50"
    assert format_epochs(many, max_sources=2) == "mail 3.50, code 2.00, 2 more"
