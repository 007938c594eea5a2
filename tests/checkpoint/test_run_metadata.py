"""Metadata whose checksum is right and whose values nobody recorded: refused in one sentence, at once, before anything is built or changed."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from phase8.checkpoint.load import open_checkpoint
from phase8.checkpoint.model_sizes import sizes_problem
from phase8.checkpoint.run_metadata import OF_A_RUN, StoredPosition, run_metadata, stored_config
from phase8.config.load import config_to_mapping
from phase8.config.model_section import ModelSection
from phase8.errors import CheckpointError, CheckpointMismatchError
from phase8.generate.restore import restore_model
from phase8.model.model import build_model
from phase8.train.resume import Position, restore_run
from tests.checkpoint.forged_run import FORGERIES, forge, write_run
from tests.train.tiny_run import prepare

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def directory(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / original.name))


def test_what_a_run_records_is_read_as_it_is(original: Path):
    checkpoint = open_checkpoint(original)
    metadata = run_metadata(checkpoint, needed=OF_A_RUN)
    assert config_to_mapping(metadata.config) == checkpoint.metadata["config"] and metadata.random_state == checkpoint.metadata["random_state"]
    assert metadata.position.model_dump() == checkpoint.metadata["position"]
    assert metadata.data_fingerprint == checkpoint.metadata["data_fingerprint"]
    assert (metadata.config.model.d_model, metadata.config.precision.dtype, metadata.global_batch_size) == (24, "fp32", 4)


def test_a_position_is_stored_with_all_that_it_has():
    assert set(StoredPosition.model_fields) == {field.name for field in dataclasses.fields(Position)}


@pytest.mark.parametrize(("path", "value", "sentence"), FORGERIES, ids=[f"{path}-{str(value)[:20]}" for path, value, _ in FORGERIES])
def test_forged_values_are_refused_at_once(path: str, value: Any, sentence: str, directory: Path):
    forge(directory, path, value)
    begin = time.thread_time()
    with pytest.raises(CheckpointError) as caught:
        run_metadata(open_checkpoint(directory), needed=OF_A_RUN)
    assert time.thread_time() - begin < 2
    assert sentence in str(caught.value) and str(directory) in str(caught.value) and len(str(caught.value)) < 1000
    assert str(caught.value).isprintable() and caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("path", "value"),
    [("position.samples_consumed", -5), ("random_state.torch", "AAAA"), ("data_fingerprint", 3), ("config.model.num_layers", 10**9)],
)
def test_a_refused_checkpoint_changes_nothing(path: str, value: Any, directory: Path, original: Path):
    """It was found after the weights had been overwritten."""
    forge(directory, path, value)
    run = prepare(original.parents[3] / "tiny.yaml", f"run.output_dir={directory.parent}", console=Console(quiet=True))
    before = {name: tensor.clone() for name, tensor in run.engine.state().items()}
    generator = torch.get_rng_state()
    with pytest.raises(CheckpointError):
        restore_run(open_checkpoint(directory), run.config, data=run.data, attachments=run.attachments, engine=run.engine)
    after = run.engine.state()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items()) and torch.equal(torch.get_rng_state(), generator)


def test_a_model_of_other_shapes_is_refused_before_it_takes_memory(directory: Path):
    """Sizes that agree by chance: as many heads as divide the same width otherwise."""
    forge(directory, "config.model.num_heads", 12)
    with pytest.raises(CheckpointMismatchError, match=r"decay_bias has shape \[4\] in the checkpoint and \[12\] here"):
        restore_model(directory, device=CPU)


def test_keys_of_other_releases(directory: Path):
    forge(directory, "config.train.of_tomorrow", {"a": 1})
    forge(directory, "config.of_tomorrow", 3)
    forge(directory, "data_fingerprint.sources.0.content", "abc")
    forge(directory, "of_tomorrow", [1])
    checkpoint = open_checkpoint(directory)
    metadata = run_metadata(checkpoint, needed=OF_A_RUN)
    assert "of_tomorrow" not in config_to_mapping(metadata.config) and metadata.data_fingerprint["sources"][0]["content"] == "abc"
    for section, key in (("position", "position"), ("config.model", "model")):
        forge(directory, f"{section}.of_tomorrow", 1)
        with pytest.raises(CheckpointMismatchError, match=rf"unknown key {key}\.of_tomorrow"):
            run_metadata(open_checkpoint(directory))


def test_an_imported_model_lacks_what_only_runs_have(directory: Path):
    document = json.loads((directory / "manifest.json").read_bytes())
    for key in ("position", "global_batch_size", "data_fingerprint", "random_state", "torch_version"):
        assert key in document["metadata"]
        forge(directory, key, None)
    assert run_metadata(open_checkpoint(directory)).position is None
    restore_model(directory, device=CPU)
    with pytest.raises(CheckpointError, match=r"holds no position, which a training run records"):
        run_metadata(open_checkpoint(directory), needed=OF_A_RUN)


@pytest.mark.parametrize(("stored", "name"), [(None, "linear"), (True, "linear"), (False, "none"), ("delta", "delta"), ("none", "none")])
def test_a_model_of_an_earlier_release_has_the_global_path_that_it_had(stored: bool | str | None, name: str):
    """The first release did not write the key, later ones wrote a bool; whatever the default is now, their path was linear."""
    model = {} if stored is None else {"global_path": stored}
    assert stored_config({"model": {"d_model": 24, "num_heads": 4, **model}}).model.global_path == name
    assert stored_config({}).model.global_path == "linear"


def model_of(**changes: Any) -> ModelSection:
    return ModelSection(**({"d_model": 24, "num_layers": 3, "num_heads": 4, "vocab_size": 61, "sequence_length": 24, "ffn_size": 40} | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"block": "transformer"},
        {"block": "transformer", "convolution_size": 3, "tie_embeddings": True},
        {"low_rank_rank": 5},
        {"low_rank_rank": 5, "ffn": "low_rank_swiglu", "score": "lorentz", "chain": "both"},
        {"global_path": "delta", "chain": "both"},
        {"global_path": "delta", "global_gate": "channel", "head_size": 10},
        {"global_path": "none", "head_size": 10, "convolution_size": 1, "num_layers": 1, "ffn_size": None},
    ],
)
def test_every_model_fits_its_own_tensors_and_no_other_sizes(changes: dict[str, Any]):
    model = model_of(**changes)
    built = build_model(model, dtype=torch.float32, device=torch.device("meta"))
    shapes = {name: list(parameter.shape) for name, parameter in built.named_parameters()}
    assert sizes_problem(model, shapes) is None
    other: dict[str, Any] = {"d_model": 28, "num_layers": 4, "vocab_size": 62, "ffn_size": 2**40, "num_heads": 2**40, "head_size": 2**40}
    other |= {"low_rank_rank": 7, "convolution_size": 2**40}  # 6 is the rank of the gates
    for key, value in other.items():
        assert sizes_problem(model.model_copy(update={key: value}), shapes) is not None, key
    del shapes["blocks.0.mixer_norm.weight"]
    assert model.num_layers == 1 or "layer 1 has other weights than layer 0" in sizes_problem(model, shapes)
