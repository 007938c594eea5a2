"""Every documented exit code of launch/pretrain.py, from a real cause: one line, no traceback."""

import contextlib
import importlib.util
import io
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from phase8 import errors
from phase8.config.load import load_config
from phase8.data.loader import SequenceDataset
from phase8.data.tokenizer_training import train_sentencepiece
from phase8.train import build

DOOR = Path(__file__).parents[2] / "launch" / "pretrain.py"


@pytest.fixture
def call(tiny, monkeypatch, capfd):
    """The command with a tiny config in this process: exit code, output and errors."""
    precision = torch.get_float32_matmul_precision()
    specification = importlib.util.spec_from_file_location("door_pretrain_exit", DOOR)
    door = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(door)

    def call(*overrides, options=()):
        settings = ["--set", "train.num_steps=3", "optim.warmup_steps=1", "train.evaluate_every_n_steps=0", *overrides]
        monkeypatch.setattr(sys, "argv", [str(DOOR), "--config", str(tiny), "--device", "cpu", *options, *settings])
        code = door.main()
        return code, *capfd.readouterr()

    yield call
    torch.set_float32_matmul_precision(precision)


def assert_one_error(result, code, text):
    assert result[0] == code, result
    assert result[2].startswith("error: ") and text in result[2] and result[2].count("\n") == 1, result[2]
    assert "Traceback" not in result[1] + result[2]


def test_every_code_of_an_error_is_documented_once():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.Phase8Error)]
    table = [line.split(" | ")[0].removeprefix("| ") for line in errors.__doc__.splitlines() if line.startswith("| ")][1:]
    codes = {str(kind.exit_code) for kind in kinds}
    assert len(set(table)) == len(table) and codes | {"0", "130"} == set(table)
    words = " ".join(DOOR.read_text().split('"""')[1].partition("Exit codes: ")[2].split())
    assert all(words.startswith(f"{code} ") or f"; {code} " in words for code in table)


def test_0_finished(call, tmp_path):
    code, output, errors = call()
    assert (code, errors) == (0, "") and "step 3/3" in output
    assert (tmp_path / "runs" / "tiny" / "checkpoints" / "step-0000000003").is_dir()


def test_0_stopped_on_request_and_the_printed_command_goes_on(call, monkeypatch):
    read = SequenceDataset.__getitem__

    def read_and_stop(dataset, number):
        if number == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(dataset, number)

    monkeypatch.setattr(SequenceDataset, "__getitem__", read_and_stop)
    code, output, errors = call(options=["--resume", "none"])
    assert code == 0 and "SIGTERM: stopping after this step" in errors and "SIGTERM: saved at step 2; go on with:" in output
    command = output.splitlines()[-1]
    assert "--set train.num_steps=3" in command and "--resume" not in command
    assert "resumed from" in call()[1]


def test_0_whatever_the_output_cannot_show(call, tmp_path):
    """A prompt that an encoding lacks, and a place whose name is no UTF-8."""
    tokenizer = train_sentencepiece(["def main(): pass\n"] * 50, tmp_path / "tokenizer.model", vocab_size=280)
    settings = ["model.vocab_size=300", f"data.tokenizer={tokenizer}", "observe.sample_prompt=日本", "observe.sample_tokens=3"]
    output = io.BytesIO()
    with io.TextIOWrapper(output, encoding="ascii", write_through=True) as stream, contextlib.redirect_stdout(stream):
        code, _, errors = call(f"run.output_dir={tmp_path}/no\udcffutf8", *settings, "observe.report=true", "observe.tensorboard=true")
        shown = output.getvalue()
    run = tmp_path / "no\udcffutf8" / "tiny"
    assert (code, errors) == (0, "") and rb"\u65e5\u672c" in shown
    assert f"report: {tmp_path}/no\\udcffutf8/tiny/report/index.html" in shown.decode("ascii")
    assert "日本" in (run / "report" / "index.html").read_text(encoding="utf-8") and list((run / "tensorboard").iterdir())
    assert load_config(run / "config.yaml", []).run.output_dir == str(run.parent)


def test_2_config(call):
    assert_one_error(call("model.num_heads=5"), 2, "model.num_heads 5")


def test_2_fewer_steps_than_the_checkpoint(call):
    call()
    assert_one_error(call("train.num_steps=2"), 2, "train.num_steps is 2, but the checkpoint is at step 3")


def test_3_data(call, tmp_path):
    assert_one_error(call(f"data.train={tmp_path}/missing"), 3, "data.train")


def test_3_a_token_outside_the_vocabulary_while_training(call):
    assert_one_error(call("model.vocab_size=10"), 3, "model.vocab_size is 10")


def test_3_tokenizer(call, tmp_path):
    (tmp_path / "bad.model").write_bytes(b"nonsense")
    assert_one_error(call(f"data.tokenizer={tmp_path}/bad.model"), 3, "bad.model")


def test_4_no_such_checkpoint(call, tmp_path):
    assert_one_error(call(options=["--resume", str(tmp_path / "nothing")]), 4, "nothing")


def test_4_all_checkpoints_damaged(call, tmp_path):
    call()
    (checkpoint,) = (tmp_path / "runs" / "tiny" / "checkpoints").iterdir()
    next(checkpoint.glob("model-*.safetensors")).unlink()
    assert_one_error(call(), 4, "all 1 checkpoints")


def test_4_checkpoint_of_another_model(call):
    call()
    assert_one_error(call("model.num_layers=1"), 4, "model.num_layers was 2 and is 1")


def test_5_storage(call, tmp_path):
    (tmp_path / "file").write_text("")
    for directory, name in ((f"{tmp_path}/file", "tiny"), (f"{tmp_path}/file/inside", "tiny"), (tmp_path, "file")):
        sentence = f"run.output_dir is {directory} and run.name is {name}, but {tmp_path}/file is a file, and the run needs a directory there; "
        assert_one_error(call(f"run.output_dir={directory}", f"run.name={name}"), 5, sentence)


def test_5_the_disk_is_full_at_the_last_save(call, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("phase8.checkpoint.writer.saving_directory", full)
    assert_one_error(call(), 5, "No space left on device")


def test_6_diverged(call):
    result = call("optim.learning_rate=1e30", "optim.warmup_steps=0", "train.num_steps=9", "train.anomaly.max_consecutive=2")
    assert_one_error(result, 6, "the last of 2 in a row")


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


NOT_SAVED = "nothing was saved, and there is no checkpoint yet"


def assert_interrupted(result, num_lines, sentence=NOT_SAVED):
    code, output, errors = result
    assert code == 130 and errors.endswith(f"interrupted: {sentence}\n"), result
    assert errors.strip().count("\n") == num_lines - 1 and "Traceback" not in output + errors


def test_130_interrupted_before_training(call, monkeypatch):
    monkeypatch.setattr(build, "open_run_data", lambda *_, **__: interrupt())
    assert_interrupted(call(), 1)


def test_130_interrupted_with_a_checkpoint(call, monkeypatch):
    call("train.stop_at_step=2")
    monkeypatch.setattr(build, "open_run_data", lambda *_, **__: interrupt())
    assert_interrupted(call(), 1, "nothing was saved since the last checkpoint")


def test_130_interrupted_twice(call, monkeypatch, tmp_path):
    def read(dataset, number):
        interrupt()
        interrupt()

    monkeypatch.setattr(SequenceDataset, "__getitem__", read)
    assert_interrupted(call(), 2)
    assert list((tmp_path / "runs" / "tiny" / "checkpoints").iterdir()) == []
