from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from phase8.checkpoint.save import save_checkpoint
from tests.tools.doors import load_door

DOOR = Path(__file__).parents[2] / "tools" / "inspect_checkpoint.py"


@pytest.fixture(scope="module")
def door():
    return load_door("inspect_checkpoint")


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    """Checkpoints of steps 100 and 200 that differ in one tensor."""
    tokenizer = tmp_path / "tokenizer.model"
    tokenizer.write_bytes(b"words")
    for step in (100, 200):
        save_checkpoint(
            tmp_path / "run" / "checkpoints",
            step=step,
            tensors={
                "model.embedding.weight": torch.ones(8, 4),
                "model.norm.weight": torch.full((4,), step / 100, dtype=torch.bfloat16),
                "optimizer.norm.weight.step": torch.tensor(5.0),
            },
            metadata={
                "config": {"model": {"d_model": 4, "block": "phase8"}, "train": {"seed": 1, "compile": {"enabled": False}}},
                "position": {"step": step, "tokens_seen": step * 12_345},
                "random_state": {"torch": "QkFE" * 1000},
                "title": "[red]\x1b[2J",
                "torch_version": "2.13.0",
            },
            attachments={"tokenizer.model": tokenizer.read_bytes()},
        )
    return tmp_path / "run"


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_the_newest_of_a_run_is_listed_with_config_and_tensors(door, run_directory: Path, capsys: pytest.CaptureFixture):
    assert door.main([str(run_directory)]) == 0
    lines = capsys.readouterr().out.splitlines()

    def line_with(*words: str) -> str:
        (found,) = [line for line in lines if all(word in line for word in words)]
        return found

    line_with("step", " 200 ")
    line_with("position", "step=200  tokens_seen=2469000")
    line_with("config.model", "d_model=4  block=phase8")
    line_with("config.train", "seed=1  compile=(enabled=false)")
    line_with("size", "140 bytes in 2 tensor files")
    line_with("attachments", "tokenizer.model")
    line_with("torch_version", "2.13.0")
    assert not [line for line in lines if "QkFE" in line]
    line_with("model.embedding.weight", "F32", "8 x 4", "128")
    line_with("model.norm.weight", "BF16", " 4 ", " 8 ")
    line_with("optimizer.norm.weight.step", "F32", "scalar", " 4 ")
    line_with("checksums", "--verify")


def test_text_of_the_checkpoint_cannot_command_the_terminal(door, run_directory: Path, capsys: pytest.CaptureFixture):
    assert door.main([str(run_directory)]) == 0
    output = capsys.readouterr().out
    assert "\x1b" not in output and "[red]\\x1b[2J" in output


def test_metadata_that_no_run_records_are_named(door, run_directory: Path, capsys: pytest.CaptureFixture):
    assert door.main([str(run_directory)]) == 0
    assert "problem" in capsys.readouterr().out
    assert door.main([str(run_directory), "--json"]) == 0
    problem = json.loads(capsys.readouterr().out)["problem"]
    assert problem.endswith("its metadata cannot be used: position lacks samples_consumed; use another checkpoint")


def test_verify_reads_every_byte(door, run_directory: Path, capsys: pytest.CaptureFixture):
    checkpoint = run_directory / "checkpoints" / "step-0000000200"
    assert door.main([str(checkpoint), "--verify"]) == 0
    assert "all verified" in capsys.readouterr().out
    flip_last_byte(checkpoint / "model-00000.safetensors")
    assert door.main([str(checkpoint)]) == 0
    capsys.readouterr()
    assert door.main([str(checkpoint), "--verify"]) == 4
    captured = capsys.readouterr()
    assert captured.out == "" and "model-00000.safetensors is altered" in captured.err and captured.err.count("\n") == 1


def test_json_is_one_object_with_everything(door, run_directory: Path, capsys: pytest.CaptureFixture):
    assert door.main([str(run_directory / "checkpoints"), "--json", "--verify"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert (content["step"], content["verified"], content["total_bytes"]) == (200, True, 140)
    assert content["metadata"]["position"]["tokens_seen"] == 2_469_000 and content["attachments"] == {"tokenizer.model": 5}
    assert content["tensors"][1] == {"name": "model.norm.weight", "dtype": "BF16", "shape": [4], "bytes": 8, "num_slices": 1}


def test_diff_exits_as_diff_does(door, run_directory: Path, capsys: pytest.CaptureFixture):
    older, newer = (str(run_directory / "checkpoints" / f"step-{step:010d}") for step in (100, 200))
    assert door.main([older, "--diff", older]) == 0
    assert "all 3 tensors are equal" in capsys.readouterr().out
    assert door.main([older, "--diff", newer]) == 1
    output = capsys.readouterr().out
    assert "1 tensors differ" in output
    (line,) = [line for line in output.splitlines() if "model.norm.weight" in line]
    assert "values" in line and " 1 " in line
    assert door.main([older, "--diff", newer, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["differences"] == [
        {"name": "model.norm.weight", "kind": "values", "detail": "", "max_abs_difference": 1.0}
    ]


def test_diff_names_what_is_missing_and_spells_nan_in_json(door, tmp_path: Path, capsys: pytest.CaptureFixture):
    paths = [
        save_checkpoint(tmp_path / "c", step=step, tensors=tensors, metadata={}, attachments={})
        for step, tensors in (
            (1, {"model.a": torch.tensor(float("nan")), "model.only": torch.ones(1), "model.s": torch.ones(2)}),
            (2, {"model.a": torch.tensor(1.0), "model.s": torch.ones(3)}),
        )
    ]
    assert door.main([str(paths[0]), "--diff", str(paths[1])]) == 1
    output = capsys.readouterr().out
    assert "only in first" in output and "[2] and [3]" in output
    assert door.main([str(paths[0]), "--diff", str(paths[1]), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["differences"]
    assert [(row["name"], row["max_abs_difference"]) for row in found] == [("model.a", "nan"), ("model.only", None), ("model.s", None)]


def test_diff_reads_no_damaged_byte(door, run_directory: Path, capsys: pytest.CaptureFixture):
    older, newer = (run_directory / "checkpoints" / f"step-{step:010d}" for step in (100, 200))
    flip_last_byte(newer / "optimizer-00000.safetensors")
    assert door.main([str(older), "--diff", str(newer)]) == 4
    assert "optimizer-00000.safetensors is altered" in capsys.readouterr().err


def test_as_a_program_it_prints_one_sentence_without_traceback_and_exits_4(tmp_path: Path):
    result = subprocess.run([sys.executable, DOOR, tmp_path / "nothing"], capture_output=True, text=True, cwd=DOOR.parents[1], check=False,
                            env={"PYTHONPATH": str(DOOR.parents[1])})  # fmt: skip
    assert result.returncode == 4
    assert "there is no checkpoint at" in result.stderr and "Traceback" not in result.stderr and result.stdout == ""
