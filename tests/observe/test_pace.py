from __future__ import annotations

import pytest

from phase8.observe.pace import RemainingTime, Throughput


def test_throughput_is_the_tokens_of_the_steps_over_their_seconds():
    throughput = Throughput()
    for seconds in (0.2, 0.2, 5.6):
        throughput.add(seconds=seconds, tokens=512)
    assert throughput.tokens_per_second == pytest.approx(3 * 512 / 6.0)  # and not the 91 of the last step
    throughput.clear()
    throughput.add(seconds=0.25, tokens=512)
    assert throughput.tokens_per_second == pytest.approx(2048)


def test_a_window_forgets_the_steps_before_it_and_keeps_one_that_is_longer():
    throughput = Throughput(window_seconds=10)
    throughput.add(seconds=90, tokens=100)
    assert throughput.tokens_per_second == pytest.approx(100 / 90)
    throughput.add(seconds=4, tokens=100)
    assert throughput.tokens_per_second == pytest.approx(25)
    for _ in range(20):
        throughput.add(seconds=2, tokens=100)
    throughput.add(seconds=4, tokens=100)
    assert throughput.tokens_per_second == pytest.approx(400 / 10)


def remaining(durations: list[float], *, between: dict[int, float] | None = None, num_steps: int) -> float | None:
    """What is estimated after steps of these durations, some of them (counted from 1) with something before them."""
    estimate, now = RemainingTime(), 0.0
    for step, seconds in enumerate(durations, start=1):
        now += (between or {}).get(step, 0.0) + seconds
        estimate.add(seconds=seconds, ended_at=now)
    return estimate.seconds(num_steps)


def test_the_remaining_time_waits_for_three_steps():
    assert [remaining([1.0] * count, num_steps=10) for count in (0, 1, 2, 3)] == [None, None, None, pytest.approx(10)]


@pytest.mark.parametrize("compiling", [[90.0], [90.0, 20.0], [60.0, 20.0, 20.0]])
def test_steps_that_compile_do_not_move_the_remaining_time(compiling):
    assert remaining([*compiling, 1.0, 1.1, 0.9, 1.0, 1.0, 1.0], num_steps=1000) == pytest.approx(1000, rel=0.05)


def test_steps_that_are_slow_again_and_again_count():
    """A median would say 0.2 s a step where the steps take 1.2 s on average."""
    assert remaining([0.2, 0.2, 0.2, 0.2, 5.2] * 60, num_steps=1000) == pytest.approx(1200, rel=0.05)


def test_the_remaining_time_follows_a_run_that_becomes_slower():
    assert remaining([1.0] * 1000 + [2.0] * 300, num_steps=100) == pytest.approx(200)


def test_what_comes_between_steps_is_in_the_remaining_time_but_for_the_first_long_evaluation():
    evaluations = {step: 10.0 for step in range(101, 1000, 100)}
    assert remaining([1.0] * 1000, between={**evaluations, 101: 60.0}, num_steps=1000) == pytest.approx(1000 + 8 * 10)
    assert remaining([1.0] * 150, between={101: 60.0}, num_steps=1000) == pytest.approx(1000)
