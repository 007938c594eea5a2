"""The loss by place: sums of the model's own losses, and a checkpoint from the command line."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from phase8.config.model_section import ModelSection
from phase8.config.schema import DataSection, DataSource
from phase8.data.indexed import IndexedWriter
from phase8.data.loader import open_dataset
from phase8.evaluate import by_position
from phase8.evaluate.by_position import evaluate_sources, position_table
from phase8.model.model import build_model
from phase8.model.parameters import initialise
from tests.tools.doors import load_door
from tests.train.tiny_run import records, train_tiny, write_config

LENGTH, VOCABULARY = 150, 30


@pytest.fixture
def model():
    section = ModelSection(d_model=16, num_layers=1, num_heads=2, vocab_size=VOCABULARY, sequence_length=LENGTH, local_window_size=8)
    model = build_model(section, dtype=torch.float32, device=torch.device("cpu"))
    initialise(model, seed=0)
    return model


@pytest.fixture
def prefixes(tmp_path):
    """Two sources of documents of 70 tokens: seven sequences of 151 tokens and three."""
    for name, num_documents in (("a", 16), ("b", 7)):
        generator = np.random.default_rng(num_documents)
        with IndexedWriter(tmp_path / name, dtype=np.dtype(np.uint16)) as writer:
            for _ in range(num_documents):
                writer.add_document(generator.integers(0, VOCABULARY, size=70))
    return [str(tmp_path / name) for name in "ab"]


def evaluate(model, prefixes, *, resets=False, **options):
    entries = [DataSource(path=prefix, weight=1) for prefix in prefixes]
    dataset = open_dataset(entries, sequence_length=LENGTH, vocab_size=VOCABULARY, seed=0)
    section = DataSection(reset_at_document_boundaries=resets, num_workers=0, pin_memory=False)
    return evaluate_sources(model, dataset, section, device=torch.device("cpu"), **{"num_sequences": 100, "micro_batch_size": 4, **options})


@pytest.mark.parametrize("resets", [False, True])
def test_losses_by_place_are_means_of_the_losses_of_the_tokens_there(model, prefixes, resets, monkeypatch):
    monkeypatch.setattr(by_position, "_LOGITS_AT_ONCE", 100 * VOCABULARY)  # several parts
    first, second = evaluate(model, prefixes, resets=resets)
    assert (first.name, second.name) == ("a", "b") and (first.num_sequences, second.num_sequences) == (7, 3)
    tokens = torch.from_numpy(np.fromfile(f"{prefixes[0]}.bin", np.uint16).astype(np.int64))
    rows = torch.stack([tokens[i * LENGTH : i * LENGTH + LENGTH + 1] for i in range(7)])
    starts = torch.arange(len(tokens)) % 70 == 0
    starts = torch.stack([starts[i * LENGTH : i * LENGTH + LENGTH + 1] for i in range(7)])
    hidden, _ = model(rows[:, :-1], starts[:, :-1] if resets else None)
    losses = F.cross_entropy(model.logits(hidden).flatten(0, 1), rows[:, 1:].flatten(), reduction="none").view(7, LENGTH).double()
    counts = ~starts[:, 1:] if resets else torch.ones(7, LENGTH, dtype=torch.bool)
    assert [(place.first, place.end) for place in first.places] == [(0, 64), (64, 128), (128, 150)]
    for place in first.places:
        there = counts[:, place.first : place.end]
        assert place.num_tokens == there.sum() and place.loss == pytest.approx(losses[:, place.first : place.end][there].mean().item(), rel=1e-5)
    assert first.num_tokens == counts.sum() and first.loss == pytest.approx(losses[counts].mean().item(), rel=1e-5)
    assert first.perplexity == math.exp(first.loss)


def test_microbatches_and_their_number_do_not_matter(model, prefixes):
    found = [evaluate(model, prefixes, micro_batch_size=size) for size in (1, 3)]
    for one, three in zip(*found, strict=True):
        assert one.loss == pytest.approx(three.loss, rel=1e-6) and one.num_tokens == three.num_tokens


def test_the_table_has_a_row_for_each_source(model, prefixes):
    head, _, *rows = position_table(evaluate(model, prefixes)).splitlines()
    assert head == "| loss, nats per token | all | perplexity | 0 to 63 | 64 to 127 | 128 to 149 |"
    assert [row.split("|")[1].strip() for row in rows] == ["a", "b"]


def test_a_checkpoint_is_evaluated_as_its_training_did(tmp_path, capsys):
    config = write_config(tmp_path)
    run = train_tiny(config, "train.num_steps=10", "train.evaluate_every_n_steps=10")
    door, prefix = load_door("evaluate"), str(tmp_path / "validation")
    common = ["--checkpoint", str(run.directory.path), "--data", prefix, "--device", "cpu", "--output", str(tmp_path / "out.json")]
    assert door.main([*common, "--sequences", "4"]) == 0
    (trained,) = [record["validation_loss"] for record in records(run) if "validation_loss" in record]
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["sources"][0]["loss"] == pytest.approx(trained, rel=1e-5)
    assert "validation | " in capsys.readouterr().out
    assert door.main([*common, "--length", "48"]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["sequence_length"] == 48


def test_numbers_below_one_are_refused(tmp_path, capsys):
    assert load_door("evaluate").main(["--checkpoint", str(tmp_path), "--data", "x", "--length", "0"]) == 2
    assert "--length is 0; it must be at least 1" in capsys.readouterr().err
