"""The worker pool itself: what a job sees, what its caller gets back, and that a bad job spoils nothing."""

import os
import signal
import sys
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

from phase8.errors import ConfigError
from tests.parallel import pool as pool_module


@pytest.fixture
def pool(expendable_pool):
    return expendable_pool


class Unsendable(Exception):
    """An error whose second argument is lost on the way."""

    def __init__(self, first, second):
        super().__init__(first)


def place_and_sum(offset):
    total = torch.tensor(float(dist.get_rank() + offset))
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), total.item(), torch.get_num_threads()


def process_id():
    return os.getpid()


def local_parts(degrees):
    """Sums over each axis of a four-dimensional mesh, by DTensor."""
    mesh = init_device_mesh("cpu", degrees, mesh_dim_names=("pp", "dp", "cp", "tp"))
    sums = []
    for axis in ("pp", "dp", "cp", "tp"):
        rank = torch.full((4,), float(dist.get_rank()))
        whole = distribute_tensor(torch.ones(8, 2), mesh[axis], [Shard(0)])
        part = dist.tensor.DTensor.from_local(rank, mesh[axis], [Partial()])
        sums.append((part.redistribute(placements=[Replicate()]).to_local()[0].item(), (whole + whole).full_tensor().sum().item()))
    return sums


def mesh_of_a_sum():
    """Whether a result is on the mesh of its operands."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    part = distribute_tensor(torch.ones(8, 2), mesh, [Shard(0)])
    return (part + part).device_mesh is mesh


def num_threads():
    return len(os.listdir("/proc/self/task"))


def raise_on(rank, error):
    if dist.get_rank() == rank:
        raise error
    dist.barrier()


def raise_unsendable():
    raise Unsendable("first", "second")


def die(rank):
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def hang():
    if dist.get_rank() == 1:
        time.sleep(3600)
    dist.barrier()


def change_the_defaults():
    torch.set_default_dtype(torch.float64)
    torch.rand(3)


def defaults():
    return torch.get_default_dtype(), torch.rand(1).item()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_default_group_has_exactly_the_ranks_of_the_job(pool, world_size):
    expected = sum(range(world_size)) + 10.0 * world_size
    assert pool.run(place_and_sum, 10, world_size=world_size) == [(rank, world_size, expected, 1) for rank in range(world_size)]


def test_workers_stay_the_same(pool):
    first = pool.run(process_id, world_size=2)
    assert pool.run(process_id, world_size=2) == first and os.getpid() not in first


def test_meshes_of_different_jobs_are_not_confused(pool):
    for degrees, sums in {
        (1, 1, 1, 2): [[0, 0, 0, 1], [1, 1, 1, 1]],
        (2, 1, 1, 2): [[2, 0, 0, 1], [4, 1, 1, 1], [2, 2, 2, 5], [4, 3, 3, 5]],
        (1, 2, 1, 2): [[0, 2, 0, 1], [1, 4, 1, 1], [2, 2, 2, 5], [3, 4, 3, 5]],
    }.items():
        world_size = len(sums)
        assert pool.run(local_parts, degrees, world_size=world_size) == [[(total, 32.0) for total in own] for own in sums]
    assert [pool.run(mesh_of_a_sum, world_size=2) for _ in range(2)] == [[True, True]] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted by /proc")
def test_a_job_leaves_no_threads_of_its_process_groups(pool):
    counts = []
    for degrees in ((1, 4, 1, 1), (2, 1, 1, 2), (1, 2, 1, 2), (1, 1, 2, 2)):
        pool.run(local_parts, degrees, world_size=4)
        counts.append(pool.run(num_threads, world_size=4))
    assert counts == counts[:1] * 4


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_comes_back_with_its_type_rank_and_traceback_and_poisons_nothing(pool, rank):
    before = pool.run(process_id, world_size=2)
    with pytest.raises(ConfigError, match="tp is 3") as caught:
        pool.run(raise_on, rank, ConfigError("tp is 3."), world_size=2)
    (note,) = caught.value.__notes__
    assert note.startswith(f"on rank {rank}:\n") and "in raise_on\n    raise error" in note
    after = pool.run(process_id, world_size=2)
    assert not set(before) & set(after)
    assert [total for _, _, total, _ in pool.run(place_and_sum, 0, world_size=2)] == [1.0, 1.0]


def test_an_error_that_cannot_be_sent_is_told(pool):
    with pytest.raises(pool_module.RankError, match=r"rank 0 raised:\n.*raise_unsendable.*Unsendable: first".replace(".*", r"[\s\S]*")):
        pool.run(raise_unsendable, world_size=1)


def test_a_rank_that_dies_is_named_and_replaced(pool):
    with pytest.raises(pool_module.RankError, match="rank 1 died with exit code -9"):
        pool.run(die, 1, world_size=2)
    assert pool.run(process_id, world_size=2) == pool.processes[:2]


def crash_once(path):
    """Rank 1 has a memory fault unless it had one before."""
    if dist.get_rank() == 1 and not path.exists():
        path.touch()
        os.kill(os.getpid(), signal.SIGSEGV)
    return dist.get_rank()


def test_a_job_with_a_memory_fault_runs_once_more_and_says_so(pool, tmp_path):
    with pytest.warns(UserWarning, match="rank 1 died with exit code -11. The job runs once more."):
        assert pool.run(crash_once, tmp_path / "crashed", world_size=2) == [0, 1]


def test_a_job_that_hangs_ends_at_its_time_out_and_leaves_no_process(pool):
    pool.run(process_id, world_size=2)
    hanging = pool.processes
    with pytest.raises((pool_module.RankError, RuntimeError), match=r"ranks \[0, 1\] have not ended|Timed out"):
        pool.run(hang, world_size=2, timeout_seconds=2)
    assert pool.processes == [] and not any(os.path.exists(f"/proc/{process}") for process in hanging)
    assert pool.run(place_and_sum, 0, world_size=1)[0][2] == 0.0


def test_a_job_does_not_inherit_defaults_or_random_numbers(pool):
    fresh = pool.run(defaults, world_size=1)
    pool.run(change_the_defaults, world_size=1)
    assert pool.run(defaults, world_size=1) == fresh and fresh[0][0] == torch.float32


def test_more_ranks_than_workers_are_refused(pool):
    with pytest.raises(ValueError, match="world_size is 9, but the pool has 1 to 8"):
        pool.run(process_id, world_size=9)
