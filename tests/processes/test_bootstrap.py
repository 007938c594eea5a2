import sys
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from phase8.errors import CommunicationError, ConfigError
from phase8.processes.bootstrap import World, world_from_environment
from phase8.processes.rendezvous import connect, meet, process_group
from tests.processes.launched import free_port, run, torchrun

TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "first", "MASTER_PORT": "29500"}


def variables(**changes):
    return {name: value for name, value in {**TORCHRUN, **changes}.items() if value is not None}


# What Slurm sets for a batch script or a shell on an allocation of four tasks, and what srun adds for each task of a step.
BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_NPROCS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
STEP = {**BATCH, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}
ALONE = {
    "a shell": {},
    "a leftover": {"MASTER_ADDR": "first", "SLURM_PROCID": "3"},
    "an empty variable": {"WORLD_SIZE": ""},
    "PMI of one process": {"PMI_RANK": "0", "PMI_SIZE": "1"},
    "sbatch": BATCH,
    "srun of one task": {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
    "salloc, in an interactive step": {**BATCH, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"},
    "srun --pty": {**STEP, "SLURM_PROCID": "0", "SLURM_PTY_PORT": "40000"},
}


@pytest.mark.parametrize("environment", ALONE.values(), ids=ALONE)
def test_a_process_that_nobody_placed_is_alone(environment):
    assert world_from_environment(environment) == World(0, 0, 1, 1, "single", None, hosts_store=False)


def test_torchrun_names_the_place_and_its_agent_has_the_store():
    of_torchrun = {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_ERROR_FILE": "/logs/1/error.json"}
    found = world_from_environment(variables(**of_torchrun))
    assert found == World(5, 1, 8, 4, "torchrun", ("first", 29500), hosts_store=False, error_file="/logs/1/error.json")


@pytest.mark.parametrize(("rank", "hosts_store"), [("0", True), ("4", False)])
def test_without_an_agent_rank_0_opens_the_store(rank, hosts_store):
    found = world_from_environment(variables(RANK=rank, LOCAL_RANK="0"))
    assert (found.launcher, found.hosts_store) == ("environment", hosts_store)


def test_torchrun_below_mpirun_wins():
    assert world_from_environment(variables(OMPI_COMM_WORLD_RANK="0", OMPI_COMM_WORLD_SIZE="2")).world_size == 8


@pytest.mark.parametrize("variables", [{}, {"PMI_RANK": "0", "PMI_SIZE": "1"}], ids=["", "PMI of one process"])
def test_several_tasks_of_srun_are_told_to_use_torchrun(variables):
    with pytest.raises(ConfigError) as caught:
        world_from_environment({**STEP, **variables})
    assert caught.value.exit_code == 2 and str(caught.value) == (
        "srun started 4 tasks (SLURM_STEP_NUM_TASKS) of which this is number 3, but nothing tells them how to find each other; use torchrun: let "
        "srun start one torchrun per node, as launch/slurm.sbatch does, or pass --ntasks=1 for one process."
    )


def test_ranks_of_torchrun_below_srun_have_their_places():
    assert world_from_environment({**STEP, **TORCHRUN}).world_size == 8


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set, but RANK, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT are not; start"),
        (variables(MASTER_PORT=None), "RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE are set, but MASTER_PORT is not;"),
        (variables(RANK="8"), "RANK=8, LOCAL_RANK=1, WORLD_SIZE=8, LOCAL_WORLD_SIZE=4, MASTER_PORT=29500 contradict each other"),
        (variables(LOCAL_RANK="4"), "contradict each other"),
        (variables(LOCAL_WORLD_SIZE="9"), "contradict each other"),
        (variables(RANK="0"), "contradict each other"),
        (variables(MASTER_PORT="70000"), "contradict each other"),
        (variables(RANK="five"), "RANK is 'five', but a whole number is needed"),
        (variables(WORLD_SIZE="-1"), "WORLD_SIZE is '-1', but a whole number is needed"),
        ({"OMPI_COMM_WORLD_RANK": "0"}, "but OMPI_COMM_WORLD_SIZE is not"),
        ({"PMI_SIZE": "2"}, "but PMI_RANK is not"),
        ({"PMI_RANK": "2", "PMI_SIZE": "2"}, "PMI_RANK=2 and PMI_SIZE=2 contradict each other"),
    ],
)
def test_an_environment_that_makes_no_sense_is_one_sentence(environment, message):
    with pytest.raises(ConfigError) as caught:
        world_from_environment(environment)
    assert message in str(caught.value) and len(caught.value.problems) == 1 and "\n" not in str(caught.value)


def mpi(rank, size, *, broadcast=None):
    """A stand-in for mpi4py.MPI on a host with all ranks."""
    module = SimpleNamespace(COMM_TYPE_SHARED=1, finalised=False)

    def finalise():
        module.finalised = True

    local = SimpleNamespace(rank=rank, size=size)
    module.COMM_WORLD = SimpleNamespace(rank=rank, size=size, Split_type=lambda kind: local, bcast=lambda value: value if rank == 0 else broadcast)
    module.Finalize = finalise
    return module


def test_mpirun_gives_the_place_and_mpi_the_address(monkeypatch):
    module = mpi(1, 2, broadcast=("first", 1234))
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=module))
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", module)
    found = world_from_environment({"PMI_RANK": "1", "PMI_SIZE": "2"})
    assert found == World(1, 1, 2, 2, "mpirun", ("first", 1234), hosts_store=False) and module.finalised


def test_rank_0_of_mpirun_chooses_the_address(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", mpi(0, 2))
    found = world_from_environment({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1"})
    assert found.hosts_store and found.address[0] == "10.0.0.1" and 1024 <= found.address[1] < 2**16


def test_mpi4py_of_another_mpi_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", mpi(0, 1))
    with pytest.raises(ConfigError, match=r"OMPI_COMM_WORLD_RANK=1 .* mpi4py says rank 0 of 1: it was built for another MPI"):
        world_from_environment({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"})


def test_mpirun_without_mpi4py_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", None)
    with pytest.raises(ConfigError, match=r"mpirun started 2 processes, but mpi4py, .* install it with: pip install 'phase8\[mpi\]', or"):
        world_from_environment({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"})


def test_mpi4py_without_an_mpi_is_refused(monkeypatch, tmp_path):
    """What mpi4py's wheels do where they find no library."""
    (package := tmp_path / "mpi4py").mkdir()
    (package / "__init__.py").touch()
    (package / "MPI.py").write_text("raise RuntimeError('cannot load MPI library\\nlibmpi.so.40: cannot open shared object file')")
    for name in ("mpi4py", "mpi4py.MPI"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    expected = r"finds no MPI \(cannot load MPI library\); install one with: apt install openmpi-bin, .* or start them with torchrun\.$"
    with pytest.raises(ConfigError, match=expected) as caught:
        world_from_environment({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"})
    assert len(caught.value.problems) == 1 and "\n" not in str(caught.value)


def world_of(rank, world_size, port, **keywords):
    return World(rank, 0, world_size, 1, "environment", ("127.0.0.1", port), hosts_store=rank == 0, **keywords)


def test_a_process_alone_has_no_process_group():
    with process_group(World()) as attempt:
        assert attempt is None and not dist.is_initialized()


@pytest.mark.parametrize("error", [None, ValueError])
def test_one_process_of_a_launcher_has_a_group_that_is_always_destroyed(error):
    def use():
        with process_group(world_of(0, 1, int(free_port()))):
            assert dist.get_world_size() == 1
            value = torch.rand(5)
            summed = value.clone()
            dist.all_reduce(summed)
            assert torch.equal(value, summed)
            if error is not None:
                raise error

    if error is None:
        use()
    else:
        with pytest.raises(error):
            use()
    assert not dist.is_initialized()


def test_more_processes_than_gpus_are_refused_on_every_rank():
    world = World(0, 0, 64, 64, "torchrun", ("127.0.0.1", 1))
    with pytest.raises(ConfigError, match=r"64 processes were started on a host with \d+ usable GPUs"), process_group(world, device_type="cuda"):
        raise AssertionError


def attempt_of_ranks(ranks, *, port, store, world_size, timeout_seconds=5.0):
    """What `meet` gives to ranks that come at the same time."""
    results = {}

    def come(rank):
        world = world_of(rank, world_size, port)
        own = store if rank == 0 else connect(world, timeout_seconds=5.0)
        try:
            results[rank] = meet(own, world, timeout_seconds=timeout_seconds)
        except CommunicationError as error:
            results[rank] = error

    threads = [threading.Thread(target=come, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.fixture
def store():
    port = int(free_port())
    return port, connect(world_of(0, 3, port), timeout_seconds=5.0, serve=True)


def test_each_attempt_has_a_name_of_its_own_although_the_store_stays(store):
    port, opened = store
    names = [attempt_of_ranks(range(3), port=port, store=opened, world_size=3) for _ in range(3)]
    assert [len(set(found.values())) for found in names] == [1, 1, 1] and len({found[0] for found in names}) == 3


def test_what_an_earlier_attempt_left_does_not_complete_a_rendezvous(store):
    """Two of three ranks come again: the third is missing although the store remembers it."""
    port, opened = store
    attempt_of_ranks(range(3), port=port, store=opened, world_size=3)
    found = attempt_of_ranks([0, 2], port=port, store=opened, world_size=3, timeout_seconds=1.0)
    for error in found.values():
        assert str(error).startswith("rank 1 of 3 did not come within 1 s; start all 3 processes"), error
    assert CommunicationError.exit_code == 7


def test_without_rank_0_the_others_say_so(store):
    port, opened = store
    found = attempt_of_ranks([1, 2], port=port, store=opened, world_size=3, timeout_seconds=1.0)
    assert [str(error).split(" within")[0] for error in found.values()] == ["rank 0 of 3 did not come"] * 2


WORLD = """
import os, sys, torch, torch.distributed as dist
from phase8.processes.bootstrap import world_from_environment
from phase8.processes.watch import running
world = world_from_environment(os.environ)
with running(world) as watch:
    torch.manual_seed(0)
    weight = torch.rand(64, 64, requires_grad=True)
    loss = (weight @ torch.rand(64, 64)).tanh().square().mean()
    loss.backward()
    watch.report(step=1, doing="reduction of gradients")
    if dist.is_initialized():
        dist.all_reduce(weight.grad)
    print(f"{world.launcher} {world.rank}/{world.world_size}", weight.grad.numpy().tobytes().hex()[-4000:], dist.is_initialized())
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(WORLD)
    return path


def test_torchrun_with_one_process_is_bit_for_bit_a_plain_process(script):
    plain = run([sys.executable, str(script)])
    launched = torchrun(script, num_processes=1)
    assert plain[0] == launched[0] == 0, launched[2]
    assert plain[1].split() == ["single", "0/1", launched[1].split()[-2], "False"]
    assert launched[1].split()[-4:-2] == ["torchrun", "0/1"] and launched[1].split()[-1] == "True"
