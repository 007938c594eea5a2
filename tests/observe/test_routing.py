import json
from typing import NamedTuple

import numpy as np
import pytest

from phase8.observe.history import History
from phase8.observe.metrics import MetricsWriter, read_metrics
from phase8.observe.report import write_report
from phase8.observe.routing import is_routing, routing_history, routing_record
from phase8.observe.routing_chart import means_of_stretches


class Layer(NamedTuple):
    load: tuple
    dropped: float
    entropy: float
    imbalance: float = 1.0


def routing_of(step):
    return {3: Layer((0.25 + 0.01 * step, 0.75 - 0.01 * step), 0.125, 0.6), 11: Layer((1.0, 0.0), float("nan"), 0.123456)}


def write_run(directory, make_step):
    with MetricsWriter(directory, resume_step=0) as metrics:
        for step in range(1, 7):
            metrics.log_step(make_step(step, routing=routing_of(step) if step % 2 == 0 else {}))


def test_steps_with_routing_become_arrays(tmp_path, make_step):
    write_run(tmp_path, make_step)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [("routing" in record) for record in records] == [False, True] * 3
    assert records[1]["routing"]["11"] == {"load": [1.0, 0.0], "dropped": None, "entropy": 0.1235, "imbalance": 1.0}
    history = History.from_records(records).routing
    assert history.layers == (3, 11) and history.steps.tolist() == [2, 4, 6] and history.load.shape == (3, 2, 2)
    np.testing.assert_allclose(history.load[:, 0, 0], [0.27, 0.29, 0.31])
    assert np.isnan(history.dropped[:, 1]).all() and history.dropped[0, 0] == 0.125


def test_records_of_earlier_releases_are_read():
    """They have no imbalance."""
    record = {"step": 1, "routing": {"3": {"load": [0.5, 0.5], "dropped": 0.0, "entropy": 0.6}}}
    assert is_routing(record["routing"]) and np.isnan(routing_history([record]).imbalance).all()


def test_a_run_without_experts_has_none(tmp_path, make_step):
    with MetricsWriter(tmp_path, resume_step=0) as metrics:
        metrics.log_step(make_step(1))
    assert History.from_records(read_metrics(tmp_path / "metrics.jsonl")).routing is None
    assert "Load of experts" not in write_report(tmp_path).read_text()


def test_steps_of_another_model_are_left_out():
    other = {"step": 1, "routing": routing_record({3: Layer((1.0,), 0.0, 0.0)})}
    last = {"step": 2, "routing": routing_record(routing_of(2))}
    assert routing_history([other, last]).steps.tolist() == [2]


def test_the_report_shows_the_load_as_a_picture(tmp_path, make_step):
    write_run(tmp_path, make_step)
    page = write_report(tmp_path).read_text()
    assert all(heading in page for heading in ("Load of experts", "Dropped choices", "Router entropy", "Imbalance of experts", "layer 11"))
    assert page.count("data:image/png;base64,") == 1


@pytest.mark.parametrize(
    "value",
    [[], {"x": {}}, {"1": 3}, {"1": {"load": [], "dropped": 0, "entropy": 0}}, {"1": {"load": ["a"], "dropped": 0, "entropy": 0}},
     {"1": {"load": [0.5], "dropped": 0}}, {"1": {"load": [0.5], "dropped": 0, "entropy": 0}, "2": {"load": [0.5, 0.5], "dropped": 0, "entropy": 0}},
     {"1": {"load": [1e30], "dropped": 0, "entropy": 0}}, {"1": {"load": [0.5], "dropped": 0, "entropy": 0, "imbalance": "x"}}],
)  # fmt: skip
def test_what_is_no_routing_is_not_taken_for_one(value):
    assert not is_routing(value) and is_routing(json.loads(json.dumps(routing_record(routing_of(1)))))


def test_a_long_run_is_averaged_over_stretches_of_steps():
    values = np.arange(1000.0)[:, None] * np.ones((1, 3))
    values[0, 0] = np.nan
    means = means_of_stretches(values)
    assert means.shape == (200, 3) and means[0].tolist() == [2.5, 2.0, 2.0] and means[-1, 0] == 997
    assert means_of_stretches(values[:200]) is not None and len(means_of_stretches(values[:200])) == 200
