import io
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from phase8.checkpoint.load import list_checkpoints, open_checkpoint
from phase8.data.tokenizer_training import train_sentencepiece
from phase8.errors import DataError, DivergenceError, StorageError, SwapError
from phase8.observe.event_file import EventFile
from phase8.observe.metrics import read_metrics
from phase8.terminal import make_console
from phase8.train import loop, saver, trainer
from phase8.train.engine import captured_step, fsdp
from phase8.train.loop import train
from tests.train.tiny_run import losses, prepare, records, train_tiny, with_blend, write_documents

ROOT = Path(__file__).parents[2]
KEYS = {"step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "step_seconds", "mfu", "peak_memory_bytes"}


@pytest.mark.parametrize("block", ["phase8", "transformer"])
def test_learns_from_context(tiny, block):
    run = train_tiny(tiny, f"model.block={block}", "train.num_steps=60")
    last = [losses(run)[step] for step in range(56, 61)]
    # Tokens are uniform over 61 ids but often repeat: below log(61) a model has learned from context.
    assert sum(last) / 5 < 0.9 * math.log(61)


def test_metrics_have_every_step_once_and_evaluations(tiny):
    run = train_tiny(tiny)
    steps = [record for record in records(run) if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 21)) and all(record.keys() >= KEYS for record in steps)
    assert [record["tokens"] for record in steps] == [step * 4 * 24 for step in range(1, 21)]
    assert [record["step"] for record in records(run) if "validation_loss" in record] == [10, 20]


def test_retention_keeps_the_newest(tiny):
    run = train_tiny(tiny, "checkpoint.keep_last=2")
    assert [path.name for path in list_checkpoints(run.directory.checkpoints)] == ["step-0000000020", "step-0000000015"]


@pytest.mark.parametrize("ending", ["complete", "failed"])
def test_a_recorded_step_is_freed_when_the_run_ends(tiny, monkeypatch, ending):
    """Communicators would wait for it for ever."""
    closed = []

    class Recorded(captured_step.CapturedStep):
        def close(self):
            closed.append(self)
            super().close()

    monkeypatch.setattr(fsdp.FsdpEngine, "captures_steps", True)
    monkeypatch.setattr(captured_step, "EAGER_STEPS", 1000)  # there is nothing to record with
    monkeypatch.setattr(fsdp, "CapturedStep", Recorded)
    run = prepare(tiny, "train.num_steps=3", "optim.warmup_steps=1")
    if ending == "failed":
        poison(run, {2})
        monkeypatch.setattr(trainer, "take_note", lambda *arguments, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(run, resume_command="")
    else:
        train(run, resume_command="")
    assert len(closed) == 1 and run.position.step == {"complete": 3, "failed": 1}[ending]


def poison(run, steps):
    """Makes the loss of some steps not a number, by spoiling the output of the model."""
    original = run.engine.train_state.model.loss_sum

    def spoiled(*arguments):
        return original(*arguments) * (math.nan if run.position.step + 1 in steps else 1.0)

    run.engine.train_state.model.loss_sum = spoiled


def test_a_non_finite_step_is_skipped_and_counted(tiny):
    run = prepare(tiny, "checkpoint.every_n_steps=0", "train.stop_at_step=6")
    poison(run, {3, 4})
    states = {}
    step = fsdp.train_step

    def remember(train_state, *arguments, **options):
        result = step(train_state, *arguments, **options)
        states[run.position.step + 1] = train_state.model.embedding.weight.detach().clone()
        return result

    fsdp.train_step, restore = remember, step
    try:
        train(run, resume_command="")
    finally:
        fsdp.train_step = restore
    assert torch.equal(states[3], states[2]) and torch.equal(states[4], states[2]) and not torch.equal(states[5], states[4])
    skipped = [record for record in records(run) if record.get("skipped")]
    assert [record["step"] for record in skipped] == [3, 4] and all(record["loss"] is None for record in skipped)
    assert run.position.total_skipped == 2 and run.position.consecutive_skipped == 0


def test_too_many_non_finite_steps_stop_the_run_with_all_that_is_needed(tiny):
    run = prepare(tiny, "train.anomaly.max_consecutive=3", "observe.report=true")
    poison(run, set(range(7, 21)))
    with pytest.raises(DivergenceError, match=r"step 9: loss nan and gradient norm nan .* samples 32\.\.35, the last of 3 in a row") as diverged:
        train(run, resume_command="")
    assert str(diverged.value).endswith(", then resume from the last checkpoint, that of step 5.")
    assert records(run)[-1] == {"step": 9, "event": "diverged", "message": str(diverged.value)}
    assert "the last of 3 in a row" in (run.directory.path / "report" / "index.html").read_text()
    newest = open_checkpoint(list_checkpoints(run.directory.checkpoints)[0])
    assert newest.step == 5 and newest.read("model.embedding.weight").isfinite().all()


def test_a_run_that_ends_before_its_first_checkpoint_is_not_told_to_resume(tiny):
    run = prepare(tiny, "train.anomaly.policy=stop")
    poison(run, {2})
    with pytest.raises(DivergenceError, match=r"step 2: .* is stop; lower .* samples, then start again: no checkpoint was saved yet\.$"):
        train(run, resume_command="")
    assert records(run)[-1]["event"] == "diverged"


def full_disk(*_, **__):
    raise StorageError("no space left on device; free some space")


def test_a_full_disk_does_not_stop_training_and_loses_nothing(tiny, monkeypatch):
    run = prepare(tiny)
    saves, original = [], saver.save_checkpoint

    def save(root, *, step, **rest):
        saves.append(step)
        return full_disk() if step in (10, 15) else original(root, step=step, **rest)

    monkeypatch.setattr(saver, "save_checkpoint", save)
    train(run, resume_command="")
    assert saves == [5, 10, 15, 20]
    assert [path.name[-2:] for path in list_checkpoints(run.directory.checkpoints)] == ["20", "05"]
    failed = [record["step"] for record in records(run) if record.get("event") == "checkpoint_failed"]
    assert failed == [10, 15]


def test_a_full_disk_at_the_last_save_is_an_error(tiny, monkeypatch):
    run = prepare(tiny)
    monkeypatch.setattr(saver, "save_checkpoint", full_disk)
    with pytest.raises(StorageError):
        train(run, resume_command="")


SHORT = ("train.num_steps=2", "optim.warmup_steps=1", "train.evaluate_every_n_steps=0")


@pytest.fixture
def tokenizer(tmp_path):
    return train_sentencepiece(["def main(): pass\n"] * 50, tmp_path / "tokenizer.model", vocab_size=280)


def test_progress_and_report_tell_the_epochs_of_each_source(tiny, tmp_path, capsys):
    for name, num_documents in (("many", 40), ("few", 4)):
        write_documents(tmp_path / name, num_documents=num_documents, seed=num_documents)
    blend = with_blend(tiny, tmp_path / "many", tmp_path / "few")
    settings = ("train.num_steps=10", "train.evaluate_every_n_steps=0", "observe.log_every_n_steps=5")
    train(prepare(blend, *settings, "train.stop_at_step=5"), resume_command="")
    run = prepare(blend, *settings, "observe.report=true", console=make_console())
    train(run, resume_command="")
    num_windows = [(source.num_tokens - 1) // run.config.model.sequence_length for source in run.data.train.sources]
    many, few = (20 / available for available in num_windows)  # 10 steps of 4 sequences, half of them from each
    expected = f"many {many:.2f}, few {few:.2f}"
    (last,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step 10/10")]
    assert f"epochs {expected}" in last and few > 1
    page = (run.directory.path / "report" / "index.html").read_text()
    assert f"<td>many</td><td>{many:.3g}</td>" in page and f"<td>few</td><td>{few:.3g}</td>" in page


@pytest.mark.parametrize("error", [StorageError("cannot write it"), RuntimeError("no font"), MemoryError()])
@pytest.mark.parametrize("name", ["write_report", "sample_text"])
def test_a_run_that_is_saved_needs_neither_report_nor_sample(tiny, tokenizer, monkeypatch, capsys, name, error):
    settings = ("model.vocab_size=300", f"data.tokenizer={tokenizer}", "observe.report=true", "observe.sample_prompt=def", "observe.sample_tokens=3")
    run = prepare(tiny, *SHORT, *settings, console=make_console())

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(trainer if name == "sample_text" else loop, name, fail)
    train(run, resume_command="")
    reason = {StorageError: "cannot write it", RuntimeError: "RuntimeError: no font", MemoryError: "MemoryError"}[type(error)]
    output = capsys.readouterr().out
    sentence = {"write_report": "no report, but the run is saved", "sample_text": "step 2: no sample"}[name]
    assert f"{sentence}: {reason}\n" in output
    assert [path.name for path in list_checkpoints(run.directory.checkpoints)] == ["step-0000000002"]
    has_report = (run.directory.path / "report" / "index.html").exists()
    assert has_report == (name == "sample_text") == ("report: " in output)


def test_an_update_that_did_not_end_is_not_saved(tiny, monkeypatch):
    """Some of the weights are of this step, others of the last one."""
    run = prepare(tiny, *SHORT, "train.num_steps=4", "checkpoint.every_n_steps=2")
    update = run.engine.update

    def fail_late(*arguments, **options):
        if run.position.step == 3:
            raise SwapError("zero.nvme_path: 3.0 MiB cannot be written to disk")
        return update(*arguments, **options)

    monkeypatch.setattr(run.engine, "update", fail_late)
    with pytest.raises(SwapError):
        train(run, resume_command="")
    assert [path.name for path in list_checkpoints(run.directory.checkpoints)] == ["step-0000000002"]


def test_what_closes_last_does_not_hide_that_the_last_save_failed(tiny, monkeypatch, capsys):
    def fail(self):
        raise OSError(28, "what closes last")

    run = prepare(tiny, *SHORT, "observe.tensorboard=true", console=make_console())
    monkeypatch.setattr(EventFile, "close", fail)
    monkeypatch.setattr(saver.Saver, "close", fail)
    monkeypatch.setattr(saver, "save_checkpoint", full_disk)
    with pytest.raises(StorageError, match="no space left on device; free some space"):
        train(run, resume_command="")
    assert capsys.readouterr().out.count("what closes last") == 2


def test_a_save_that_fails_after_an_error_does_not_hide_it(tiny, monkeypatch, capsys):
    def bad_data(*_, **__):
        raise DataError("bad data")

    run = prepare(tiny, *SHORT, console=make_console())
    monkeypatch.setattr(trainer.Trainer, "_take_step", bad_data)
    monkeypatch.setattr(saver, "save_checkpoint", lambda *_, **__: {}["tokenizer"])
    run.position.step = 1
    with pytest.raises(DataError, match="bad data"):
        train(run, resume_command="")
    assert "the steps since the last checkpoint are not saved: KeyError: 'tokenizer'" in capsys.readouterr().out


def test_bad_data_are_one_sentence(tiny, tmp_path):
    with pytest.raises(DataError, match=r"data.train.*missing"):
        prepare(tiny, f"data.train={tmp_path}/missing")
    with pytest.raises(DataError, match=r"model.sequence_length 20000"):
        prepare(tiny, "model.sequence_length=20000")
    write_documents(tmp_path / "large_ids", num_documents=50, seed=0, vocab_size=5000)
    with pytest.raises(DataError, match=r"model.vocab_size is 61"):
        train_tiny(tiny, f"data.train={tmp_path}/large_ids", "run.name=large")


def test_unwritable_run_directory_is_one_sentence(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file is a file, and the run needs a directory there"):
        prepare(tiny, f"run.output_dir={tmp_path}/file")


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.full)])
def test_a_stop_signal_finishes_the_step_saves_and_says_how_to_go_on(tiny, number, tmp_path):
    command = [sys.executable, "launch/pretrain.py", "--config", str(tiny), "--set", "train.num_steps=100000", "data.num_workers=1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        metrics = tmp_path / "runs" / "tiny" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text().count("\n") > 3) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(number)
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    newest = open_checkpoint(list_checkpoints(tmp_path / "runs" / "tiny" / "checkpoints")[0])
    newest.verify()
    assert f"{signal.Signals(number).name}: saved at step {newest.step}" in output
    assert f"launch/pretrain.py --config {tiny} --set train.num_steps=100000" in output
    assert newest.step == len([record for record in read_metrics(metrics) if "loss" in record])


def test_a_first_step_that_compiles_is_announced(tiny):
    """It takes so long that a run without a line since its banner looks like one that hangs."""
    for settings, is_announced in ((("train.compile.enabled=true", "train.compile.backend=eager"), True), ((), False)):
        shown = io.StringIO()
        changes = (*settings, f"run.name={is_announced}", "train.num_steps=4", "observe.log_every_n_steps=1")
        run = prepare(tiny, *changes, console=Console(file=shown, width=200))
        train(run, resume_command="")
        before, _, after = shown.getvalue().partition("step 1/4")
        assert ("the first step compiles" in before) == is_announced and after and "the first step compiles" not in after
