"""The pieces of the watch without processes; what real ones do is in test_failures.py."""

import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from phase8.errors import CommunicationError, ConfigError
from phase8.processes.bootstrap import World
from phase8.processes.exit import exit_code_of, is_echo, leave_word, own_message, summary
from phase8.processes.failure import Beat, Failure, Position, describe_ranks, describe_silence, find_stall
from phase8.processes.heartbeat import Neighbour, neighbours_of
from phase8.processes.watch import Limits, running
from tests.processes.launched import free_port

FORWARD, REDUCTION = Position(12, "forward of microbatch 3", 4), Position(12, "reduction of gradients", 5)


def beats(*positions, age_seconds=600.0):
    return [Beat(count=9, process=1, position=position, age_seconds=age_seconds) for position in positions]


@pytest.mark.parametrize(("ranks", "text"), [([3], "rank 3"), ([0, 1, 2], "ranks 0-2"), ([5, 0, 2, 1, 7, 8], "ranks 0-2, 5, 7-8")])
def test_ranks_are_told_as_ranges(ranks, text):
    assert describe_ranks(ranks) == text


def test_the_rank_that_is_behind_is_named_with_all_places():
    rank, sentence = find_stall(beats(REDUCTION, FORWARD, REDUCTION, REDUCTION), timeout_seconds=600)
    assert rank == 1 and sentence == (
        "no rank has moved for 600 s and rank 1 is behind (rank 1: step 12, forward of microbatch 3; ranks 0, 2-3: step 12, reduction of "
        "gradients); raise the time-out if this may take longer."
    )


@pytest.mark.parametrize(
    ("positions", "rank", "text"),
    [
        ((REDUCTION, REDUCTION), 0, "all are at the same place (ranks 0-1: step 12, reduction of gradients)"),
        ((Position(13, "starting", 1), FORWARD, FORWARD), 1, "ranks 1-2 are behind (ranks 1-2: step 12, forward of microbatch 3; rank 0: step 13,"),
        ((replace(FORWARD, finished=True), REDUCTION), 1, "rank 1 is behind (rank 1: step 12, reduction of gradients; rank 0: finished)"),
    ],
)
def test_steps_count_before_places_and_who_has_finished_is_ahead(positions, rank, text):
    found, sentence = find_stall(beats(*positions), timeout_seconds=600)
    assert found == rank and text in sentence


def test_as_long_as_one_rank_moves_nothing_stalls():
    moving = replace(beats(FORWARD)[0], age_seconds=599.0)
    assert find_stall([*beats(REDUCTION, REDUCTION), moving], timeout_seconds=600) is None


def test_the_sentence_about_a_silent_rank_names_it_and_says_which_others_are_silent_too():
    assert describe_silence(3, beats(REDUCTION, FORWARD, REDUCTION, FORWARD), silent=[1, 2, 3], timeout_seconds=600) == (
        "rank 3 has been silent for 600 s: its process lives, but is stopped, or waits for its device while it holds the interpreter's lock "
        "(ranks 1, 3: silent, last at step 12, forward of microbatch 3; rank 0: step 12, reduction of gradients; rank 2: silent, last at "
        "step 12, reduction of gradients); raise the time-out if this may take longer."
    )


def test_beats_and_failures_survive_the_store():
    beat, failure = beats(FORWARD)[0], Failure(3, 7, "rank 3 is lost: \u2013", "loss")
    assert Beat.from_json(beat.to_json().encode()) == beat and Failure.from_json(failure.to_json().encode()) == failure


def place(rank, *, launcher="torchrun", local=4, world_size=8):
    return World(rank, rank % local, world_size, local, launcher, ("first", 1))


@pytest.mark.parametrize(
    ("world", "ranks"),
    [
        (place(1), {2: (True, []), 5: (False, [4, 6, 7])}),
        (place(3), {0: (True, []), 7: (False, [4, 5, 6])}),
        (place(7), {4: (True, []), 3: (False, [0, 1, 2])}),
        (place(2, world_size=4), {3: (True, [])}),
        (place(0, local=1, world_size=2), {1: (False, [])}),
        (place(2, launcher="mpirun"), {3: (False, [])}),
        (place(0, local=1, world_size=1), {}),
        (place(3, world_size=6), {0: (True, []), 5: (False, [4])}),  # the other host has fewer ranks
    ],
)
def test_each_rank_watches_the_next_of_its_host_and_one_of_the_next_host(world, ranks):
    assert {neighbour.rank: (neighbour._has_same_launcher, neighbour._others) for neighbour in neighbours_of(world)} == ranks


@pytest.mark.parametrize("has_same_launcher", [True, False])
def test_every_rank_is_watched_once_from_its_own_host_and_once_from_another(has_same_launcher):
    neighbours = [neighbour for rank in range(8) for neighbour in neighbours_of(place(rank))]
    assert sorted(each.rank for each in neighbours if each._has_same_launcher is has_same_launcher) == list(range(8))


def losses(neighbour, beats_read, *, tick_seconds=1.0, heartbeat_seconds=3.0):
    """What the neighbour finds at every tick; with lists of beats, rank N of its host has number N."""
    found = []
    for beat in beats_read:
        read = beat.__getitem__ if isinstance(beat, list) else lambda rank, beat=beat: beat
        found.append(neighbour.find_loss(read, tick_seconds=tick_seconds, heartbeat_seconds=heartbeat_seconds))
    return found


def alive(count, **changes):
    return Beat(count=count, process=os.getpid(), position=replace(FORWARD, **changes))


def test_a_rank_is_lost_after_the_heartbeat_time_out_and_not_before():
    found = losses(Neighbour(3), [alive(0), alive(1), *[alive(2)] * 5])
    assert found[:-1] == [None] * 6
    assert found[-1].startswith("rank 3 is lost: nothing was heard from it for 3 s; it was last at step 12, forward of microbatch 3;")


def test_a_sign_of_life_starts_the_count_again():
    assert losses(Neighbour(3), [alive(0), *[alive(1)] * 4, *[alive(2)] * 4]) == [None] * 9


@pytest.mark.parametrize("has_same_launcher", [True, False])
def test_a_rank_that_never_said_anything_is_lost_too(has_same_launcher):
    found = losses(Neighbour(3, has_same_launcher=has_same_launcher), [Beat()] * 4)
    assert found[-1].startswith("rank 3 is lost: nothing was heard from it for 3 s; it was last at step 0, starting")


def test_a_silent_rank_whose_process_lives_is_not_lost():
    assert losses(Neighbour(3, has_same_launcher=True), [alive(0)] * 99) == [None] * 99


def of_host(*counts):
    return [alive(count) for count in counts]


def test_a_silent_rank_is_not_lost_while_another_rank_of_its_host_beats():
    beats_read = [of_host(tick, 7, 7, tick // 3) for tick in range(99)]  # slower than this rank looks
    assert losses(Neighbour(2, host=range(4)), beats_read) == [None] * 99


def test_a_rank_that_beats_is_not_lost_with_the_silent_ranks_of_its_host():
    assert losses(Neighbour(2, host=range(4)), [of_host(7, 7, tick, 7) for tick in range(99)]) == [None] * 99


def test_a_rank_is_lost_when_all_ranks_of_its_host_have_been_silent_together():
    beats_read = [of_host(tick, 7, 7, 7) for tick in range(9)] + [of_host(8, 7, 7, 7)] * 4
    found = losses(Neighbour(2, host=range(4)), beats_read)
    assert found[:-1] == [None] * 12
    assert found[-1].startswith("rank 2 is lost: nothing was heard from any rank of its host (ranks 0-3) for 3 s; it was last at step 12,")


def test_a_host_that_never_said_anything_is_lost_too():
    assert losses(Neighbour(0, host=range(2)), [[Beat(), Beat()]] * 4)[3].startswith("rank 0 is lost: nothing was heard from any rank of its host")


def silences(neighbour, beats_read, *, timeout_seconds=6.0):
    """What the neighbour finds at every tick; it is never lost."""
    found = []
    for read in beats_read:
        assert neighbour.find_loss(read.__getitem__, tick_seconds=1.0, heartbeat_seconds=3.0) is None
        found.append(neighbour.find_silence(lambda read=read: read, tick_seconds=1.0, timeout_seconds=timeout_seconds))
    return found


def test_a_living_rank_that_is_silent_for_the_time_out_is_named_with_those_that_are_silent_too():
    neighbour = Neighbour(1, has_same_launcher=True)
    found = silences(neighbour, [of_host(tick, 7, 7 + (tick > 7), 7) for tick in range(9)])
    assert found[:6] == [None] * 6 and found[6].startswith("rank 1 has been silent for 6 s: its process lives, but is stopped")
    assert "; ranks 1-3: silent, last at step 12, forward of microbatch 3)" in found[6]
    assert "; ranks 1, 3: silent, last at step 12, forward of microbatch 3)" in found[8]


def test_a_word_within_the_time_out_is_enough_and_what_was_heard_before_does_not_count():
    neighbour = Neighbour(1, has_same_launcher=True)
    assert silences(neighbour, [of_host(0, tick // 6, 7) for tick in range(36)]) == [None] * 36
    found = silences(neighbour, [of_host(tick, 9, 8) for tick in range(7)])
    assert found[:6] == [None] * 6 and "; ranks 1-2: silent, last at" in found[6]


def test_the_silence_of_another_host_is_for_the_ranks_there():
    neighbour = Neighbour(1, host=range(2))
    assert silences(neighbour, [of_host(tick, 7) for tick in range(99)]) == [None] * 99


@pytest.fixture
def ended_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def zombie():
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    yield process.pid
    process.wait()


@pytest.mark.parametrize("process", ["ended_process", "zombie"])
def test_a_process_that_has_ended_is_lost_at_once(process, request):
    ended = request.getfixturevalue(process)
    gone = Beat(count=1, process=ended, position=FORWARD)
    found = losses(Neighbour(3, has_same_launcher=True), [gone, replace(gone, count=2)])
    assert found[0] is None and f"its process {ended} has ended without a word; it was last at step 12" in found[1]


def test_the_process_id_of_another_host_means_nothing(ended_process):
    gone = Beat(count=1, process=ended_process, position=FORWARD)
    assert losses(Neighbour(3), [gone, replace(gone, count=2)]) == [None, None]


def test_a_rank_that_has_finished_may_go(ended_process):
    going = Beat(count=1, process=ended_process, position=FORWARD)
    done = Beat(count=2, process=ended_process, position=replace(FORWARD, finished=True))
    neighbour = Neighbour(3, has_same_launcher=True)
    assert losses(neighbour, [going, done, *[done] * 9]) == [None] * 11
    assert neighbour.find_silence(lambda: [done] * 4, tick_seconds=1.0, timeout_seconds=4.0) is None


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError(["a is 1.", "b is 2."]), 2, "a is 1."),
        (CommunicationError("rank 3 is lost."), 7, "rank 3 is lost."),
        (KeyboardInterrupt(), 130, "KeyboardInterrupt"),
        (SystemExit(143), 143, "ended with exit code 143"),
        (SystemExit(), 0, "ended with exit code 0"),
        (SystemExit("no"), 1, "ended with exit code 1"),
        (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError: division by zero"),
        (RuntimeError("\nno compiler\n\nSet this for more\n"), 1, "RuntimeError: no compiler"),
        (AssertionError(), 1, "AssertionError"),
    ],
)
def test_codes_and_summaries_of_errors(error, code, line):
    assert (exit_code_of(error), summary(error)) == (code, line)


def test_a_word_for_the_launcher_is_left_where_it_can_be(tmp_path):
    leave_word(None, "nobody reads it")
    leave_word(str(tmp_path / "missing" / "error.json"), "nobody can read it")
    leave_word(str(tmp_path / "error.json"), "rank 1: error: a is 1.\n")
    failure = ProcessFailure(local_rank=1, pid=1, exitcode=3, error_file=str(tmp_path / "error.json"))
    assert failure.message["extraInfo"]["py_callstack"] == "rank 1: error: a is 1." and abs(failure.timestamp - time.time()) < 60


def test_every_problem_of_a_config_is_told_with_the_rank():
    assert [own_message(KeyboardInterrupt(*words), rank=3) for words in ((), ("interrupted: why",))] == ["interrupted\n", "interrupted: why\n"]
    assert own_message(ConfigError(["a is 1.", "b is 2."]), rank=3) == "rank 3: error: a is 1.\nrank 3: error: b is 2.\n"


@pytest.mark.parametrize(
    ("error", "echo"),
    [
        (RuntimeError("[/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:13723: Connection reset by peer"), True),
        (RuntimeError("Application timeout caused pair closure"), True),
        (dist.DistBackendError("NCCL communicator was aborted on rank 1"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)"), False),
        (OSError("[Errno 28] No space left on device"), False),
    ],
)
def test_errors_of_the_backends_may_be_echoes(error, echo):
    assert is_echo(error) is echo


def test_alone_errors_are_raised_as_usual_and_reports_go_nowhere():
    with pytest.raises(ZeroDivisionError), running(World()) as watch:
        watch.report(step=1, doing="forward")
        raise ZeroDivisionError
    with running(World(0, 0, 1, 1, "environment", ("127.0.0.1", int(free_port())), hosts_store=True)) as watch:
        watch.report(step=1, doing="forward")
        assert dist.get_world_size() == 1
    assert not dist.is_initialized()


def test_reports_of_a_step_are_counted():
    with running(World(), limits=Limits()) as watch:
        for step, doing in ((1, "a"), (1, "b"), (2, "a")):
            before = time.monotonic()
            watch.report(step=step, doing=doing)
            assert watch._moved_at >= before
        assert watch._position == Position(2, "a", 1)
        watch.report(step=2, doing="b")
        assert watch._position == Position(2, "b", 2)
