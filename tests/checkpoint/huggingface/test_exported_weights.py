"""Weights there and back, bit for bit, in one file or several; and directories that hold no model of ours."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from phase8.checkpoint.huggingface import export
from phase8.checkpoint.load import open_checkpoint
from phase8.checkpoint.model_source import open_model
from phase8.checkpoint.run_metadata import run_metadata
from phase8.checkpoint.state import require_fit
from phase8.checkpoint.step_directories import INDEX_NAME
from phase8.config.model_keys import keys_in_effect, model_differences
from phase8.config.model_section import ModelSection
from phase8.errors import Phase8Error
from phase8.model.model import build_model
from tests.checkpoint.fuzzing import Tally, Watch, fuzz, mutated_bytes, mutated_json
from tests.checkpoint.huggingface.exported import checkpoint_of, exported, loaded, run
from tests.model.small import VARIANTS, random_tokens, scaled_down

# A Llama forgets what it does not compute with; it has tests of its own.
OTHERS = [(name, section) for name, section in VARIANTS if section.block == "phase8" or section.convolution_taps > 1 or section.ffn == "moe"]


@pytest.mark.parametrize(
    ("section", "dtype"),
    [
        pytest.param(section, dtype, id=f"{name}-{dtype}", marks=() if place % 9 == 4 * (dtype == "bf16") else pytest.mark.full)
        for place, (name, section) in enumerate(OTHERS)
        for dtype in ("fp32", "bf16")
    ],
)
def test_there_and_back_is_bit_equal(tmp_path, section, dtype):
    _, path = checkpoint_of(tmp_path, section)
    assert run(path, tmp_path / "hf", "--format", "hf", "--dtype", dtype) == 0
    assert run(tmp_path / "hf", tmp_path / "back", "--shards", 2) == 0
    source, back = open_checkpoint(path), open_checkpoint(tmp_path / "back")
    back.verify()
    assert sorted(source.tensor_names) == sorted(back.tensor_names) and back.step == 0
    stored = {}
    for file in (tmp_path / "hf").glob("*.safetensors"):
        stored |= {name: value.dtype for name, value in safetensors.torch.load_file(file).items()}
    for name in source.tensor_names:
        was, now = source.read(name), back.read(name)
        assert torch.equal(now, was) or (dtype == "bf16" and torch.equal(now, was.bfloat16().float())), name
        assert dtype == "fp32" or torch.equal(now, was) == (not {"weight", "gate", "up", "down"} & set(name.split(".")) or _is_wide(name)), name
    assert set(stored.values()) == ({torch.float32} if dtype == "fp32" else {torch.float32, torch.bfloat16})
    before, after = (run_metadata(each).config for each in (source, back))
    assert model_differences(before.model, after.model) == {} and keys_in_effect(before.model) == keys_in_effect(after.model)
    assert after.precision.dtype == dtype


def _is_wide(name: str) -> bool:
    return any(part in name for part in ("norm", "scalar", "router"))


@torch.no_grad()
def test_weights_beyond_a_size_lie_in_several_files(tmp_path, monkeypatch):
    section = scaled_down(ModelSection())
    monkeypatch.setattr(export, "MAX_FILE_BYTES", 20_000)
    model, directory = exported(tmp_path, section)
    index = json.loads((directory / INDEX_NAME).read_text())
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values())) and files[0] == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 2
    assert index["metadata"]["total_size"] == sum(value.numel() * 4 for value in model.state_dict().values())
    assert all(os.path.getsize(directory / name) < 25_000 for name in files)
    tokens = random_tokens()
    torch.testing.assert_close(loaded(directory)(tokens).logits, model.logits(model(tokens)[0]), rtol=0, atol=1e-5)
    assert run(directory, tmp_path / "back") == 0
    assert torch.equal(open_checkpoint(tmp_path / "back").read("model.head.weight"), model.head.weight)


def test_a_head_that_repeats_the_embedding_is_left_out(tmp_path, capsys):
    model, directory = exported(tmp_path, scaled_down(ModelSection(), tie_embeddings=True))
    weights = safetensors.torch.load_file(directory / "model.safetensors")
    assert "lm_head.weight" not in weights
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(weights, directory / "model.safetensors")
    assert run(directory, tmp_path / "back") == 0
    assert len(open_checkpoint(tmp_path / "back").tensor_names) == len(model.state_dict())
    weights["lm_head.weight"][0, 0] += 1
    safetensors.torch.save_file(weights, directory / "model.safetensors")
    assert run(directory, tmp_path / "other") == 4 and "differs from 'model.embed_tokens.weight'" in capsys.readouterr().err


def changed_weights(**changes: torch.Tensor | None):
    def change(directory: Path) -> None:
        weights = safetensors.torch.load_file(directory / "model.safetensors")
        weights |= {name.replace("__", "."): value for name, value in changes.items()}
        safetensors.torch.save_file({name: value for name, value in weights.items() if value is not None}, directory / "model.safetensors")

    return change


def changed_config(**changes: object):
    def change(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text()) | changes
        (directory / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "left out"}))

    return change


def with_linked_tokenizer_config(directory: Path) -> None:
    (directory / "tokenizer.model").write_bytes(b"words")
    (directory / "tokenizer_config.json").symlink_to("/etc/passwd")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (changed_config(d_model="left out"), "config.json lacks d_model, with which the model computes"),
        (changed_config(num_layers="x"), "config.json: num_layers is 'x', which no model here has"),
        (changed_config(num_layers=1), "model.num_layers is 1, but there are weights of 2 layers"),
        (changed_config(num_layers=9000), "its config does not fit its tensors"),
        (changed_config(num_heads=2), "model.num_heads 2 and model.head_size 6 make a weight of shape [12, 24], and none has it"),
        (changed_config(score="cosine\nhere"), "config.json: score is 'cosine\\nhere', which no model here has"),
        (changed_config(tie_word_embeddings=3), "config.json: tie_word_embeddings is 3, which no model here has"),
        (changed_config(num_experts_per_tok=-1), "config.json: num_experts_per_tok is -1, which no model here has"),
        (changed_config(model_type="phase9"), "model_type is 'phase9', but only 'llama' and 'phase8' can be read"),
        (changed_weights(model__extra=torch.ones(1)), "holds 'model.extra', which is no parameter of a model here"),
        (changed_weights(model__layers__00__mixer_norm__weight=torch.ones(24)), "holds 'model.layers.00.mixer_norm.weight', which is no parameter"),
        (changed_weights(model__norm__weight=None), "norm.weight"),
        (changed_weights(model__norm__weight=torch.ones(24).double()), "has dtype F64, but weights are F32, BF16, F16"),
        (with_linked_tokenizer_config, "tokenizer_config.json is a link"),
    ],
)
def test_what_is_no_model_of_ours_is_refused_and_nothing_is_written(tmp_path, capsys, change, sentence):
    _, directory = exported(tmp_path, scaled_down(ModelSection()))
    change(directory)
    capsys.readouterr()
    assert run(directory, tmp_path / "back") == 4
    error = [line for line in capsys.readouterr().err.splitlines() if "reading:" not in line]
    assert len(error) == 1 and sentence in error[0] and sorted(os.listdir(tmp_path)) == ["c", "hf"]


def test_an_export_of_an_earlier_release_lacks_keys_that_came_later(tmp_path):
    model, directory = exported(tmp_path, scaled_down(ModelSection()))
    changed_config(embedding_scalars="left out", global_skip="left out", global_gate_activation="left out", value_activation="left out")(directory)
    assert run(directory, tmp_path / "back") == 0
    section = run_metadata(open_checkpoint(tmp_path / "back")).config.model
    assert keys_in_effect(section) == keys_in_effect(model.section) and not section.embedding_scalars


def test_whatever_its_files_say_it_is_opened_or_refused(tmp_path):
    """Fuzzed config, weights and tokenizer config."""
    model, directory = exported(tmp_path, scaled_down(ModelSection()))
    (directory / "tokenizer.model").write_bytes(b"words")
    (directory / "tokenizer_config.json").write_text('{"eos_token": "</s>", "converted_from": "tokenizer.model"}')
    names = ("config.json", "model.safetensors", "tokenizer_config.json")
    originals = {name: (directory / name).read_bytes() for name in names}
    watch, tally = Watch(), Tally()

    @given(data=st.data(), name=st.sampled_from(["config.json", *names]))
    def check(data: st.DataObject, name: str) -> None:
        if name == "model.safetensors":
            content = data.draw(mutated_bytes(originals[name]))
        else:
            document = json.loads(originals[name])
            content = data.draw(mutated_json(document, *document, "phase8", "delta")).encode("utf-8", "surrogatepass")
        (directory / name).write_bytes(content)
        try:
            with watch.over(directory):
                checkpoint = open_model(directory)
                section = run_metadata(checkpoint).config.model
                require_fit(checkpoint, build_model(section, dtype=torch.float32, device=torch.device("meta")), widen=True)
        except Phase8Error as error:
            tally.refused(error)
        else:
            tally.count("opened")
            assert len(checkpoint.tensor_names) == len(model.state_dict())
        (directory / name).write_bytes(originals[name])

    fuzz(check, num_inputs=100, derandomize=True)()
    tally.check("an exported model's files", at_least=100, among={"opened", "CheckpointCorruptError", "CheckpointMismatchError"})
