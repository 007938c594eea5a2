"""What a step really communicates, collective by collective, is what the planner says: one too many is noticed."""

import collections
import os

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from phase8.config.auto import without_auto
from phase8.config.batch import batch_shape, run_topology
from phase8.config.load import load_config
from phase8.distributed.collectives import gather_tokens
from phase8.distributed.mesh import build_mesh
from phase8.exchanges import Operation
from phase8.plan.run_communication import plan_run_communication
from phase8.precision.policy import compute_dtype
from phase8.topology import AxisName, Topology
from phase8.train.engine.step import train_step
from phase8.train.engine.train_state import build_train_state
from phase8.zero.fsdp import shard_size
from tests.parallel.training import MODEL, microbatch_of_slice

CPU = torch.device("cpu")
OFFLOADED = ("zero.stage=3", "zero.offload_optimizer=cpu", "zero.offload_params=cpu")
LOW_RANK = ("model.low_rank_rank=5", "model.ffn=low_rank_swiglu")


class Counter(TorchDispatchMode):
    """Counts the collectives and the bytes of the operators that torch.distributed ends in, whoever calls it: FSDP, DTensor or ourselves.

    Args:
        mesh: The axes; what happens between ranks of none of them is counted under their numbers, what one rank does alone is not.
    """

    # The operation, and its bytes from the arguments of the operator.
    OPERATORS = {  # noqa: RUF012
        "_c10d_functional::all_gather_into_tensor": (Operation.ALL_GATHER, lambda x, size, group: x.nbytes * size),
        "_c10d_functional::reduce_scatter_tensor": (Operation.REDUCE_SCATTER, lambda x, *_: x.nbytes),
        "_c10d_functional::all_to_all_single": (Operation.ALL_TO_ALL, lambda x, *_: x.nbytes),
        "_c10d_functional::all_reduce": (Operation.ALL_REDUCE, lambda x, *_: x.nbytes),
        "c10d::_allgather_base_": (Operation.ALL_GATHER, lambda output, *_: output.nbytes),
        "c10d::_reduce_scatter_base_": (Operation.REDUCE_SCATTER, lambda output, x, *_: x.nbytes),
        "c10d::allreduce_": (Operation.ALL_REDUCE, lambda tensors, *_: sum(x.nbytes for x in tensors)),
        "c10d::send": (Operation.SEND, lambda tensors, *_: sum(x.nbytes for x in tensors)),
        "c10d::recv_": (Operation.RECEIVE, lambda tensors, *_: sum(x.nbytes for x in tensors)),
    }
    SILENT = ("_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd")

    @classmethod
    def _should_skip_dynamo(cls):
        """Nothing is compiled here: without the guard that keeps the compiler out, an operator takes half the time."""
        return False

    def __init__(self, mesh):
        super().__init__()
        self.counts, self.num_bytes = collections.Counter(), collections.Counter()
        names = [name for name in AxisName if name in mesh.device_mesh.mesh_dim_names and mesh.device_mesh[name].size() > 1]
        self.axes = {name: set(dist.get_process_group_ranks(mesh.device_mesh[name].get_group())) for name in names}
        # Ranks of these groups are among those of other axes.
        self.groups = {mesh.cp.group.group_name: AxisName.CONTEXT} if mesh.cp.size > 1 else {}
        if mesh.expert_mesh is not None:
            self.groups |= {mesh.expert_mesh[name].get_group().group_name: AxisName(name) for name in mesh.expert_mesh.mesh_dim_names}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # first DTensor: it becomes collectives of plain tensors
        name = func._schema.name
        if name.split("::")[0] in ("c10d", "_c10d_functional") and name not in self.SILENT:
            operation, bytes_of = self.OPERATORS[name]  # an operator that is not listed must not go unnoticed
            if key := self._axis(args):
                self.counts[key, operation] += 1
                self.num_bytes[key, operation] += bytes_of(*args)
        return func(*args, **(kwargs or {}))

    def _axis(self, args):
        boxed = next((x for x in args if isinstance(x, torch.ScriptObject)), None)
        group = dist.distributed_c10d._resolve_process_group(args[-1]) if boxed is None else dist.ProcessGroup.unbox(boxed)
        ranks = dist.get_process_group_ranks(group)
        if len(ranks) == 1:
            return None
        if group.group_name in self.groups:
            return self.groups[group.group_name]
        return next((name for name, members in self.axes.items() if members.issuperset(ranks)), str(ranks))

    def table(self):
        return {(str(axis), str(operation)): (n, self.num_bytes[axis, operation]) for (axis, operation), n in self.counts.items()}


def config_of(settings):
    return without_auto(load_config(os.devnull, [*MODEL, *settings]))


def build(config, world_size):
    topology = run_topology(config.parallel, world_size=world_size)
    mesh = build_mesh(topology, device_type="cpu", shard_size=shard_size(config.zero, num_token_ranks=topology.num_token_ranks))
    return build_train_state(config, mesh=mesh, device=CPU, dtype=compute_dtype(config.precision))


def step(train_state, config):
    """A step on random tokens."""
    shape = batch_shape(config.train, config.parallel, data_parallel_size=train_state.mesh.topology.data_parallel_size)
    generator = torch.Generator().manual_seed(train_state.mesh.data_parallel_index)
    size = (shape.num_microbatches, shape.micro_batch_size, config.model.sequence_length + 1)
    samples = torch.randint(0, config.model.vocab_size, size, generator=generator)
    microbatches = [microbatch_of_slice(tokens, None, train_state.mesh.own_slice) for tokens in samples]
    return train_step(train_state, microbatches, learning_rate=1e-3, gradient_clip_norm=1.0)


def counted(settings, world_size, plant=None):
    """What two steps communicate, counted by themselves: the second one is like all that follow."""
    config = config_of(settings)
    train_state = build(config, world_size)
    if plant:
        PLANTED[plant](train_state)
    tables = []
    for _ in range(2):
        with Counter(train_state.mesh) as counter:
            assert not step(train_state, config).skipped
        tables.append(counter.table())
    return tables


def planned(settings, world_size, rank):
    table, _ = plan_run_communication(config_of(settings), world_size=world_size, rank=rank)
    found = {}
    for each in table:  # collectives of experts that ranks share are told apart
        key = (str(each.axis), str(each.operation))
        count, num_bytes = found.get(key, (0, 0))
        found[key] = (count + each.count, num_bytes + each.num_bytes)
    return found


def case(world_size, *, tp=1, pp=1, cp=1, stage=0, micro=None, more=()):
    degrees = {"tensor": tp, "pipeline": pp, "context": cp}
    sizes = (*(f"parallel.{axis}_parallel_size={size}" for axis, size in degrees.items()), f"zero.stage={stage}")
    return world_size, (*sizes, *((f"train.micro_batch_size={micro}",) if micro else ()), *more)


EXPERTS, EP2 = ("model.ffn=moe", "model.num_experts=4", "model.expert_ffn_size=16"), ("parallel.expert_parallel_size=2",)
SHARED_EXPERT = ("model.shared_experts=1",)
FULL, SELECTIVE = ("train.recompute=full",), ("train.recompute=selective",)
TIED, WIDE = ("model.tie_embeddings=true",), ("precision.dtype=fp32",)
CASES = {
    "tp2": case(2, tp=2),
    "tp2 fp32, chain, accumulation": case(2, tp=2, micro=4, more=(*WIDE, "model.chain=both")),
    "tp2 without global path": case(2, tp=2, more=("model.global_path=none",)),
    "tp2 delta, chain": case(2, tp=2, more=("model.global_path=delta", "model.chain=both")),
    "tp2 gate per channel": case(2, tp=2, more=("model.global_path=delta", "model.global_gate=channel")),
    "tp2 low-rank": case(2, tp=2, more=LOW_RANK),
    "tp2 low-rank mixer": case(2, tp=2, more=LOW_RANK[:1]),
    "tp2 transformer": case(2, tp=2, more=("model.block=transformer",)),
    "tp2 fewer heads of keys": case(2, tp=2, more=("model.block=transformer", "model.num_kv_heads=2")),
    "tp2 tied": case(2, tp=2, more=TIED),
    "tp2 full": case(2, tp=2, more=FULL),
    "tp2 full low-rank": case(2, tp=2, more=(*FULL, *LOW_RANK)),
    "tp2 selective": case(2, tp=2, more=SELECTIVE),
    "tp2 selective low-rank, every second": case(2, tp=2, more=(*SELECTIVE, *LOW_RANK, "train.recompute_every_n_layers=2")),
    "tp2 several chunks of rows": case(2, tp=2, more=("model.sequence_length=300",)),
    "tp4": case(4, tp=4, more=FULL),
    **{f"dp2 zero {stage}": case(2, stage=stage) for stage in range(4)},
    **{f"dp2 zero {stage}, accumulation": case(2, stage=stage, micro=2) for stage in range(4)},
    "dp2 zero 3 gathered in fp32": case(2, stage=3, more=("zero.gather_dtype=fp32",)),
    "dp2 zero 3, full": case(2, stage=3, more=FULL),
    "dp2 zero 3 offloaded": case(2, more=OFFLOADED),
    "dp4 zero 3 in pairs, sums offloaded": case(4, micro=2, more=(*OFFLOADED, "zero.offload_gradients=true", "zero.shard_size=2")),
    "dp2 zero 2 tied": case(2, stage=2, more=TIED),
    "dp4 zero 3 in pairs": case(4, stage=3, micro=1, more=("zero.shard_size=2",)),
    "dp4 zero 1 in pairs": case(4, stage=1, micro=1, more=("zero.shard_size=2",)),
    "tp2 dp2 zero 0, accumulation": case(4, tp=2, micro=2),
    "tp2 dp2 zero 3": case(4, tp=2, stage=3, micro=2),
    "tp2 dp2 zero 2, selective low-rank": case(4, tp=2, stage=2, micro=2, more=(*SELECTIVE, *LOW_RANK)),
    "tp2 zero 3 without data ranks": case(2, tp=2, stage=3, micro=4),
    "tp2 offloaded": case(2, tp=2, micro=4, more=OFFLOADED),
    "cp2": case(2, cp=2),
    "cp4 delta, chain, slices shorter than the window": case(4, cp=4, stage=3, micro=4, more=("model.global_path=delta", "model.chain=both")),
    "cp2 tp2, full, global tokens": case(4, cp=2, tp=2, stage=2, micro=4, more=(*FULL, "model.global_tokens=3", "model.convolution_size=1")),
    "cp2 dp2 zero 1 in pairs, selective": case(4, cp=2, stage=1, micro=2, more=(*SELECTIVE, "zero.shard_size=2")),
    "cp4 transformer, fewer heads of keys": case(
        4, cp=4, micro=4, more=("model.block=transformer", "model.convolution_size=4", "model.num_kv_heads=1")
    ),
    "cp2 pp2, window alone": case(4, cp=2, pp=2, micro=4, more=("model.global_path=none",)),
    "dp2 experts": case(2, more=EXPERTS),
    "tp2 zero 3 experts, recomputed": case(4, tp=2, stage=3, micro=2, more=(*EXPERTS, *SHARED_EXPERT, *FULL)),
    "cp2 experts": case(2, cp=2, more=EXPERTS),
    "ep2 dp4 zero 0, accumulation": case(4, micro=1, more=(*EXPERTS, *EP2)),
    "ep2 dp4 zero 3, accumulation": case(4, stage=3, micro=1, more=(*EXPERTS, *EP2)),
    "ep2 dp4 zero 1 in pairs, selective": case(4, stage=1, micro=1, more=(*EXPERTS, *EP2, *SELECTIVE, "zero.shard_size=2")),
    "ep2 tp2 zero 2, recomputed": case(4, tp=2, stage=2, micro=2, more=(*EXPERTS, *EP2, *SHARED_EXPERT, *FULL)),
    "cp2 tp2 experts": case(4, cp=2, tp=2, micro=4, more=EXPERTS),
    "ep2 pp2, one dense layer": case(4, pp=2, micro=2, more=(*EXPERTS, *EP2, "model.num_layers=4", "model.first_dense_layers=1")),
    "pp2": case(2, pp=2, micro=2),
    "pp2 interleaved": case(2, pp=2, micro=2, more=("parallel.pipeline_schedule=interleaved", "parallel.pipeline_chunks=2", "model.num_layers=5")),
    "pp2 embedding scalars": case(2, pp=2, micro=2, more=("model.embedding_scalars=true",)),
    "tp2 embedding scalars": case(2, tp=2, more=("model.embedding_scalars=true",)),
    "pp4": case(4, pp=4, micro=2, more=("model.num_layers=4",)),
    "pp2 tied, dp2 zero 3": case(4, pp=2, stage=3, micro=2, more=TIED),
    "pp2 tp2, full": case(4, pp=2, tp=2, micro=4, more=FULL),
    "pp2 dp2 zero 0, gpipe": case(4, pp=2, micro=2, more=("parallel.pipeline_schedule=gpipe",)),
    "pp2 dp2 zero 1, gpipe": case(4, pp=2, stage=1, micro=2, more=("parallel.pipeline_schedule=gpipe",)),
    **{f"pp2 dp2 zero {stage}": case(4, pp=2, stage=stage, micro=2) for stage in range(1, 4)},
}


ALSO = (  # their parts are in other cases
    "tp2 full", "tp2 low-rank", "tp2 transformer", *(f"dp2 zero {stage}" for stage in range(4)), "pp2 dp2 zero 1", "cp2 experts", "dp2 experts",
    "tp4", "dp2 zero 3, full", "dp2 zero 3 offloaded", "dp4 zero 1 in pairs", "pp2 dp2 zero 3", "tp2 dp2 zero 3",
    "tp2 dp2 zero 0, accumulation",  # counted with a collective too many below
)  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.full) if name in ALSO else name for name in CASES])
def test_a_step_communicates_what_the_planner_says(pool, name):
    world_size, settings = CASES[name]
    for rank, steps in enumerate(pool.run(counted, settings, world_size, world_size=world_size)):
        assert steps == [planned(settings, world_size, rank)] * 2, f"rank {rank}"


@pytest.mark.parametrize("block", [(), ("model.global_path=delta", "model.chain=both", "model.global_tokens=3")], ids=["default", "whole"])
def test_what_slices_exchange_does_not_depend_on_the_length(pool, block):
    found = []
    for length in (48, 192):
        settings = (*CASES["cp2"][1], *block, f"model.sequence_length={length}")
        steps = [step for step, _ in pool.run(counted, settings, 2, world_size=2)]
        found.append([step["cp", operation] for operation in ("all_to_all", "all_gather") for step in steps])
    assert found[0] == found[1]


def gather_once_more(train_state):
    """All tokens before each feed-forward, for nothing."""

    def gather(module, inputs):
        gather_tokens(inputs[0].detach(), train_state.mesh.tp)

    for block in train_state.model.blocks.values():
        block.feed_forward.register_forward_pre_hook(gather)


def free_parameters_after_forward(train_state):
    """As ZeRO 3 does it, so that backward gathers them again."""
    for block in train_state.model.blocks.values():
        block.set_reshard_after_forward(True)


PLANTED = {function.__name__: function for function in (gather_once_more, free_parameters_after_forward)}


@pytest.mark.parametrize(
    ("plant", "name", "place", "too_many"),
    [
        # Of two layers and two microbatches, each 48 tokens of 24 numbers in bf16.
        ("gather_once_more", "tp2 dp2 zero 0, accumulation", ("tp", "all_gather"), (4, 4 * 48 * 24 * 2)),
        # Two layers have 6036 numbers each, with padding.
        ("free_parameters_after_forward", "dp2 zero 2", ("shard", "all_gather"), (2, 2 * 6036 * 4)),
    ],
)
def test_a_collective_too_many_is_noticed(pool, plant, name, place, too_many):
    world_size, settings = CASES[name]
    for rank, steps in enumerate(pool.run(counted, settings, world_size, plant, world_size=world_size)):
        expected = planned(settings, world_size, rank)
        count, num_bytes = expected[place]
        assert steps == [{**expected, place: (count + too_many[0], num_bytes + too_many[1])}] * 2


def every_collective():
    """One of each, over the world."""
    mesh = build_mesh(Topology(tensor_parallel_size=2), device_type="cpu", shard_size=1)
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    x = torch.ones(6)
    with Counter(mesh) as counter:
        dist.all_reduce(x)
        dist.all_reduce(x, group=alone)
        dist.all_gather_into_tensor(torch.empty(12), x)
        dist.reduce_scatter_tensor(torch.empty(3), x)
        dist.send(x, 1) if dist.get_rank() == 0 else dist.recv(x, 0)
        gather_tokens(x, mesh.tp)
        with pytest.raises(KeyError, match="broadcast"):
            dist.broadcast(x, 0)
    return counter.table()


def test_the_counter_counts_every_way_to_communicate_and_refuses_what_it_does_not_know(pool):
    collectives = {("tp", "all_reduce"): (1, 24), ("tp", "all_gather"): (2, 96), ("tp", "reduce_scatter"): (1, 24)}
    messages = {("tp", "send"): (1, 24)}, {("tp", "receive"): (1, 24)}
    assert pool.run(every_collective, world_size=2) == [collectives | own for own in messages]
