"""Products with the exchange of tokens beside them equal the collectives followed by products, forward and backward.

On CPUs a stand-in with collectives takes the place of the memory of other GPUs: it has what that has, and demands the same order of calls.
"""

import functools
import math
import os
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from phase8.config.auto import without_auto
from phase8.config.batch import run_topology
from phase8.config.load import load_config
from phase8.distributed import peer_memory
from phase8.distributed.collectives import Axis, gather_tokens, scatter_tokens
from phase8.distributed.mesh import build_mesh
from phase8.errors import ConfigError
from phase8.precision.formats import OPERAND_DTYPE
from phase8.tensor_parallel import overlapped
from phase8.topology import Topology
from phase8.train.engine.train_state import build_chunks
from phase8.zero import copy_engine_gather, fsdp
from tests.parallel import training
from tests.parallel.pool import GLOO, NCCL
from tests.parallel.test_gpu_parity import require_gpus
from tests.parallel.test_parity import BLOCKS, INTERLEAVED, ranks


class CollectiveMemory:
    """`PeerMemory` among processes that share nothing."""

    def __init__(self, group_name):
        self._group = dist.distributed_c10d._resolve_process_group(group_name)
        self.rank, self.size = self._group.rank(), self._group.size()
        self.others = [(self.rank + step) % self.size for step in range(1, self.size)]
        self.sent = []  # for as long as they travel

    @contextmanager
    def gathering(self, x):
        assert x.is_contiguous()
        gathered = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(gathered, x.detach(), group=self._group)
        yield Tokens(gathered, self)
        for tokens in gathered:
            tokens.fill_(torch.nan)

    def places_of_gathers(self):
        return mock.Mock(begin=lambda shape, dtype: Parts(self, torch.full((self.size, *shape), torch.nan, dtype=dtype)))

    def adding(self, shape, dtype):
        return Summands(self, torch.full((self.size, *shape), torch.nan, dtype=dtype))


class Tokens:
    """`Exchange` of a gathering."""

    def __init__(self, gathered, memory):
        self.gathered, self.missing = gathered, set(memory.others)

    def of(self, rank):
        self.missing.remove(rank)
        return self.gathered[rank]


class Summands:
    """`Exchange` of an adding: what is not filled is no number."""

    def __init__(self, memory, places):
        self._memory, self._places = memory, places

    def place_on(self, rank):
        return self._places[rank]

    def filled(self, rank):
        self._memory.sent.append(dist.isend(self._places[rank].clone(), group=self._memory._group, group_dst=rank))

    def of(self, rank):
        summand = torch.empty_like(self._places[rank])
        dist.recv(summand, group=self._memory._group, group_src=rank)
        return summand


class Parts(Summands):
    """`Exchange` of a gathering in place."""

    def __init__(self, memory, places):
        super().__init__(memory, torch.full_like(places, torch.nan))
        self._whole = places

    def of(self, rank):
        self._whole[rank] = super().of(rank)

    def whole(self):
        return self._whole.flatten()


def axis_of_all(device_type):
    mesh = init_device_mesh(device_type, (dist.get_world_size(),), mesh_dim_names=("tp",))
    return Axis(mesh, has_peer_memory=True)


def gradients(function, x, weight, grad):
    """The output, and the gradients of both inputs."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = function(x, weight)
    y.backward(grad)
    return y.detach(), x.grad, weight.grad


def worst_difference(axis, dtype, device, *, tokens=12, width=16, inner=24):
    """Largest relative difference of outputs and gradients, to collectives followed by products."""
    generator = torch.Generator().manual_seed(axis.index)
    random = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)  # noqa: E731
    own, every = random(tokens, width), random(axis.size * tokens, inner)
    # As in the backward of a concatenation, gradients come with strides of their own.
    wide_own, wide_every = random(tokens, 2 * width)[:, :width], random(axis.size * tokens, 2 * inner)[:, inner:]
    column, row = random(inner, width), random(width, inner)
    pairs = [
        (lambda x, w: overlapped.gathered_product(x, w, axis, OPERAND_DTYPE), lambda x, w: gather_tokens(x, axis) @ w.T, (own, column, wide_every)),
        (lambda x, w: overlapped.scattered_product(x, w, axis, OPERAND_DTYPE), lambda x, w: scatter_tokens(x @ w.T, axis), (every, row, wide_own)),
    ]
    worst = 0.0
    for ours, reference, arguments in pairs:
        for found, expected in zip(gradients(ours, *arguments), gradients(reference, *arguments), strict=True):
            worst = max(worst, relative_difference(found, expected))
    return worst


def relative_difference(found, expected):
    """Infinite where something is no number, which no maximum would notice."""
    difference = ((found.double() - expected.double()).norm() / expected.double().norm()).item()
    return math.inf if math.isnan(difference) else difference


def products_on_cpus():
    with mock.patch.object(overlapped, "peer_memory", functools.cache(CollectiveMemory)):
        return worst_difference(axis_of_all("cpu"), torch.float64, "cpu")


@pytest.mark.parametrize("world_size", [2, 4])
def test_products_equal_those_after_collectives(pool, world_size):
    for worst in pool.run(products_on_cpus, world_size=world_size, backend=GLOO, timeout_seconds=60):
        assert worst < 1e-14


def train_through_peers(settings, num_steps, world_size):
    """`train_steps` whose tensor-parallel layers exchange tokens as on GPUs."""
    build = training.build_mesh

    def build_mesh(*arguments, **options):
        mesh = build(*arguments, **options)
        return replace(mesh, tp=replace(mesh.tp, has_peer_memory=True))

    with mock.patch.object(overlapped, "peer_memory", functools.cache(CollectiveMemory)), mock.patch.object(training, "build_mesh", build_mesh):
        return training.train_steps(settings, num_steps, world_size)


@pytest.mark.parametrize(("block", "recompute"), [("default", "selective"), ("low-rank", "full"), ("transformer", "none")])
def test_training_equals_one_process(pool, block, recompute):
    world_size, settings = ranks(tp=2, more=(f"train.recompute={recompute}",))
    settings = (*BLOCKS[block], *settings)
    steps, weights = pool.run(train_through_peers, settings, 2, world_size, world_size=world_size, backend=GLOO, timeout_seconds=120)[0]
    expected_steps, expected = training.train_steps(settings_of_one(settings), 2)
    assert steps == [pytest.approx(step, rel=1e-9) for step in expected_steps]
    for name, weight in weights.items():
        assert (weight - expected[name]).norm() <= 1e-9 * expected[name].norm(), name


def settings_of_one(settings):
    return tuple(setting for setting in settings if not setting.startswith("parallel."))


def test_a_mistake_is_noticed(pool):
    for worst in pool.run(products_with_a_mistake, world_size=2, backend=GLOO, timeout_seconds=60):
        assert worst > 0.1


def products_with_a_mistake():
    """Tokens of the rank itself instead of those of the other."""
    wrong = lambda self, rank: self.gathered[1 - rank]  # noqa: E731
    with mock.patch.object(Tokens, "of", wrong):
        return products_on_cpus()


def has_peer_memory():
    return build_mesh(Topology(tensor_parallel_size=2), device_type="cpu", shard_size=1, async_tensor_parallel=True).tp.has_peer_memory


def test_the_key_has_no_effect_on_cpus(pool):
    assert pool.run(has_peer_memory, world_size=2, backend=GLOO, timeout_seconds=60) == [False, False]


def gather_parameters():
    """Output and gradients of a module whose parameters are gathered as on GPUs, and by FSDP's own collective."""
    mesh, found = init_device_mesh("cpu", (dist.get_world_size(),)), []
    with mock.patch.object(copy_engine_gather, "peer_memory", functools.cache(CollectiveMemory)):
        for is_copied in (False, True):
            torch.manual_seed(0)
            # One that does not divide evenly, and two that are gathered one after the other while the first is in use.
            model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3), torch.nn.Linear(3, 5))
            copies = copy_engine_gather.CopyEngineGather(mesh.get_group())
            for layer in model:
                fully_shard(layer, mesh=mesh)
                if is_copied:
                    layer.set_custom_all_gather(copies)
            y = model(torch.randn(4, 5))
            y.square().sum().backward()
            found.append([y.detach(), *(parameter.grad.full_tensor() for parameter in model.parameters())])
    return [relative_difference(*pair) for pair in zip(*found, strict=True)]


def test_parameters_are_gathered_as_by_fsdp(pool):
    for differences in pool.run(gather_parameters, world_size=2, backend=GLOO, timeout_seconds=60):
        assert len(differences) == 7 and not any(differences)


def gathers_of_blocks():
    """A job: for each block of each chunk, which object gathers its parameters, and which object's places it gathers through."""
    world_size, settings = ranks(pp=2, dp=2, stage=3, more=(*INTERLEAVED, "zero.copy_engine_gather=true", "model.num_layers=8"))
    config = without_auto(load_config(os.devnull, [*training.MODEL, *settings]))
    mesh = build_mesh(run_topology(config.parallel, world_size=world_size), device_type="cpu", shard_size=2)
    reaches = mock.patch.object(fsdp, "reaches_peers", return_value=True)
    with reaches, mock.patch.object(copy_engine_gather, "peer_memory", functools.cache(CollectiveMemory)):
        chunks = build_chunks(config, mesh=mesh, device=torch.device("cpu"), dtype=torch.float32)
    gathers = [[block._get_fsdp_state()._fsdp_param_group._all_gather_comm for block in chunk.blocks.values()] for chunk in chunks]
    return [[(id(gather), id(gather._places)) for gather in of_chunk] for of_chunk in gathers]


def test_no_two_chunks_gather_through_the_same_places(pool):
    """Their streams do not wait for each other's readers, so one would overwrite what another has not read yet."""
    for chunks in pool.run(gathers_of_blocks, world_size=4, backend=GLOO, timeout_seconds=60):
        (first,), (second,) = map(set, chunks)
        assert len(chunks[0]) == 2 and first[0] != second[0] and first[1] != second[1]


def products_on_gpus():
    """Worst differences of small and large products, of a half-precision one, and of one that is recorded and replayed."""
    axis, device = axis_of_all("cuda"), torch.device("cuda", torch.cuda.current_device())
    allow = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        found = {f"{dtype}, {tokens} tokens": worst_difference(axis, dtype, device, tokens=tokens, width=64, inner=96)
                 for tokens in (4, 1000, 40) for dtype in (torch.float32, torch.bfloat16)}  # fmt: skip
        return found | {"replayed": _replayed(axis, device)}
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allow


def _replayed(axis, device):
    """The same numbers again and again, from inputs that change between the replays."""
    torch.manual_seed(axis.index)
    x, column, row = (torch.randn(shape, device=device) for shape in ((64, 32), (48, 32), (32, 48)))
    take = lambda: overlapped.scattered_product(overlapped.gathered_product(x, column, axis, OPERAND_DTYPE), row, axis, OPERAND_DTYPE)  # noqa: E731
    take()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        y = take()
    worst = 0.0
    for _ in range(20):
        x.copy_(torch.randn_like(x))
        graph.replay()
        expected = scatter_tokens(gather_tokens(x, axis) @ column.T @ row.T, axis)
        worst = max(worst, relative_difference(y, expected))
    torch.cuda.synchronize()
    graph.reset()
    return worst


def chunks_on_gpus():
    """Worst difference of gradients to FSDP's own collective, where the backward of a chunk is begun while the forward of another one computes."""
    mesh, found = init_device_mesh("cuda", (dist.get_world_size(),)), []
    for is_copied in (False, True):
        torch.manual_seed(0)
        chunks = [torch.nn.Sequential(*(Slow(256) for _ in range(5))).cuda() for _ in range(2)]
        for chunk in chunks:
            copies = copy_engine_gather.CopyEngineGather(mesh.get_group()) if is_copied else None
            for layer in chunk:
                fully_shard(layer, mesh=mesh)
                if copies is not None:
                    layer.set_custom_all_gather(copies)
            fully_shard(chunk, mesh=mesh, reshard_after_forward=False)
        for _ in range(3):
            outputs = [chunk(torch.randn(64, 256, device="cuda")) for chunk in chunks]
            for y in outputs:
                y.square().sum().backward()
        found.append([parameter.grad.full_tensor() for chunk in chunks for parameter in chunk.parameters()])
    return max(relative_difference(*pair) for pair in zip(*found, strict=True))


class Slow(torch.nn.Linear):
    """A layer that takes a millisecond before it reads its weights, so that the host is far ahead."""

    def __init__(self, width):
        super().__init__(width, width)

    def forward(self, x):
        torch.cuda._sleep(2_000_000)
        return super().forward(x)


@pytest.mark.gpu
def test_chunks_do_not_overwrite_what_others_have_gathered(pool):
    require_gpus(2)
    assert max(pool.run(chunks_on_gpus, world_size=2, backend=NCCL, timeout_seconds=120)) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("world_size", [2, 4])
def test_products_through_memory_of_other_gpus(pool, world_size):
    require_gpus(world_size)
    for found in pool.run(products_on_gpus, world_size=world_size, backend=NCCL, timeout_seconds=120):
        print(found)
        assert all(worst < (2e-2 if "bfloat16" in what else 1e-6) for what, worst in found.items()), found


def test_gpus_that_do_not_reach_each_other_are_a_sentence(monkeypatch):
    broken = mock.Mock(empty=mock.Mock(side_effect=RuntimeError("no peer access between 0 and 1\nCallStack ...")))
    monkeypatch.setattr(peer_memory, "symmetric_memory", broken)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(ConfigError) as error:
        peer_memory.PeerMemory(mock.Mock(rank=lambda: 0, size=lambda: 2))
    assert str(error.value) == (
        "parallel.async_tensor_parallel or zero.copy_engine_gather is true, but GPUs do not reach each other's memory "
        "(no peer access between 0 and 1); set it to false."
    )


def test_groups_of_one_name_are_told_apart(monkeypatch):
    """After all groups were destroyed the next ones have their names."""
    made, groups = [], {"0": object()}
    monkeypatch.setattr(peer_memory, "PeerMemory", lambda group: made.append(group) or mock.Mock(group=group))
    monkeypatch.setattr(dist.distributed_c10d, "_resolve_process_group", groups.get)
    monkeypatch.setattr(peer_memory, "_OF_GROUPS", {})
    assert peer_memory.peer_memory("0") is peer_memory.peer_memory("0")
    groups["0"] = object()
    assert peer_memory.peer_memory("0").group is groups["0"]
    assert len(made) == 2
