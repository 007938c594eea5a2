import inspect
import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phase8.config.schema import OptimSection
from phase8.optim.schedule import learning_rate

untimed = settings(deadline=None)
PEAK, FLOOR = 2e-3, 0.1


def rates(num_steps, **section):
    optim = OptimSection(**{"learning_rate": PEAK, "min_learning_rate_ratio": FLOOR, **section})
    return [learning_rate(step, optim, num_steps=num_steps) for step in range(1, num_steps + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warmup_rises_linearly_to_the_peak(schedule):
    assert rates(100, schedule=schedule, warmup_steps=20)[:20] == pytest.approx([PEAK * step / 20 for step in range(1, 21)])


@pytest.mark.parametrize("schedule", ["wsd", "constant"])
def test_without_warmup_the_first_step_has_the_peak(schedule):
    assert rates(100, schedule=schedule, warmup_steps=0)[0] == PEAK


def test_cosine_ends_at_the_floor_and_passes_the_middle_halfway():
    values = rates(120, schedule="cosine", warmup_steps=20)
    assert values[-1] == pytest.approx(FLOOR * PEAK)
    assert values[70 - 1] == pytest.approx((1 + FLOOR) / 2 * PEAK)
    # A quarter of the way down the cosine: (1 + cos(pi / 4)) / 2 of the way between floor and peak.
    assert values[45 - 1] == pytest.approx(PEAK * (FLOOR + (1 - FLOOR) * (1 + math.sqrt(0.5)) / 2))
    assert all(early >= late for early, late in itertools.pairwise(values[19:]))


@pytest.mark.parametrize(("decay_steps", "begin"), [(40, 60), (None, 90)])
def test_wsd_is_stable_and_then_falls_linearly(decay_steps, begin):
    values = rates(100, schedule="wsd", warmup_steps=10, decay_steps=decay_steps)
    assert values[9:begin] == [PEAK] * (begin - 9)
    falls = [early - late for early, late in itertools.pairwise(values[begin - 1 :])]
    assert falls == pytest.approx([(1 - FLOOR) * PEAK / (100 - begin)] * (100 - begin))
    assert values[-1] == pytest.approx(FLOOR * PEAK)


def test_constant_stays_at_the_peak():
    assert rates(50, schedule="constant", warmup_steps=5)[4:] == [PEAK] * 46


@untimed
@given(
    schedule=st.sampled_from(["cosine", "wsd", "constant"]),
    num_steps=st.integers(1, 300),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    ratio=st.floats(0, 1),
)
def test_every_schedule_is_continuous_and_between_zero_and_peak(schedule, num_steps, shares, ratio):
    warmup_steps = min(int(shares[0] * num_steps), num_steps - 1)
    decay_steps = max(int(shares[1] * (num_steps - warmup_steps)), 1) if schedule == "wsd" else None
    values = rates(num_steps, schedule=schedule, warmup_steps=warmup_steps, decay_steps=decay_steps, min_learning_rate_ratio=ratio)
    assert all(0 <= value <= PEAK * (1 + 1e-12) for value in values)
    # The steepest that each part may be.
    steepest = max(1 / max(warmup_steps, 1), 1 / (decay_steps or num_steps), 0.5 * math.pi / (num_steps - warmup_steps))
    for early, late in itertools.pairwise(values):
        assert abs(late - early) <= PEAK * steepest * (1 + 1e-9)


def test_a_schedule_depends_on_its_length_and_not_on_where_a_run_stops():
    """`train.stop_at_step` never reaches the schedule: a run stopped at half of its length is in the middle of it."""
    assert list(inspect.signature(learning_rate).parameters) == ["step", "section", "num_steps"]
    assert rates(200, warmup_steps=10)[:100] != pytest.approx(rates(100, warmup_steps=10))
