import io

import pytest
from rich.console import Console

from phase8.config.load import load_config
from phase8.config.without_effect import unread_keys
from tests.train.tiny_run import assert_same_weights, losses, prepare, train_tiny

# Values that are no defaults, for all keys that nothing reads in a dense run on a CPU by AdamW at a constant rate.
OTHERS = {
    "model.num_experts": 4, "model.top_k": 3, "model.expert_ffn_size": 16, "model.shared_experts": 1, "model.capacity_factor": 2.0,
    "model.moe_every_n_layers": 2, "model.first_dense_layers": 1, "model.router_score": "sigmoid", "model.routed_scaling_factor": 2.0,
    "model.balance_loss_weight": 0.5, "model.router_z_loss_weight": 0.5, "model.router_bias_rate": 0.1, "model.rope_scaling.factor": 2.0,
    "model.rope_scaling.low_frequency_factor": 2.0, "model.rope_scaling.high_frequency_factor": 8.0,
    "model.rope_scaling.original_sequence_length": 16, "data.prefetch_factor": 3, "data.persistent_workers": "false",
    "parallel.pipeline_schedule": "gpipe", "parallel.pipeline_chunks": 2, "zero.gather_dtype": "fp32",
    "precision.fp8_scaling": "row", "precision.bf16_layers": 2, "optim.momentum": 0.5, "optim.momentum_warmup_steps": 2,
    "optim.min_learning_rate_ratio": 0.9, "train.recompute_slice_tokens": 8, "train.activation_memory_budget": 0.2,
    "train.compile.backend": "nobody's", "train.compile.fullgraph": "true", "train.evaluation_sequences": 8,
    "observe.sample_tokens": 3, "observe.sample_at_evaluations": "true", "observe.wandb_entity": "us", "observe.project": "ours",
}  # fmt: skip
OF_THE_BLOCK = {
    "model.local_window_size": 4, "model.global_tokens": 1, "model.score": "dot", "model.global_path": "delta", "model.chain": "gate",
    "model.decay_floor": -5.0, "model.global_activation": "none", "model.global_gate": "scalar",
    "model.global_gate_activation": "silu", "model.global_skip": "true", "model.memory_tokens": [1.0, 9.0],
}  # fmt: skip


# A model, and what else of it nothing reads.
MODELS = {
    "block": ([], {}),
    "transformer": (["model.block=transformer"], OF_THE_BLOCK),
    "global path alone": (
        ["model.local_window_size=0"], {"model.score": "dot", "model.global_tokens": 1, "model.rotary": "false", "model.rope_base": 5e5},
    ),
}  # fmt: skip
NOT_TOGETHER = {"train.compile.mode", "model.local_qk_norm"}  # of which others of these keys allow no other value


@pytest.mark.parametrize(("model", "of_model"), MODELS.values(), ids=MODELS)
def test_what_is_said_to_be_without_effect_changes_nothing(tiny, model, of_model):
    shared = [
        *model, "optim.schedule=constant", "data.num_workers=0", "train.recompute=none", "train.compile.enabled=false",
        "train.evaluate_every_n_steps=0", "train.num_steps=4", "checkpoint.every_n_steps=0",
    ]  # fmt: skip
    others = OTHERS | of_model
    assert unread_keys(load_config(tiny, shared)).keys() - NOT_TOGETHER == others.keys()
    plain, changed = (
        train_tiny(tiny, *shared, f"run.name={name}", *(f"{key}={value}" for key, value in given.items()))
        for name, given in (("plain", {}), ("changed", others))
    )
    assert losses(plain) == losses(changed)
    assert_same_weights(plain, changed)


def test_the_banner_names_what_is_given_without_effect(tiny):
    console = Console(file=io.StringIO(), width=500)
    run = prepare(tiny, "model.num_experts=8", "train.compile.fullgraph=true", console=console)
    said = {"model.num_experts, because model.ffn is swiglu", "train.compile.fullgraph, because train.compile.enabled is false"}  # which was auto
    assert {text for name, text in run.facts if name == "without effect"} == said
    assert all(text in console.file.getvalue() for text in said)
