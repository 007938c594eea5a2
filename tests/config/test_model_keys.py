import pytest
import torch

from phase8.config.model_keys import WITHOUT_SHAPE, keys_in_effect, model_differences, shape_differences
from phase8.config.model_section import ModelSection
from phase8.config.rope_scaling import RopeScaling
from phase8.model.model import build_model
from phase8.model.parameters import initialise

LINEAR = RopeScaling(type="linear", factor=4.0)
SMALL = {"d_model": 24, "num_layers": 2, "num_heads": 4, "vocab_size": 61, "sequence_length": 24, "local_window_size": 6}


class ReadSection(ModelSection):
    """A model section that writes down which of its keys are read."""

    def __getattribute__(self, name):
        if name in ModelSection.model_fields:
            READ.add(name)
        return super().__getattribute__(name)


READ = set()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"score": "lorentz", "chain": "both"},
        {"global_path": "none"},
        {"global_path": "delta", "chain": "decay"},
        {"global_path": "delta", "global_gate": "channel", "decay_floor": -5.0, "global_activation": "silu"},
        {"block": "transformer"},
        {"block": "transformer", "local_qk_norm": True},
        {"block": "transformer", "tie_embeddings": True},
        {"block": "transformer", "num_kv_heads": 2},
        {"ffn": "moe", "num_experts": 4, "first_dense_layers": 1, "shared_experts": 1},
    ],
)
def test_the_keys_in_effect_are_those_that_the_model_reads(settings):
    section = ReadSection(**SMALL, **settings)
    READ.clear()
    model = build_model(section, dtype=torch.float32, device=torch.device("cpu"))
    initialise(model, seed=0)
    model(torch.zeros(1, 5, dtype=torch.long))
    assert keys_in_effect(ModelSection(**SMALL, **settings)).keys() == READ | {"sequence_length"}  # which the data have


@pytest.mark.parametrize(
    ("was", "now", "different"),
    [
        ({}, {}, {}),
        ({}, {"rope_base": 5e5, "sequence_length": 48}, {"rope_base": (10000.0, 5e5), "sequence_length": (24, 48)}),
        ({}, {"local_window_size": (6, 6)}, {}),
        ({"local_window_size": (6, 4)}, {"local_window_size": (6, 4, 6)}, {}),
        ({}, {"local_window_size": (6, 4)}, {"local_window_size": (6, [6, 4])}),
        ({}, {"head_size": 6, "ffn_size": 64, "convolution_size": 4}, {}),
        ({"global_path": "linear"}, {"global_path": "none", "chain": "both"}, {"global_path": ("linear", "none")}),
        ({"global_path": "linear"}, {"global_path": "delta"}, {"global_path": ("linear", "delta")}),
        ({"global_path": "linear"}, {"global_path": True}, {}),
        ({"block": "transformer", "global_path": "delta"}, {"block": "transformer", "global_path": "none"}, {}),
        ({"block": "transformer"}, {"block": "transformer", "local_window_size": 3, "score": "lorentz", "memory_tokens": (1.0, 2.0)}, {}),
        ({"block": "transformer"}, {"convolution_size": 1}, {"block": ("transformer", "phase8"), "local_qk_norm": (False, True)}),
        ({}, {"local_qk_norm": True, "global_gate": "channel", "global_activation": "silu"}, {}),
        ({}, {"local_qk_norm": False, "global_gate": "scalar"}, {"local_qk_norm": (True, False), "global_gate": ("channel", "scalar")}),
        ({"score": "lorentz"}, {"score": "lorentz", "local_qk_norm": False}, {}),
        ({"low_rank_rank": 5}, {"low_rank_rank": 5, "global_gate": "scalar"}, {}),
        ({"block": "transformer"}, {"block": "transformer", "num_kv_heads": 4}, {}),
        ({"block": "transformer"}, {"block": "transformer", "num_kv_heads": 2}, {"num_kv_heads": (4, 2)}),
        ({}, {"rope_scaling": RopeScaling(factor=4.0)}, {}),
        ({}, {"rope_scaling": LINEAR}, {"rope_scaling": ({"type": "none"}, {"type": "linear", "factor": 4.0})}),
        ({}, {"num_experts": 16, "router_score": "sigmoid"}, {}),
        ({"ffn": "moe"}, {"ffn": "moe", "expert_ffn_size": 64, "top_k": 1}, {"top_k": (2, 1)}),
        ({"num_layers": 10_000}, {}, {"num_layers": (10_000, 2)}),
    ],
)
def test_models_differ_by_what_both_read_and_not_by_how_it_is_written(was, now, different):
    assert model_differences(ModelSection(**SMALL | was), ModelSection(**SMALL | now)) == different


OTHER_VALUES = {
    "sequence_length": 48, "rotary": (True, False), "rope_base": 5.0, "rope_scaling": LINEAR, "norm_eps": 0.1, "local_window_size": (12, 3),
    "global_tokens": 2, "decay_floor": -5.0, "global_activation": "silu_with_values", "global_gate_activation": "silu", "value_activation": "silu",
    "top_k": 1, "capacity_factor": None, "router_score": "sigmoid", "routed_scaling_factor": 2.0, "balance_loss_weight": 0.0,
    "router_z_loss_weight": 0.0, "router_bias_rate": 0.1, "memory_tokens": (3.0, 4.0), "init_std": 0.1,
}  # fmt: skip


def shapes(section):
    model = build_model(section, dtype=torch.float32, device=torch.device("meta"))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", sorted(WITHOUT_SHAPE))
@pytest.mark.parametrize("common", [{"ffn": "moe"}, {"score": "lorentz"}], ids=str)
def test_keys_without_shape_change_no_shape(common, name):
    was, now = ModelSection(**SMALL | common), ModelSection(**SMALL | common | {name: OTHER_VALUES[name]})
    assert shapes(was) == shapes(now) and shape_differences(was, now) == {}


@pytest.mark.parametrize("common", [{}, {"score": "lorentz"}, {"global_path": "delta"}], ids=str)
@pytest.mark.parametrize(("was", "now"), [(6, 0), (0, 6), (6, (0, 6)), ((0, 6), (6, 0))])
def test_windows_that_layers_get_or_lose_change_the_weights(common, was, now):
    before, after = (ModelSection(**SMALL | common | {"local_window_size": window}) for window in (was, now))
    assert shapes(before) != shapes(after) and shape_differences(before, after).keys() == {"local_window_size"}


def test_windows_of_other_sizes_beside_layers_without_one_change_no_weights():
    before, after = (ModelSection(**SMALL | {"local_window_size": (0, window)}) for window in (6, 3))
    assert shapes(before) == shapes(after) and shape_differences(before, after) == {} != model_differences(before, after)
