"""What ranks really hold is what the planner says: parameters and optimizer to the byte, the peak of a step in a known ratio."""

import math
import os
from unittest import mock

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from phase8.config.auto import without_auto
from phase8.config.batch import batch_shape, run_topology
from phase8.config.load import load_config
from phase8.distributed.mesh import build_mesh
from phase8.plan.whole_config import plan_stages
from phase8.precision.policy import compute_dtype
from phase8.train.engine import stage as stage_module
from phase8.train.engine.step import train_step
from phase8.train.engine.train_state import build_train_state
from phase8.zero.fsdp import shard_size, sum_gradients_after
from tests.parallel.test_parity import OFFLOADED, SUMS_OFFLOADED
from tests.parallel.training import microbatch_of_slice, new_train_state, take_step

# Wide enough that parameters and what is kept for backward weigh more than what lives for a moment.
MODEL = (
    "model.d_model=64", "model.num_layers=4", "model.num_heads=4", "model.vocab_size=640", "model.sequence_length=32",
    "model.local_window_size=8", "train.global_batch_size=4", "train.micro_batch_size=1", "precision.dtype=fp32",
)  # fmt: skip


class LiveBytes(TorchDispatchMode):
    """The memory of all tensors that operators have made, now and at its peak; counted where it may be higher than ever."""

    @classmethod
    def _should_skip_dynamo(cls):
        """Nothing is compiled here: without the guard that keeps the compiler out, an operator takes half the time."""
        return False

    def __init__(self):
        super().__init__()
        self._storages, self._sizes, self._at_most, self.peak = {}, {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # first DTensor: it becomes operators on plain tensors
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:  # what a product copies for oneDNN has no storage, and is small
                storage = tensor.untyped_storage()
                if storage._cdata not in self._storages or self._storages[storage._cdata].expired():
                    self._at_most += storage.nbytes() - self._sizes.get(storage._cdata, 0)
                    self._storages[storage._cdata] = StorageWeakRef(storage)
                    self._sizes[storage._cdata] = storage.nbytes()
        if self._at_most > self.peak:
            self.peak = max(self.peak, self.now())
        return result

    def now(self):
        """Bytes of the tensors that are still there; FSDP empties some without freeing them, and fills them again."""
        opened, sizes, total, gone = torch.UntypedStorage._new_with_weak_ptr, self._sizes, 0, []
        for key, reference in self._storages.items():
            storage = opened(reference.cdata)
            if storage is None:
                gone.append(key)
            else:
                size = storage.nbytes()
                total += size
                if size > sizes[key]:
                    self._at_most += size - sizes[key]
                    sizes[key] = size
        for key in gone:
            del self._storages[key]
            self._at_most -= sizes.pop(key)
        return total


def held(settings, world_size):
    """Parameters between steps, bytes of the optimizer's states, and the peak of the second step."""
    config = without_auto(load_config(os.devnull, [*MODEL, *settings]))
    topology = run_topology(config.parallel, world_size=world_size)
    shape = batch_shape(config.train, config.parallel, data_parallel_size=topology.data_parallel_size)
    with LiveBytes() as live:
        size = shard_size(config.zero, num_token_ranks=topology.num_token_ranks)
        mesh = build_mesh(topology, device_type="cpu", shard_size=size)
        train_state = build_train_state(config, mesh=mesh, device=torch.device("cpu"), dtype=compute_dtype(config.precision))
        samples = torch.randint(config.model.vocab_size, (shape.num_microbatches, shape.micro_batch_size, config.model.sequence_length + 1))
        microbatches = [microbatch_of_slice(tokens, None, mesh.own_slice) for tokens in samples]
        for live.peak in (math.inf, 0):  # what is highest in the first step is not looked for
            train_step(train_state, microbatches, learning_rate=1e-3, gradient_clip_norm=1.0)
    parameters = [each.to_local() if isinstance(each, DTensor) else each for each in train_state.stage.module.parameters()]
    moments = [value for state in train_state.optimizer.state.values() for name, value in state.items() if name != "step"]
    return sum(each.numel() for each in parameters), sum(each.nbytes for each in moments), live.peak


def case(world_size, *settings, tp=1, pp=1, stage=0):
    return world_size, (f"parallel.tensor_parallel_size={tp}", f"parallel.pipeline_parallel_size={pp}", f"zero.stage={stage}", *settings)


EXPERTS, EP2 = ("model.ffn=moe", "model.num_experts=4", "model.expert_ffn_size=64"), ("parallel.expert_parallel_size=2",)
FULL, INPUTS_OFFLOADED = "train.recompute=full", "train.offload_activations=cpu"
SHALLOW = ("model.num_layers=2",)
LONG = ("model.sequence_length=256", "train.global_batch_size=2")
SLICES = ("train.recompute=slices", "train.recompute_slice_tokens=32", *LONG)
INTERLEAVED = ("parallel.pipeline_schedule=interleaved", "parallel.pipeline_chunks=2")
CASES = {
    "one": case(1),
    "one full": case(1, FULL),
    "one in slices": case(1, *SLICES),
    "one full, inputs offloaded": case(1, FULL, INPUTS_OFFLOADED, *LONG),
    "one in slices, inputs offloaded": case(1, *SLICES, INPUTS_OFFLOADED),
    "one full, one microbatch": case(1, FULL, "train.global_batch_size=1"),
    "cp2 full": case(2, FULL, "parallel.context_parallel_size=2", "model.sequence_length=64"),
    "cp2": case(2, "parallel.context_parallel_size=2", "model.sequence_length=64"),
    "tp2": case(2, tp=2),
    "tp2 uneven vocabulary": case(2, "model.vocab_size=637", tp=2),
    "tp2 low-rank": case(2, "model.low_rank_rank=4", "model.ffn=low_rank_swiglu", tp=2),
    "one delta": case(1, "model.global_path=delta"),
    "tp2 gate per channel": case(2, "model.global_path=delta", "model.global_gate=channel", tp=2),
    "tp2 delta, chain": case(2, "model.global_path=delta", "model.chain=both", tp=2),
    **{f"dp2 zero {stage}": case(2, stage=stage) for stage in range(4)},
    "dp2 zero 0, one microbatch": case(2, "train.global_batch_size=8", "train.micro_batch_size=4"),
    "dp2 zero 3 in bf16": case(2, "precision.dtype=bf16", stage=3),
    "dp2 zero 3, full": case(2, FULL, stage=3),
    "dp4 zero 1 in pairs": case(4, *SHALLOW, "zero.shard_size=2", "train.global_batch_size=8", stage=1),
    "dp2 zero 1, offloaded optimizer": case(2, "zero.offload_optimizer=cpu", stage=1),
    "dp2 zero 3, offloaded": case(2, "zero.offload_optimizer=cpu", "zero.offload_params=cpu", stage=3),
    "one zero 3, offloaded": case(1, *OFFLOADED[1:], SUMS_OFFLOADED, FULL, "train.global_batch_size=1", stage=3),
    "pp2": case(2, pp=2),
    "pp2 full": case(2, FULL, pp=2),
    "one embedding scalars": case(1, "model.embedding_scalars=true"),
    "one full, embedding scalars, inputs offloaded": case(1, FULL, INPUTS_OFFLOADED, *LONG, "model.embedding_scalars=true"),
    "pp2 full, embedding scalars": case(2, FULL, "model.embedding_scalars=true", pp=2),
    "pp2 interleaved, embedding scalars": case(2, *INTERLEAVED, "model.embedding_scalars=true", pp=2),
    "pp2 full, inputs offloaded": case(2, FULL, INPUTS_OFFLOADED, pp=2),
    "pp2 gpipe": case(2, "parallel.pipeline_schedule=gpipe", pp=2),
    "pp2 interleaved": case(2, *INTERLEAVED, pp=2),
    "pp2 tied": case(2, "model.tie_embeddings=true", pp=2),
    "tp2 dp2 zero 1": case(4, *SHALLOW, tp=2, stage=1),
    "pp2 dp2 zero 1": case(4, "train.global_batch_size=8", pp=2, stage=1),
    "pp2 dp2 zero 3": case(4, "train.global_batch_size=8", pp=2, stage=3),
    "tp2 pp2": case(4, tp=2, pp=2),
    "one with experts": case(1, *EXPERTS),
    "tp2 experts": case(2, *EXPERTS, tp=2),
    "ep2 zero 0": case(2, *EXPERTS, *EP2),
    "ep2 dp4 zero 3": case(4, *EXPERTS, *EP2, "model.num_layers=3", "train.global_batch_size=8", stage=3),
    "ep2 dropless, pp2": case(4, *EXPERTS, *EP2, "model.capacity_factor=null", "model.first_dense_layers=1", pp=2),
}
ALSO = (  # their parts are in other cases
    "one in slices, inputs offloaded", "dp2 zero 3, full", "pp2 dp2 zero 1", "dp2 zero 0, one microbatch", "tp2 experts", "tp2 gate per channel",
    "tp2", "tp2 uneven vocabulary", "ep2 zero 0", "pp2 full", "pp2 gpipe", "one full", "dp2 zero 0", "dp2 zero 1", "dp2 zero 3", "tp2 pp2",
)  # fmt: skip


# Planned bytes over those that were measured, for each stage. Without a GPU nothing is gathered or summed ahead, for which the plan has room, and
# what lives for a moment weighs more in such small models than in large ones. The ratios are the same every time but for some hundred bytes, so
# whatever a plan forgets shows: the least of it, a message between stages, is 0.6 %. Another ratio needs a reason.
PLANNED_OVER_MEASURED = {
    "one": (0.977,), "one full": (0.985,), "one in slices": (0.954,), "one full, inputs offloaded": (0.946,),
    "one in slices, inputs offloaded": (0.963,), "one full, one microbatch": (1.009,), "cp2 full": (1.036,), "cp2": (1.012,), "tp2": (0.959,),
    "tp2 uneven vocabulary": (0.959,), "tp2 low-rank": (0.919,), "one delta": (0.977,), "tp2 gate per channel": (0.960,),
    "tp2 delta, chain": (0.960,), "dp2 zero 0": (1.018,), "dp2 zero 1": (1.022,), "dp2 zero 2": (1.067,), "dp2 zero 3": (1.089,),
    "dp2 zero 0, one microbatch": (1.131,), "dp2 zero 3 in bf16": (1.097,), "dp2 zero 3, full": (1.065,), "dp4 zero 1 in pairs": (1.037,),
    "dp2 zero 1, offloaded optimizer": (1.018,), "dp2 zero 3, offloaded": (1.089,), "one zero 3, offloaded": (1.020,),
    "pp2": (0.984, 0.958), "pp2 full": (0.975, 0.976), "pp2 full, inputs offloaded": (0.976, 0.976),
    "pp2 gpipe": (1.085, 1.069), "pp2 interleaved": (0.987, 0.961), "pp2 tied": (0.984, 0.958),
    "tp2 dp2 zero 1": (1.009,), "pp2 dp2 zero 1": (1.034, 1.016), "pp2 dp2 zero 3": (1.124, 1.107), "tp2 pp2": (0.971, 0.931),
    "one with experts": (0.978,), "tp2 experts": (0.961,), "ep2 zero 0": (1.019,), "ep2 dp4 zero 3": (1.140,),
    "ep2 dropless, pp2": (1.171, 1.006),
    "one embedding scalars": (0.977,), "one full, embedding scalars, inputs offloaded": (0.961,), "pp2 full, embedding scalars": (0.979, 0.978),
    "pp2 interleaved, embedding scalars": (0.988, 0.957),
}  # fmt: skip
TOLERANCE = 0.005


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.full) if name in ALSO else name for name in CASES])
def test_ranks_hold_what_the_planner_says(pool, name):
    world_size, settings = CASES[name]
    stages = plan_stages(without_auto(load_config(os.devnull, [*MODEL, *settings])), world_size=world_size, device_type="cpu")
    found = pool.run(held, settings, world_size, world_size=world_size)
    ratios = []
    for stage in stages:
        num_parameters, moments, peak = found[stage.stage * world_size // len(stages)]
        plan = stage.memory
        assert (num_parameters, moments) == (stage.num_parameters, 8 * stage.num_parameters)
        if INPUTS_OFFLOADED not in settings:
            assert plan.optimizer_bytes + plan.host_bytes // 2 == moments  # half of what is offloaded are moments
        # Without a GPU host memory is all there is. Sums of gradients that go to the host are there already.
        twice = 4 * num_parameters if "zero.offload_params=cpu" in settings else 0
        ratios.append((plan.total_bytes + plan.host_bytes - twice) / peak)
    assert ratios == pytest.approx(PLANNED_OVER_MEASURED[name], abs=TOLERANCE)


def offloaded_parts_with_gradients(settings, world_size):
    """A job: before the backward of each microbatch, of how many offloaded parameters the host has gradients."""
    config = without_auto(load_config(os.devnull, [*MODEL, *OFFLOADED, *settings]))
    state = new_train_state(config, world_size, device_type="cpu", dtype=torch.float32)
    found, parts = [], list(state.model.parameters())  # later those of embedding and head are the gathered ones

    def counted(model, zero, *, is_last):
        found.append(sum(part.grad is not None for part in parts))
        sum_gradients_after(model, zero, is_last=is_last)

    with mock.patch.object(stage_module, "sum_gradients_after", counted):
        take_step(state, config, 0)
    return found, len(parts)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("is_told_to", [False, True])
def test_gradients_go_to_the_host_once_a_step_unless_it_is_told_to_sum_them(pool, world_size, is_told_to):
    """A microbatch of phase8_1b has 5 GB of them."""
    settings = (f"train.global_batch_size={3 * world_size}", f"zero.offload_gradients={str(is_told_to).lower()}")
    for found, number in pool.run(offloaded_parts_with_gradients, settings, world_size, world_size=world_size):
        assert found == [0, *(2 * [number if is_told_to else 0])]


def names_of_meshes(settings, world_size):
    config = without_auto(load_config(os.devnull, [*MODEL, *settings]))
    state = new_train_state(config, world_size, device_type="cpu", dtype=torch.float32)
    return {parameter.device_mesh.mesh_dim_names for parameter in state.stage.module.parameters()}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (("zero.stage=3",), {("shard",)}),
        (("zero.stage=3", "zero.shard_size=1"), {("replicate", "shard")}),
        (("zero.stage=1", "parallel.expert_parallel_size=2", "model.ffn=moe", "model.num_experts=2"), {("shard",), ("shard", "ep")}),
        ((*OFFLOADED, "train.global_batch_size=2"), {("shard",)}),
        ((*OFFLOADED, SUMS_OFFLOADED), {("shard",)}),
    ],
)
def test_fsdp_has_a_dim_of_replicas_only_where_it_sums_late(pool, settings, expected):
    """With one, if only of one rank, it keeps the summed gradients of each block until the end of backward: of 48 offloaded ones 36 GB."""
    for found in pool.run(names_of_meshes, settings, 2, world_size=2):
        assert found == expected
