"""Trained models in eight and four bits: what is written, that every tool reads it, and how little the losses change."""

import functools
import json
import math
import re
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
from phase8.model import quantized_layers
from phase8.model.quantized_layers import QuantizedExperts, QuantizedLinear
from phase8.precision import int4
from phase8.precision.int4 import Int4, block_of_torch
from phase8.precision.int8 import Int8
from phase8.precision.weight_format import IN_WORDS
from tests.tools.doors import load_door
from tests.tools.test_upcycle import EXPERTS, hidden_of, write_model
from tests.train.tiny_run import train_tiny, write_config

CPU = torch.device("cpu")
BLOCKS = {
    "default": (),
    "delta, gate per channel": ("model.global_path=delta", "model.global_gate=channel", "model.chain=both"),
    "low-rank mixer": ("model.low_rank_rank=5", "model.ffn=swiglu"),
    "all of low rank": ("model.low_rank_rank=12", "model.ffn=low_rank_swiglu"),
    "low-rank transformer": ("model.low_rank_rank=12", "model.ffn=low_rank_swiglu", "model.block=transformer"),
    "experts": EXPERTS,
    "experts, some shared, of low rank": (*EXPERTS, "model.shared_experts=1", "model.top_k=1", "model.low_rank_rank=12"),
    "transformer": ("model.block=transformer",),
    "transformer, fewer heads of keys": ("model.block=transformer", "model.num_kv_heads=1"),
}
# Options of the command, the format that they choose, and by how much what a model off its first weights computes may change.
FORMATS = {
    "int8": ((), Int8(is_dynamic=False), 0.05),
    "dynamic": (("--dynamic",), Int8(is_dynamic=True), 0.05),
    "int4": (("--bits", "4"), Int4(), 0.3),
}
FOUR = ("--bits", "4")


def is_left(name, weight_format):
    """Whether a matrix of a block keeps its weights: those that are summed in fp32, a gate per channel, and thin ones that would not get smaller."""
    is_thin = weight_format.bits == 4 and name in {f"mixer.{each}.up.weight" for each in ("q", "k", "v", "out")}
    return is_thin or any(each in name for each in ("convolution.", "scalars.", "router.", "norm", "global_path.gate.", "chain."))


@pytest.fixture(scope="module")
def door():
    return load_door("quantize_checkpoint")


def refused(door, capsys, *arguments):
    code = door.main([*map(str, arguments)])
    return code, capsys.readouterr().err


@pytest.mark.parametrize(("options", "weight_format", "bound"), FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("block", BLOCKS)
def test_what_a_model_computes_changes_little(door, tmp_path, capsys, block, options, weight_format, bound):
    source = write_model(tmp_path / "c", *BLOCKS[block])
    assert door.main([str(source), str(tmp_path / "d"), *options]) == 0, capsys.readouterr().err
    (expected, _), (hidden, model) = hidden_of(source), hidden_of(tmp_path / "d")
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear | QuantizedExperts)]
    assert layers and all(layer.weight_format == weight_format for layer in layers)
    num_scales = sum(name.endswith("scale") for layer in layers for name, _ in layer.named_buffers())
    assert 0 < ((hidden - expected).norm() / expected.norm()).item() < bound
    assert f"{num_scales} weights of {IN_WORDS[weight_format.bits]} bits" in capsys.readouterr().out
    # What has a few bits' scale is what would take more bytes in bf16; what is left, of blocks, is what has no other form.
    left = {name.split(".", 2)[2] for name, each in model.named_parameters() if name.startswith("blocks.") and each.ndim > 1}
    assert all(is_left(name, weight_format) for name in left), left


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


def test_what_is_written_in_four_bits(door, tmp_path):
    source = open_checkpoint(write_model(tmp_path / "c", "model.d_model=64", "model.num_heads=2"))
    assert door.main([str(source.path), str(tmp_path / "d"), *FOUR]) == 0
    found = open_model(tmp_path / "d")
    found.verify()
    assert json.loads((tmp_path / "d" / "config.json").read_text())["quantization"] == {"format": "int4", "group": 32}
    num_weights = 0
    for name in (name for name in found.tensor_names if found.entry(name).dtype == "U8"):
        weight, scale = source.read(name), found.read(name.removesuffix("weight") + "scale")
        outputs, inputs = weight.shape
        steps = scale.float().repeat_interleave(32, 1)[:, :inputs]
        values = Int4().unpacked(found.read(name)).flatten(1)[:, :inputs]
        assert scale.dtype == torch.bfloat16 and list(found.entry(name).shape) == [outputs, -(-inputs // 32) * 16]
        assert ((values * steps - weight).abs() <= 0.54 * steps.abs()).all()
        num_weights += weight.numel()
    small = [name for name in found.tensor_names if not name.endswith(".scale") and found.entry(name).dtype != "U8"]
    others = sum(found.read(name).nbytes for name in small)
    file_bytes = (tmp_path / "d" / "model.safetensors").stat().st_size
    assert num_weights and 0 <= file_bytes - others - num_weights * 4.5 / 8 < 0.1 * num_weights * 4.5 / 8 + 8192  # ragged groups; the header


@pytest.mark.skipif(block_of_torch() is None, reason="torch's operator has no fast product on this CPU")
def test_logits_of_torchs_operator_are_those_of_unpacked_weights(door, tmp_path, monkeypatch):
    settings = ("model.d_model=64", "model.num_heads=2", "model.ffn_size=128")
    door.main([str(write_model(tmp_path / "c", *settings)), str(tmp_path / "d"), *FOUR])
    model, *_ = restore_model(tmp_path / "d", device=CPU)
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    assert layers and all(layer.weight.nbytes == layer.weight.shape[1] * layer.scale.shape[1] // 2 for layer in layers)
    monkeypatch.setattr(int4, "block_of_torch", lambda: None)
    reference, *_ = restore_model(tmp_path / "d", device=CPU)
    tokens = torch.randint(61, (1, 20), generator=torch.Generator().manual_seed(0))
    found, expected = (Decoder(each).feed(tokens) for each in (model, reference))
    assert 0 < (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("options", [(), FOUR])
def test_pieces_of_a_sequence_continue_each_other(door, tmp_path, options):
    door.main([str(write_model(tmp_path / "c")), str(tmp_path / "d"), *options])
    model, *_ = restore_model(tmp_path / "d", device=CPU)
    tokens = torch.randint(61, (1, 20), generator=torch.Generator().manual_seed(0))
    whole, pieces = Decoder(model).feed(tokens), Decoder(model)
    pieces.feed(tokens[:, :13])
    torch.testing.assert_close(pieces.feed(tokens[:, 13:]), whole, rtol=1e-4, atol=1e-4)


TRAINED = {
    "dense": (),
    "experts": ("model.ffn=moe", "model.num_experts=4", "model.expert_ffn_size=24", "model.shared_experts=1"),
    "low-rank": ("model.low_rank_rank=12", "model.ffn=low_rank_swiglu"),
}


@pytest.fixture(scope="module")
def trained_as(tmp_path_factory):
    """Data and the run of a kind of model, trained once."""
    directory = tmp_path_factory.mktemp("quantize")
    config = write_config(directory)
    tokenizer = train_sentencepiece(["def main(): pass\n"] * 50, directory / "tokenizer.model", vocab_size=280)

    @functools.cache
    def trained_as(kind):
        settings = ("train.num_steps=40", "model.vocab_size=300", f"data.tokenizer={tokenizer}", "model.chain=none", f"run.name={kind}")
        return directory, train_tiny(config, *settings, *TRAINED[kind]).directory.path

    return trained_as


@pytest.fixture
def trained(trained_as):
    return trained_as("dense")


def test_quantised_weights_are_inspected_and_evaluated_on_text(door, trained, tmp_path, capsys):
    _, run = trained
    assert door.main([str(run), str(tmp_path / "q"), *FOUR]) == 0
    (tmp_path / "text.txt").write_text("def main(): pass\n" * 50)
    inspect = load_door("inspect_checkpoint")
    capsys.readouterr()
    assert inspect.main([str(tmp_path / "q"), "--verify"]) == 0
    out, errors = capsys.readouterr()
    assert errors == "" and "│ format=int4  group=" in out and "every byte was read" in out and "step" not in out.splitlines()[2]
    assert re.search(r"│ model\.blocks\.0\.\S+ +│ U8 ", out)
    assert inspect.main([str(tmp_path / "q"), "--diff", str(tmp_path / "q")]) == 0
    assert load_door("evaluate").main(["--checkpoint", str(tmp_path / "q"), "--text", str(tmp_path / "text.txt"), "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.partition("\n")[2])["total"]["bits_per_byte"] > 0


@pytest.mark.parametrize("options", [(), ("--dynamic",), FOUR])
@pytest.mark.parametrize("kind", TRAINED)
def test_the_perplexity_of_a_trained_model_is_the_same_within_a_hundredth(door, trained_as, tmp_path, kind, options):
    data, run = trained_as(kind)
    assert door.main([str(run), str(tmp_path / "d"), *options]) == 0
    losses = []
    for model in (run, tmp_path / "d"):
        arguments = ["--checkpoint", str(model), "--data", str(data / "validation"), "--device", "cpu", "--output", str(tmp_path / "e.json")]
        assert load_door("evaluate").main(arguments) == 0
        (source,) = json.loads((tmp_path / "e.json").read_text())["sources"]
        losses.append(source["loss"])
    assert math.exp(losses[1]) == pytest.approx(math.exp(losses[0]), rel=0.01) and losses[1] != losses[0]
    assert losses[0] < 0.9 * torch.tensor(300.0).log()  # it has learnt something


@pytest.mark.parametrize(("kind", "options"), [("dense", ()), ("dense", FOUR), ("experts", ()), ("experts", FOUR), ("low-rank", ("--dynamic",))])
def test_text_is_written_with_the_tokenizer_of_the_original(door, trained_as, tmp_path, monkeypatch, capsys, kind, options):
    door.main([str(trained_as(kind)[1]), str(tmp_path / "d"), *options])
    assert tokenizer_of(open_model(tmp_path / "d")) is not None
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **options: None, raising=False)
    arguments = ["--prompt", "def ma", "--max-tokens", "5", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["generate.py", "--checkpoint", str(tmp_path / "d"), *arguments])
    capsys.readouterr()
    assert load_door("generate").main() == 0 and capsys.readouterr().out.startswith("def ma")


@pytest.mark.parametrize("weight_format", [Int8(is_dynamic=False), Int4()], ids=str)
def test_a_region_of_experts_is_a_part_of_the_whole(tmp_path, weight_format):
    source, name = open_checkpoint(write_model(tmp_path / "c", *EXPERTS)), "model.blocks.1.feed_forward.experts.up"
    experts = name.removeprefix("model.")
    weights = QuantizedWeights(source, [(experts, f"{experts}_scale")], weight_format)
    whole, scale = weights.read(name), weights.read(f"{name}_scale")
    for expert, stored in enumerate(map(weight_format.quantized, source.read(name))):
        assert torch.equal(whole[expert], stored["weight"]) and torch.equal(scale[expert], stored["scale"])
    assert torch.equal(weights.read_region(name, Region([1, 3, 2], [2, 7, 5])), whole[1:3, 3:10, 2:7])
    ends = list(scale.shape[2:])
    assert torch.equal(weights.read_region(f"{name}_scale", Region([2, 3] + [0] * len(ends), [2, 7, *ends])), scale[2:4, 3:10])


def test_pairs_whose_weights_were_left_as_they_are_are_read(door, tmp_path, monkeypatch):
    """As earlier releases of the tool wrote them, and as thin matrices are written."""
    source = write_model(tmp_path / "c", "model.low_rank_rank=12", "model.ffn=swiglu")
    monkeypatch.setattr(quantized_layers, "is_worthwhile", lambda weight_format, shape: shape[-1] == 40)
    assert door.main([str(source), str(tmp_path / "d")]) == 0
    monkeypatch.undo()
    (expected, _), (hidden, model) = hidden_of(source), hidden_of(tmp_path / "d")
    assert {name.split(".")[-1] for name, each in model.named_modules() if isinstance(each, QuantizedLinear)} == {"down"}
    assert 0 < ((hidden - expected).norm() / expected.norm()).item() < 0.05


@pytest.mark.parametrize("weight_format", [Int8(is_dynamic=False), Int4()], ids=str)
def test_a_region_is_a_part_of_the_whole(tmp_path, weight_format):
    source = open_checkpoint(write_model(tmp_path / "c"))
    names, name = [("blocks.0.mixer.q.weight", "blocks.0.mixer.q.scale")], "model.blocks.0.mixer.q.weight"
    weights = QuantizedWeights(source, names, weight_format)
    whole, scale = weights.read(name), weights.read("model.blocks.0.mixer.q.scale")
    assert torch.equal(weights.read_region(name, Region([2, 1], [3, 4])), whole[2:5, 1:5])
    ends = list(scale.shape[1:])
    assert torch.equal(weights.read_region("model.blocks.0.mixer.q.scale", Region([2] + [0] * len(ends), [3, *ends])), scale[2:5])
    weights.verify()


@pytest.mark.parametrize(("options", "bits"), [((), "eight"), (FOUR, "four")])
def test_models_that_would_not_get_smaller_are_refused(door, tmp_path, capsys, options, bits):
    settings = ("model.d_model=4", "model.num_heads=1", "model.ffn_size=4", "model.block=transformer")
    code, error = refused(door, capsys, write_model(tmp_path / "c", *settings), tmp_path / "d", *options)
    assert code == 2 and f"model.d_model is 4: no weight of a block takes fewer bytes with {bits} bits" in error
    assert not (tmp_path / "d").exists()


def test_four_bits_have_no_rounded_activations(door, tmp_path, capsys):
    code, error = refused(door, capsys, tmp_path / "c", tmp_path / "d", *FOUR, "--dynamic")
    assert code == 2 and "--dynamic is set and --bits is 4, but" in error and not (tmp_path / "d").exists()


@pytest.mark.parametrize(("options", "bits"), [((), "eight"), (FOUR, "four")])
def test_few_bits_are_not_made_of_few_bits_nor_rewritten(door, tmp_path, capsys, options, bits):
    door.main([str(write_model(tmp_path / "c")), str(tmp_path / "d"), *options])
    reshard = load_door("reshard_checkpoint")
    for other, more in ((door, ()), (door, FOUR), (reshard, ()), (reshard, ("--format", "hf")), (reshard, ("--format", "consolidated"))):
        code, error = refused(other, capsys, tmp_path / "d", tmp_path / "e", *more)
        assert code == 4 and f"has weights of {bits} bits, which are for generation and evaluation alone; give the checkpoint" in error
    code, error = refused(door, capsys, tmp_path / "c", tmp_path / "d")
    assert code == 4 and "is there already; give another DST" in error


@pytest.mark.parametrize(("options", "bits"), [((), "eight"), (FOUR, "four")])
def test_no_run_begins_with_few_bits(door, trained, tmp_path, options, bits):
    data, run = trained
    door.main([str(run), str(tmp_path / "d"), *options])
    with pytest.raises(CheckpointError, match=f"has weights of {bits} bits"):
        train_tiny(data / "tiny.yaml", "model.vocab_size=300", "model.chain=none", f"checkpoint.initialise_from={tmp_path / 'd'}", "run.name=next")


OTHERS = [{"format": "int8"}, {"format": "int8", "dynamic": 1}, "int8", {"format": "int4"}, {"format": "int4", "group": 48}]


@pytest.mark.parametrize("quantization", [*OTHERS, {"format": "int4", "group": 32, "dynamic": False}, {"format": "int2", "group": 32}])
def test_other_kinds_of_quantisation_are_refused(door, tmp_path, quantization):
    door.main([str(write_model(tmp_path / "c")), str(tmp_path / "d")])
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    (tmp_path / "d" / "config.json").write_text(json.dumps(config | {"quantization": quantization}))
    with pytest.raises(Exception, match=r"quantization is .*, but this release reads") as caught:
        restore_model(tmp_path / "d", device=CPU)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(("options", "other"), [((), {"format": "int4", "group": 32}), (FOUR, {"format": "int8", "dynamic": False})])
def test_numbers_are_not_read_as_those_of_the_other_format(door, tmp_path, options, other):
    door.main([str(write_model(tmp_path / "c")), str(tmp_path / "d"), *options])
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    (tmp_path / "d" / "config.json").write_text(json.dumps(config | {"quantization": other}))
    with pytest.raises(CheckpointError) as caught:
        restore_model(tmp_path / "d", device=CPU)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("options", [(), FOUR])
def test_damaged_numbers_are_noticed(door, tmp_path, options):
    door.main([str(write_model(tmp_path / "c")), str(tmp_path / "d"), *options])
    path = tmp_path / "d" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(Exception) as caught:
        restore_model(tmp_path / "d", device=CPU)
    assert caught.value.exit_code == 4
