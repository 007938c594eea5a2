"""The transformer baseline as Hugging Face's Llama: by name, and, where transformers is installed, by its logits."""

from __future__ import annotations

import json
import os

import pytest
import safetensors.torch
import torch

from phase8.checkpoint.huggingface.model_card import escaped
from phase8.checkpoint.save import save_checkpoint
from phase8.config.load import config_to_mapping, load_config
from phase8.model.model import build_model
from phase8.model.parameters import initialise
from tests.tools.doors import load_door

MODEL = ("model.block=transformer", "model.d_model=24", "model.num_layers=2", "model.num_heads=3", "model.vocab_size=61", "model.sequence_length=24",
         "model.ffn_size=40", "model.norm_eps=1e-4", "model.rope_base=500.0")  # fmt: skip


# As in the models of Llama 3.2, with a tied head.
LLAMA_3 = ("model.num_heads=4", "model.num_kv_heads=2", "model.tie_embeddings=true", "model.rope_scaling.type=llama3", "model.rope_scaling.factor=4",
           "model.rope_scaling.low_frequency_factor=0.15", "model.rope_scaling.high_frequency_factor=2",
           "model.rope_scaling.original_sequence_length=16")  # fmt: skip


def trained(directory, *settings):
    """A model whose every weight matters, and its checkpoint."""
    config = load_config(os.devnull, [*MODEL, *settings])
    model = build_model(config.model, dtype=torch.float32, device=torch.device("cpu"))
    initialise(model, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    return model, save_checkpoint(directory / "c", step=7, tensors=tensors, metadata={"config": config_to_mapping(config)}, attachments={})


@pytest.mark.parametrize("settings", [(), ("model.tie_embeddings=true", "model.head_size=10")])
def test_every_weight_is_there_under_its_name(tmp_path, settings):
    model, source = trained(tmp_path, *settings)
    assert load_door("reshard_checkpoint").main([str(source), str(tmp_path / "hf"), "--format", "hf"]) == 0
    found = safetensors.torch.load_file(tmp_path / "hf" / "model.safetensors")
    parameters = dict(model.named_parameters())
    assert len(found) == len(parameters) and torch.equal(found["model.layers.1.self_attn.o_proj.weight"], parameters["blocks.1.mixer.out.weight"])
    assert torch.equal(found["model.layers.0.mlp.gate_proj.weight"], parameters["blocks.0.feed_forward.gate.weight"])
    assert ("lm_head.weight" in found) != ("model.tie_embeddings=true" in settings)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["architectures"], config["head_dim"], config["rope_theta"]) == (["LlamaForCausalLM"], 10 if settings else 8, 500.0)
    assert config["initializer_range"] == 0.02


def test_keys_of_llama_3_have_the_names_of_both_releases_of_transformers(tmp_path):
    _, source = trained(tmp_path, *LLAMA_3)
    assert load_door("reshard_checkpoint").main([str(source), str(tmp_path / "hf"), "--format", "hf"]) == 0
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    rope = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 0.15, "high_freq_factor": 2.0, "original_max_position_embeddings": 16}
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["rope_scaling"]) == (4, 2, rope)
    assert config["rope_parameters"] == rope | {"rope_theta": 500.0}
    assert safetensors.torch.load_file(tmp_path / "hf" / "model.safetensors")["model.layers.1.self_attn.v_proj.weight"].shape == (12, 24)


@pytest.mark.parametrize("settings", [(), ("model.tie_embeddings=true", "model.head_size=10"), LLAMA_3, ("model.rope_scaling.type=linear",)])
def test_transformers_computes_the_same_logits(tmp_path, settings):
    transformers = pytest.importorskip("transformers")
    model, source = trained(tmp_path, *settings)
    assert load_door("reshard_checkpoint").main([str(source), str(tmp_path / "hf"), "--format", "hf"]) == 0
    llama = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    tokens = torch.randint(0, 61, (2, 24), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(llama(tokens).logits, model.logits(model(tokens)[0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("model.convolution_size=4", "a convolution of 4 taps"),
        ("model.local_qk_norm=true", "a norm of queries and keys (model.local_qk_norm)"),
        ("model.value_activation=silu", "an activation of values (model.value_activation)"),
        ("model.embedding_scalars=true", "blocks that add the embedding (model.embedding_scalars)"),
        ("model.rotary=[true,false]", "layers without positions (model.rotary)"),
        ("model.low_rank_rank=4", "matrices of rank 4 (model.low_rank_rank), so"),
        ("model.block=phase8", "model.block phase8"),
    ],
)
def test_what_is_no_llama_brings_its_code(tmp_path, setting, reason):
    _, source = trained(tmp_path, setting, "model.local_window_size=4")
    assert load_door("reshard_checkpoint").main([str(source), str(tmp_path / "hf"), "--format", "hf"]) == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "phase8" and (tmp_path / "hf" / "modeling_phase8.py").exists()
    assert escaped(reason) in (tmp_path / "hf" / "README.md").read_text()
