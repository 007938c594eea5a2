"""Checkpoints that earlier revisions wrote, kept in `released/`: today's code loads every bit of them and goes on from them."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from phase8.checkpoint.load import Checkpoint, open_checkpoint
from phase8.checkpoint.manifest import Slice, TensorEntry
from phase8.checkpoint.renamed_tensors import in_present_form
from phase8.checkpoint.run_metadata import stored_config
from phase8.checkpoint.state import flat_state
from phase8.config.load import config_to_mapping, load_config
from phase8.generate.restore import restore_model
from phase8.train.build import Run, build_run
from phase8.train.loop import train
from tests.train.tiny_run import losses

RELEASED = Path(__file__).parent / "released"
FIXTURES = sorted(path.name for path in RELEASED.iterdir() if path.is_dir())
# Their config has no model.global_path and no model.memory_tokens: the path is linear and the other has its default, as in these models.
OF_FIRST_LIGHT = {"2026-11-21-8811aeb-phase8", "2026-11-21-8811aeb-transformer"}
SAVED_STEP, LAST_STEP = 4, 8


def expected_of(name: str) -> dict[str, Any]:
    """What the revision itself said."""
    return json.loads((RELEASED / name / "expected.json").read_text())


def described(tensor: torch.Tensor) -> list[object]:
    """dtype, number of elements and SHA-256 of the bytes."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return [str(tensor.dtype), tensor.numel(), hashlib.sha256(data).hexdigest()]


def expected_tensors(checkpoint: Checkpoint, name: str) -> dict[str, list[object]]:
    """By today's names; their order is that in which they were saved."""
    stored = expected_of(name)["tensors"]
    assert list(stored) == list(checkpoint.manifest.tensors)
    values = ([dtype, torch.Size(shape).numel(), digest] for dtype, shape, digest in stored.values())
    return dict(zip(checkpoint.tensor_names, values, strict=True))


def go_on(name: str, directory: Path) -> Run:
    """The run of a fixture in one process, at the step where it was saved."""
    shutil.copytree(RELEASED / name / "data", directory / "data")
    checkpoint = open_checkpoint(RELEASED / name / f"step-{SAVED_STEP:010d}")
    # Defaults may have changed since: the model is that of the checkpoint.
    model = config_to_mapping(stored_config(checkpoint.metadata["config"]))["model"]
    lines = [line for line in (RELEASED / name / "config.yaml").read_text().splitlines() if not line.startswith("model:")]
    (directory / "config.yaml").write_text("\n".join([*lines, f"model: {json.dumps(model)}"]))
    config = load_config(directory / "config.yaml", [])
    shutil.copytree(checkpoint.path, directory / "runs" / "tiny" / "checkpoints" / checkpoint.path.name)
    return build_run(config, device=torch.device("cpu"), resume="auto", console=Console(quiet=True))


def test_there_are_fixtures_and_each_says_how_it_was_made():
    assert len(FIXTURES) >= 5 and set(FIXTURES) >= OF_FIRST_LIGHT
    assert all(name in (RELEASED / "README.md").read_text() for name in FIXTURES)
    assert sum(path.stat().st_size for path in RELEASED.rglob("*") if path.is_file()) < 2**20


@pytest.mark.parametrize("name", FIXTURES)
def test_every_bit_is_read(name: str):
    checkpoint = open_checkpoint(RELEASED / name / f"step-{SAVED_STEP:010d}")
    checkpoint.verify()
    assert {tensor: described(checkpoint.read(tensor)) for tensor in checkpoint.tensor_names} == expected_tensors(checkpoint, name)
    assert checkpoint.step == SAVED_STEP and checkpoint.metadata["position"] == expected_of(name)["position"]


@pytest.mark.parametrize("name", FIXTURES)
def test_a_run_goes_on_from_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # the paths in the configs are relative
    run, expected = go_on(name, tmp_path), expected_of(name)
    saved = open_checkpoint(RELEASED / name / f"step-{SAVED_STEP:010d}")
    live = run.engine.state()
    assert {tensor: described(value) for tensor, value in live.items()} == expected_tensors(saved, name)
    assert {key: getattr(run.position, key) for key in expected["position"]} == expected["position"]
    train(run, resume_command="")
    assert run.position.step == LAST_STEP
    later = {int(step): loss for step, loss in expected["losses"].items() if int(step) > SAVED_STEP}
    assert losses(run) == pytest.approx(later, rel=1e-5) and len(later) == LAST_STEP - SAVED_STEP


@pytest.mark.parametrize("name", FIXTURES)
def test_its_model_is_restored_from_it_alone(name: str):
    """The config has keys that were removed since."""
    directory = RELEASED / name / f"step-{SAVED_STEP:010d}"
    model, _, checkpoint = restore_model(directory, device=torch.device("cpu"))
    live = {tensor: described(value) for tensor, value in flat_state(model, torch.optim.AdamW(model.parameters())).items()}
    assert live == {tensor: value for tensor, value in expected_tensors(checkpoint, name).items() if tensor.startswith("model.")}


def entry(shape: list[int], *regions: tuple[list[int], list[int]]) -> TensorEntry:
    slices = [Slice(file="a.safetensors", key="k", offsets=offsets, shape=size, checksum="crc32:00000000") for offsets, size in regions]
    return TensorEntry(dtype="F32", shape=shape, slices=slices)


def test_tensors_of_earlier_revisions_have_todays_names_and_shapes():
    whole, vector = entry([12, 4], ([0, 0], [12, 4])), entry([2], ([0], [2]))
    present = in_present_form({
        "model.blocks.3.mixer.convolution.weight": whole,
        "optimizer.blocks.3.mixer.convolution.weight.exp_avg": whole,
        "optimizer.blocks.3.mixer.chain.energy.exp_avg": vector,
        "model.blocks.10.mixer.global_norm.weight": vector,
        "model.blocks.10.mixer.decay_bias": vector,
        "model.blocks.0.mixer.gate_bias": vector,
        "model.blocks.0.mixer.scalars.weight": vector,
    })  # fmt: skip
    assert {name: found.shape for name, found in present.items()} == {
        "model.blocks.3.mixer.convolution.weight": [3, 4, 4],
        "optimizer.blocks.3.mixer.convolution.weight.exp_avg": [3, 4, 4],
        "optimizer.blocks.3.mixer.global_path.chain.energy.exp_avg": [2],
        "model.blocks.10.mixer.global_path.norm.weight": [2],
        "model.blocks.10.mixer.global_path.decay_bias": [2],
        "model.blocks.0.mixer.global_path.gate_bias": [2],
        "model.blocks.0.mixer.global_path.scalars.weight": [2],
    }
    assert present["model.blocks.3.mixer.convolution.weight"].slices[0].shape == [3, 4, 4]


def test_what_is_of_today_or_cannot_be_told_stays_as_it_is():
    today = {
        "model.blocks.0.mixer.global_path.decay_bias": entry([2], ([0], [2])),
        "model.blocks.0.mixer.convolution.weight": entry([3, 4, 4], ([0, 0, 0], [3, 2, 4]), ([0, 2, 0], [3, 2, 4])),
        "model.blocks.0.mixer.score.beta_raw": entry([2], ([0], [2])),
        "optimizer.blocks.0.mixer.convolution.weight.step": entry([], ([], [])),
        "model.chain.energy": entry([2], ([0], [2])),
    }
    assert in_present_form(today) == today and list(in_present_form(today)) == list(today)
    divided = {"model.blocks.0.mixer.convolution.weight": entry([12, 4], ([0, 0], [6, 4]), ([6, 0], [6, 4]))}
    assert in_present_form(divided) == divided  # no revision wrote this
    both = {"model.blocks.0.mixer.decay_bias": entry([2], ([0], [2])), "model.blocks.0.mixer.global_path.decay_bias": entry([2], ([0], [2]))}
    assert in_present_form(both) == both
