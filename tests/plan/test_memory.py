import pytest

from phase8.plan.memory import Division, MemoryPlan, peak_activation_bytes, plan_memory


def test_weights_gradients_and_both_moments_are_fp32():
    plan = plan_memory(num_parameters=1000, num_layers=10, activations_bytes=77, division=Division())
    assert plan == MemoryPlan(weights_bytes=4000, gradients_bytes=4000, optimizer_bytes=8000, activations_bytes=77)
    assert plan.total_bytes == 16077


# 1000 parameters in ten layers over 2 x 4 ranks: 2000 bytes a tensor-parallel rank, 500 a shard, 400 two layers.
@pytest.mark.parametrize(
    ("division", "weights", "gradients", "optimizer"),
    [
        (Division(2), 2000, 2000, 4000),
        (Division(2, 4, 1), 500 + 2000, 2000, 1000),
        (Division(2, 4, 2), 500 + 2000, 500 + 200, 1000),
        (Division(2, 4, 3), 500 + 400, 500 + 200, 1000),
        (Division(2, 4, 3, offload_optimizer=True), 500 + 400, 500 + 200, 0),
        (Division(2, 4, 3, offload_optimizer=True, offload_params=True), 400, 200, 0),
    ],
)
def test_ranks_divide_what_the_stage_says(division, weights, gradients, optimizer):
    plan = plan_memory(num_parameters=1000, num_layers=10, activations_bytes=77, division=division)
    assert plan == MemoryPlan(weights_bytes=weights, gradients_bytes=gradients, optimizer_bytes=optimizer, activations_bytes=39)


@pytest.mark.parametrize(
    ("num_recomputed", "head", "expected"),
    [
        (0, 7, 5 * 100 + 7),
        (5, 7, 5 * 10 + 90),  # the block that is recomputed in backward outweighs the head
        (5, 200, 5 * 10 + 200),
        (3, 7, 2 * 100 + 3 * 10 + 90),
    ],
)
def test_peak_is_what_all_blocks_keep_and_the_larger_of_head_and_recomputed_block(num_recomputed, head, expected):
    assert peak_activation_bytes(num_layers=5, num_recomputed=num_recomputed, block=100, recomputed_block=10, head=head) == expected
