"""Real processes under torchrun that fail in every way we know: one message that names the rank, the right code, nothing left behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.processes import launched
from tests.processes.launched import free_port

SCRIPT = Path(__file__).with_name("failing_rank.py")


def fail(how, *, rank, directory, timeout_seconds=30.0, **keywords):
    """Exit code, stdout, what the ranks said, and what torchrun says was the root cause."""
    code, output, errors = launched.torchrun(SCRIPT, how, rank, directory / "hang", timeout_seconds, **keywords)
    return code, output, launched.own_lines(errors), launched.code_of_first_failure(errors) if code else None


def test_nothing_happens_to_ranks_that_do_not_fail(tmp_path):
    code, output, said, _ = fail("fine", rank=1, directory=tmp_path, num_processes=2)
    assert code == 0 and [output.count(f"rank {rank}: 24") for rank in range(2)] == [1, 1], (output, said)
    assert said == [] and list(tmp_path.iterdir()) == []


def test_a_rank_that_raises_tells_its_sentence_and_the_others_follow(tmp_path):
    code, _, said, root_cause = fail("error", rank=1, directory=tmp_path)
    assert (code, root_cause) == (1, (1, 3))  # torchrun itself always exits with 1
    assert said == [
        "rank 1: error: shard 7 of the corpus is truncated; copy it again.",
        "error: stopped because rank 1 failed: shard 7 of the corpus is truncated; copy it again.",
    ]


@pytest.mark.full
def test_rank_0_tells_its_own_message_only(tmp_path):
    code, _, said, root_cause = fail("error", rank=0, directory=tmp_path, num_processes=2)
    assert (code, root_cause) == (1, (0, 3))
    assert said == ["rank 0: error: shard 7 of the corpus is truncated; copy it again."]


@pytest.mark.full
def test_ranks_that_have_finished_wait_for_the_others_and_fail_with_them(tmp_path):
    _, output, errors = launched.torchrun(SCRIPT, "late", 0, tmp_path, 30.0)
    assert output.count(": 81") == 2 and errors.count("exitcode  : 3") == 3, errors
    assert launched.own_lines(errors) == ["rank 0: error: shard 7 of the corpus is truncated; copy it again."]


def test_a_bug_shows_one_traceback_and_torchrun_ends_with_it(tmp_path):
    code, _, errors = launched.torchrun(SCRIPT, "bug", 1, tmp_path / "hang", 30.0, num_processes=2)
    said = launched.own_lines(errors)
    assert (code, launched.code_of_first_failure(errors)) == (1, (1, 1))
    assert said[0] == "rank 1: Traceback (most recent call last):"
    assert said[-2:] == ["IndexError: list index out of range", "error: stopped because rank 1 failed: IndexError: list index out of range"]
    assert sum("Traceback" in line for line in said) == 1
    account = [line.strip() for line in errors[errors.index("Root Cause") :].splitlines()]
    first = account.index(f"traceback : {said[0]}")
    assert account[first + 1 :] == [*(line.strip() for line in said[1:-1]), "=" * 60]


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.full), 2])
def test_a_rank_that_is_killed_is_named_once_with_its_place(tmp_path, rank):
    code, _, said, root_cause = fail("kill", rank=rank, directory=tmp_path)
    assert (code, root_cause) == (1, (rank, -signal.SIGKILL))
    (line,) = said
    assert f"rank {rank} is lost: its process " in line and "it was last at step 2, forward of microbatch 0;" in line, line


def test_a_hang_names_the_rank_that_is_behind_and_every_rank_leaves_a_record(tmp_path):
    code, _, said, root_cause = fail("hang", rank=1, directory=tmp_path, timeout_seconds=4.0, TORCH_FR_BUFFER_SIZE="100")
    assert (code, root_cause[1]) == (1, 7)
    assert said == [
        "error: no rank has moved for 4 s and rank 1 is behind (rank 1: step 2, forward of microbatch 0; ranks 0, 2: step 2, reduction of "
        "gradients); raise the time-out if this may take longer."
    ]
    assert sorted(path.name for path in (tmp_path / "hang").iterdir()) == sorted(
        f"rank-{rank}.{kind}" for rank in range(3) for kind in ("stack.txt", "collectives.json")
    )
    assert "in misbehave\n    time.sleep(3600)" in (tmp_path / "hang" / "rank-1.stack.txt").read_text()
    assert "all_reduce" in (tmp_path / "hang" / "rank-0.stack.txt").read_text()
    assert "gloo:all_reduce" in (tmp_path / "hang" / "rank-0.collectives.json").read_text()


def test_an_error_that_all_find_before_they_meet_is_told_once(tmp_path):
    code, _, said, root_cause = fail("before", rank=-1, directory=tmp_path, num_processes=2)
    assert (code, root_cause) == (1, (0, 3)) and said == ["error: the corpus is missing; prepare it."]


def test_an_error_that_one_rank_finds_before_they_meet_is_told_by_it(tmp_path):
    code, _, said, root_cause = fail("before", rank=1, directory=tmp_path, num_processes=2)
    assert (code, root_cause) == (1, (1, 3)) and said == ["rank 1: error: the corpus is missing; prepare it."]


@pytest.mark.slow
@pytest.mark.full
def test_a_restart_by_torchrun_sees_nothing_of_the_attempt_before(tmp_path):
    """torchrun keeps its store over restarts: the second attempt fails like the first, with its own message."""
    _, _, errors = launched.torchrun(SCRIPT, "error", 1, tmp_path, 30.0, num_processes=2, options=["--max-restarts=1"])
    said = [line.partition(": shard 7")[0] for line in launched.own_lines(errors)]
    assert said == ["rank 1: error", "error: stopped because rank 1 failed"] * 2, errors


def test_a_rendezvous_that_never_completes_says_who_is_missing(tmp_path):
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    code, _, errors = launched.run([sys.executable, str(SCRIPT), "fine", "0", str(tmp_path), "2"], **place)
    assert code == 7 and errors.splitlines()[-1] == (
        "error: ranks 1-2 of 3 did not come within 2 s; start all 3 processes, and look at the output of those for an earlier error."
    ), errors


def test_a_store_that_nobody_opened_is_one_sentence(tmp_path):
    place = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    code, _, errors = launched.run([sys.executable, str(SCRIPT), "fine", "0", str(tmp_path), "2"], **place)
    own = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert code == 7 and len(own) == 1 and own[0].startswith(f"error: rank 1 of 2 cannot reach the store at 127.0.0.1:{place['MASTER_PORT']}"), errors


def start(how, directory, *, who="1", timeout_seconds=30.0, of_each=({"LOCAL_RANK": "0"}, {"LOCAL_RANK": "0"}), **shared):
    """Ranks without a launcher: nobody ends the others."""
    shared = {"LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(len(of_each)), **shared}
    command = [sys.executable, str(SCRIPT), how, who, str(directory / "hang"), str(timeout_seconds)]
    environments = [launched.environment(**shared, **own, RANK=str(rank)) for rank, own in enumerate(of_each)]
    return [subprocess.Popen(command, cwd=launched.ROOT, env=each, text=True, stderr=subprocess.PIPE) for each in environments]


def start_two_that_hang(directory):
    """The same, once the second hangs while the first waits for it."""
    processes = start("hang", directory)
    deadline = time.monotonic() + launched.LONG
    while not (directory / "hang.begun").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    return processes


def ends_of(processes):
    ends = [None, None]

    def collect(rank):
        _, errors = processes[rank].communicate(timeout=launched.LONG)
        ends[rank] = (processes[rank].returncode, launched.own_lines(errors))

    threads = [threading.Thread(target=collect, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for process in processes:
        process.kill()
    return ends


def test_without_a_launcher_the_silence_of_a_rank_is_enough(tmp_path):
    ends = ends_of(start("kill", tmp_path))
    assert ends[1] == (-signal.SIGKILL, [])
    code, (line,) = ends[0]
    assert code == 7 and line.startswith("error: rank 1 is lost: nothing was heard from it for 5 s; it was last at step 2, forward of microbatch 0;")


SILENT = "its process lives, but is stopped, or waits for its device while it holds the interpreter's lock"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "silent", "num_ranks", "place"),
    [
        # Rank 1 watches rank 2. Rank 0 tells what rank 1 has found, if it can.
        pytest.param("stop", [2], 3, "rank 2: silent, last at {0}; ranks 0-1: {1}", id="stopped", marks=pytest.mark.full),
        pytest.param("hold", [0, 2], 3, "ranks 0, 2: silent, last at {0}; rank 1: {1}", id="two hold the lock"),
        pytest.param("hold", [0], 2, "rank 0: silent, last at {0}; rank 1: {1}", id="rank 0 holds the lock", marks=pytest.mark.full),
    ],
)
def test_a_silent_rank_is_found_by_the_time_out_and_not_before(tmp_path, how, silent, num_ranks, place):
    """The time-out is longer than the time after which another host is lost. torchrun would wait for half a minute for a stopped process."""
    of_each, as_torchrun = [{"LOCAL_RANK": str(rank)} for rank in range(num_ranks)], {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": str(num_ranks)}
    processes = start(how, tmp_path, who=",".join(map(str, silent)), timeout_seconds=6.0, of_each=of_each, **as_torchrun)
    others = [process for rank, process in enumerate(processes) if rank not in silent]
    try:
        said = [line for process in others for line in launched.own_lines(process.communicate(timeout=launched.LONG)[1])]
        assert [process.returncode for process in others] == [7] * len(others) and [processes[rank].poll() for rank in silent] == [None] * len(silent)
    finally:
        for process in processes:
            process.kill()
    said += [line for rank in silent for line in launched.own_lines(processes[rank].communicate()[1])]
    places = place.format("step 2, forward of microbatch 0", "step 2, reduction of gradients")
    assert said == [f"error: rank {silent[-1]} has been silent for 6 s: {SILENT} ({places}); raise the time-out if this may take longer."]
    assert len(list((tmp_path / "hang").glob("rank-*.stack.txt"))) == len(others)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills the children of a process that ends")
def test_ranks_end_with_torchrun_also_one_that_holds_the_interpreters_lock(tmp_path):
    run = launched.Launched(launched.torchrun_command(SCRIPT, "hold", 1, tmp_path / "hang", 60.0, num_processes=2))
    begun = tmp_path / "hang.begun"
    run.wait_until(begun.exists)
    run.process.kill()
    run.end(timeout_seconds=30.0)  # no process is left


def test_the_end_of_the_host_of_the_store_ends_the_others(tmp_path):
    processes = start_two_that_hang(tmp_path)
    processes[0].kill()
    code, said = ends_of(processes)[1]
    assert code == 7 and len(said) == 1 and said[0].startswith("rank 1: error: the store at 127.0.0.1:"), said


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.full), pytest.param(signal.SIGUSR1, marks=pytest.mark.full)]
)
def test_a_rank_that_is_asked_to_end_while_all_is_well_ends_with_the_number_of_the_signal(tmp_path, number):
    processes = start_two_that_hang(tmp_path)
    os.kill(processes[1].pid, number)
    ends, code = ends_of(processes), 128 + number
    assert [found for found, _ in ends] == [code, code]
    assert ends[1][1] == [f"rank 1: ended with exit code {code}"]
    assert ends[0][1] == [f"error: stopped because rank 1 failed: ended with exit code {code}"]
