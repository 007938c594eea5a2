"""The figures by hand, on a model small enough for it; that ranks really do so is tested in tests/parallel/test_communication.py."""

from collections import Counter

import pytest

from phase8.config.model_section import ModelSection
from phase8.division import DividedShape
from phase8.exchanges import Exchange, Operation
from phase8.pipeline_parallel.lowering import Receive, Send, channels_of, lower
from phase8.pipeline_parallel.schedules import build_schedule
from phase8.plan.chunks import chunk_exchanges
from phase8.plan.communication import (
    Chunk,
    Collectives,
    Grid,
    Step,
    messages_of_stage,
    step_communication,
)
from phase8.topology import AxisName

ALL_GATHER, REDUCE_SCATTER, ALL_REDUCE = Operation.ALL_GATHER, Operation.REDUCE_SCATTER, Operation.ALL_REDUCE
TP, SHARD, REPLICATE, PP = AxisName.TENSOR, AxisName.SHARD, AxisName.REPLICATE, AxisName.PIPELINE
# D 8, two heads; a microbatch of one sequence has 16 tokens, 16 * 8 numbers of two bytes: 256 bytes.
SHAPE = {"d_model": 8, "num_layers": 2, "num_heads": 2, "vocab_size": 11, "sequence_length": 16, "ffn_size": 12, "local_window_size": 4}
SHAPE |= {"global_path": "linear"}
NORM, MATRIX, EMBEDDING = DividedShape((8,)), DividedShape((6, 8), {"tp": 0}), DividedShape((11, 8), {"tp": 0})


def section(**changes):
    return ModelSection(**{**SHAPE, **changes})


def chunks_of(model, *layers):
    """Chunks of one norm and one matrix a block; the ends have embedding and norm."""
    layers = layers or (range(model.num_layers),)
    found = []
    for each in layers:
        blocks = tuple({f"blocks.{layer}.norm": NORM, f"blocks.{layer}.matrix": MATRIX} for layer in each)
        begins, ends = each.start == 0, each.stop == model.num_layers
        rest = {"embedding.weight": EMBEDDING} if begins or (ends and model.tie_embeddings) else {}
        found.append(Chunk(each, blocks, {**rest, "norm.weight": NORM} if ends else rest))
    return found


def table(model, *, grid, microbatches=1, chunks=None, exchanges=None, recompute="none", recompute_every_n_layers=1, **step):
    step, chunks = Step(num_microbatches=microbatches, **{"micro_batch_size": 1, "compute_bytes": 2, **step}), chunks or chunks_of(model)
    how = {"recompute": recompute, "recompute_every_n_layers": recompute_every_n_layers, "is_divided": grid.tensor > 1}
    counted = [chunk_exchanges(model, chunk.layers, **how) for chunk in chunks] if exchanges is None else [Counter(exchanges)]
    declared = sum(counted, Counter())
    found = step_communication(model, chunks, declared, step=step, grid=grid)
    assert [(each.axis, each.operation) for each in found] == sorted({(each.axis, each.operation) for each in found})
    return {(each.axis, each.operation): (each.count, each.num_bytes) for each in found}


def test_one_rank_communicates_nothing():
    assert table(section(tie_embeddings=True), grid=Grid(), zero_stage=3, microbatches=3) == {}


def test_tensor_parallel_layers_gather_and_scatter_tokens():
    """A layer gathers for columns (twice with backward), scalars and rows in both halves; scatters as often, but for what is gathered again."""
    scalar = section(global_gate="scalar")
    found = table(scalar, grid=Grid(tensor=2))
    scalars = 16 * 4 * 4  # two scalars of two heads in fp32
    assert found == {
        (TP, ALL_GATHER): (2 * (6 + 1) + 2, (2 * 6 + 2) * 256 + 2 * scalars),
        (TP, REDUCE_SCATTER): (2 * (4 + 1) + 2, (2 * 4 + 2) * 256 + 2 * scalars),
        # Loss; gradients of three norms; both flags and norm.
        (TP, ALL_REDUCE): (2 + 1 + 2, 3 * 16 * 4 + 3 * 8 * 4 + 3 * 4),
    }
    twice = table(scalar, grid=Grid(tensor=2), microbatches=2)
    assert twice[TP, ALL_GATHER] == tuple(2 * number for number in found[TP, ALL_GATHER])
    assert twice[TP, ALL_REDUCE] == (2 * 2 + 1 + 2, 2 * 3 * 16 * 4 + 3 * 8 * 4 + 3 * 4)


def test_exchanges_are_summed_as_declared():
    """A microbatch has 16 tokens; numbers have two bytes, wide ones four; one collective takes three tokens of each of two ranks."""
    base = table(section(), grid=Grid(tensor=2), microbatches=3, exchanges=())
    plain, wide = Exchange(ALL_GATHER, 5), Exchange(REDUCE_SCATTER, 5, is_wide=True)
    several = Exchange(ALL_REDUCE, 2, is_wide=True, tokens_per_rank=3)
    elsewhere = Exchange(ALL_GATHER, 7, axis="shard")
    found = table(section(), grid=Grid(tensor=2), microbatches=3, exchanges=(plain, plain, wide, several, elsewhere))
    count, num_bytes = base[TP, ALL_REDUCE]
    assert found == {
        (TP, ALL_GATHER): (3 * 2, 3 * 2 * 16 * 5 * 2),
        (TP, REDUCE_SCATTER): (3, 3 * 16 * 5 * 4),
        (TP, ALL_REDUCE): (count + 3 * 3, num_bytes + 3 * 16 * 2 * 4),
    }
    assert table(section(), grid=Grid(tensor=2), exchanges=(wide,), compute_bytes=8)[TP, REDUCE_SCATTER] == (1, 16 * 5 * 8)


def test_the_transformer_and_the_window_alone_have_no_scalars_and_chain_and_delta_rule_have_one_more_each():
    expected = (2 * 6 + 2, (2 * 6 + 2) * 256)
    for changes in ({"block": "transformer"}, {"global_path": "none", "score": "dot"}):
        assert table(section(**changes), grid=Grid(tensor=2))[TP, ALL_GATHER] == expected
    for changes, scalars in (({"chain": "both"}, 3), ({"global_path": "delta"}, 3), ({"global_path": "delta", "chain": "both"}, 4)):
        found = table(section(**changes, global_gate="scalar"), grid=Grid(tensor=2))[TP, ALL_GATHER]
        assert found == (expected[0] + 2, expected[1] + 2 * 16 * 2 * scalars * 4)


def test_a_gate_per_channel_exchanges_its_bottleneck_instead_of_a_scalar():
    scalar, channel = (table(section(global_path="delta", global_gate=gate), grid=Grid(tensor=2)) for gate in ("scalar", "channel"))
    head_size = 8 // 2  # of two heads, for two layers of 16 tokens; a scalar is a number of fp32 for each head
    more = 2 * 16 * (head_size * 2 - 2 * 4)
    for operation in (ALL_GATHER, REDUCE_SCATTER):
        count, num_bytes = scalar[TP, operation]
        assert channel[TP, operation] == (count + 2, num_bytes + more)


def test_low_rank_pairs_exchange_their_bottleneck():
    found = table(section(block="transformer", low_rank_rank=3, ffn="low_rank_swiglu"), grid=Grid(tensor=2))
    widths = 3 * 3 + 3 + 2 * 3 + 3
    assert found[TP, ALL_GATHER] == found[TP, REDUCE_SCATTER] == (2 * 4 + 2, 2 * 16 * widths * 2 + 2 * 256)


@pytest.mark.parametrize(
    ("recompute", "low_rank", "gathers", "scatters"),
    [("full", {}, 2, 1), ("selective", {}, 1, 0), ("full", {"low_rank_rank": 8}, 2, 1), ("selective", {"low_rank_rank": 8}, 1, 1)],
)
def test_recomputation_repeats_the_forward_but_for_a_dense_row_at_its_end(recompute, low_rank, gathers, scatters):
    model = section(block="transformer", **low_rank)
    base, found = (table(model, grid=Grid(tensor=2), recompute=how) for how in ("none", recompute))
    assert found[TP, ALL_GATHER][0] - base[TP, ALL_GATHER][0] == 2 * gathers
    assert found[TP, REDUCE_SCATTER][0] - base[TP, REDUCE_SCATTER][0] == 2 * scatters
    every_second = table(model, grid=Grid(tensor=2), recompute=recompute, recompute_every_n_layers=2)
    assert every_second[TP, ALL_GATHER][0] - base[TP, ALL_GATHER][0] == gathers


BLOCK_NUMBERS, REST_NUMBERS = (8 + 8 * 8), (12 * 8 + 8)  # of four shards: 6 rows become 8, 11 become 12


@pytest.mark.parametrize(
    ("stage", "block_gathers", "rest_gathers", "sums"),
    [(1, 1, 1, 1), (2, 1, 1, 2), (3, 4, 2, 2)],  # of two microbatches; stage 3 gathers blocks for each use, the rest for each microbatch
)
def test_zero_gathers_parameters_and_scatters_gradients(stage, block_gathers, rest_gathers, sums):
    found = table(section(), grid=Grid(shard=4, replicate=2), microbatches=2, zero_stage=stage)
    whole = 2 * BLOCK_NUMBERS + REST_NUMBERS
    assert found == {
        (SHARD, ALL_GATHER): (2 * block_gathers + rest_gathers, 4 * (2 * block_gathers * BLOCK_NUMBERS + rest_gathers * REST_NUMBERS)),
        (SHARD, REDUCE_SCATTER): (3 * sums, sums * 4 * whole),
        (SHARD, ALL_REDUCE): (4, 8 + 4 * 4),
        (REPLICATE, ALL_REDUCE): (3 + 3, whole + 8 + 3 * 4),
    }


def test_replicas_sum_all_gradients_once():
    found = table(section(), grid=Grid(replicate=2), microbatches=3)
    assert found == {(REPLICATE, ALL_REDUCE): (3 + 3, 4 * (2 * (8 + 48) + 88 + 8) + 8 + 3 * 4)}


def test_parts_of_a_rank_count():
    """11 rows over two tensor ranks are 6 and 5; over four shards of those, both become 8."""
    first, last = (table(section(), grid=Grid(replicate=2, tensor=2, tensor_index=index)) for index in range(2))
    assert first[REPLICATE, ALL_REDUCE][1] - last[REPLICATE, ALL_REDUCE][1] == 8 * 4
    first, last = (table(section(), grid=Grid(shard=4, tensor=2, tensor_index=index), zero_stage=2) for index in range(2))
    assert first == last


def test_gradients_of_whole_parameters_are_summed_as_often_as_fsdp_sums():
    counts = {
        name: table(section(), grid=grid, microbatches=3, **step)[TP, ALL_REDUCE][0] - 3 * 2 - 2
        for name, grid, step in (
            ("alone", Grid(tensor=2), {"zero_stage": 0}),
            ("stage 1", Grid(tensor=2, shard=2), {"zero_stage": 1}),
            ("stage 2", Grid(tensor=2, shard=2), {"zero_stage": 2}),
            ("alone, stage 3", Grid(tensor=2), {"zero_stage": 3}),
            ("offloaded", Grid(tensor=2), {"zero_stage": 3, "offload_params": True}),
        )
    }
    assert counts == {"alone": 1, "stage 1": 3, "stage 2": 9, "alone, stage 3": 1, "offloaded": 9}


SIZES = [("1f1b", 1, 3, 1), *((name, P, M, 1) for name in ("gpipe", "1f1b") for P in (2, 3, 4) for M in (1, 5))]
SIZES += [("interleaved", P, 2 * P, V) for P in (2, 3) for V in (2, 3)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_messages_are_those_of_the_lowered_programs(size):
    name, P, M, V = size
    programs = lower(build_schedule(name, num_stages=P, num_microbatches=M, num_chunks=V))
    channels = channels_of(programs)
    model = section(num_layers=P * V)
    for stage, program in enumerate(programs):
        layers = [range(chunk * P + stage, chunk * P + stage + 1) for chunk in range(V)]
        found = table(model, grid=Grid(pipeline=P, stage=stage), microbatches=M, chunks=chunks_of(model, *layers))
        for operation, kind, end in ((Operation.SEND, Send, "source"), (Operation.RECEIVE, Receive, "destination")):
            messages = sum(isinstance(instruction, kind) for instruction in program)
            agreements = sum(getattr(channel, end) == stage for channel in channels)
            expected = (messages + agreements, messages * 256 + agreements * 8)
            assert found.get((PP, operation), (0, 0)) == expected
        assert sum(messages_of_stage(num_stages=P, num_chunks=V, stage=stage)) * M == messages


def test_a_stage_has_its_own_layers_and_tensor_ranks_send_their_tokens():
    model, grid = section(block="transformer"), {"pipeline": 2, "tensor": 2}
    first, last = (
        table(model, grid=Grid(**grid, stage=stage), microbatches=4, chunks=chunks_of(model, range(stage, stage + 1))) for stage in range(2)
    )
    assert first[TP, ALL_GATHER] == last[TP, ALL_GATHER] == (4 * 7, 4 * 7 * 256)
    # The embedding needs no all-reduce; the loss does.
    assert (first[TP, ALL_REDUCE][0], last[TP, ALL_REDUCE][0]) == (1 + 2, 2 * 4 + 1 + 2)
    assert first[PP, Operation.SEND] == last[PP, Operation.RECEIVE] == (4 + 1, 4 * 128 + 8)
    assert first[PP, ALL_REDUCE] == (3, 4 * 4)


def test_copies_of_the_embedding_are_summed_by_part():
    model = section(tie_embeddings=True, num_layers=3)
    for stage, parts in ((0, 1), (1, 0), (2, 1)):
        chunks = chunks_of(model, range(stage, stage + 1))
        grids = [Grid(pipeline=3, shard=4, tensor=2, stage=stage, shard_index=index) for index in range(4)]
        found = [table(model, grid=grid, chunks=chunks, zero_stage=2)[PP, ALL_REDUCE] for grid in grids]
        # Six rows of the first tensor rank: 2 2 2 0.
        assert found == [(3 + parts, 16 + parts * rows * 8 * 4) for rows in (2, 2, 2, 0)]


def test_a_chunk_has_its_own_parameters():
    model = section()
    found = table(model, grid=Grid(pipeline=2, shard=4), microbatches=4, chunks=chunks_of(model, range(0, 1)), zero_stage=3)
    assert found[SHARD, ALL_GATHER] == (8 + 4, 4 * (8 * BLOCK_NUMBERS + 4 * 12 * 8))


@pytest.mark.parametrize(
    ("operation", "sent"), [(ALL_GATHER, 75), (REDUCE_SCATTER, 75), (ALL_REDUCE, 150), (Operation.SEND, 100), (Operation.RECEIVE, 0)]
)
def test_what_leaves_a_rank_of_four(operation, sent):
    assert Collectives(TP, operation, count=1, num_bytes=100).sent_bytes(4) == sent
