"""Trained models in eight bits: what is written, that every tool reads it, and how little the losses change."""

import json
import sys

import pytest
import torch

from phase8.checkpoint.load import open_checkpoint
from phase8.checkpoint.model_source import open_model, tokenizer_of
from phase8.checkpoint.reshard.quantize import QuantizedWeights
from phase8.data.tokenizer_training import train_sentencepiece
from phase8.division import Region
from phase8.errors import CheckpointError
from phase8.generate.decode import Decoder
from phase8.generate.restore import restore_model
from phase8.model.int8_layers import Int8Linear
from tests.tools.doors import load_door
from tests.tools.test_upcycle import hidden_of, write_model
from tests.train.tiny_run import train_tiny, write_config

CPU = torch.device("cpu")
BLOCKS = {
    "default": (),
    "delta, gate per channel": ("model.global_path=delta", "model.global_gate=channel", "model.chain=both"),
    "low-rank mixer": ("model.low_rank_rank=5", "model.ffn=swiglu"),
    "transformer": ("model.block=transformer",),
    "transformer, fewer heads of keys": ("model.block=transformer", "model.num_kv_heads=1"),
}


@pytest.fixture(scope="module")
def door():
    return load_door("quantize_checkpoint")


def refused(door, capsys, *arguments):
    code = door.main([*map(str, arguments)])
    return code, capsys.readouterr().err


@pytest.mark.parametrize("options", [(), ("--dynamic",)])
@pytest.mark.parametrize("block", BLOCKS)
def test_what_a_model_computes_changes_little(door, tmp_path, capsys, block, options):
    source = write_model(tmp_path / "c", *BLOCKS[block])
    assert door.main([str(source), str(tmp_path / "d"), *options]) == 0, capsys.readouterr().err
    (expected, _), (hidden, model) = hidden_of(source), hidden_of(tmp_path / "d")
    layers = [layer for layer in model.modules() if isinstance(layer, Int8Linear)]
    assert layers and all(layer.is_dynamic == bool(options) for layer in layers)
    assert 0 < ((hidden - expected).norm() / expected.norm()).item() < 0.03
    assert f"{len(layers)} layers of eight bits" in capsys.readouterr().out


def test_what_is_written(door, tmp_path):
    source = open_checkpoint(write_model(tmp_path / "c"))
    assert door.main([str(source.path), str(tmp_path / "d")]) == 0
    found = open_model(tmp_path / "d")
    found.verify()
    assert json.loads((tmp_path / "d" / "config.json").read_text())["quantization"] == {"format": "int8", "dynamic": False}
    dtypes = {name: found.entry(name).dtype for name in found.tensor_names}
    assert not any(name.startswith("optimizer.") for name in dtypes)
    for layer in ("mixer.q", "mixer.out", "feed_forward.down"):
        name = f"model.blocks.1.{layer}.weight"
        values, scale = found.read(name), found.read(f"model.blocks.1.{layer}.scale")
        assert (dtypes[name], scale.dtype) == ("I8", torch.float32)
        assert ((values * scale[:, None] - source.read(name)).abs() <= 0.5001 * scale[:, None]).all()
    others = {name: dtype for name, dtype in dtypes.items() if dtype != "I8"}
    assert others["model.embedding.weight"] == "BF16" and others["model.norm.weight"] == "F32"
    assert all(dtype == ("BF16" if len(found.entry(name).shape) > 1 else "F32") for name, dtype in others.items())


def test_pieces_of_a_sequence_continue_each_other(door, tmp_path):
    door.main([str(write_model(tmp_path / "c")), str(tmp_path / "d")])
    model, *_ = restore_model(tmp_path / "d", device=CPU)
    tokens = torch.randint(61, (1, 20), generator=torch.Generator().manual_seed(0))
    whole, pieces = Decoder(model).feed(tokens), Decoder(model)
    pieces.feed(tokens[:, :13])
    torch.testing.assert_close(pieces.feed(tokens[:, 13:]), whole, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("quantize")
    config = write_config(directory)
    tokenizer = train_sentencepiece(["def main(): pass\n"] * 50, directory / "tokenizer.model", vocab_size=280)
    run = train_tiny(config, "train.num_steps=40", "model.vocab_size=300", f"data.tokenizer={tokenizer}", "model.chain=none")
    return directory, run.directory.path


@pytest.mark.parametrize("options", [(), ("--dynamic",)])
def test_the_loss_of_a_trained_model_is_the_same_within_a_hundredth(door, trained, tmp_path, options):
    data, run = trained
    assert door.main([str(run), str(tmp_path / "d"), *options]) == 0
    losses = []
    for model in (run, tmp_path / "d"):
        arguments = ["--checkpoint", str(model), "--data", str(data / "validation"), "--device", "cpu", "--output", str(tmp_path / "e.json")]
        assert load_door("evaluate").main(arguments) == 0
        (source,) = json.loads((tmp_path / "e.json").read_text())["sources"]
        losses.append(source["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.01) and losses[1] != losses[0]
    assert losses[0] < 0.9 * torch.tensor(300.0).log()  # it has learnt something


def test_text_is_written_with_the_tokenizer_of_the_original(door, trained, tmp_path, monkeypatch, capsys):
    door.main([str(trained[1]), str(tmp_path / "d")])
    assert tokenizer_of(open_model(tmp_path / "d")) is not None
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **options: None, raising=False)
    options = ["--prompt", "def ma", "--max-tokens", "5", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["generate.py", "--checkpoint", str(tmp_path / "d"), *options])
    capsys.readouterr()
    assert load_door("generate").main() == 0 and capsys.readouterr().out.startswith("def ma")


def test_a_region_is_a_part_of_the_whole(tmp_path):
    source = open_checkpoint(write_model(tmp_path / "c"))
    weights, name = QuantizedWeights(source, ["blocks.0.mixer.q"]), "model.blocks.0.mixer.q.weight"
    whole, scale = weights.read(name), weights.read("model.blocks.0.mixer.q.scale")
    assert torch.equal(weights.read_region(name, Region([2, 1], [3, 4])), whole[2:5, 1:5])
    assert torch.equal(weights.read_region("model.blocks.0.mixer.q.scale", Region([2], [3])), scale[2:5])
    weights.verify()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (("model.ffn=moe", "model.num_experts=4", "model.expert_ffn_size=16"), "model.ffn is moe, whose experts cannot have eight bits yet"),
        (("model.low_rank_rank=5", "model.ffn=low_rank_swiglu"), "no block has a dense layer, whose weights could have eight bits"),
    ],
)
def test_models_without_dense_layers_are_refused(door, tmp_path, capsys, settings, sentence):
    code, error = refused(door, capsys, write_model(tmp_path / "c", *settings), tmp_path / "d")
    assert code == 2 and sentence in error and not (tmp_path / "d").exists()


def test_eight_bits_are_not_made_of_eight_bits_nor_rewritten_for_ranks(door, tmp_path, capsys):
    door.main([str(write_model(tmp_path / "c")), str(tmp_path / "d")])
    for other in (door, load_door("reshard_checkpoint")):
        code, error = refused(other, capsys, tmp_path / "d", tmp_path / "e")
        assert code == 4 and "has weights of eight bits, which are for generation and evaluation alone; give the checkpoint" in error
    code, error = refused(door, capsys, tmp_path / "c", tmp_path / "d")
    assert code == 4 and "is there already; give another DST" in error


def test_no_run_begins_with_eight_bits(door, trained, tmp_path):
    data, run = trained
    door.main([str(run), str(tmp_path / "d")])
    with pytest.raises(CheckpointError, match="has weights of eight bits"):
        train_tiny(data / "tiny.yaml", "model.vocab_size=300", "model.chain=none", f"checkpoint.initialise_from={tmp_path / 'd'}", "run.name=next")


@pytest.mark.parametrize("quantization", [{"format": "int4", "dynamic": False}, {"format": "int8"}, {"format": "int8", "dynamic": 1}, "int8"])
def test_other_kinds_of_quantisation_are_refused(door, tmp_path, quantization):
    door.main([str(write_model(tmp_path / "c")), str(tmp_path / "d")])
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    (tmp_path / "d" / "config.json").write_text(json.dumps(config | {"quantization": quantization}))
    with pytest.raises(Exception, match=r"quantization is .*, but this release reads") as caught:
        restore_model(tmp_path / "d", device=CPU)
    assert caught.value.exit_code == 4


def test_damaged_numbers_are_noticed(door, tmp_path):
    door.main([str(write_model(tmp_path / "c")), str(tmp_path / "d")])
    path = tmp_path / "d" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(Exception) as caught:
        restore_model(tmp_path / "d", device=CPU)
    assert caught.value.exit_code == 4
