"""torchrun starts a group of ranks again, and the run goes on by itself as if nothing had happened, on fewer hosts too."""

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest

from tests.processes.launched import free_port, own_lines, run

pytestmark = pytest.mark.slow

IMPATIENT = Path(__file__).with_name("impatient.py")
STEPS = 24
SETTINGS = (f"train.num_steps={STEPS}", "train.evaluate_every_n_steps=0", "checkpoint.every_n_steps=4")
RESTARTS = "--max-restarts=3"
LONG = 900.0  # a run that starts three times, on a machine that is busy with other things


@pytest.fixture(scope="module")
def undisturbed(training):
    """The run of two data-parallel ranks that nothing happens to."""
    code, _, errors = run(training.torchrun("undisturbed", *SETTINGS, "zero.stage=2", num_ranks=2, options=[RESTARTS]), timeout_seconds=LONG)
    assert code == 0, errors
    assert len(training.figures("undisturbed")) == STEPS
    return "undisturbed"


def kill(launched, **variables):
    """Kills the only process with these variables in its environment; returns its id."""
    (process,) = launched.processes(**variables)
    os.kill(process, signal.SIGKILL)
    return process


def has_come(training, name, step):
    return lambda: len(training.figures(name)) >= step


def resumed_steps(output):
    return [int(step) for step in re.findall(r"resumed from \S+ \(step (\d+),", output.replace("\n", " "))]


@pytest.mark.parametrize("kills", [(("1", 6),), pytest.param((("1", 6), ("0", 14)), marks=pytest.mark.full)], ids=["once", "twice"])
def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint_and_nothing_else(training, undisturbed, launch, kills):
    name, lost = f"restarted_{len(kills)}", []
    launched = launch(training.torchrun(name, *SETTINGS, "zero.stage=2", num_ranks=2, options=[RESTARTS]))
    for attempt, (rank, step) in enumerate(kills):
        launched.wait_until(has_come(training, name, step), timeout_seconds=LONG)
        lost.append(kill(launched, RANK=rank, TORCHELASTIC_RESTART_COUNT=str(attempt)))
    code, output, errors = launched.end(timeout_seconds=LONG)
    assert code == 0, errors
    assert training.figures(name) == training.figures(undisturbed)  # to the last bit
    resumed = resumed_steps(output)
    assert all(resumed_from >= step - 2 and resumed_from % 4 == 0 for resumed_from, (_, step) in zip(resumed, kills, strict=True))
    assert training.saved_steps(name)[-1] == STEPS
    told = own_lines(errors)
    assert re.match(rf"error: rank 1 is lost: its process {lost[0]} has ended without a word; it was last at step \d+, ", told[0]), told
    assert all(line.startswith("error: rank") for line in told) and len(told) <= len(kills), told  # rank 0 was to tell the second; it was killed


@pytest.mark.full
def test_a_run_that_keeps_failing_ends_after_the_last_restart_and_its_checkpoints_stay(training, undisturbed, launch):
    name = "hopeless"
    launched = launch(training.torchrun(name, *SETTINGS, "zero.stage=2", num_ranks=2, options=["--max-restarts=1"]))
    for attempt, step in ((0, 5), (1, 10)):
        launched.wait_until(has_come(training, name, step), timeout_seconds=LONG)
        kill(launched, RANK="1", TORCHELASTIC_RESTART_COUNT=str(attempt))
    code, _, errors = launched.end(timeout_seconds=LONG)
    assert code == 1 and "exitcode  : 7" in errors and "exitcode  : -9" in errors
    assert sum(line.startswith("error: rank 1 is lost: ") for line in own_lines(errors)) == 2
    assert 4 <= training.saved_steps(name)[-1] < STEPS
    training.in_this_process(name, *SETTINGS)
    training.assert_same(name, undisturbed, num_steps=STEPS)


@pytest.mark.full
def test_a_restart_of_a_run_that_was_to_start_anew_goes_on_from_what_it_has_saved(training, undisturbed, launch):
    name = "anew"
    earlier = [training.directory / "runs" / f"{name}.{number}" for number in (1, 2, 3)]
    training.in_this_process(name, *SETTINGS, "train.stop_at_step=8", "train.seed=5")
    command = [*training.torchrun(name, *SETTINGS, "zero.stage=2", num_ranks=2, options=[RESTARTS]), "--resume", "none"]
    launched = launch(command)
    launched.wait_until(earlier[0].exists, timeout_seconds=LONG)
    launched.wait_until(has_come(training, name, 6), timeout_seconds=LONG)
    kill(launched, RANK="1", TORCHELASTIC_RESTART_COUNT="0")
    code, output, errors = launched.end(timeout_seconds=LONG)
    assert code == 0, errors
    assert f"the earlier run of this name is now {earlier[0]}" in output.replace("\n", "")
    (step,) = resumed_steps(output)
    assert step >= 4 and step % 4 == 0
    assert training.figures(name) == training.figures(undisturbed) and not earlier[1].exists()
    code, output, errors = run([*command, "--set", "train.stop_at_step=1"], timeout_seconds=LONG)  # a second launch is no restart of the first
    assert code == 0 and resumed_steps(output) == [] and earlier[1].exists() and not earlier[2].exists(), errors
    assert training.figures(name) == training.figures(undisturbed)[:1]


def agent(training, name, port, number, *settings):
    """One of one or two agents, each with one rank; the first has the rendezvous."""
    options = ["--nnodes=1:2", "--nproc_per_node=1", RESTARTS, "--rdzv-id=elastic", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
    # A lost agent is missed after six seconds, and the others wait as long for one more; torchrun's own times are fifteen and thirty.
    options += [f"--rdzv-conf=is_host={number == 0},last_call_timeout=6,keep_alive_interval=2", "--local-addr=127.0.0.1"]
    _, *arguments = training.door(name, *SETTINGS, "zero.stage=2", *settings)
    return [sys.executable, "-m", "torch.distributed.run", *options, str(IMPATIENT), *arguments]


def test_the_host_that_is_left_goes_on_alone_with_the_same_batches(training, undisturbed, launch):
    name, port = "elastic", free_port()
    first = launch(agent(training, name, port, 0))
    second = launch(agent(training, name, port, 1))
    first.wait_until(has_come(training, name, 6), timeout_seconds=LONG)
    second.kill()  # the agent and its rank
    code, output, errors = first.end(timeout_seconds=LONG)
    assert code == 0, errors
    (step,) = resumed_steps(output)
    assert step >= 4 and step % 4 == 0
    batches = re.findall(r"(\d+) sequences of \d+ .* x (\d+) data-parallel ranks", output)  # one banner for each attempt
    assert batches == [("4", "2"), ("4", "1")]
    metadata = json.loads((training.directory / "runs" / name / "checkpoints" / f"step-{STEPS:010d}" / "manifest.json").read_text())["metadata"]
    assert metadata["position"]["samples_consumed"] == 4 * STEPS
    found, expected = training.figures(name), training.figures(undisturbed)
    assert len(found) == STEPS and found[:step] == expected[:step]
    for (loss, _), (expected_loss, _) in zip(found, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-6)
    (line,) = [line for line in own_lines(errors) if line.startswith("error: ")]
    assert re.match(r"error: rank 1 is lost: nothing was heard from it for 15 s; ", line), line


@pytest.mark.full
def test_a_host_that_comes_back_is_taken_in_again_and_no_step_is_lost(training, launch):
    """torch's agent tells a newcomer of a later rendezvous where the store is only if the agents do not share theirs."""
    name, port, without_sharing = "returned", free_port(), {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    endless = ("train.num_steps=100000", "checkpoint.every_n_steps=1000")
    first, second = (launch(agent(training, name, port, number, *endless), **without_sharing) for number in (0, 1))
    first.wait_until(has_come(training, name, 6), timeout_seconds=LONG)
    second.kill()
    first.wait_until(lambda: first.processes(RANK="0", WORLD_SIZE="1"), timeout_seconds=LONG)
    first.wait_until(has_come(training, name, 10), timeout_seconds=LONG)
    third = launch(agent(training, name, port, 2, *endless), **without_sharing)
    first.wait_until(lambda: first.processes(WORLD_SIZE="2") and third.processes(WORLD_SIZE="2"), timeout_seconds=LONG)
    (step,) = training.saved_steps(name)  # of the ranks that were asked to stop; none was due
    first.wait_until(has_come(training, name, step + 5), timeout_seconds=LONG)
    found = training.figures(name)
    training.in_this_process("without_end", *SETTINGS, *endless, f"train.stop_at_step={step + 5}")
    for (loss, _), (expected_loss, _) in zip(found, training.figures("without_end"), strict=False):
        assert loss == pytest.approx(expected_loss, rel=1e-5)
