from dataclasses import replace

import pytest

from phase8.pipeline_parallel.schedules import build_schedule
from phase8.plan.deepspeed_host import DeepSpeedBuffers, deepspeed_host_bytes
from phase8.plan.memory import ChunkActivations, Division, Held, MemoryPlan, free_bytes, peak_activation_bytes, plan_memory, usable_bytes


def held(whole, part):
    """Two moments of four bytes an element, as of AdamW."""
    return Held(whole, part, 8 * sum(part))


# Two blocks of 100 and 60 numbers and 50 in no block, a quarter of which each rank keeps.
BLOCKS = [held((60, 40), (15, 10)), held((60,), (15,))]
RESTS = [held((30, 20), (8, 5)), held((), ())]
WHOLE, PART, REST = 210, 53, 50


def plan(division, blocks=BLOCKS, rests=RESTS):
    return plan_memory(blocks, rests, activations_bytes=77, division=division)


def test_weights_gradients_and_both_moments_are_fp32():
    undivided = [held(each.whole, each.whole) for each in (*BLOCKS, *RESTS)]
    found = plan(Division(), undivided[:2], undivided[2:])
    assert found == MemoryPlan(weights_bytes=840, gradients_bytes=840, optimizer_bytes=1680, activations_bytes=77, host_bytes=0)
    assert found.total_bytes == 840 + 840 + 1680 + 77


def test_gradients_of_a_single_microbatch_take_the_place_of_activations():
    undivided = [held(each.whole, each.whole) for each in (*BLOCKS, *RESTS)]
    single = Division(accumulates=False)
    few = plan_memory(undivided[:2], undivided[2:], activations_bytes=100, division=single)
    assert few.gradients_bytes + 100 == 4 * WHOLE
    many = plan_memory(undivided[:2], undivided[2:], activations_bytes=4000, division=single)
    assert many.gradients_bytes == 4 * 100  # of the block whose backward comes first
    # Those of all blocks but one, beside the activations of the last block that backward comes to.
    last = plan_memory(undivided[:2], undivided[2:], activations_bytes=416, first_layer_bytes=412, division=single)
    assert last.gradients_bytes + 416 == 4 * (WHOLE - 100) + 412


GIB = 2**30
# On an H100, fresh processes with the step recorded: peak of tensors, and what the allocator reserved.
RESERVED_GIB = [(6.28, 7.07), (16.0, 17.05), (26.0, 27.0), (3.12, 3.78)]


@pytest.mark.parametrize(("peak", "reserved"), RESERVED_GIB)
def test_a_plan_leaves_room_for_what_the_allocator_reserves_beyond_tensors(peak, reserved):
    """Where just so much is free, less than that peak may be planned."""
    assert usable_bytes(int(reserved * GIB), is_recorded=True) < peak * GIB


def test_nothing_is_usable_of_too_little():
    assert free_bytes(8 * GIB) == 7 * GIB and free_bytes(GIB // 2) == 0
    assert usable_bytes(0, is_recorded=True) == usable_bytes(0, is_recorded=False) == 0


def test_libraries_count():
    with_libraries = plan_memory(BLOCKS, RESTS, activations_bytes=77, division=Division(), libraries_bytes=9)
    assert with_libraries.total_bytes == plan(Division()).total_bytes + 9


@pytest.mark.parametrize(
    ("stage", "accumulates", "weights", "gradients"),
    [
        (1, True, PART + WHOLE, WHOLE + 100),  # whole until the last microbatch, and the copy of a block that is summed
        (1, False, PART + WHOLE, PART + REST + 2 * 100),
        (2, True, PART + WHOLE, PART + REST + 2 * 100),
        (3, True, PART + REST + 160, PART + REST + 2 * 100),
        (3, False, PART + REST + 160, PART + REST + 2 * 100),
    ],
)
def test_ranks_divide_what_the_stage_says(stage, accumulates, weights, gradients):
    found = plan(Division(is_divided=True, zero_stage=stage, accumulates=accumulates))
    assert found == MemoryPlan(4 * weights, 4 * gradients, optimizer_bytes=8 * PART, activations_bytes=77)


def test_what_the_loss_needs_is_not_there_while_gradients_are_on_their_way():
    divided = Division(is_divided=True, zero_stage=3)
    on_their_way = 4 * (REST + 2 * 100)
    backward = plan_memory(BLOCKS, RESTS, activations_bytes=900, backward_bytes=100, division=divided)
    assert (backward.gradients_bytes, backward.activations_bytes) == (4 * PART + on_their_way, 100)
    loss = plan_memory(BLOCKS, RESTS, activations_bytes=100 + on_their_way + 1, backward_bytes=100, division=divided)
    assert (loss.gradients_bytes, loss.activations_bytes) == (4 * PART, 101 + on_their_way)
    whole = plan_memory(BLOCKS, RESTS, activations_bytes=900, backward_bytes=100, division=Division(is_divided=True, zero_stage=1))
    assert whole.activations_bytes == 900  # gradients stay from one microbatch to the next


def test_stage_0_computes_with_a_copy():
    undivided = [held(each.whole, each.whole) for each in (*BLOCKS, *RESTS)]
    found = plan(Division(is_divided=True), undivided[:2], undivided[2:])
    assert found == MemoryPlan(2 * 840, 840 + 400, 1680, 77)


def test_an_embedding_larger_than_the_blocks_is_what_is_on_its_way():
    rests = [held((500,), (125,))]
    assert plan(Division(is_divided=True, zero_stage=1), rests=rests).gradients_bytes == 4 * (160 + 500 + 500)
    assert plan(Division(is_divided=True, zero_stage=2), rests=rests).gradients_bytes == 4 * (40 + 125 + 500 + 500)


def test_three_blocks_of_stage_3_are_gathered_two_at_a_time():
    blocks = [held((100,), (25,)), held((60,), (15,)), held((80,), (20,))]
    assert plan(Division(is_divided=True, zero_stage=3), blocks).weights_bytes == 4 * (60 + 13 + 50 + 180)


def test_what_is_offloaded_lies_on_the_host():
    """Parameters, gradients and two moments: 16 bytes a parameter; page-locked memory comes in powers of two.

    Gradients are summed on the device, and go to the host after the last microbatch.
    """
    optimizer = plan(Division(is_divided=True, zero_stage=2, offload_optimizer=True, pins_memory=True))
    assert (optimizer.weights_bytes, optimizer.optimizer_bytes, optimizer.host_bytes) == (4 * (PART + WHOLE), 0, 16 * PART)
    both = Division(is_divided=True, zero_stage=3, offload_optimizer=True, offload_params=True)
    assert plan(both) == MemoryPlan(4 * (REST + 160), 4 * (PART + REST + 200), 0, 77, host_bytes=16 * PART)
    assert plan(replace(both, accumulates=False)).gradients_bytes == plan(replace(both, offload_gradients=True)).gradients_bytes == 4 * (REST + 200)
    pinned = plan(Division(is_divided=True, zero_stage=3, offload_optimizer=True, offload_params=True, pins_memory=True))
    assert pinned.host_bytes == 2 * (64 + 64 + 64 + 32 + 32) + 8 * PART  # of 60, 40, 60, 32 and 20 bytes
    summed_there = Division(is_divided=True, zero_stage=3, offload_optimizer=True, offload_params=True, offload_gradients=True, pins_memory=True)
    assert plan(summed_there).host_bytes == pinned.host_bytes + 64 + 64  # of the largest block, whose new sum arrives while the old one is read
    assert plan(replace(summed_there, accumulates=False)).host_bytes == pinned.host_bytes


@pytest.mark.parametrize(
    ("stage", "offload_params", "swapped", "expected"),
    [
        (2, False, {}, 2 * 512 + 8 * 100 + 256),  # masters and gradients, two moments, parameters in bf16
        (3, False, {}, 400 + 8 * 100 + 512 + 256 + 256),  # masters, moments, sums, gradients of groups of 60 and 40
        (3, True, {}, 400 + 8 * 100 + 512 + 256 + 256 + 256),
        (3, True, {"swaps_optimizer": True, "swaps_params": True}, 4 * 4 * 60 + 512 + 5 * 2 * 25),  # sums are not on NVMe
    ],
)
def test_what_deepspeed_offloads_is_page_locked_in_powers_of_two(stage, offload_params, swapped, expected):
    buffers = DeepSpeedBuffers(element_bytes=2, bucket=0, group=60, **swapped)
    own = {"state_bytes": 800, "largest": 25, "offload_params": offload_params}
    assert deepspeed_host_bytes(buffers, 100, stage=stage, **own, pins_memory=True) == expected


def test_copies_that_are_saved_aside_lie_on_the_host_too():
    undivided = [held(each.whole, each.whole) for each in (*BLOCKS, *RESTS)]
    assert plan(Division(copies_state=True), undivided[:2], undivided[2:]).host_bytes == 12 * WHOLE
    assert plan(Division(is_divided=True, zero_stage=2, copies_state=True)).host_bytes == 12 * PART
    assert plan(Division(is_divided=True, zero_stage=2, offload_optimizer=True, copies_state=True)).host_bytes == (16 + 12) * PART


ONE = build_schedule("1f1b", num_stages=1, num_microbatches=3).actions[0]


@pytest.mark.parametrize(
    ("chunk", "expected"),
    [
        (ChunkActivations(500, head=7), 507),
        (ChunkActivations(50, head=7, repeated=90), 140),  # the block that is recomputed in backward outweighs the head
        (ChunkActivations(50, head=200, repeated=90), 250),
        (ChunkActivations(50, head=7, repeated=90, scratch=100), 157),  # while the loss is computed
    ],
)
def test_peak_is_what_all_blocks_keep_and_the_larger_of_head_and_recomputed_block(chunk, expected):
    assert peak_activation_bytes(ONE, [chunk]).ever == expected


def test_stages_hold_as_many_microbatches_as_their_schedule_says():
    chunk = ChunkActivations(100, head=10, repeated=30)
    gpipe = build_schedule("gpipe", num_stages=2, num_microbatches=5)
    assert peak_activation_bytes(gpipe.actions[1], [chunk]).ever == 5 * 110 - 10 + 30
    early = build_schedule("1f1b", num_stages=4, num_microbatches=8)
    assert [peak_activation_bytes(actions, [ChunkActivations(100)]).ever for actions in early.actions] == [400, 300, 200, 100]


def test_chunks_of_a_stage_weigh_differently():
    """Stage 0 of two holds five: microbatches 0, 1 in both chunks and 2 in the first."""
    actions = build_schedule("interleaved", num_stages=2, num_microbatches=4, num_chunks=2).actions[0]
    assert peak_activation_bytes(actions, [ChunkActivations(1), ChunkActivations(100)]).ever == 2 * 100 + 3
    assert peak_activation_bytes(actions, [ChunkActivations(100), ChunkActivations(1)]).ever >= 3 * 100 + 2


def test_a_backward_begins_without_what_the_head_keeps():
    assert peak_activation_bytes(ONE, [ChunkActivations(50, head=200, repeated=90, scratch=7)]) == (257, 140)
