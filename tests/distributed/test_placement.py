import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.placement_types import _StridedShard

from phase8.distributed.placement import is_held_once, own_region, placed_like
from phase8.division import Place, Region, region_of_rank, whole_region


@pytest.fixture
def ranks_on_gpus():
    """A mesh of two GPUs as one process sees it that has none."""
    dist.init_process_group("fake", rank=1, world_size=2, store=dist.HashStore())
    yield DeviceMesh("cuda", torch.arange(2), _init_backend=False)
    dist.destroy_process_group()


def test_an_offloaded_part_stays_in_host_memory(ranks_on_gpus):
    meta = TensorMeta(torch.Size([6, 3]), (3, 1), torch.float32)
    whole = DTensor(torch.zeros(3, 3), DTensorSpec(ranks_on_gpus, (Shard(0),), tensor_meta=meta), requires_grad=False)
    part = torch.ones(3, 3)
    placed = placed_like(part, whole)
    assert placed.shape == (6, 3) and own_region(placed) == Region([3, 0], [3, 3])
    placed.to_local().fill_(2)
    assert part.sum() == 18  # one memory: what is restored into it reaches the optimizer


@pytest.mark.parametrize(("shards", "tp"), [(2, 2), (3, 2), (4, 2), (2, 4), (4, 4), (3, 3)])
@pytest.mark.parametrize("size", [5, 9, 13, 33, 61, 50257])
def test_fsdp_divides_what_tensor_parallelism_has_left_of_a_dim(shards, tp, size):
    spec = (_StridedShard(0, split_factor=tp), Shard(0))
    meta = TensorMeta(torch.Size([size, 2]), (2, 1), torch.float32)
    for rank in range(shards * tp):
        dist.init_process_group("fake", rank=rank, world_size=shards * tp, store=dist.HashStore())
        try:
            mesh = DeviceMesh("cpu", torch.arange(shards * tp).view(shards, tp), mesh_dim_names=("shard", "tp"))
            found = own_region(DTensor(torch.empty(0), DTensorSpec(mesh, spec, tensor_meta=meta), requires_grad=False))
        finally:
            dist.destroy_process_group()
        of_tensor_axis = region_of_rank(whole_region([size, 2]), 0, Place(tp, rank % tp))
        assert found == region_of_rank(of_tensor_axis, 0, Place(shards, rank // tp))


def test_what_no_other_rank_holds(ranks_on_gpus):
    meta = TensorMeta(torch.Size([6, 3]), (3, 1), torch.float32)

    def placed(mesh, *placements):
        return DTensor(torch.zeros(3, 3), DTensorSpec(mesh, placements, tensor_meta=meta), requires_grad=False)

    alone_in_pairs = DeviceMesh("cuda", torch.arange(2)[None], _init_backend=False)
    assert is_held_once(placed(ranks_on_gpus, Shard(0))) and is_held_once(placed(alone_in_pairs, Replicate(), Shard(0)))
    assert not is_held_once(placed(ranks_on_gpus, Replicate())) and not is_held_once(placed(alone_in_pairs, Shard(0), Replicate()))
    assert not is_held_once(torch.zeros(3))  # of two ranks


def test_one_process_holds_everything():
    assert is_held_once(torch.zeros(3))
