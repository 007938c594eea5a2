from __future__ import annotations

from dataclasses import asdict

import numpy as np

from phase8.observe.history import History, last_finite, loss_limits, median, moving_average, smooth, thin_out


def test_lines_are_sorted_into_arrays_and_evaluations_find_their_tokens(make_step, make_skipped):
    history = History.from_records(
        [
            {"step": 0, "validation_loss": 9.5, "validation_tokens": 8},
            asdict(make_step(1)),
            asdict(make_skipped(2)),
            {"step": 2, "validation_loss": None, "validation_tokens": 8},
            {"step": 2, "event": "checkpoint"},
            asdict(make_step(3, mfu=None)),
        ]
    )
    assert history.steps.tolist() == [1, 2, 3]
    assert np.isnan(history.loss).tolist() == [False, True, False]
    assert np.isnan(history.mfu).tolist() == [False, False, True]
    assert history.skipped_steps == (2,)
    at_evaluations = history.places.at(history.validation_steps)
    assert at_evaluations.tokens.tolist() == [0, 2 * 8192]
    np.testing.assert_allclose(at_evaluations.seconds, [0, 2 * 0.17])
    assert history.validation_loss[0] == 9.5 and np.isnan(history.validation_loss[1])


def test_the_moving_average_is_the_mean_of_the_finite_values_in_reach():
    values = np.arange(40.0)
    values[20] = np.nan
    averaged = moving_average(values, half_window=2)
    assert averaged[30] == 30
    assert averaged[20] == np.mean([18, 19, 21, 22])
    assert averaged[39] == np.mean([37, 38, 39])
    assert averaged[0] == 0 and averaged[4] == 4


def test_the_plunge_at_the_start_is_neither_lagged_nor_lifted():
    loss = 3 + 6 * np.exp(-np.arange(1000) / 30)
    assert np.abs(smooth(loss) - loss).max() < 0.15


def test_smoothing_takes_the_noise_out():
    noise = np.random.default_rng(0).normal(size=2000)
    assert smooth(noise)[200:].std() < 0.15


def test_series_without_a_finite_value_have_no_median_and_no_last():
    for values in (np.array([]), np.array([np.nan, np.nan])):
        assert median(values) is None and last_finite(values) is None
        assert np.isnan(smooth(values)).all() and len(smooth(values)) == len(values)
    assert last_finite(np.array([1.0, 2.0, np.nan])) == 2.0
    assert median(np.array([1.0, np.nan, 3.0])) == 2.0


def test_the_first_plunge_does_not_squash_the_curve():
    loss = 3 + np.exp(-np.arange(2000) / 100)
    loss[:10] = 12.0
    low, high = loss_limits(loss, np.array([]), {})
    assert 2.5 < low < 3 and 3.5 < high < 4


def test_references_and_late_evaluations_are_inside_the_limits():
    loss = np.full(100, 3.0)
    low, high = loss_limits(loss, np.array([9.0, 3.5, 4.2]), {"unigram entropy": 6.71, "floor": 1.9})
    assert low < 1.9 and 6.71 < high < 8
    low, high = loss_limits(loss, np.array([9.0, 3.5, 4.2]), {})
    assert low < 3 and 4.2 < high < 5


def test_limits_exist_without_any_finite_value():
    assert loss_limits(np.array([np.nan]), np.array([np.nan]), {}) == (0.0, 1.0)


def test_a_long_curve_is_thinned_but_keeps_every_spike():
    x, y = np.arange(100_000.0), np.zeros(100_000)
    y[[0, 31_415, 99_999]] = [5, 7, -3]
    y[500:900] = np.nan
    thin_x, thin_y = thin_out(x, y, most=1600)
    assert len(thin_x) <= 1600
    assert (np.diff(thin_x) > 0).all()
    assert {(0.0, 5.0), (31_415.0, 7.0), (99_999.0, -3.0)} <= set(zip(thin_x, thin_y, strict=True))
    assert np.isnan(thin_y).any()
