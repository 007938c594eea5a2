"""Weights without a manifest: nothing vouches for their bytes, but those that are read twice must be the same."""

import json

import pytest
import safetensors.torch
import torch

from phase8.checkpoint.load import find_checkpoint, open_checkpoint
from phase8.checkpoint.model_source import open_model, tokenizer_of
from phase8.checkpoint.reshard.reshard import ConsolidatedForm, consolidate
from phase8.checkpoint.save import save_checkpoint
from phase8.errors import CheckpointCorruptError, CheckpointError, CheckpointMismatchError

TENSORS = {"embedding.weight": torch.arange(12.0).view(4, 3), "norm.weight": torch.ones(3)}


@pytest.fixture
def weights(tmp_path):
    """A consolidated directory, which has the name of a step as a user may give it."""
    tensors = {f"model.{name}": value for name, value in TENSORS.items()}
    attachments = {"tokenizer.model": b"words"}
    path = save_checkpoint(tmp_path / "c", step=7, tensors=tensors, metadata={"config": {"model": {}}}, attachments=attachments)
    destination = tmp_path / "step-0000000007"
    consolidate(open_checkpoint(path), destination, form=ConsolidatedForm({"model": {}}), dtype=None, on_progress=lambda *_: None)
    return destination


def test_they_are_a_checkpoint_without_a_past(weights):
    checkpoint = open_model(weights)
    assert (checkpoint.step, checkpoint.metadata, checkpoint.form) == (0, {"config": {"model": {}}}, "consolidated")
    assert {name: checkpoint.read(f"model.{name}").tolist() for name in TENSORS} == {name: value.tolist() for name, value in TENSORS.items()}
    assert tokenizer_of(checkpoint).read_bytes() == b"words"
    checkpoint.verify()


def test_a_tokenizer_without_a_suffix_as_earlier_releases_attached_it_is_found(tmp_path):
    path = save_checkpoint(tmp_path, step=1, tensors={}, metadata={}, attachments={"notes.txt": b"none", "tokenizer": b"words"})
    assert tokenizer_of(open_checkpoint(path)).read_bytes() == b"words"


def test_bytes_that_change_between_two_looks_are_found(weights):
    checkpoint = open_model(weights)
    checkpoint.verify()
    checkpoint.read("model.norm.weight")
    safetensors.torch.save_file(TENSORS | {"norm.weight": torch.zeros(3)}, weights / "model.safetensors", metadata={"format": "pt"})
    checkpoint.read("model.embedding.weight")
    with pytest.raises(CheckpointCorruptError, match=r"is altered: tensor 'model.norm.weight'"):
        checkpoint.read("model.norm.weight")


def test_who_needs_a_whole_checkpoint_says_what_this_is(weights):
    with pytest.raises(CheckpointError, match=r"holds weights alone .* --set checkpoint.initialise_from=\S+, or make .* tools/reshard_checkpoint.py"):
        find_checkpoint(weights)


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"norm.weight": torch.ones(3, dtype=torch.int64)}, "'norm.weight' has dtype I64, but weights are F32, BF16, F16"),
        ({"a name": torch.ones(3)}, "holds a name or a shape that no tensor of a model has"),
        ({"norm.weight": torch.ones([1] * 65)}, "a shape has 65 dims, but at most 64 are stored"),
    ],
)
def test_tensors_that_cannot_be_weights_are_refused(weights, tensors, sentence):
    safetensors.torch.save_file(tensors, weights / "model.safetensors")
    with pytest.raises((CheckpointCorruptError, CheckpointMismatchError), match=sentence):
        open_model(weights)


def test_a_config_of_neither_form_is_refused(weights):
    (weights / "config.json").write_text(json.dumps({"model": 3}))
    with pytest.raises(CheckpointMismatchError, match=r"model_type is None, but only 'llama' and 'phase8' can be read"):
        open_model(weights)
