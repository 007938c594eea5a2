"""Training that fails on one rank, or is stopped: one message, the documented code, nothing left behind, and the run goes on."""

import os
import re
import signal
from functools import partial
from pathlib import Path

import pytest

from tests.processes.launched import code_of_first_failure, free_port, own_lines, run, torchrun_command

FLIPPED_BIT = Path(__file__).with_name("flipped_bit.py")
NEVER_FITS = {
    "a world size that does not fit": (
        ("parallel.tensor_parallel_size=4",),
        ["world size 2 is not a positive multiple of parallel.tensor_parallel_size 4 x parallel.context_parallel_size 1 x "
         "parallel.pipeline_parallel_size 1 = 4; start 4 processes (torchrun --nproc_per_node starts them, "
         "--world-size 4 plans for them) or change the degrees."],
    ),
    "uneven heads": (
        ("parallel.tensor_parallel_size=2", "model.num_heads=3"),
        ["parallel.tensor_parallel_size 2 does not divide model.num_heads 3; change one of them."],
    ),
    "too few layers for the stages": (
        ("parallel.pipeline_parallel_size=2", "model.num_layers=1", "parallel.num_microbatches=4"),
        ["model.num_layers 1 is below parallel.pipeline_parallel_size 2 x parallel.pipeline_chunks 1 = 2; every chunk needs a layer: use at "
         "least 2 layers, or fewer stages or chunks."],
    ),
}  # fmt: skip


def test_all_that_is_wrong_with_a_config_is_told_once(training):
    settings = ("parallel.tensor_parallel_size=4", "model.num_heads=6")
    code, output, errors = run(training.torchrun("wrong", *settings, num_ranks=2))
    assert (code, code_of_first_failure(errors)[1], training.figures("wrong")) == (1, 2, []) and "Traceback" not in output
    assert own_lines(errors) == [
        "error: parallel.tensor_parallel_size 4 does not divide model.num_heads 6; change one of them.",
        *(f"error: {sentence}" for sentence in NEVER_FITS["a world size that does not fit"][1]),
    ]


@pytest.mark.full
@pytest.mark.parametrize("case", NEVER_FITS)
def test_what_never_fits_is_one_sentence(training, case):
    settings, sentences = NEVER_FITS[case]
    code, _, errors = run(training.torchrun("wrong", *settings, num_ranks=2))
    assert (code, code_of_first_failure(errors)[1], training.figures("wrong")) == (1, 2, [])
    assert own_lines(errors) == [f"error: {sentence}" for sentence in sentences]


def test_a_rendezvous_that_never_completes_is_one_sentence(training):
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    code, _, errors = run(training.plain("nobody", "parallel.timeout_seconds=1"), **place)
    assert code == 7 and own_lines(errors) == [
        "error: rank 1 of 2 did not come within 1 s; start all 2 processes, and look at the output of those for an earlier error."
    ]


@pytest.mark.full
def test_torchrun_itself_says_that_the_other_host_never_came(training):
    options = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-conf=join_timeout=2"]
    command = [word for word in training.torchrun("nobody", num_ranks=2, options=options) if word != "--standalone"]
    code, _, errors = run(command)
    assert code == 1 and errors.splitlines()[-1].endswith("RendezvousTimeoutError")


@pytest.mark.full
def test_a_flipped_bit_ends_training_before_it_is_saved(training):
    command = torchrun_command(str(FLIPPED_BIT), *training.door("flipped", "observe.stragglers_every_n_steps=0")[1:], num_processes=2)
    code, _, errors = run(command)
    assert (code, code_of_first_failure(errors)[1]) == (1, 8)
    assert "step 6: embedding.weight should be the same on ranks 0 and 1, but is not" in errors
    assert training.saved_steps("flipped") == [3]


def test_data_that_shrink_in_the_middle_of_training_end_all_ranks_after_saving(training, launch):
    prefix = training.directory / "shrinking"
    for ending in (".idx", ".bin"):
        prefix.with_suffix(ending).write_bytes((training.directory / "train").with_suffix(ending).read_bytes())
    launched = launch(training.torchrun("shrunk", f"data.train={prefix}", "checkpoint.every_n_steps=0", num_ranks=2))
    launched.wait_until(lambda: len(training.figures("shrunk")) >= 2)
    os.truncate(prefix.with_suffix(".bin"), 100)
    code, _, errors = launched.end()
    assert (code, code_of_first_failure(errors)[1]) == (1, 3), errors
    said = [line for line in own_lines(errors) if "shrinking.bin is shorter than when it was opened" in line]
    assert said and not any("Traceback" in line for line in own_lines(errors))
    (step,) = training.saved_steps("shrunk")
    assert step == len(training.figures("shrunk")) < 24


@pytest.mark.full
def test_a_bug_in_the_middle_of_a_step_shows_one_traceback_and_torchrun_ends_with_it(training, tmp_path):
    """Without a compiler, every rank fails in its first forward; one of them is first."""
    variables = {"CXX": "/no/such/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    settings = ("parallel.tensor_parallel_size=2", "train.compile.enabled=true")
    code, _, errors = run(training.torchrun("no_compiler", *settings, num_ranks=2), **variables)
    (rank, exit_code), said = code_of_first_failure(errors), own_lines(errors)
    assert (code, exit_code) == (1, 1) and said[0] == f"rank {rank}: Traceback (most recent call last):"
    assert sum("Traceback" in line for line in said) == 1 and any("in train_step" in line for line in said)
    stopped = [line for line in said if line.startswith("error: ")]
    assert [line.count("InvalidCxxCompiler") for line in stopped] == [1] * rank, said  # rank 0 says why it stops, unless it failed itself
    last = errors[errors.index("Root Cause") :]
    assert f"rank {rank}: Traceback (most recent call last):" in last and "/no/such/compiler" in last


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        pytest.param("killed", ("zero.stage=3",), marks=pytest.mark.full),  # tests/launch/test_restart.py kills ranks in every run
        pytest.param("killed_in_two", ("parallel.tensor_parallel_size=2",), marks=pytest.mark.full),
    ],
)
def test_a_rank_killed_in_the_middle_of_training_ends_all_and_the_last_checkpoint_goes_on(training, alone, launch, name, settings):
    launched = launch(training.torchrun(name, *settings, num_ranks=2))
    launched.wait_until(lambda: len(training.figures(name)) >= 4)
    (rank,) = launched.processes(RANK="1")
    os.kill(rank, signal.SIGKILL)
    code, _, errors = launched.end()
    assert (code, code_of_first_failure(errors)) == (1, (1, -signal.SIGKILL)) and "exitcode  : 7" in errors
    (line,) = own_lines(errors)
    assert re.match(rf"error: rank 1 is lost: its process {rank} has ended without a word; it was last at step \d+, \w+", line), line
    assert training.in_this_process(name, "train.stop_at_step=9") >= 3
    training.assert_same(name, alone, num_steps=9)


def interrupt(launched):
    """What a terminal does on Ctrl-C; ranks are in sessions of their own."""
    os.killpg(launched.process.pid, signal.SIGINT)


def signal_rank_1(number, launched):
    """What a scheduler does that signals the ranks of one host."""
    (rank,) = launched.processes(RANK="1")
    os.kill(rank, number)


@pytest.mark.parametrize(
    ("name", "stop", "codes"),
    [
        # torchrun exits with 1 and a traceback of its own after Ctrl-C; on a busy machine its threads sometimes abort it then.
        ("interrupted", interrupt, (1, -signal.SIGABRT)),
        pytest.param("terminated", partial(signal_rank_1, signal.SIGTERM), (0,), marks=pytest.mark.full),
        pytest.param("hung_up", partial(signal_rank_1, signal.SIGHUP), (0,), marks=pytest.mark.full),
        pytest.param("warned_by_slurm", partial(signal_rank_1, signal.SIGUSR1), (0,), marks=pytest.mark.full),
    ],
)
def test_training_that_is_stopped_saves_on_all_ranks_and_goes_on_as_if_undisturbed(training, alone, launch, name, stop, codes):
    launched = launch(training.torchrun(name, "parallel.tensor_parallel_size=2", num_ranks=2))
    launched.wait_until(lambda: len(training.figures(name)) >= 2)
    stop(launched)
    code, output, errors = launched.end()
    assert code in codes and "error: " not in errors and "SIGKILL" not in errors, errors
    # Rank 0 is the one that speaks, if it was signalled itself; torchrun signals all ranks once it knows.
    assert errors.count("all ranks stop after this step") <= 1 and "Ctrl-C again" not in errors
    (step,) = re.findall(r"saved at step (\d+); go on with:\n  \S+ -m torch.distributed.run --nproc_per_node=2 \S+pretrain.py --config", output)
    assert len(training.figures(name)) == int(step) == training.saved_steps(name)[-1] < 24
    assert training.in_this_process(name) == int(step)
    training.assert_same(name, alone, num_steps=24)
