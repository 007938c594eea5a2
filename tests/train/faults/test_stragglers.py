"""Who is called the slowest rank, by numbers made up; and how it goes into the record of a run."""

import math
from dataclasses import asdict

import pytest
import torch

from phase8.observe.history import History
from phase8.observe.metrics import MetricsWriter, read_metrics
from phase8.observe.report import write_report
from phase8.train.faults.stragglers import ProbeWork, RankTimes, probe_ranks, summarise
from tests.train.faults.step_metrics import step_metrics


def times(probes, waits=None, step=1.0):
    waits = [0.0] * len(probes) if waits is None else waits
    return [
        RankTimes(host=f"node{rank}", probe=probe, data_wait=wait, step=step)
        for rank, (probe, wait) in enumerate(zip(probes, waits, strict=True))
    ]


def test_a_slow_device_is_named_with_its_ratio_to_the_median():
    report = summarise(times([0.010, 0.011, 0.016, 0.010, 0.009]))
    assert (report.slowest_rank, report.slowest_host, report.cause) == (2, "node2", "device")
    assert report.ratio == pytest.approx(1.6) and (report.probe_seconds, report.median_probe_seconds) == (0.016, 0.010)
    assert report.describe() == "slowest is rank 2 on node2, 1.60 times the median: its device took 16.00 ms for what takes 10.00 ms elsewhere"


def test_of_two_ranks_the_slower_is_compared_with_the_faster():
    assert summarise(times([0.03, 0.01])).ratio == pytest.approx(3.0)


def test_a_rank_that_waits_for_data_is_named():
    report = summarise(times([0.010, 0.011, 0.010, 0.010], waits=[0.1, 0.1, 0.1, 0.7]))
    assert (report.slowest_rank, report.cause) == (3, "data")
    assert report.ratio == pytest.approx(1.0 / 0.4) and (report.data_wait_seconds, report.median_data_wait_seconds) == (0.7, 0.1)
    assert report.describe() == "slowest is rank 3 on node3, 2.50 times the median: it waited 0.700 s for data, others 0.100 s"


def test_a_wait_that_is_long_only_beside_other_waits_counts_as_little():
    report = summarise(times([0.010, 0.012, 0.010], waits=[1e-5, 1e-5, 1e-3]))
    assert (report.slowest_rank, report.cause) == (1, "device") and report.ratio == pytest.approx(1.2)


def test_the_worse_of_both_decides():
    slow_device = summarise(times([0.040, 0.010, 0.010, 0.010], waits=[0.1, 0.0, 0.0, 0.5]))
    slow_data = summarise(times([0.015, 0.010, 0.010], waits=[0.0, 0.0, 0.5]))
    assert (slow_device.slowest_rank, slow_device.cause, slow_data.slowest_rank, slow_data.cause) == (0, "device", 2, "data")


def test_nobody_is_slow():
    report = summarise(times([0.01] * 4, waits=[0.2] * 4))
    assert (report.slowest_rank, report.ratio, report.cause) == (0, 1.0, "device")


def test_a_step_of_nothing_but_waiting():
    assert summarise(times([0.01, 0.01, 0.01], waits=[0.0, 1.0, 0.0])).ratio == math.inf


def test_one_process_is_its_own_median():
    work = ProbeWork(width=8, num_products=1, num_copied=8, num_copies=1, dtype=torch.float32)
    report = probe_ranks(torch.device("cpu"), data_wait_seconds=0.25, step_seconds=1.0, work=work)
    assert (report.slowest_rank, report.ratio, report.data_wait_seconds) == (0, 1.0, 0.25) and report.probe_seconds > 0


def test_metrics_have_the_report_and_the_page_is_still_drawn(tmp_path):
    report = summarise(times([0.01, 0.01, 0.01], waits=[0.0, 1.0, 0.0]))
    with MetricsWriter(tmp_path, resume_step=0) as writer:
        writer.log_step(step_metrics(1))
        writer.log_event(1, "stragglers", **asdict(report))
        writer.log_step(step_metrics(2))
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert records[1] == {
        "step": 1, "event": "stragglers", "slowest_rank": 1, "slowest_host": "node1", "ratio": None, "cause": "data",
        "probe_seconds": 0.01, "median_probe_seconds": 0.01, "data_wait_seconds": 1.0, "median_data_wait_seconds": 0.0,
    }  # fmt: skip
    assert History.from_records(records).steps.tolist() == [1, 2]
    assert "After step 2" in write_report(tmp_path).read_text()
