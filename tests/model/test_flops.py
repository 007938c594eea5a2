import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from phase8.config.model_section import ModelSection
from phase8.model.flops import forward_flops_per_token, training_flops_per_token
from phase8.model.model import build_model
from phase8.model.parameters import initialise
from phase8.model.work import mean_visible_keys

SHAPE = {"d_model": 24, "num_layers": 3, "num_heads": 4, "vocab_size": 50, "sequence_length": 32, "local_window_size": 8, "global_tokens": 3}
VARIANTS = {
    "dense": {},
    "low rank mixer": {"low_rank_rank": 5},
    "low rank everywhere": {"low_rank_rank": 5, "ffn": "low_rank_swiglu"},
    "tied": {"tie_embeddings": True},
    "own widths": {"head_size": 10, "ffn_size": 17},
    "no chain": {"chain": "none"},
    "window alone": {"chain": "none", "global_path": "none"},
    "delta rule": {"global_path": "delta"},
    "delta rule with chain": {"global_path": "delta", "chain": "both"},
    "norm of queries and keys": {"local_qk_norm": True},
    "fewer heads of keys": {"num_kv_heads": 2, "convolution_size": 4},
    "one head of keys, low rank": {"num_kv_heads": 1, "low_rank_rank": 5},
    "gate per channel": {"global_path": "delta", "global_gate": "channel"},
    "gate per channel, low rank": {"global_gate": "channel", "low_rank_rank": 5},
}
LINEAR_PARTS = ("mixer projections", "feed-forward", "head")


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("block", ["phase8", "transformer"])
def test_linear_parts_equal_the_matrix_products_of_a_real_forward(block, changes):
    if block == "phase8" and "num_kv_heads" in changes:
        pytest.skip("the Phase 8 block has keys for each head")
    section = ModelSection(**{**SHAPE, "block": block, **changes})
    model = build_model(section, dtype=torch.float32, device=torch.device("cpu"))
    initialise(model, seed=0)
    tokens = torch.zeros(2, section.sequence_length, dtype=torch.int64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.logits(model(tokens)[0])
    # Linear layers are plain products (mm); attention and recurrence are batched ones (bmm) or fused.
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    parts = forward_flops_per_token(section)
    # The products behind the bottlenecks of q, k and v are one, of whose nine blocks six are zero: no work of the model.
    zeros = section.num_layers * 2 * 2 * section.low_rank_rank * (section.attention_width + 2 * section.key_value_width)
    assert (sum(parts[name] for name in LINEAR_PARTS) + zeros) * tokens.numel() == counted


def test_experts_cost_as_much_as_a_dense_feed_forward_of_the_width_that_computes_a_token():
    experts = {"ffn": "moe", "num_experts": 5, "top_k": 2, "expert_ffn_size": 16, "shared_experts": 1, "ffn_size": 3 * 16}
    parts, dense = (forward_flops_per_token(ModelSection(**{**SHAPE, **changes})) for changes in (experts, {"ffn_size": 3 * 16}))
    routers = 2 * 24 * 5
    assert parts == {**dense, "feed-forward": dense["feed-forward"] + 3 * routers}
    mixed = forward_flops_per_token(ModelSection(**{**SHAPE, **experts, "first_dense_layers": 1}))
    assert mixed == {**dense, "feed-forward": dense["feed-forward"] + 2 * routers}


def visible_keys_by_mask(length, window, global_tokens):
    query, key = torch.arange(length)[:, None], torch.arange(length)
    visible = (key <= query) & ((query - key < window) | (key < global_tokens))
    return visible.sum().item() / length


@pytest.mark.parametrize("length", [1, 2, 7, 16, 33])
def test_mean_visible_keys_equals_a_count_over_masks(length):
    for window, global_tokens in itertools.product([1, 2, 5, 16, 40], [0, 1, 4, 16, 50]):
        section = ModelSection(sequence_length=length, local_window_size=window, global_tokens=global_tokens)
        assert mean_visible_keys(section, window) == visible_keys_by_mask(length, window, global_tokens), (window, global_tokens)
    assert mean_visible_keys(ModelSection(block="transformer", sequence_length=length), 256) == visible_keys_by_mask(length, length, 0)


@pytest.mark.parametrize("block", ["phase8", "transformer"])
def test_attention_is_the_visible_share_of_both_products_over_all_pairs(block):
    section = ModelSection(**SHAPE, block=block)
    length = section.sequence_length
    q = torch.zeros(1, section.num_heads, length, section.head_width)
    with FlopCounterMode(display=False) as counter:
        (q @ q.transpose(2, 3)) @ q
    all_pairs = section.num_layers * counter.get_total_flops() / length
    assert forward_flops_per_token(section)["attention"] == pytest.approx(all_pairs * mean_visible_keys(section, 8) / length)


def test_a_worked_example():
    shape = {"d_model": 8, "num_layers": 2, "num_heads": 2, "vocab_size": 10, "sequence_length": 4, "local_window_size": 2, "ffn_size": 12}
    shape |= {"global_tokens": 1, "global_gate": "scalar"}
    section = ModelSection(**shape, global_path="linear")
    # Keys of tokens 0..3: 1, 2, 3 (window 2 + global), 3: 9 / 4 on average.
    assert forward_flops_per_token(section) == {
        "mixer projections": 2 * (4 * 2 * 8 * 8 + 2 * 8 * 2 * 2),
        "convolution": 2 * 2 * 3 * 8 * 4,
        "attention": 2 * 2 * 2 * 8 * 9 / 4,
        "feed-forward": 2 * 3 * 2 * 8 * 12,
        "head": 2 * 8 * 10,
        "recurrence": 2 * 2 * 2 * 2 * 4 * 4,  # layers, multiply and add, update and read-out, heads, K x K
    }
    delta = forward_flops_per_token(ModelSection(**shape, global_path="delta"))
    assert delta == forward_flops_per_token(section) | {
        "mixer projections": 2 * (4 * 2 * 8 * 8 + 2 * 8 * 2 * 3),  # a third scalar of each head
        "recurrence": 2 * 2 * 3 * 2 * 4 * 4,  # read by key, update, read-out
    }


def test_layers_of_a_hybrid_have_one_path_each():
    section = ModelSection(**{**SHAPE, "num_layers": 4, "local_window_size": (0, 8)}, global_path="delta")
    found = forward_flops_per_token(section)
    window, path = (
        forward_flops_per_token(ModelSection(**{**SHAPE, "num_layers": 2}, **changes))
        for changes in ({"global_path": "none"}, {"global_path": "delta"})
    )
    assert found["attention"] == window["attention"] and found["recurrence"] == path["recurrence"]
    assert found["mixer projections"] == window["mixer projections"] + path["mixer projections"]
    assert mean_visible_keys(section, 0) == 0


@pytest.mark.parametrize("block", ["phase8", "transformer"])
def test_training_costs_three_forwards(block):
    section = ModelSection(**SHAPE, block=block)
    assert training_flops_per_token(section) == 3 * sum(forward_flops_per_token(section).values())


def test_parts_that_do_not_exist_cost_nothing():
    transformer = forward_flops_per_token(ModelSection(**SHAPE, block="transformer"))
    assert transformer["convolution"] == 0 and "recurrence" not in transformer
    grouped = forward_flops_per_token(ModelSection(**SHAPE, block="transformer", num_kv_heads=1, convolution_size=2))
    assert grouped["convolution"] == 3 * 2 * 2 * (24 + 2 * 6) and grouped["attention"] == transformer["attention"]
    taps = {n: forward_flops_per_token(ModelSection(**SHAPE, convolution_size=n))["convolution"] for n in (1, 2, 4)}
    assert taps[1] == 0 and taps[4] == 2 * taps[2] == 3 * 2 * 3 * 24 * 4
