"""Hugging Face's Llama as the transformer baseline: bit for bit, by the logits of transformers itself, and what is no such Llama is refused."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import sentencepiece
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from phase8.checkpoint.huggingface.source import open_hugging_face
from phase8.checkpoint.load import Checkpoint, open_checkpoint
from phase8.checkpoint.reshard.compare import compare_checkpoints
from phase8.checkpoint.reshard.rewrite import WORK_PREFIX
from phase8.checkpoint.save import save_checkpoint
from phase8.checkpoint.state import restore_state
from phase8.checkpoint.weight_files import read_object, regular
from phase8.errors import CheckpointMismatchError, Phase8Error
from phase8.generate.restore import restore_model
from phase8.generate.sampling import SamplingOptions
from phase8.model.model import build_model
from tests.checkpoint.fuzzing import Tally, Watch, fuzz, mutated_bytes, mutated_json
from tests.generate.drawn import drawn_tokens
from tests.tools.doors import TOOLS, load_door
from tests.tools.test_reshard_to_hf import LLAMA_3, trained
from tests.train import tiny_run

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "hidden_act": "silu", "max_position_embeddings": 24,
    "rms_norm_eps": 1e-4, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
IN_A_LAYER = {
    "input_layernorm": (24,), "self_attn.q_proj": (24, 24), "self_attn.k_proj": (24, 24), "self_attn.v_proj": (24, 24), "self_attn.o_proj": (24, 24),
    "post_attention_layernorm": (24,), "mlp.gate_proj": (40, 24), "mlp.up_proj": (40, 24), "mlp.down_proj": (24, 40),
}  # fmt: skip
INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def llama_weights(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"model.embed_tokens.weight": (61, 24), "model.norm.weight": (24,), "lm_head.weight": (61, 24)}
    shapes |= {f"model.layers.{layer}.{name}.weight": shape for layer in range(2) for name, shape in IN_A_LAYER.items()}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def write_llama(directory: Path, *, dtype: torch.dtype = torch.float32, is_sharded: bool = False, **settings) -> Path:
    """What transformers would save, written without it."""
    directory.mkdir()
    weights = llama_weights(dtype)
    (directory / "config.json").write_text(json.dumps(CONFIG | settings))
    if not is_sharded:
        safetensors.torch.save_file(weights, directory / "model.safetensors")
        return directory
    files = {name: FIRST if "layers.0" in name else SECOND for name in weights}
    for file in (FIRST, SECOND):
        safetensors.torch.save_file({name: weights[name] for name in weights if files[name] == file}, directory / file)
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))
    return directory


def small_sentencepiece() -> bytes:
    """A model with fewer ids than the model here has."""
    buffer = io.BytesIO()
    text = iter(["a few words about nothing"] * 9)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=text, model_writer=buffer, vocab_size=20, model_type="char", minloglevel=2)
    return buffer.getvalue()


def run(*arguments: object) -> int:
    return load_door("reshard_checkpoint").main([str(argument) for argument in arguments])


def imported(source: Path, *options: object) -> Checkpoint:
    """Beside the source, checked byte by byte."""
    assert run(source, source.parent / "d", *options) == 0
    checkpoint = open_checkpoint(source.parent / "d")
    checkpoint.verify()
    return checkpoint


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ((), ("--pipeline-parallel-size", 2, "--shards", 2)),
        (("model.tie_embeddings=true", "model.head_size=10"), ()),
        (LLAMA_3, ("--tensor-parallel-size", 2, "--shards", 2)),
    ],
)
def test_there_and_back_is_bit_equal(tmp_path, settings, options):
    _, path = trained(tmp_path, "model.init_std=0.03", *settings)
    source = open_checkpoint(path)
    words = small_sentencepiece()
    tensors = {name: source.read(name) for name in source.tensor_names}
    attachments = {"tokenizer.model": words}
    path = save_checkpoint(tmp_path / "with", step=7, tensors=tensors, metadata=source.metadata, attachments=attachments)
    assert run(path, tmp_path / "hf", "--format", "hf") == 0
    copy = imported(tmp_path / "hf", *options)
    assert not list(compare_checkpoints(source, copy)) and copy.step == 0
    assert copy.metadata["config"]["model"] == source.metadata["config"]["model"] and copy.metadata["config"]["precision"]["dtype"] == "fp32"
    assert copy.attachment("tokenizer.model").read_bytes() == words
    assert len(copy.manifest.files) == (4 if options else 1) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard_bytes", [5000, 10**6])
def test_the_logits_are_those_of_the_llama_that_transformers_saved(tmp_path, is_tied, dtype, shard_bytes):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, max_position_embeddings=24,
        rope_theta=300.0, initializer_range=0.2, tie_word_embeddings=is_tied
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(tmp_path / "llama", max_shard_size=shard_bytes)
    assert (tmp_path / "llama" / INDEX).exists() == (shard_bytes == 5000)
    copy = imported(tmp_path / "llama")
    model = build_model(restore_model(copy.path, device=torch.device("cpu"))[0].section, dtype=torch.float32, device=torch.device("cpu"))
    restore_state(copy, model, None)
    llama = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32)
    tokens = torch.randint(0, 61, (2, 24), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model(tokens)[0]), llama(tokens).logits, rtol=1e-5, atol=1e-5)


LLAMA3_NUMBERS = {"factor": 4.0, "low_freq_factor": 0.15, "high_freq_factor": 2.0, "original_max_position_embeddings": 16}
LLAMA3_ROPE = {"rope_type": "llama3", **LLAMA3_NUMBERS}
LINEAR_ROPE = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize("rope", [LLAMA3_ROPE, LINEAR_ROPE], ids=["llama3", "linear"])
def test_a_llama_3_that_transformers_saved_computes_generates_and_returns_the_same(tmp_path, rope):
    """Fewer heads of keys, scaled rotary frequencies, one embedding for both ends, several files."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=64, rope_theta=300.0, rope_scaling=dict(rope), initializer_range=0.2, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    llama = transformers.LlamaForCausalLM(config).eval()
    llama.save_pretrained(tmp_path / "llama", max_shard_size=5000)
    copy = imported(tmp_path / "llama", "--tensor-parallel-size", 2)
    model, _, _ = restore_model(copy.path, device=torch.device("cpu"))
    assert model.section.num_kv_heads == 2 and model.section.rope_scaling.type == rope["rope_type"]
    tokens = torch.randint(0, 61, (2, 64), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model(tokens)[0]), llama(tokens).logits, rtol=1e-5, atol=1e-5)
    theirs = llama.generate(tokens[:1, :7], do_sample=False, max_new_tokens=40, attention_mask=torch.ones(1, 7, dtype=torch.int64))
    ours = drawn_tokens(model, tokens[0, :7].tolist(), max_tokens=40, options=SamplingOptions(temperature=0.0))
    assert ours == theirs[0, 7:].tolist() and len(set(ours)) > 1
    assert run(copy.path, tmp_path / "again", "--format", "hf") == 0
    again = safetensors.torch.load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == {name for name in llama.state_dict() if name != "lm_head.weight"}
    assert all(torch.equal(again[name], value) for name, value in llama.state_dict().items() if name != "lm_head.weight")
    found = transformers.AutoConfig.from_pretrained(tmp_path / "again").to_dict()
    assert {name: found[name] for name in ("rope_parameters", "num_key_value_heads", "head_dim")} == {
        "rope_parameters": rope | {"rope_theta": 300.0}, "num_key_value_heads": 2, "head_dim": 8
    }  # fmt: skip


@pytest.mark.parametrize(
    "places",
    [
        {"rope_theta": 500.0, "rope_scaling": LLAMA3_ROPE, "rope_parameters": None},
        {"rope_theta": 500.0, "rope_scaling": {"type": "llama3", **LLAMA3_NUMBERS}, "rope_parameters": None},
        {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 500}},
        {"rope_theta": 500.0, "rope_scaling": LLAMA3_ROPE, "rope_parameters": LLAMA3_ROPE | {"rope_theta": 500.0}},
    ],
    ids=["4.x", "old names", "5.x", "both"],
)
def test_scaling_is_found_where_each_release_writes_it(tmp_path, places):
    source = write_llama(tmp_path / "llama", **places)
    # The first frequency turns 2.5 times in 16 tokens, the second 0.32 times, the third 0.04 times.
    kept = (16 * frequencies()[1] / (2 * torch.pi) - 0.15) / (2 - 0.15)
    between = kept * frequencies()[1] + (1 - kept) * frequencies()[1] / 4
    add_to(source, model__rotary_emb__inv_freq=torch.stack((frequencies()[0], between, frequencies()[2] / 4)))
    section = imported(source).metadata["config"]["model"]
    assert section["rope_base"] == 500.0 and section["rope_scaling"] == {
        "type": "llama3", "factor": 4.0, "low_frequency_factor": 0.15, "high_frequency_factor": 2.0, "original_sequence_length": 16
    }  # fmt: skip


@pytest.mark.parametrize("is_sharded", [False, True])
def test_bf16_weights_become_the_fp32_master_weights_of_a_bf16_model(tmp_path, is_sharded):
    source = write_llama(tmp_path / "llama", dtype=torch.bfloat16, is_sharded=is_sharded)
    (source / "tokenizer.model").write_bytes(b"words")
    (source / "tokenizer.json").write_bytes(b"{}")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    copy = imported(source, "--tensor-parallel-size", 2)
    weights = llama_weights(torch.bfloat16)
    assert torch.equal(copy.read("model.blocks.1.mixer.out.weight"), weights["model.layers.1.self_attn.o_proj.weight"].float())
    assert torch.equal(copy.read("model.blocks.0.feed_forward.gate.weight"), weights["model.layers.0.mlp.gate_proj.weight"].float())
    assert {entry.dtype for entry in copy.manifest.tensors.values()} == {"F32"} and len(copy.tensor_names) == 21
    assert list(copy.manifest.attachments) == ["tokenizer.json"] and copy.attachment("tokenizer.json").read_bytes() == b"{}"
    model, _, _ = restore_model(copy.path, device=torch.device("cpu"))
    assert (model.dtype, model.section.rope_base, model.section.norm_eps, model.section.block) == (torch.bfloat16, 500.0, 1e-4, "transformer")
    assert len(drawn_tokens(model, [1, 2], max_tokens=3, options=SamplingOptions())) == 3
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def frequencies(base: float = 500.0) -> torch.Tensor:
    """As Llama computes them for heads of size 6."""
    return 1.0 / (base ** (torch.arange(0, 6, 2).float() / 6))


def add_to(source: Path, **tensors: torch.Tensor) -> None:
    """Further tensors in the single file, under names with `__` for a dot."""
    weights = safetensors.torch.load_file(source / "model.safetensors")
    weights |= {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(weights, source / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_that_repeat_what_is_known_are_left_out(tmp_path, dtype):
    source = write_llama(tmp_path / "llama", dtype=dtype, tie_word_embeddings=True)
    stored = {f"model__layers__{layer}__self_attn__rotary_emb__inv_freq": frequencies().to(dtype) for layer in range(2)}
    add_to(source, lm_head__weight=llama_weights(dtype)["model.embed_tokens.weight"], model__rotary_emb__inv_freq=frequencies(), **stored)
    copy = imported(source)
    assert len(copy.tensor_names) == 20 and copy.metadata["config"]["model"]["tie_embeddings"]
    assert torch.equal(copy.read("model.embedding.weight"), llama_weights(dtype)["model.embed_tokens.weight"].float())


LAYER_1 = "model__layers__1__self_attn__rotary_emb__inv_freq"
OTHER_HEAD = llama_weights()["model.embed_tokens.weight"].clone()
OTHER_HEAD[-1, -1] *= -1


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({LAYER_1: frequencies(10000.0)}, "does not hold the 3 rotary frequencies of base 500 (rope_theta"),
        ({LAYER_1: frequencies(501.0).bfloat16() * 1.05}, "does not hold the 3 rotary frequencies"),
        ({LAYER_1: frequencies()[:2].clone()}, "does not hold the 3 rotary frequencies"),
        ({LAYER_1: frequencies().double()}, "does not hold the 3 rotary frequencies"),
        ({"model__layers__2__self_attn__rotary_emb__inv_freq": frequencies()}, "has no place"),
        ({"model__layers__1__self_attn__rotary_emb__cos_cached": frequencies()}, "has no place"),
        ({"lm_head__weight": OTHER_HEAD}, "'lm_head.weight' differs from 'model.embed_tokens.weight', but tie_word_embeddings"),
        ({"lm_head__weight": llama_weights()["model.embed_tokens.weight"].bfloat16()}, "'lm_head.weight' differs from"),
    ],
)
def test_tensors_that_contradict_what_is_known_are_refused(tmp_path, capsys, tensors, sentence):
    source = write_llama(tmp_path / "llama", tie_word_embeddings=True)
    add_to(source, lm_head__weight=llama_weights()["model.embed_tokens.weight"])
    add_to(source, **tensors)
    assert run(source, tmp_path / "d") == 4
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and os.listdir(tmp_path) == ["llama"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_consolidated_weights_are_imported_too(tmp_path, dtype):
    _, path = trained(tmp_path, "model.tie_embeddings=true")
    assert run(path, tmp_path / "one", "--format", "consolidated", "--dtype", dtype) == 0
    copy = imported(tmp_path / "one", "--shards", 2)
    source = open_checkpoint(path)
    expected = {name: source.read(name).to(torch.bfloat16).float() if dtype == "bf16" else source.read(name) for name in source.tensor_names}
    assert all(torch.equal(copy.read(name), value) for name, value in expected.items()) and copy.tensor_names == source.tensor_names
    assert copy.step == 0 and copy.metadata["config"] == source.metadata["config"]
    assert run(tmp_path / "one", tmp_path / "hf", "--format", "hf") == 0  # through our names to those of transformers


@pytest.mark.parametrize(("options", "dtype"), [((), torch.bfloat16), (("--dtype", "fp32"), torch.float32)])
def test_it_can_be_consolidated_under_our_names(tmp_path, options, dtype):
    source = write_llama(tmp_path / "llama", dtype=torch.bfloat16, is_sharded=True)
    assert run(source, tmp_path / "one", "--format", "consolidated", *options) == 0
    found = safetensors.torch.load_file(tmp_path / "one" / "model.safetensors")
    assert torch.equal(found["head.weight"], llama_weights(torch.bfloat16)["lm_head.weight"].to(dtype)) and found["norm.weight"].dtype == dtype
    assert json.loads((tmp_path / "one" / "config.json").read_text())["model"]["block"] == "transformer"


def test_a_run_trains_from_it_once_it_accepts_other_data(tiny, tmp_path):
    copy = imported(write_llama(tmp_path / "llama"))
    config = yaml.safe_load(tiny.read_text()) | {"model": copy.metadata["config"]["model"]}
    tiny.write_text(yaml.safe_dump(config))
    with pytest.raises(CheckpointMismatchError, match=r"had 0 sources and have 1; .* data.allow_fingerprint_change=true"):
        tiny_run.prepare(tiny, resume=str(copy.path))
    settings = ("data.allow_fingerprint_change=true", "train.num_steps=4")
    begun = tiny_run.prepare(tiny, *settings, resume=str(copy.path))
    assert begun.position.step == 0 and begun.position.samples_consumed == 0
    assert torch.equal(tiny_run.weights(begun)["head.weight"], llama_weights()["lm_head.weight"])
    begun.lock.close()
    trained_run = tiny_run.train_tiny(tiny, *settings, resume=str(copy.path))
    assert trained_run.position.step == 4 and len(tiny_run.losses(trained_run)) == 4


def test_an_interrupted_import_goes_on_unless_the_source_is_another_by_then(tmp_path, monkeypatch):
    source = write_llama(tmp_path / "llama", is_sharded=True)
    door = load_door("reshard_checkpoint")

    def interrupt(self, stage, completed, total):
        if stage == "verifying":
            raise KeyboardInterrupt

    def interrupted() -> dict[str, int]:
        assert random.random() + np.random.random() + torch.rand(1) > 0  # as in another process, the generators are elsewhere by now
        with monkeypatch.context() as patch:
            patch.setattr(door.ProgressDisplay, "show", interrupt)
            assert door.main([str(source), str(tmp_path / "d"), "--shards", "2"]) == 130
        return {path.name: path.stat().st_ino for path in (tmp_path / f"{WORK_PREFIX}d" / "content").glob("model*")}

    first, second = interrupted(), interrupted()
    assert first == second and len(first) == 2  # nothing was written again
    weights = safetensors.torch.load_file(source / FIRST)
    weights["model.layers.0.input_layernorm.weight"] += 1
    safetensors.torch.save_file(weights, source / FIRST)
    copy = imported(source, "--shards", 2)
    assert torch.equal(copy.read("model.blocks.0.mixer_norm.weight"), weights["model.layers.0.input_layernorm.weight"])


NESTED = "[" * 100_000


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral', but only 'llama'"),
        ({"architectures": ["LlamaModel"]}, "architectures is ['LlamaModel']"),
        ({"num_key_value_heads": 2}, "'model.layers.0.self_attn.k_proj.weight' has shape [24, 24], by config.json it has [12, 24]"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 4"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0, but a whole number of at least 1"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', but the transformer baseline needs 'silu'"),
        ({"is_causal": False}, "is_causal is False"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        ({"auto_map": {"AutoModel": "code.py"}}, "auto_map is {'AutoModel': 'code.py'}"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling.type is 'yarn', but the transformer baseline knows default, linear"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling and rope_parameters contradict each other"),
        ({"rope_scaling": LINEAR_ROPE | {"type": "llama3"}}, "rope_scaling.rope_type linear and rope_scaling.type llama3 contradict each other"),
        ({"rope_parameters": LINEAR_ROPE | {"factor": 0.5}}, "rope_parameters.factor is 0.5, but a number of at least 1 is needed"),
        ({"rope_parameters": LINEAR_ROPE | {"factor": "2"}}, "rope_parameters.factor is '2', but a finite number above 0"),
        ({"rope_parameters": LINEAR_ROPE | {"low_freq_factor": 1}}, "rope_parameters.'low_freq_factor' is 1, but the transformer baseline does not"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope_parameters.factor is None, but a finite number above 0 is needed"),
        ({"rope_parameters": LLAMA3_ROPE | {"high_freq_factor": 0.1}}, "rope_parameters.high_freq_factor 0.1 is not above low_freq_factor 0.15"),
        (
            {"rope_parameters": LLAMA3_ROPE | {"original_max_position_embeddings": 16.0}},
            "rope_parameters.original_max_position_embeddings is 16.0, but a whole number",
        ),
        (
            {"rope_parameters": LLAMA3_ROPE | {"original_max_position_embeddings": 2**40}},
            "whose original_max_position_embeddings is more than a model can have here",
        ),
        (
            {"rope_parameters": LLAMA3_ROPE, "original_max_position_embeddings": 8},
            "original_max_position_embeddings is 8, but 16 in rope_parameters",
        ),
        ({"rope_parameters": {"rope_type": "default", "factor": 8}}, "rope_parameters.'factor' is 8"),
        ({"rope_parameters": [1]}, "rope_parameters is [1]"),
        ({"rope_theta": 100.0}, "rope_theta 100.0 and rope_parameters.rope_theta 500.0 contradict each other"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0, but a finite number above 0"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is 1000000"),
        ({"hidden_size": None}, "hidden_size is None, but a whole number"),
        ({"num_hidden_layers": 10**15}, "num_hidden_layers is 1000000000000000, more than a model can have here"),
        ({"num_hidden_layers": 9999}, "lacks the tensor 'model.layers.2.input_layernorm.weight', which its config.json asks for"),
        ({"num_hidden_layers": 1}, "for which the transformer baseline of config.json has no place"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_attention_heads": 5, "num_key_value_heads": None}, "num_attention_heads 5 does not divide hidden_size 24"),
        ({"head_dim": 5}, "head_dim is 5, but rotary positions need an even one"),
        ({"head_dim": 8}, "'model.layers.0.self_attn.q_proj.weight' has shape [24, 24], by config.json it has [32, 24]"),
        ({"vocab_size": 2**62}, "vocab_size is 4611686018427387904, more than a model can have here"),
        ({"vocab_size": 2**20}, "'model.embed_tokens.weight' has shape [61, 24], by config.json it has [1048576, 24]"),
        ({"tie_word_embeddings": True}, "'lm_head.weight' differs from 'model.embed_tokens.weight', but tie_word_embeddings"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, but true or false"),
        ({"id2label": [[[]]] * 3, "x": float("nan")}, "config.json.x is nan, which JSON cannot hold"),
    ],
)
def test_a_config_that_the_baseline_cannot_have_is_refused(tmp_path, capsys, settings, sentence):
    source = write_llama(tmp_path / "llama", **settings)
    assert run(source, tmp_path / "d") == 4
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and os.listdir(tmp_path) == ["llama"]


def without(name: str):
    return lambda source: (source / name).unlink()


def config_of(text: str | bytes):
    return lambda source: (source / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())


def other_tensors(**changes: torch.Tensor | None):
    """A change of tensors of the second file; None: the tensor is left out."""

    def change(source: Path) -> None:
        found = safetensors.torch.load_file(source / SECOND)
        names = {name.replace(".", "_"): name for name in found}
        found |= {names.get(name, name): tensor for name, tensor in changes.items()}
        safetensors.torch.save_file({name: tensor for name, tensor in found.items() if tensor is not None}, source / SECOND)
        files = json.loads((source / INDEX).read_text())["weight_map"]
        kept = {name: file for name, file in files.items() if file == FIRST} | {name: SECOND for name in found if found[name] is not None}
        (source / INDEX).write_text(json.dumps({"weight_map": kept}))

    return change


def other_index(key: str, value: object):
    def change(source: Path) -> None:
        index = json.loads((source / INDEX).read_text())
        index["weight_map"][key] = value
        (source / INDEX).write_text(json.dumps(index))

    return change


def moved_behind_a_link(name: str):
    def change(source: Path) -> None:
        (source / name).rename(source.parent / "outside")
        (source / name).symlink_to(source.parent / "outside")

    return change


def pickled(source: Path) -> None:
    for name in (INDEX, FIRST, SECOND):
        (source / name).unlink()
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04")


def cut_short(source: Path) -> None:
    (source / FIRST).write_bytes((source / FIRST).read_bytes()[:-1])


def claim_a_long_header(source: Path) -> None:
    (source / FIRST).write_bytes((2**40).to_bytes(8, "little") + (source / FIRST).read_bytes()[8:])


def with_both(source: Path) -> None:
    shutil.copy(source / FIRST, source / "model.safetensors")


def with_a_pipe(source: Path) -> None:
    (source / FIRST).unlink()
    os.mkfifo(source / FIRST)


def with_a_linked_tokenizer(source: Path) -> None:
    (source / "tokenizer.json").symlink_to(source.parent / "outside")


HEAD = torch.zeros(61, 24)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (config_of("{"), "config.json is not valid JSON ("),
        (config_of(NESTED), "config.json is not valid JSON (it is nested too deeply)"),
        (config_of('{"a": ' + "[" * 150 + "]" * 150 + "}"), "is nested deeper than 100 levels"),
        (config_of("[]"), "config.json holds [], but a JSON object is needed"),
        (config_of('{"a": 1, "a": 2}'), "the same key twice"),
        (config_of(b"\xff\xfe{}"), "config.json is not valid JSON ("),
        (config_of(b" " * (2**24 + 1)), "has 16777217 bytes"),
        (config_of("{}"), "model_type is None, but only 'llama'"),
        (without(INDEX), "holds no model.safetensors and no model.safetensors.index.json; save the weights as safetensors"),
        (pickled, "but pytorch_model.bin, a pickle, which may run code and is never read"),
        (with_both, "holds model.safetensors and model.safetensors.index.json"),
        (without(SECOND), f"is '{SECOND}', which is not there"),
        (other_index("lm_head.weight", "../outside.safetensors"), "is '../outside.safetensors', which is not the name of a safetensors file there"),
        (other_index("lm_head.weight", "/dev/zero"), "is '/dev/zero', which is not the name"),
        (other_index("lm_head.weight", "config.json"), "is 'config.json', which is not the name"),
        (other_index("lm_head.weight", [1]), "weight_map.'lm_head.weight' is [1], which is not the name"),
        (other_index("lm_head.weight", FIRST), "disagree whether 'lm_head.weight' lies there"),
        (other_index("more.weight", FIRST), "disagree whether 'more.weight' lies there"),
        (lambda source: (source / INDEX).write_text('{"weight_map": []}'), "weight_map is [], but an object of file names is needed"),
        (other_tensors(lm_head_weight=None), "lacks the tensor 'lm_head.weight'"),
        (other_tensors(more=HEAD), "holds 'more', for which the transformer baseline of config.json has no place"),
        (other_tensors(lm_head_weight=HEAD[1:].clone()), "'lm_head.weight' has shape [60, 24], by config.json it has [61, 24]"),
        (other_tensors(lm_head_weight=HEAD.to(torch.int8)), "'lm_head.weight' has dtype I8, but weights are F32, BF16, F16"),
        (cut_short, "its byte ranges do not end with the file"),
        (claim_a_long_header, f"{FIRST} is not a safetensors file"),
        (with_a_pipe, f"{FIRST} is not a regular file"),
        (moved_behind_a_link(FIRST), f"{FIRST} is a link, which may lead elsewhere and is not followed"),
        (moved_behind_a_link(INDEX), "index.json is a link"),
        (moved_behind_a_link("config.json"), "config.json is a link"),
        (with_a_linked_tokenizer, "tokenizer.json is a link"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, capsys, damage, sentence):
    source = write_llama(tmp_path / "llama", is_sharded=True)
    damage(source)
    assert run(source, tmp_path / "d") == 4
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and set(os.listdir(tmp_path)) <= {"llama", "outside"}


@pytest.mark.parametrize(
    ("options", "exit_code", "sentence"),
    [
        (("--format", "hf"), 2, "is in that form already"),
        (("--dtype", "bf16"), 2, "--dtype is bf16, but --format is phase8"),
        (("--tensor-parallel-size", 3), 2, "does not divide model.num_heads 4"),
        (("--pipeline-parallel-size", 3), 2, "model.num_layers 2 is below"),
    ],
)
def test_options_that_cannot_be_are_refused_before_the_weights_are_read(tmp_path, capsys, options, exit_code, sentence):
    source = write_llama(tmp_path / "llama")
    assert run(source, tmp_path / "d", *options) == exit_code
    error = capsys.readouterr().err
    assert sentence in error and "reading" not in error and os.listdir(tmp_path) == ["llama"]


def test_destinations_that_cannot_be_are_refused_before_the_weights_are_read(tmp_path, capsys):
    source = write_llama(tmp_path / "llama")
    for destination in (source, source / "inside", tmp_path):
        assert run(source, destination) == 4
    assert "reading" not in capsys.readouterr().err and sorted(os.listdir(source)) == ["config.json", "model.safetensors"]


def opened(source):
    return open_hugging_face(source, read_object(regular(source / "config.json"))).with_checksums({}, on_progress=lambda *_: None)


def test_whatever_its_files_say_nothing_else_is_touched(tmp_path):
    """Fuzzed config, index and files: opened as what the others say it is, or refused in one sentence."""
    source = write_llama(tmp_path / "llama", is_sharded=True)
    originals = {path.name: path.read_bytes() for path in source.iterdir()}
    safetensors.torch.save_file(llama_weights(), tmp_path / "outside.safetensors")
    original = opened(source)
    expected = {name: original.read(name) for name in original.tensor_names}
    watch, tally = Watch(), Tally()

    @given(data=st.data(), name=st.sampled_from(["config.json", "config.json", INDEX, FIRST]))
    def check(data: st.DataObject, name: str) -> None:
        if name == FIRST:
            content = data.draw(mutated_bytes(originals[name]))
        else:
            document = json.loads(originals[name])
            content = data.draw(mutated_json(document, *document, "llama", FIRST)).encode("utf-8", "surrogatepass")
        (source / name).write_bytes(content)
        try:
            with watch.over(source):
                checkpoint = opened(source)
                checkpoint.verify()
        except Phase8Error as error:
            tally.refused(error)
        else:
            tally.count("opened")
            found = {key: checkpoint.read(key) for key in checkpoint.tensor_names}
            assert found.keys() == expected.keys() and (name == FIRST or all(torch.equal(found[key], expected[key]) for key in found))
        (source / name).write_bytes(originals[name])

    fuzz(check, num_inputs=120, derandomize=True)()
    tally.check("a Llama's files", at_least=120, among={"opened", "CheckpointCorruptError", "CheckpointMismatchError"})


MEASURED = """
import importlib.util, sys
from pathlib import Path
specification = importlib.util.spec_from_file_location("door", sys.argv[1])
door = importlib.util.module_from_spec(specification)
specification.loader.exec_module(door)
root = Path(sys.argv[2])
def peak():  # of this program, unlike getrusage, which begins with what its parent used
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
# Once unmeasured: the code itself is read into memory when it first runs.
assert door.main([str(root / "small"), str(root / "warm"), "--tensor-parallel-size", "2"]) == 0
Path("/proc/self/clear_refs").write_text("5")
before = peak()
assert door.main([str(root / "large"), str(root / "d"), "--tensor-parallel-size", "2"]) == 0
print("peak", peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_memory_stays_below_twice_the_largest_tensor(tmp_path):
    write_llama(tmp_path / "small")
    source = write_llama(tmp_path / "large", vocab_size=200_000)
    weights = llama_weights(torch.bfloat16) | {"model.embed_tokens.weight": torch.ones(200_000, 24), "lm_head.weight": torch.ones(200_000, 24)}
    safetensors.torch.save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, source / "model.safetensors")
    # glibc keeps freed blocks of up to 32 MiB for later, as chance will have it; with a fixed threshold it gives them back at once.
    environment = {"PYTHONPATH": str(TOOLS.parent), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
    command = [sys.executable, "-c", MEASURED, TOOLS / "reshard_checkpoint.py", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    largest, constant = 200_000 * 24 * 4, 12 * 2**20
    assert int(result.stdout.split()[-1]) < 2 * largest + constant
