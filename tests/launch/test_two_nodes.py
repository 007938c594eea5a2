"""torchrun over two hosts, for real: two network namespaces with a cable between them. And mpirun on this one."""

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("meeting.py")
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


def environment(**variables):
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}


def start_on(hosts, number, *arguments, num_processes=2):
    """torchrun on one of two hosts; the first has the rendezvous."""
    options = ["--nnodes=2", f"--nproc_per_node={num_processes}", "--rdzv-id=two-nodes", "--rdzv-backend=c10d"]
    options += [f"--rdzv-endpoint={ADDRESSES[0]}:{PORT}", f"--rdzv-conf=is_host={number == 0}", f"--local-addr={ADDRESSES[number]}"]
    command = ["ip", "netns", "exec", hosts[number], sys.executable, "-m", "torch.distributed.run", *options, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, env=environment(GLOO_SOCKET_IFNAME="cable"), text=True, **pipes)


def ends_of(processes, *, timeout_seconds=120):
    """Exit code, stdout and stderr of each; what takes too long is stopped, with its ranks."""
    ends = []
    for process in processes:
        try:
            output, errors = process.communicate(timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            for each in processes:
                each.terminate()  # torchrun ends its ranks then
            output, errors = process.communicate()
        ends.append((process.returncode, output, errors))
    return ends


def test_four_ranks_on_two_hosts_meet(two_hosts):
    ends = ends_of([start_on(two_hosts, number, SCRIPT) for number in range(2)])
    assert [code for code, _, _ in ends] == [0, 0], ends
    said = [sorted(line for line in output.splitlines() if line.startswith("torchrun")) for _, output, _ in ends]
    hosts = [[f"torchrun {rank}/4 {rank % 2}/2 sum 6" for rank in ranks] for ranks in ((0, 1), (2, 3))]
    assert said in (hosts, hosts[::-1]), ends  # who comes first has the first ranks


def test_a_rank_killed_on_one_host_is_named_on_the_other(two_hosts, tmp_path):
    failing = ROOT / "tests" / "distributed" / "failing_rank.py"
    ends = ends_of([start_on(two_hosts, number, failing, "kill", 3, tmp_path, 30) for number in range(2)])
    assert [code for code, _, _ in ends] == [1, 1], ends
    told = [line for _, _, errors in ends for line in errors.splitlines() if line.startswith(("error: ", "rank "))]
    assert len(told) == 1 and told[0].startswith("error: rank 3 is lost: its process "), told
    assert "exitcode  : -9" in ends[0][2] + ends[1][2] and "exitcode  : 7" in ends[0][2] + ends[1][2]


def test_the_hosts_are_joined_by_the_cable_only(two_hosts):
    routes = [ip("netns", "exec", name, "ip", "-o", "link").stdout for name in two_hosts]
    assert all(links.count("\n") == 2 and " lo: " in links and " cable@" in links for links in routes), routes
    assert ip("netns", "exec", two_hosts[1], "ip", "route", "get", ADDRESSES[0]).stdout.startswith(f"{ADDRESSES[0]} dev cable")


@pytest.fixture
def mpirun():
    """The command, for two processes of this host."""
    if shutil.which("mpirun") is None:
        pytest.skip("needs mpirun (Debian: apt-get install openmpi-bin)")
    if importlib.util.find_spec("mpi4py") is None:
        pytest.skip("needs mpi4py: the extra phase8[mpi]")
    return ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2", sys.executable]


def test_mpirun_on_one_host(mpirun):
    process = subprocess.run([*mpirun, str(SCRIPT)], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    said = sorted(line for line in process.stdout.splitlines() if line.startswith("mpirun"))
    assert (process.returncode, said) == (0, ["mpirun 0/2 0/2 sum 1", "mpirun 1/2 1/2 sum 1"]), process
