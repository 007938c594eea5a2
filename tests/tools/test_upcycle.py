"""A dense checkpoint as a mixture of experts, and a mixture rewritten for ranks that share its experts."""

import os

import pytest
import torch

from phase8.checkpoint.load import open_checkpoint
from phase8.checkpoint.reshard.compare import compare_checkpoints
from phase8.checkpoint.reshard.upcycle import UpcycledWeights
from phase8.checkpoint.save import save_checkpoint
from phase8.config.load import config_to_mapping, load_config
from phase8.division import Region
from phase8.generate.restore import restore_model
from phase8.model.model import build_model
from phase8.model.parameters import initialise
from tests.tools.doors import load_door
from tests.tools.test_reshard_checkpoint import MODEL

EXPERTS = ("model.ffn=moe", "model.num_experts=4", "model.expert_ffn_size=16", "model.moe_every_n_layers=2", "model.first_dense_layers=1")


@pytest.fixture(scope="module")
def door():
    return load_door("reshard_checkpoint")


def write_model(root, *settings):
    """A checkpoint of a model off its initial values, with an optimizer."""
    config = load_config(os.devnull, (*MODEL, *settings))
    model = build_model(config.model, dtype=torch.float32, device=torch.device("cpu"))
    initialise(model, seed=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"optimizer.{name}.exp_avg": torch.ones(each.shape) for name, each in model.named_parameters()}
    return save_checkpoint(root, step=7, tensors=tensors, metadata={"config": config_to_mapping(config)}, attachments={})


def hidden_of(path):
    model, *_ = restore_model(path, device=torch.device("cpu"))
    tokens = torch.randint(61, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(tokens)[0], model


@pytest.mark.parametrize(("experts", "top_k"), [(4, None), (4, 3), (6, 6), (2, 2), (1, 1), (4, 1), (6, 1)])
def test_whatever_the_number_of_experts_of_a_token_logits_are_those_of_the_dense_model(door, tmp_path, capsys, experts, top_k):
    source = write_model(tmp_path / "c", "precision.dtype=fp32")
    options = ["--upcycle-experts", str(experts), *([] if top_k is None else ["--upcycle-top-k", str(top_k)])]
    assert door.main([str(source), str(tmp_path / "d"), *options]) == 0, capsys.readouterr().err
    (hidden, dense), (found, mixture) = hidden_of(source), hidden_of(tmp_path / "d")
    expected, found = dense.logits(hidden), mixture.logits(found)
    assert (mixture.section.num_experts, mixture.section.top_k) == (experts, top_k or 2)
    # A single one of several experts has its score for a weight, which is 1 / E but for what makes experts differ.
    tolerance = 1e-5 if top_k != 1 or experts == 1 else 2e-3
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def test_a_mixture_of_single_experts_spreads_tokens_and_trains_on(door, tmp_path):
    source = write_model(tmp_path / "c")
    assert door.main([str(source), str(tmp_path / "d"), "--upcycle-experts", "4", "--upcycle-top-k", "1"]) == 0
    model, *_ = restore_model(tmp_path / "d", device=torch.device("cpu"))
    shares = []
    tokens = torch.randint(61, (8, 24), generator=torch.Generator().manual_seed(0))
    model.requires_grad_(True)
    model.loss_sum(tokens[:, :-1], tokens[:, 1:], on_losses=lambda _, found: shares.append(found["routing"][:4] / (8 * 23))).backward()
    assert len(shares) == len(model.blocks) and all(share.max() < 0.8 for share in shares)
    assert all(block.feed_forward.router.scores.weight.grad.abs().max() > 0 for block in model.blocks.values())


@pytest.mark.parametrize("layout", [(), ("--shards", "4", "--expert-parallel-size", "2"), ("--tensor-parallel-size", "2")])
def test_a_mixture_of_copies_computes_what_the_dense_model_computes(door, tmp_path, capsys, layout):
    # Keys of experts are without effect in a dense model.
    source = write_model(tmp_path / "c", "model.top_k=1", "model.shared_experts=2", "model.moe_every_n_layers=3")
    assert door.main([str(source), str(tmp_path / "d"), "--upcycle-experts", "4", *layout]) == 0, capsys.readouterr().err
    mixture, dense = open_checkpoint(tmp_path / "d"), open_checkpoint(source)
    mixture.verify()
    assert mixture.step == 0 and not any(name.startswith("optimizer.") for name in mixture.tensor_names)
    for expert in range(4):
        found = mixture.read("model.blocks.2.feed_forward.experts.down")[expert]
        assert torch.equal(found, dense.read("model.blocks.2.feed_forward.down.weight"))
    (expected, _), (hidden, model) = hidden_of(source), hidden_of(tmp_path / "d")
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
    router = model.blocks["0"].feed_forward.router
    assert router.load.tolist() == [0.25] * 4 and 0.01 < router.scores.weight.std() < 0.03


def test_a_region_of_experts_is_a_region_of_the_dense_weight(tmp_path):
    source = open_checkpoint(write_model(tmp_path / "c"))
    weights = UpcycledWeights(source, {}, has_experts=(True, False, False, True), num_experts=3, added={"x": torch.arange(12.0).view(3, 4)})
    name, dense = "model.blocks.0.feed_forward.experts.gate", source.read("model.blocks.0.feed_forward.gate.weight")
    assert weights.entry(name).shape == [3, 40, 24] and "model.blocks.1.feed_forward.gate.weight" in weights.tensor_names
    assert torch.equal(weights.read_region(name, Region([1, 5, 2], [2, 7, 9])), dense[5:12, 2:11].expand(2, 7, 9))
    tripled = UpcycledWeights(source, {}, has_experts=(True, False, False, True), num_experts=3, factor=3, added={})
    assert torch.equal(tripled.read_region(name, Region([1, 5, 2], [2, 7, 9])), dense[5:12, 2:11].expand(2, 7, 9))
    down, last = "model.blocks.0.feed_forward.experts.down", source.read("model.blocks.0.feed_forward.down.weight")
    assert torch.equal(tripled.read_region(down, Region([1, 5, 2], [2, 7, 9])), 3 * last[5:12, 2:11].expand(2, 7, 9))
    assert torch.equal(weights.read_region("model.x", Region([1, 1], [2, 2])), torch.tensor([[5.0, 6], [9, 10]]))


def test_a_mixture_for_ranks_that_share_its_experts(door, tmp_path):
    source = write_model(tmp_path / "c", *EXPERTS)
    layout = ("--shards", "4", "--expert-parallel-size", "2", "--tensor-parallel-size", "2")
    assert door.main([str(source), str(tmp_path / "d"), *layout]) == 0
    copy = open_checkpoint(tmp_path / "d")
    copy.verify()
    assert not list(compare_checkpoints(open_checkpoint(source), copy))
    # Each rank along ep has two experts; tensor-parallel ranks halve their width, and ZeRO halves the model width.
    slices = copy.entry("model.blocks.1.feed_forward.experts.gate").slices
    assert sorted(part.offsets for part in slices) == [[e, f, d] for e in (0, 2) for f in (0, 8) for d in (0, 12)]
    assert {part.file for part in slices if part.offsets == [2, 8, 12]} == {"model-rank00007-00000.safetensors"}


@pytest.mark.parametrize(
    ("settings", "options", "sentence"),
    [
        (EXPERTS, ["--upcycle-experts", "4"], "--upcycle-experts is for dense models, but model.ffn of"),
        ((), ["--upcycle-experts", "1"], "--upcycle-experts is 1, but 2 experts compute a token (--upcycle-top-k); give at least as many."),
        ((), ["--upcycle-experts", "0"], "--upcycle-experts is 0, but 2 experts compute a token (--upcycle-top-k); give at least as many."),
        (
            (), ["--upcycle-experts", "4", "--upcycle-top-k", "5"],
            "--upcycle-experts is 4, but 5 experts compute a token (--upcycle-top-k); give at least as many.",
        ),
        ((), ["--upcycle-experts", "4", "--upcycle-top-k", "0"], "--upcycle-top-k is 0, but must be at least 1."),
        ((), ["--upcycle-top-k", "2"], "--upcycle-top-k is 2, but no mixture is made; give --upcycle-experts too, or leave it out."),
        ((), ["--upcycle-experts", "4", "--format", "consolidated"], "--upcycle-experts is for --format phase8, but --format is consolidated"),
        ((), ["--shards", "2", "--expert-parallel-size", "2"], "--expert-parallel-size is 2, but model.ffn is swiglu and has no experts"),
        (EXPERTS, ["--shards", "3", "--expert-parallel-size", "2"], "--expert-parallel-size 2 does not divide --shards 3, of which"),
        (EXPERTS, ["--shards", "3", "--expert-parallel-size", "3"], "--expert-parallel-size 3 does not divide model.num_experts 4; choose a"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(door, tmp_path, capsys, settings, options, sentence):
    source = write_model(tmp_path / "c", *settings)
    assert door.main([str(source), str(tmp_path / "d"), *options]) == 2
    assert sentence in capsys.readouterr().err and not (tmp_path / "d").exists()
