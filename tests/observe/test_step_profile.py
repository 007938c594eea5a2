import gzip
import io
import json
import re

import pytest
import torch
from rich.console import Console

from phase8.errors import StorageError
from phase8.observe.step_profile import (
    MAX_ROWS,
    MAX_STREAMS,
    ExchangeTime,
    KernelTime,
    StepProfile,
    exchange_times,
    profile_steps,
    shares,
    write_profile,
)
from phase8.train.loop import train
from tests.train.tiny_run import losses, prepare, train_tiny


def test_operators_of_the_steps_with_their_calls():
    def take_steps():
        for _ in range(6):
            torch.ones(64, 64) @ torch.ones(64, 64)

    rows = profile_steps(take_steps, device=torch.device("cpu"), num_steps=3).kernels
    times = [row.seconds_per_step for row in rows]
    assert times == sorted(times, reverse=True) and 0 < times[0] < 1
    assert {row.name: row.calls_per_step for row in rows}["aten::mm"] == 2.0


@pytest.mark.gpu
def test_kernels_of_a_gpu_and_nothing_of_the_host():
    x = torch.ones(2048, 2048, device="cuda")

    def take_steps():
        for _ in range(4):
            x @ x

    rows = profile_steps(take_steps, device=torch.device("cuda", 0), num_steps=4).kernels
    assert not any(row.name.startswith(("aten::", "cuda")) for row in rows)
    assert rows[0].calls_per_step == 1.0 and 0 < rows[0].seconds_per_step < 0.1


def test_the_table_holds_the_longest_and_the_sum_of_the_rest(tmp_path):
    rows = [KernelTime("longest" + "x" * 500, 0.5, 3), *(KernelTime(f"short{i}", 0.1 / (MAX_ROWS + 1), 1) for i in range(MAX_ROWS + 1))]
    write_profile(tmp_path / "new" / "table.txt", StepProfile(rows), title="title", step_seconds=0.8)
    lines = (tmp_path / "new" / "table.txt").read_text().splitlines()
    assert lines[0] == "title" and lines[1].startswith("600.00 ms in kernels per step of 800.00 ms") and "(75 %)" in lines[1]
    assert re.fullmatch(r" 83\.3 %   500\.000        3\.0  longestx+", lines[4]) and len(lines[4]) < 160
    assert len(lines) == 4 + MAX_ROWS + 1 and "(2 more)" in lines[-1]
    assert sum(float(line.split()[2]) for line in lines[4:]) == pytest.approx(600, abs=0.1)


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        write_profile(tmp_path / "file" / "table.txt", StepProfile([]), title="title", step_seconds=1.0)


def test_what_an_exchange_leaves_exposed():
    """Products from 0 to 4 and 6 to 8, an exchange beside the end of the first, a copy beside nothing and the second, a gap."""
    gather, copy = "ncclDevKernel_AllGather_RING_LL", "Memcpy PtoP (Device -> Device)"
    spans = [("gemm", 7, 0, 4), (gather, 8, 3, 5), (copy, 9, 5.5, 7), ("gemm", 7, 6, 8)]
    assert shares(spans) == (8, 3.5, 1.5, 0.5)
    assert exchange_times(spans, num_steps=1) == [ExchangeTime(gather, 8, 2, 1, 1), ExchangeTime(copy, 9, 1.5, 0.5, 1)]
    assert shares([]) == (0, 0, 0, 0) and exchange_times([], num_steps=1) == []
    within = [("gemm", 7, 0, 10), ("norm", 7, 2, 3), ("nccl", 8, 4, 5), ("nccl", 8, 4.5, 6)]
    assert shares(reversed(within)) == (10, 2, 0, 0)
    found = StepProfile([KernelTime("gemm", 0.006, 2)], None, *(part / 1e3 for part in shares(spans)))
    assert found.describe() == "3.50 ms of exchanges between ranks, 1.50 ms of them exposed, 0.50 ms with nothing to do, of 8.00 ms"


def test_exchanges_of_two_groups_share_what_they_leave_exposed_together(tmp_path):
    """The same kernel for layers and for parameters, of two steps: a wait for both from 2 to 4, and for one of them from 4 to 5."""
    spans = [("gemm", 7, 0, 2), ("nccl gather", 8, 1, 4), ("nccl gather", 13, 2, 5), ("gemm", 7, 5, 6)]
    found = exchange_times(spans, num_steps=2)
    assert found == [ExchangeTime("nccl gather", 13, 3, 2, 0.5), ExchangeTime("nccl gather", 8, 3, 1, 0.5)]
    assert sum(each.exposed_seconds for each in found) == shares(spans)[2]
    write_profile(tmp_path / "table.txt", StepProfile([], None, *shares(spans), exchanges=found), title="title")
    head, first, second = (tmp_path / "table.txt").read_text().splitlines()[3:6]
    assert head.split() == ["ms/step", "exposed", "calls/step", "stream", "exchange"]
    assert first.split() == ["3000.000", "2000.000", "0.5", "13", "nccl", "gather"] and second.split()[1] == "1000.000"


def test_streams_of_a_cuda_graph_are_one_row(tmp_path):
    """A graph gives each of its kernels a stream: nine sums in turn, two of them beside a product, and a gather in a stream of its own."""
    sums = [("nccl sum", 100 + i, i, i + 1) for i in range(MAX_STREAMS + 1)]
    found = exchange_times([*sums, ("gemm", 7, 0, 2), ("nccl gather", 8, 20, 22)], num_steps=1)
    assert found == [ExchangeTime("nccl sum", None, 9, 7, 9), ExchangeTime("nccl gather", 8, 2, 2, 1)]
    write_profile(tmp_path / "table.txt", StepProfile([], exchanges=found), title="title")
    assert (tmp_path / "table.txt").read_text().splitlines()[4].split() == ["9000.000", "7000.000", "9.0", "all", "nccl", "sum"]
    assert len(exchange_times(sums[:MAX_STREAMS], num_steps=1)) == MAX_STREAMS


def test_a_run_records_the_step_that_it_was_asked_for(tiny):
    run = train_tiny(tiny, "train.num_steps=3", "optim.warmup_steps=1", "observe.profile_at_step=2")
    trace, table = sorted(run.directory.profiles.iterdir())
    assert (trace.name, table.name) == ("step_2_rank_0.json.gz", "step_2_rank_0.txt")
    assert table.read_text().startswith("step 2, rank 0\n") and "aten::" in table.read_text()
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert any("aten::" in event.get("name", "") for event in events)
    assert set(losses(run)) == {1, 2, 3}


def test_a_step_that_this_start_does_not_take_is_named(tiny):
    def said(*overrides):
        console = Console(file=io.StringIO(), width=300)
        run = prepare(tiny, "train.num_steps=4", "optim.warmup_steps=1", *overrides, console=console)
        train(run, resume_command="")
        return [line for line in console.file.getvalue().splitlines() if "profile_at_step is" in line]

    assert said("observe.profile_at_step=3", "train.stop_at_step=2") == [
        "observe.profile_at_step is 3, but this start ends after step 2: a later start records it."
    ]
    assert said("observe.profile_at_step=2", "train.stop_at_step=3") == [
        "observe.profile_at_step is 2, but the run goes on after step 2: nothing is recorded; name a later step."
    ]
    assert said("observe.profile_at_step=4") == said("observe.profile_at_step=4") == []


def test_a_profile_that_cannot_be_written_does_not_end_the_run(tiny):
    console = Console(file=io.StringIO(), width=300)
    run = prepare(tiny, "train.num_steps=2", "optim.warmup_steps=1", "observe.profile_at_step=1", console=console)
    run.directory.profiles.parent.mkdir(parents=True, exist_ok=True)
    run.directory.profiles.write_text("in the way")
    train(run, resume_command="")
    assert "the profile is lost: cannot write" in console.file.getvalue()
    assert set(losses(run)) == {1, 2}
