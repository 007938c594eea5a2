"""Whatever the degrees, the numbers are those of one process: losses, gradient norms and weights of several steps, in float64."""

import functools
import itertools

import pytest
import torch

from tests.parallel.mutations import MUTATIONS
from tests.parallel.pool import RankError
from tests.parallel.training import train_steps

TOLERANCE = 1e-9  # float64, after two steps, the second with what the first left; what differs is the order of sums
# After twenty at this learning rate: the steps of a recurrence amplify a difference tenfold in four, those of the transformer do not at all.
LONG_TOLERANCE = 1e-5
BLOCKS = {
    "default": (),
    "whole": ("model.score=lorentz", "model.chain=both", "model.global_tokens=2"),
    "window": ("model.global_path=none",),
    "delta": ("model.global_path=delta", "model.chain=both"),
    "hybrid": ("model.global_path=delta", "model.local_window_size=[0,5]"),
    "delta-options": (
        "model.global_path=delta", "model.chain=gate", "model.global_gate=channel", "model.decay_floor=-5", "model.local_qk_norm=true",
        "model.global_activation=silu_with_values", "model.global_gate_activation=silu", "model.global_skip=true",
        "model.rotary=[true,false]",
    ),
    "transformer": ("model.block=transformer", "model.convolution_size=4"),
    "transformer-norm": ("model.block=transformer", "model.local_qk_norm=true"),
    "grouped": (
        "model.block=transformer", "model.num_kv_heads=2", "model.convolution_size=4", "model.local_qk_norm=true", "optim.name=muon",
        "model.rope_scaling.type=llama3", "model.rope_scaling.original_sequence_length=24",
    ),
    "low-rank": ("model.low_rank_rank=5", "model.ffn=low_rank_swiglu", "model.chain=both"),
    "experts": (
        "model.ffn=moe", "model.num_experts=4", "model.expert_ffn_size=16", "model.capacity_factor=1.0", "model.balance_loss_weight=0.3",
        "model.router_z_loss_weight=0.1", "model.router_bias_rate=0.01", "model.routed_scaling_factor=1.5",
        "model.init_std=0.3",
    ),
    "experts-dropless": (
        "model.ffn=moe", "model.num_experts=8", "model.top_k=3", "model.expert_ffn_size=8", "model.capacity_factor=null",
        "model.router_score=sigmoid", "model.shared_experts=1", "model.init_std=0.3",
    ),
    "muon": ("optim.name=muon", "optim.momentum_warmup_steps=3"),
    "muon, low-rank": ("optim.name=muon", "model.low_rank_rank=5"),
    "muon, experts": (
        "optim.name=muon", "model.ffn=moe", "model.num_experts=4", "model.expert_ffn_size=16", "model.capacity_factor=1.0", "model.init_std=0.3",
    ),
    "bf16 moments": ("optim.state_dtype=bf16",),
    "fp8 moments": ("optim.state_dtype=fp8",),
    "tied": ("model.tie_embeddings=true",),
    "embedding scalars": ("model.embedding_scalars=true", "model.num_layers=4", "model.tie_embeddings=true", "model.init_std=0.3"),
    "values": ("model.value_activation=silu", "model.global_gate_activation=silu", "model.init_std=0.3"),
    "values, transformer": ("model.value_activation=silu", "model.block=transformer", "model.init_std=0.3"),
    "embedding scalars, transformer": ("model.embedding_scalars=true", "model.block=transformer", "model.num_layers=3", "model.init_std=0.3"),
    "deep": ("model.num_layers=5",),
    "deep-tied": ("model.num_layers=4", "model.tie_embeddings=true"),
}
SUMS_OFFLOADED = "zero.offload_gradients=true"
OFFLOADED = ("zero.stage=3", "zero.offload_optimizer=cpu", "zero.offload_params=cpu")

INPUTS_OFFLOADED = ("train.recompute=full", "train.offload_activations=cpu")


def ranks(*, tp=1, pp=1, dp=1, cp=1, ep=1, stage=0, more=()):
    degrees = {"tensor": tp, "pipeline": pp, "context": cp, "expert": ep}
    return tp * pp * dp * cp, (*(f"parallel.{axis}_parallel_size={size}" for axis, size in degrees.items()), f"zero.stage={stage}", *more)


GPIPE = "parallel.pipeline_schedule=gpipe"
INTERLEAVED = ("parallel.pipeline_schedule=interleaved", "parallel.pipeline_chunks=2", "train.micro_batch_size=2")
QUICK = {
    "pp2": ("default", ranks(pp=2)),
    "pp2 gpipe": ("whole", ranks(pp=2, more=(GPIPE,))),
    "pp2 tied, short microbatches": ("tied", ranks(pp=2, more=("train.micro_batch_size=1",))),
    "pp4 of as many layers": ("deep", ranks(pp=4)),
    "pp2 interleaved": ("deep", ranks(pp=2, more=INTERLEAVED)),
    "pp2 interleaved tied": ("deep-tied", ranks(pp=2, more=INTERLEAVED)),
    "pp2 interleaved embedding scalars": ("embedding scalars", ranks(pp=2, more=INTERLEAVED)),
    "tp2 pp2 embedding scalars, selective": ("embedding scalars", ranks(tp=2, pp=2, more=("train.recompute=selective",))),
    "pp2 dp2 zero 3 embedding scalars, inputs offloaded": ("embedding scalars", ranks(pp=2, dp=2, stage=3, more=INPUTS_OFFLOADED)),
    "cp2 embedding scalars, transformer": ("embedding scalars, transformer", ranks(cp=2, more=("train.recompute=full",))),
    "tp2 pp2 embedding scalars, transformer": ("embedding scalars, transformer", ranks(tp=2, pp=2, stage=1)),
    "cp2 tp2 values": ("values", ranks(cp=2, tp=2)),
    "cp2 dp2 zero 3 values, transformer": ("values, transformer", ranks(cp=2, dp=2, stage=3)),
    "pp2 dp2 zero 0": ("default", ranks(pp=2, dp=2)),
    "pp2 dp2 zero 1": ("tied", ranks(pp=2, dp=2, stage=1)),
    "pp2 dp2 zero 2": ("low-rank", ranks(pp=2, dp=2, stage=2)),
    "pp2 dp2 zero 3 interleaved": ("deep-tied", ranks(pp=2, dp=2, stage=3, more=(*INTERLEAVED, "train.recompute=full"))),
    "tp2 pp2": ("transformer", ranks(tp=2, pp=2)),
    "tp2 pp2 interleaved, selective": ("deep-tied", ranks(tp=2, pp=2, more=(*INTERLEAVED, "train.recompute=selective"))),
    "tp2 pp2 delta, selective": ("delta", ranks(tp=2, pp=2, more=("train.recompute=selective",))),
    "tp2 pp2 dp2 zero 3": ("low-rank", ranks(tp=2, pp=2, dp=2, stage=3)),
    "pp2 dp2 zero 3 offloaded": ("tied", ranks(pp=2, dp=2, more=OFFLOADED)),
    "tp2": ("whole", ranks(tp=2)),
    "tp4": ("low-rank", ranks(tp=4)),
    "tp2 delta": ("delta", ranks(tp=2)),
    "tp2 delta, gate per channel, floor, norm of queries and keys, silu": ("delta-options", ranks(tp=2)),
    "tp2 low-rank": ("low-rank", ranks(tp=2)),
    "tp2 transformer": ("transformer", ranks(tp=2)),
    "tp2 transformer, norm of queries and keys": ("transformer-norm", ranks(tp=2)),
    "tp2 tied": ("tied", ranks(tp=2)),
    "dp2": ("default", ranks(dp=2)),
    "dp4 zero 1": ("default", ranks(dp=4, stage=1)),
    "dp2 zero 3": ("default", ranks(dp=2, stage=3)),
    "dp2 zero 3 delta, recomputation": ("delta", ranks(dp=2, stage=3, more=("train.recompute=full",))),
    "tp2 pp2 hybrid": ("hybrid", ranks(tp=2, pp=2)),
    "dp2 zero 2": ("tied", ranks(dp=2, stage=2)),
    "dp4 zero 3": ("low-rank", ranks(dp=4, stage=3)),
    "dp4 zero 3 in pairs": ("whole", ranks(dp=4, stage=3, more=("zero.shard_size=2",))),
    "dp2 zero 1, optimizer offloaded": ("default", ranks(dp=2, stage=1, more=("zero.offload_optimizer=cpu",))),
    "dp2 zero 3 offloaded": ("default", ranks(dp=2, more=OFFLOADED)),
    "dp2 whole, sums offloaded": ("default", ranks(dp=2, more=(*OFFLOADED, SUMS_OFFLOADED, "zero.shard_size=1", "train.micro_batch_size=1"))),
    "tp2 dp2 zero 2": ("default", ranks(tp=2, dp=2, stage=2)),
    "tp2 dp2 zero 0": ("whole", ranks(tp=2, dp=2)),
    "tp2 dp2 zero 3, accumulation": ("default", ranks(tp=2, dp=2, stage=3, more=("train.micro_batch_size=1",))),
    "tp2 dp2 zero 2, recomputation": ("transformer", ranks(tp=2, dp=2, stage=2, more=("train.recompute=full",))),
    "cp2": ("default", ranks(cp=2)),
    "cp4 delta, zero 3": ("delta-options", ranks(cp=4, stage=3, more=("train.recompute=full",))),
    "cp2 dp2 zero 1 in pairs": ("whole", ranks(cp=2, dp=2, stage=1, more=("zero.shard_size=2",))),
    "tp2 cp2": ("low-rank", ranks(tp=2, cp=2, more=("train.recompute=selective",))),
    "tp2 cp2 transformer": ("transformer", ranks(tp=2, cp=2, stage=3)),
    "tp2 pp2 dp2 zero 3, grouped": ("grouped", ranks(tp=2, pp=2, dp=2, stage=3)),
    "tp2 cp2 zero 3, grouped": ("grouped", ranks(tp=2, cp=2, stage=3)),
    "pp2 cp2": ("deep-tied", ranks(pp=2, cp=2, more=INTERLEAVED)),
    "tp2 pp2 cp2 zero 2": ("hybrid", ranks(tp=2, pp=2, cp=2, stage=2)),
    "tp2 experts": ("experts-dropless", ranks(tp=2)),
    "ep2": ("experts", ranks(dp=2, ep=2)),
    "ep2 dp4 zero 2 in pairs, accumulation": (
        "experts-dropless", ranks(dp=4, ep=2, stage=2, more=("zero.shard_size=2", "train.micro_batch_size=1")),
    ),
    "ep4 zero 2, optimizer offloaded": ("experts", ranks(dp=4, ep=4, stage=2, more=("zero.offload_optimizer=cpu",))),
    "ep2 dp4 zero 3 offloaded": ("experts", ranks(dp=4, ep=2, more=OFFLOADED)),
    "ep2 tp2 zero 3, accumulation": ("experts", ranks(dp=2, tp=2, ep=2, stage=3, more=("train.micro_batch_size=1",))),
    "ep2 pp2, one dense layer": ("experts-dropless", ranks(dp=2, pp=2, ep=2, more=("model.num_layers=4", "model.first_dense_layers=1"))),
    "ep2 cp2 dp2 zero 3, recomputation": ("experts", ranks(dp=2, cp=2, ep=2, stage=3, more=("train.recompute=full",))),
    "ep2 cp2 zero 0, recomputation": ("experts", ranks(dp=2, cp=2, ep=2, more=("train.recompute=full",))),
    "tp2 dp2 zero 3 offloaded inputs": ("whole", ranks(tp=2, dp=2, stage=3, more=INPUTS_OFFLOADED)),
    "pp2 cp2 offloaded inputs": ("deep-tied", ranks(pp=2, cp=2, more=(*INTERLEAVED, *INPUTS_OFFLOADED))),
    "tp2 dp2 zero 3, bf16 moments": ("bf16 moments", ranks(tp=2, dp=2, stage=3)),
    "pp2 dp2 zero 1, optimizer offloaded, bf16 moments": ("bf16 moments", ranks(pp=2, dp=2, stage=1, more=("zero.offload_optimizer=cpu",))),
    "tp2 dp2 zero 3, fp8 moments": ("fp8 moments", ranks(tp=2, dp=2, stage=3)),
    "pp2 dp2 zero 1, optimizer offloaded, fp8 moments": ("fp8 moments", ranks(pp=2, dp=2, stage=1, more=("zero.offload_optimizer=cpu",))),
    "tp2 muon": ("muon", ranks(tp=2)),
    "dp2 zero 3 offloaded, muon": ("muon", ranks(dp=2, more=OFFLOADED)),
    "tp2 dp2 zero 3, muon": ("muon, low-rank", ranks(tp=2, dp=2, stage=3)),
    "pp2 dp4 zero 1 in pairs, muon": ("muon", ranks(pp=2, dp=4, stage=1, more=("zero.shard_size=2",))),
    "ep2 tp2 zero 2, muon": ("muon, experts", ranks(dp=2, tp=2, ep=2, stage=2)),
    "tp2 dp2 zero 1, selective": ("low-rank", ranks(tp=2, dp=2, stage=1, more=("train.recompute=selective",))),
}
# Rows that differ from two others together only: what is in them, and more, is in the table of -m full as well.
ALSO = (
    "pp2 interleaved", "tp2 low-rank", "tp2 transformer", "tp2 tied", "dp4 zero 1", "dp4 zero 3", "tp2 dp2 zero 2", "tp4", "tp2 dp2 zero 0",
    "tp2 dp2 zero 3 offloaded inputs", "tp2 dp2 zero 1, selective", "tp2 dp2 zero 2, recomputation", "tp2 pp2 delta, selective", "tp2 delta",
    "tp2 cp2 transformer", "tp2 transformer, norm of queries and keys", "tp2 pp2 dp2 zero 3", "pp2 dp2 zero 0",
)  # fmt: skip
ACCUMULATION = ("train.micro_batch_size=1",)
# Eight layers at the other rate amplify 1e-15 to 7e-13 in four steps and to 0.1 in twenty.
SLOWLY = "optim.learning_rate=1e-3"
SCHEDULES = {
    "gpipe": (GPIPE, *ACCUMULATION),
    "1f1b": ACCUMULATION,
    "interleaved": (*INTERLEAVED, *ACCUMULATION),
}


def degrees(*, with_stages):
    """Every (tp, pp, dp) of two to eight ranks."""
    sizes = itertools.product((1, 2, 4), (2, 4) if with_stages else (1,), (1, 2, 4) if with_stages else (1, 2, 4, 8))
    return [(tp, pp, dp) for tp, pp, dp in sizes if 1 < tp * pp * dp <= 8]


FULL = [
    (block, ranks(tp=tp, dp=dp, stage=stage, more=more))
    for block in BLOCKS
    if not block.startswith(("deep", "muon"))
    for tp, _, dp in degrees(with_stages=False)
    for stage in (range(4) if dp > 1 else (0,))
    for more in ((), ACCUMULATION)
    if dp < 8 or more  # eight ranks have one sequence each
] + [
    (block, ranks(tp=tp, pp=pp, dp=dp, stage=stage, more=(*SCHEDULES[schedule], f"model.num_layers={layers}", SLOWLY)))
    for block in BLOCKS
    if not block.startswith("deep")
    for tp, pp, dp in degrees(with_stages=True)
    for number, stage in enumerate(range(4) if dp > 1 else (0,))
    for schedule in (SCHEDULES if tp == dp == 1 else [["1f1b", "interleaved"][number % 2]])  # alone each schedule, else in turn
    for layers in [pp * (2 if schedule == "interleaved" else 1)]
] + [
    (block, ranks(tp=tp, pp=pp, dp=dp, cp=cp, stage=stage, more=(SLOWLY,)))
    for block in BLOCKS
    if not block.startswith("deep")
    for cp, tp, pp, dp in itertools.product((2, 4, 8), (1, 2), (1, 2), (1, 2))
    if cp * tp * pp * dp <= 8
    for stage in (0, 3)
] + [
    (block, ranks(tp=tp, pp=pp, dp=dp, cp=cp, ep=ep, stage=stage, more=(SLOWLY,)))
    for block in ("experts", "experts-dropless")
    for ep, tp, pp, cp, dp in itertools.product((2, 4), (1, 2), (1, 2), (1, 2), (2, 4))
    if dp % ep == 0 and tp * pp * cp * dp <= 8
    for stage in range(4)
]


@functools.cache
def one_process(block, num_steps, settings=()):
    """All sequences in one microbatch: nothing depends on how they are cut."""
    return train_steps((*BLOCKS[block], *settings, "train.micro_batch_size=8"), num_steps)


def largest_difference(found, expected):
    """Over losses, norms and weights, relative to the largest value of each; and what differs most."""
    (steps, weights), (expected_steps, expected_weights) = found, expected
    assert weights.keys() == expected_weights.keys() and len(steps) == len(expected_steps)
    differences = {
        f"{name} of step {number}": abs(ours / theirs - 1)
        for number, (step, expected_step) in enumerate(zip(steps, expected_steps, strict=True))
        for name, ours, theirs in zip(("loss", "gradient norm"), step, expected_step, strict=True)
    }
    differences |= {
        name: ((weights[name] - value).abs().max() / value.abs().max()).item() for name, value in expected_weights.items()
    }
    return max(((difference if difference == difference else float("inf")), name) for name, difference in differences.items())


def difference_to_one_process(pool, block, world_size, settings, *, num_steps, mutation=None):
    seconds = max(120.0, 30.0 * num_steps)  # eight ranks may have two cores, and other work beside them
    same = tuple(setting for setting in settings if setting.startswith(("model.", "optim.")))
    found = pool.run(train_steps, (*BLOCKS[block], *settings), num_steps, world_size, mutation, world_size=world_size, timeout_seconds=seconds)
    assert mutation or all(steps == found[0][0] for steps, _ in found)  # every rank reports the same
    return largest_difference(found[0], one_process(block, num_steps, same))


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.full) if name in ALSO else name for name in QUICK])
def test_equals_one_process(pool, name):
    block, (world_size, settings) = QUICK[name]
    difference, where = difference_to_one_process(pool, block, world_size, settings, num_steps=2)
    assert difference < TOLERANCE, where


@pytest.mark.full
@pytest.mark.parametrize(("block", "case"), FULL, ids=[f"{block}-{'-'.join((str(n), *s))}" for block, (n, s) in FULL])
def test_twenty_steps_equal_one_process(pool, block, case):
    world_size, settings = case
    difference, where = difference_to_one_process(pool, block, world_size, settings, num_steps=20)
    assert difference < LONG_TOLERANCE, where


# Where a mistake shows: tensor parallelism, data parallelism, or both.
SHOWS_ON = {
    "tensor": ("low-rank", ranks(tp=2)),
    "tensor, delta": ("delta", ranks(tp=2)),
    "tensor, options": ("delta-options", ranks(tp=2)),
    "data": ("default", ranks(dp=2, stage=3)),
    "both": ("default", ranks(tp=2, dp=2, stage=2)),
    "stages": ("tied", ranks(pp=2, more=("train.micro_batch_size=2",))),
    "slices": ("whole", ranks(cp=2)),
    "slices, delta": ("delta", ranks(cp=2)),
    "experts": ("experts", ranks(dp=2, ep=2)),
    "counted experts": ("experts-dropless", ranks(dp=2, ep=2)),
    "experts, tensor": ("experts", ranks(tp=2)),
    "experts, slices": ("experts", ranks(cp=2)),
    "more slices": ("whole", ranks(cp=4)),  # of two slices, none has one before it and one after it
    "matrices in parts": ("muon", ranks(dp=2, stage=1)),
    "stages and data": ("tied", ranks(pp=2, dp=2, more=("train.micro_batch_size=2",))),
}
PLACE = {
    "no_reduction_in_scatter": "tensor", "swapped_neighbours": "tensor", "sum_is_local": "both", "local_count_of_targets": "data",
    "norm_counts_replicas_twice": "both", "norm_of_one_shard": "data", "plain_to_local": "both", "average_over_data_ranks": "data",
    "never_synchronised": "data", "same_data_everywhere": "data", "another_ranks_part": "tensor", "largest_logit_is_local": "tensor",
    "gradient_stays_a_summand": "tensor", "embedding_of_one_rank": "tensor", "first_id_of_the_first": "tensor", "extra_all_reduce": "both",
    "copies_not_summed": "stages", "copies_counted_twice": "stages", "gradient_of_another_microbatch": "stages",
    "synchronised_too_early": "stages and data", "scalars_of_the_neighbour": "tensor, delta",
    "gate_of_one_rank_has_its_gradient": "tensor, options",
    "lengths_of_the_neighbour": "tensor, options",
    "state_begins_anew": "slices", "gradient_of_the_memory_stays": "slices", "memory_of_the_delta_rule_begins_anew": "slices, delta",
    "decay_of_slices_is_forgotten": "more slices", "tokens_one_too_early": "slices",
    "gradients_of_fetched_tokens_stay": "slices", "every_slice_begins_at_zero": "slices", "documents_end_with_slices": "slices",
    "chain_without_gradient_of_later_slices": "slices",
    "rows_of_another_rank": "experts", "rows_of_another_expert": "counted experts", "gradients_of_rows_stay": "experts",
    "counts_are_not_told": "experts",
    "norm_without_experts_of_others": "experts", "routers_learn_from_own_tokens": "experts", "experts_of_another_rank": "experts",
    "parts_are_orthogonalised": "matrices in parts", "elements_arrive_one_too_late": "matrices in parts",
    "router_of_one_tensor_rank": "experts, tensor", "room_of_experts_begins_anew": "experts, slices",
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mistake_is_noticed(pool, mutation):
    block, (world_size, settings) = SHOWS_ON[PLACE[mutation]]
    try:
        difference, _ = difference_to_one_process(pool, block, world_size, settings, num_steps=2, mutation=mutation)
    except (RuntimeError, RankError):
        return  # an error is noticed, too
    assert difference > 1e-6


def test_one_process_is_trained_at_all():
    steps, weights = one_process("default", 3)
    assert steps[-1][0] != steps[0][0] and all(torch.isfinite(value).all() for value in weights.values())
