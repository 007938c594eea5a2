import pytest

from phase8.plan.memory import MemoryPlan, peak_activation_bytes, plan_memory


def test_weights_gradients_and_both_moments_are_fp32():
    plan = plan_memory(num_parameters=1000, activations_bytes=77)
    assert plan == MemoryPlan(weights_bytes=4000, gradients_bytes=4000, optimizer_bytes=8000, activations_bytes=77)
    assert plan.total_bytes == 16077


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
