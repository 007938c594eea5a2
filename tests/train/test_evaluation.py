"""Held-out losses of a blend: each source's, and all of them as the blend weighs them."""

import io
import math
import signal

import numpy as np
import pytest
import yaml
from rich.console import Console

from phase8.checkpoint.load import list_checkpoints
from phase8.data.indexed import IndexedWriter
from phase8.observe.metrics import SourceLoss
from phase8.train import evaluation
from phase8.train.engine import fsdp
from phase8.train.evaluation import HeldOutData, weighted_loss
from phase8.train.loop import train
from tests.train.tiny_run import prepare, records, train_tiny, write_config

SEQUENCE_LENGTH = 24


@pytest.fixture
def tiny(tmp_path):
    """A run that trains on `many` and is evaluated on `many` and on `few`, which has three windows and other tokens."""
    for name, low, high, num_windows in (("many", 3, 8, 60), ("few", 30, 60, 3)):
        with IndexedWriter(tmp_path / name, dtype=np.dtype(np.uint16)) as writer:
            writer.add_document(np.random.default_rng(num_windows).integers(low, high, num_windows * SEQUENCE_LENGTH + 1))
    path = write_config(tmp_path)
    config = yaml.safe_load(path.read_text())
    config["data"] = {"train": str(tmp_path / "many"), "validation": blend(tmp_path, few=1, many=1)}
    config["train"] |= {"num_steps": 20, "evaluate_every_n_steps": 20, "evaluation_sequences": 40}
    path.write_text(yaml.safe_dump(config))
    return path


def blend(directory, **weights):
    return [{"path": str(directory / name), "weight": weight} for name, weight in weights.items()]


def evaluation_of(run):
    (record,) = [record for record in records(run) if "validation_loss" in record]
    return record


def test_a_small_source_has_the_weight_of_the_blend(tiny):
    record = evaluation_of(train_tiny(tiny))
    few, many = record["validation_sources"]["few"], record["validation_sources"]["many"]
    assert few["loss"] > many["loss"] + 0.5
    assert record["validation_loss"] == pytest.approx((few["loss"] + many["loss"]) / 2, rel=1e-12)
    assert (few["sequences"], many["sequences"], record["validation_sequences"]) == (3, 20, 23)
    assert record["validation_tokens"] == 23 * SEQUENCE_LENGTH


def test_the_loss_of_a_source_is_that_of_the_source_alone(tiny):
    run = prepare(tiny)
    together = {source.name: source.loss for source in HeldOutData(run).evaluate().sources}
    for name in ("few", "many"):
        alone = prepare(tiny, f"data.validation={tiny.parent / name}", f"run.name={name}", "train.evaluation_sequences=20")
        assert HeldOutData(alone).evaluate().loss == pytest.approx(together[name], rel=1e-6)


def test_a_long_evaluation_comes_in_pieces_between_which_it_may_end(tiny, monkeypatch):
    whole, calls = HeldOutData(prepare(tiny)).evaluate(), []
    monkeypatch.setattr(evaluation, "ROUNDS_TOGETHER", 3)  # of 2 and 10 microbatches: one piece and four

    def goes_on():
        calls.append(None)
        return len(calls) < stops_at

    run, stops_at = prepare(tiny, "run.name=pieces"), 9
    pieces = HeldOutData(run).evaluate(goes_on)
    assert pieces.loss == pytest.approx(whole.loss, rel=1e-12) and pieces.num_tokens == whole.num_tokens and len(calls) == 4
    stops_at = 6
    assert HeldOutData(run).evaluate(goes_on) is None and len(calls) == 6


@pytest.mark.parametrize("step", [10, 20])
def test_a_stop_during_an_evaluation_leaves_it_out_but_for_the_last(tiny, monkeypatch, step):
    """Whoever asks does not wait for ever before he kills, and steps since the last save would be lost."""
    monkeypatch.setattr(evaluation, "ROUNDS_TOGETHER", 3)
    run, original, places = prepare(tiny, "train.evaluate_every_n_steps=10", "checkpoint.every_n_steps=100"), fsdp.FsdpEngine.evaluate, []

    def evaluate(self, microbatches):
        if run.position.step == step and places.count((step, "evaluation")) == 2:
            signal.raise_signal(signal.SIGTERM)
        return original(self, microbatches)

    monkeypatch.setattr(fsdp.FsdpEngine, "evaluate", evaluate)
    train(run, resume_command="", report=lambda step, doing: places.append((step, doing)))
    assert run.position.step == step and [path.name for path in list_checkpoints(run.directory.checkpoints)] == [f"step-{step:010d}"]
    assert [record["step"] for record in records(run) if "validation_loss" in record] == ([10, 20] if step == 20 else [])
    assert places.count((step, "evaluation")) == (5 if step == 20 else 3)  # the watch over hangs hears of every piece


def test_unequal_weights_count(tiny):
    config = yaml.safe_load(tiny.read_text())
    config["data"]["validation"] = blend(tiny.parent, few=3, many=1)
    tiny.write_text(yaml.safe_dump(config))
    found = HeldOutData(prepare(tiny)).evaluate()
    few, many = (source.loss for source in found.sources)
    assert found.loss == pytest.approx((3 * few + many) / 4, rel=1e-12)


def test_the_console_names_each_source_and_its_sequences(tiny):
    console = Console(file=io.StringIO(), width=300)
    train(prepare(tiny, "train.num_steps=4", console=console), resume_command="")
    (line,) = [line for line in console.file.getvalue().splitlines() if "validation loss" in line]
    assert "few " in line and "(3 sequences)" in line and "many " in line and "(20 sequences)" in line


def test_a_source_without_targets_does_not_count():
    def source(*, weight, loss, num_tokens):
        return SourceLoss(name="any", weight=weight, loss=loss, num_tokens=num_tokens, num_sequences=1)

    nothing, something = source(weight=5, loss=0.0, num_tokens=0), source(weight=1, loss=2.0, num_tokens=9)
    assert weighted_loss([nothing, something]) == 2.0 and weighted_loss([nothing]) == 0.0
    assert math.isnan(weighted_loss([something, source(weight=1, loss=math.nan, num_tokens=1)]))
