"""Training over two hosts, for real: two network namespaces with a cable between them. And under mpirun on this one."""

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests.processes.launched import ROOT, code_of_first_failure, own_lines

SCRIPT, IMPATIENT = (Path(__file__).with_name(name) for name in ("meeting.py", "impatient.py"))
ADDRESSES = ("10.88.0.1", "10.88.0.2")
PORT = 29400  # in a namespace of its own: nobody else has it


def ip(*arguments, check=True):
    return subprocess.run(["ip", *arguments], check=check, capture_output=True, text=True)


def reason_against_namespaces():
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs Linux and root"
    if shutil.which("ip") is None:
        return "needs the command ip"
    name = f"p8-{uuid.uuid4().hex[:6]}"
    made = ip("netns", "add", name, check=False)
    ip("netns", "delete", name, check=False)
    return made.stderr.strip() and f"network namespaces cannot be made here: {made.stderr.strip()}"


@pytest.fixture
def two_hosts():
    """Names of two namespaces that reach each other through a pair of virtual interfaces, both named `cable`."""
    reason = reason_against_namespaces()
    if reason:
        pytest.skip(reason)
    names = [f"p8-{uuid.uuid4().hex[:6]}-{number}" for number in range(2)]
    with contextlib.ExitStack() as stack:
        for name in names:
            ip("netns", "add", name)
            stack.callback(ip, "netns", "delete", name, check=False)  # its end of the cable goes with it
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for interface in ("lo", "cable"):
                ip("-n", name, "link", "set", interface, "up")
        yield names


@pytest.fixture
def launch_on_both(two_hosts, launch):
    """Starts torchrun with two ranks, or another number, on each host; the first has the rendezvous."""

    def launch_on_both(*arguments, ranks_of_each=2):
        started = []
        for number, (host, address) in enumerate(zip(two_hosts, ADDRESSES, strict=True)):
            options = ["--nnodes=2", f"--nproc_per_node={ranks_of_each}", "--rdzv-id=two-nodes", "--rdzv-backend=c10d", f"--local-addr={address}"]
            options += [f"--rdzv-endpoint={ADDRESSES[0]}:{PORT}", f"--rdzv-conf=is_host={number == 0}"]
            command = ["ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run", *options, *arguments]
            started.append(launch(command, GLOO_SOCKET_IFNAME="cable"))
        return started

    return launch_on_both


@pytest.mark.parametrize(
    ("name", "ranks_of_each", "settings"),
    [
        ("hosts", 1, ("parallel.tensor_parallel_size=2", "zero.stage=3")),
        pytest.param("hosts_of_two", 2, ("parallel.tensor_parallel_size=2", "zero.stage=3"), marks=pytest.mark.full),
        pytest.param("hosts_as_stages", 2, ("parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2"), marks=pytest.mark.full),
    ],
)
def test_ranks_on_two_hosts_train_as_one_process(training, alone, launch_on_both, name, ranks_of_each, settings):
    arguments = training.door(name, *settings, "parallel.num_microbatches=2", "train.stop_at_step=3")
    started = launch_on_both(*arguments, ranks_of_each=ranks_of_each)
    ends = [each.end() for each in started]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert sum("ZeRO stage" in output for _, output, _ in ends) == 1, ends  # the banner, of rank 0
    training.assert_same(name, alone, num_steps=3)


@pytest.mark.full
def test_a_rank_killed_on_one_host_is_named_on_the_other(launch_on_both, tmp_path):
    failing = ROOT / "tests" / "processes" / "failing_rank.py"
    ends = [each.end() for each in launch_on_both(failing, "kill", 3, tmp_path, 30)]
    assert [code for code, _, _ in ends] == [1, 1], ends
    told = [line for _, _, errors in ends for line in errors.splitlines() if line.startswith(("error: ", "rank "))]
    assert len(told) == 1 and told[0].startswith("error: rank 3 is lost: its process "), told
    assert "exitcode  : -9" in ends[0][2] + ends[1][2] and "exitcode  : 7" in ends[0][2] + ends[1][2]


@pytest.mark.full
def test_a_silent_rank_of_a_host_that_lives_is_named_after_the_time_out(launch_on_both, tmp_path):
    failing = ROOT / "tests" / "processes" / "failing_rank.py"
    ends = [each.end() for each in launch_on_both(failing, "hold", 3, tmp_path / "hang", 9)]  # a host is lost after 5 s
    told = [line for _, _, errors in ends for line in errors.splitlines() if line.startswith(("error: ", "rank "))]
    assert len(told) == 1 and told[0].startswith("error: rank 3 has been silent for 9 s: its process lives, but is stopped, or waits"), told
    assert "(rank 3: silent, last at step 2, forward of microbatch 0; ranks 0-2: step 2, reduction of gradients)" in told[0], told


@pytest.mark.full
def test_a_cable_that_is_cut_in_the_middle_of_training_ends_both_hosts(training, alone, two_hosts, launch_on_both):
    _, *arguments = training.door("cut", "zero.stage=3", "train.stop_at_step=20")
    started = launch_on_both(IMPATIENT, *arguments)
    first, second = started
    first.wait_until(lambda: len(training.figures("cut")) >= 4)
    ip("-n", two_hosts[1], "link", "set", "cable", "down")
    code, _, errors = first.end()
    (lost,) = own_lines(errors)
    assert (code, code_of_first_failure(errors)[1]) == (1, 7)
    reason = r"nothing was heard from any rank of its host \(ranks 2-3\) for 15 s"
    assert re.match(rf"error: rank [23] is lost: {reason}; it was last at step \d+, ", lost), lost
    second.wait_until(lambda: not any(second.processes(LOCAL_RANK=rank) for rank in range(2)))
    # torchrun, without a rank left, asks its store for minutes; Slurm ends it with the step (--kill-on-bad-exit).
    (gone,) = own_lines(second.kill()[1])
    assert re.match(rf"rank [0-3]: error: the store at {ADDRESSES[0]}:\d+ is gone \(", gone), gone


def test_the_hosts_are_joined_by_the_cable_only(two_hosts):
    routes = [ip("netns", "exec", name, "ip", "-o", "link").stdout for name in two_hosts]
    assert all(links.count("\n") == 2 and " lo: " in links and " cable@" in links for links in routes), routes
    assert ip("netns", "exec", two_hosts[1], "ip", "route", "get", ADDRESSES[0]).stdout.startswith(f"{ADDRESSES[0]} dev cable")


@pytest.fixture
def mpirun(launch):
    """Starts Python on several ranks of this host; exit code, stdout and stderr."""
    if shutil.which("mpirun") is None:
        pytest.skip("needs mpirun (Debian: apt-get install openmpi-bin)")
    if importlib.util.find_spec("mpi4py") is None:
        pytest.skip("needs mpi4py: the extra phase8[mpi]")

    def mpirun(*arguments, num_ranks):
        command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", num_ranks, sys.executable, *arguments]
        return launch(command).end()

    return mpirun


def test_mpirun_gives_every_rank_its_place(mpirun):
    code, output, errors = mpirun(SCRIPT, num_ranks=2)
    said = sorted(re.findall(r"mpirun \d/\d \d/\d sum \d", output))  # mpirun mixes the lines of its ranks
    assert (code, said) == (0, ["mpirun 0/2 0/2 sum 1", "mpirun 1/2 1/2 sum 1"]), errors


@pytest.mark.parametrize(
    ("num_ranks", "settings"),
    [
        (2, ("zero.stage=2",)),
        pytest.param(4, ("parallel.tensor_parallel_size=2", "zero.stage=3"), marks=pytest.mark.full),
    ],
)
def test_ranks_of_mpirun_train_as_one_process(training, alone, mpirun, num_ranks, settings):
    name = f"mpirun_{num_ranks}"
    code, output, errors = mpirun(*training.door(name, *settings, "train.stop_at_step=3"), num_ranks=num_ranks)
    assert code == 0 and output.count("ZeRO stage") == 1, errors  # the banner, of rank 0
    training.assert_same(name, alone, num_steps=3)
