"""The probe on several ranks, of which one has more to do, or waits longer for its data."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from phase8.train.faults.stragglers import ProbeWork, probe_ranks

WORK = ProbeWork(width=64, num_products=10, num_copied=2**12, num_copies=10, dtype=torch.float32)


def probe(slow_rank, factor, wait_seconds):
    """The report where one rank does many times the work, or waits for data, in steps of ten thousand seconds."""
    is_slow = dist.get_rank() == slow_rank
    work = replace(WORK, num_products=WORK.num_products * factor, num_copies=WORK.num_copies * factor) if is_slow else WORK
    return probe_ranks(torch.device("cpu"), data_wait_seconds=wait_seconds if is_slow else 1.0, step_seconds=1e4, work=work)


@pytest.mark.parametrize(("world_size", "slow_rank"), [(2, 0), (4, 2)])
def test_a_rank_whose_device_is_slow_is_named_on_all(pool, world_size, slow_rank):
    reports = pool.run(probe, slow_rank, 300, 1.0, world_size=world_size)
    assert all(report == reports[0] for report in reports)
    assert (reports[0].slowest_rank, reports[0].cause) == (slow_rank, "device") and reports[0].ratio > 1


def test_a_rank_that_waits_for_data_is_named_on_all(pool):
    reports = pool.run(probe, 1, 1, 9999.9, world_size=4)
    assert all(report == reports[0] for report in reports)
    assert (reports[0].slowest_rank, reports[0].cause, reports[0].data_wait_seconds) == (1, "data", 9999.9)
    assert reports[0].median_data_wait_seconds == 1.0 and reports[0].ratio == pytest.approx(1e4 / (1e4 - 9998.9))
