from __future__ import annotations

import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from phase8.checkpoint.checksum import checksum_of
from phase8.checkpoint.load import open_checkpoint
from phase8.checkpoint.reshard.compare import compare_checkpoints
from phase8.checkpoint.save import save_checkpoint
from phase8.config.load import config_to_mapping, load_config
from phase8.model.model import build_model
from tests.tools.doors import load_door

MODEL = ("model.d_model=24", "model.num_layers=4", "model.num_heads=4", "model.vocab_size=61", "model.sequence_length=24", "model.ffn_size=40",
         "model.local_window_size=[5,12]", "parallel.pipeline_schedule=interleaved", "parallel.pipeline_chunks=2")  # fmt: skip


@pytest.fixture(scope="module")
def door():
    return load_door("reshard_checkpoint")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "c")


def write_source(root: Path, *settings: str) -> Path:
    config = load_config(os.devnull, (*MODEL, *settings))
    model = build_model(config.model, dtype=torch.float32, device=torch.device("meta"))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = torch.randn(parameter.shape, generator=generator)
        tensors[f"optimizer.{name}.exp_avg"] = torch.randn(parameter.shape, generator=generator)
        tensors[f"optimizer.{name}.step"] = torch.tensor(3.0)
    return save_checkpoint(root, step=7, tensors=tensors, metadata={"config": config_to_mapping(config)}, attachments={})


def test_a_layout_and_its_interleaved_chunks(door, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    arguments = [str(tmp_path / "c"), str(tmp_path / "d"), "--tensor-parallel-size", "2", "--pipeline-parallel-size", "2", "--shards", "2"]
    assert door.main(arguments) == 0
    output = capsys.readouterr()
    assert "in 16 files, equal to" in output.out and "verifying: 100 %" in output.err
    copy = open_checkpoint(tmp_path / "d")
    copy.verify()
    assert not list(compare_checkpoints(open_checkpoint(source), copy))
    stages = {layer: {int(part.file[10:15]) // 4 for name, entry in copy.manifest.tensors.items() if name.startswith(f"model.blocks.{layer}.")
                      for part in entry.slices} for layer in range(4)}  # fmt: skip
    assert stages == {0: {0}, 1: {1}, 2: {0}, 3: {1}}
    assert door.main(arguments) == 4 and "is there already" in capsys.readouterr().err


def test_settings_of_the_ranks_that_saved_do_not_matter(door, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Asynchronous exchange needs several ranks, and the one that was written for was refused."""
    source = write_source(tmp_path / "c", "parallel.tensor_parallel_size=2", "parallel.async_tensor_parallel=true")
    assert door.main([str(source), str(tmp_path / "d")]) == 0, capsys.readouterr().err


def test_weights_of_another_model_are_refused(door, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Sizes agree, shapes do not."""
    body = (source / "manifest.json").read_bytes()[:-31].replace(b'"num_heads": 4', b'"num_heads": 2')
    (source / "manifest.json").write_bytes(body + f'"checksum": "{checksum_of(body)}"\n}}\n'.encode())
    for options in ([], ["--format", "consolidated"], ["--format", "hf"]):
        assert door.main([str(source), str(tmp_path / "d"), *options]) == 4
        assert "decay_bias has shape [4] in the checkpoint and [2] here" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_consolidated(door, source: Path, tmp_path: Path):
    assert door.main([str(source), str(tmp_path / "one"), "--format", "consolidated", "--dtype", "bf16"]) == 0
    checkpoint = open_checkpoint(source)
    for name, tensor in safetensors.torch.load_file(tmp_path / "one" / "model.safetensors").items():
        assert torch.equal(tensor, checkpoint.read(f"model.{name}").to(torch.bfloat16))
    assert load_config(tmp_path / "one" / "config.json") == load_config(os.devnull, MODEL)


@pytest.mark.parametrize(
    ("options", "exit_code", "sentence"),
    [
        (["--format", "hf", "--shards", "2"], 2, "--shards is for --format phase8"),
        (["--dtype", "bf16"], 2, "goes on bit for bit"),
        (["--format", "consolidated", "--shards", "2"], 2, "--shards is for --format phase8"),
        (["--shards", "0"], 2, "--shards is 0"),
        (["--tensor-parallel-size", "3"], 2, "does not divide model.num_heads 4"),
        (["--pipeline-parallel-size", "3"], 2, "model.num_layers 4 is below"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(door, source: Path, tmp_path: Path, capsys, options, exit_code, sentence):
    assert door.main([str(source), str(tmp_path / "d"), *options]) == exit_code
    assert sentence in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_the_original_and_its_absence(door, source: Path, tmp_path: Path, capsys):
    assert door.main([str(source), str(source)]) == 4
    assert "SRC and DST are both" in capsys.readouterr().err
    assert door.main([str(tmp_path / "nothing"), str(tmp_path / "d")]) == 4
    assert "there is no checkpoint" in capsys.readouterr().err


def test_interrupted_it_says_how_to_go_on_and_does(door, source: Path, tmp_path: Path, capsys, monkeypatch):
    def interrupt(self, stage, completed, total):
        if completed > total / 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(door.ProgressDisplay, "show", interrupt)
        assert door.main([str(source), str(tmp_path / "d"), "--shards", "2"]) == 130
    assert "run the same command again" in capsys.readouterr().err and not (tmp_path / "d").exists()
    assert door.main([str(source), str(tmp_path / "d"), "--shards", "2"]) == 0
    open_checkpoint(tmp_path / "d").verify()
