"""Accuracy of recall: all of it for an oracle, chance for a guesser, and a checkpoint from the command line."""

import json
import shlex

import numpy as np
import pytest
import torch

from phase8.config.model_section import ModelSection
from phase8.data.indexed import IndexedDataset
from phase8.data.loader import open_dataset
from phase8.errors import CheckpointError
from phase8.model.model import build_model
from phase8.model.parameters import initialise
from phase8.recall.evaluate import evaluate_recall, greedy_predictions, recall_table
from phase8.recall.tasks import BEGIN, MARK, Task
from phase8.recall.write import write_task
from tests.recall.oracle import look_up
from tests.tools.doors import load_door
from tests.train.tiny_run import train_tiny

MQAR, PASSKEY = Task("mqar", 128, (2, 8)), Task("passkey", 128, (6,))


@pytest.mark.parametrize("task", [MQAR, PASSKEY], ids=lambda task: task.name)
def test_an_oracle_recalls_everything(task):
    found = evaluate_recall(task, look_up, lengths=[64, 150], num_sequences=20, seed=1)
    assert [(result.size, result.length) for result in found] == [(size, length) for size in task.sizes for length in (64, 150)]
    assert {(result.answer_ratio, result.sequence_ratio, result.num_sequences) for result in found} == {(1.0, 1.0, 20)}


def test_a_model_whose_logits_are_not_finite_has_no_recall():
    """The largest of such logits is the id of the first that is not finite."""
    model = build_model(ModelSection(d_model=24, num_layers=1, num_heads=2, vocab_size=128), dtype=torch.float32, device=torch.device("cpu"))
    initialise(model, seed=1)
    with torch.no_grad():
        model.norm.weight[3] = float("nan")
    with pytest.raises(CheckpointError, match="computes logits that are not finite"):
        evaluate_recall(MQAR, greedy_predictions(model, torch.device("cpu")), lengths=[64], num_sequences=2, seed=1)


def test_a_guesser_is_right_by_chance():
    generator = np.random.default_rng(0)

    def guess(_, answers):
        return generator.integers(128 - MQAR.num_values, 128, size=answers.shape)

    (found,) = evaluate_recall(Task("mqar", 128, (8,)), guess, lengths=[64], num_sequences=2000, seed=1)
    assert found.answer_ratio == pytest.approx(1 / MQAR.num_values, rel=0.15) and found.sequence_ratio == 0


def test_accuracy_by_place_tells_what_a_window_reaches():
    def see_late_tokens(tokens, answers):
        shown = (tokens == MARK).argmax(axis=1)[:, None] + 1 + np.arange(6)
        return np.where(shown >= 120, look_up(tokens, answers), BEGIN)

    (found,) = evaluate_recall(PASSKEY, see_late_tokens, lengths=[200], num_sequences=200, seed=1)
    assert found.answer_ratio_by_place == [0, 0, 0, 1, 1]


def test_predictions_of_a_model_are_those_at_the_positions_before():
    section = ModelSection(d_model=16, num_layers=1, num_heads=2, vocab_size=128, sequence_length=64, local_window_size=8)
    model = build_model(section, dtype=torch.float32, device=torch.device("cpu"))
    initialise(model, seed=1)
    drawn = MQAR.draw(np.random.default_rng(1), length=64, size=8, count=3)
    predicted = greedy_predictions(model, torch.device("cpu"))(drawn.tokens, drawn.answers)
    with torch.no_grad():
        everywhere = model.logits(model(torch.from_numpy(drawn.tokens))[0]).argmax(-1).numpy()
    assert np.array_equal(predicted, np.take_along_axis(everywhere, drawn.answers - 1, axis=1))


def test_every_written_sequence_is_one_sample(tmp_path):
    write_task(MQAR, tmp_path, length=64, num_sequences={"train": 7, "validation": 2}, once_ratio=0.5, seed=3, on_progress=lambda *_: None)
    dataset = open_dataset(str(tmp_path / "mqar_64_train"), sequence_length=64, vocab_size=128, seed=1)
    pair = IndexedDataset(tmp_path / "mqar_64_train")
    assert dataset.order.num_windows == (7,) and pair.num_documents == 8
    for i in range(7):
        tokens = dataset[0, i]["tokens"].numpy()
        assert np.array_equal(tokens[:-1], pair.sequence(i)) and tokens[0] == tokens[-1] == BEGIN
    rounds = {int((pair.sequence(i) >= 128 - MQAR.num_values).sum()) for i in range(7)} - {4, 16}
    assert rounds  # some ask more than once
    assert json.loads((tmp_path / "mqar_64.json").read_text())["num_sequences"] == {"train": 7, "validation": 2}


def test_the_table_has_a_column_for_each_length():
    table = recall_table(MQAR, evaluate_recall(MQAR, look_up, lengths=[64, 150], num_sequences=2, seed=1))
    assert "| mqar, per cent right | 64 | 150 |" in table and "| 8 pairs, whole sequences | 100.0 | 100.0 |" in table
    assert f"right in {100 / 31:.2f} %" in table


def test_from_data_to_a_table_by_the_command_line(tiny, tmp_path, capsys):
    recall = load_door("recall")
    shared = ["--task", "mqar", "--pairs", "2", "4"]
    options = ["--length", "40", "--tokens", "400", "--validation-sequences", "8", "--vocab-size", "100"]
    assert recall.main(["data", *shared, *options, "--output", str(tmp_path / "two words")]) == 0
    settings = shlex.split(capsys.readouterr().out.split("--set ")[1])
    assert settings[2:] == ["model.vocab_size=100", "model.sequence_length=40"]
    run = train_tiny(tiny, *settings, "train.num_steps=4")
    options = ["--checkpoint", str(run.directory.path), "--lengths", "40", "64", "--sequences", "3", "--output", str(tmp_path / "found.json")]
    assert recall.main(["evaluate", *shared, *options, "--device", "cpu"]) == 0
    assert "| mqar, per cent right | 40 | 64 |" in capsys.readouterr().out
    written = json.loads((tmp_path / "found.json").read_text())
    assert [result["size"] for result in written["results"]] == [2, 2, 4, 4] and written["vocab_size"] == 100
    assert recall.main(["evaluate", *shared, *options, "--vocab-size", "101"]) == 2
    assert "--vocab-size is 101, but the model has 100 ids" in capsys.readouterr().err


def test_data_of_other_settings_are_not_replaced(tmp_path, capsys):
    recall = load_door("recall")
    options = ["data", "--task", "mqar", "--length", "40", "--tokens", "400", "--validation-sequences", "2", "--vocab-size", "100"]
    options += ["--output", str(tmp_path), "--pairs"]
    assert recall.main([*options, "2", "4"]) == 0
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert recall.main([*options, "2"]) == 2
    changed = "sizes was [2, 4] and is [2]"
    sentence = f"error: {tmp_path / 'mqar_40.json'} is of data with other settings ({changed}); choose another --output or remove it\n"
    assert capsys.readouterr().err.endswith(sentence)
    assert recall.main([*options, "2", "4"]) == 0  # again the same, such as after an interruption
    assert written == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "mqar_40.json").unlink()
    assert recall.main([*options, "2", "4"]) == 2
    assert f"{tmp_path / 'mqar_40_train'}.bin exists, and nothing says of which settings it is" in capsys.readouterr().err


def test_options_of_the_other_task_are_refused(tmp_path, capsys):
    recall = load_door("recall")
    ignored = (("passkey", "--pairs", "5", "mqar"), ("passkey", "--once-ratio", "1", "mqar"), ("mqar", "--key-tokens", "3", "passkey"))
    for task, option, value, of in ignored:
        assert recall.main(["data", "--task", task, "--length", "64", "--output", str(tmp_path), option, value]) == 2
        assert f"error: {option} is for --task {of}; leave it out" in capsys.readouterr().err
    assert recall.main(["evaluate", "--checkpoint", str(tmp_path), "--task", "passkey", "--pairs", "5"]) == 2
    assert "error: --pairs is for --task mqar; leave it out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--length", "0"], "--length is 0; it must be at least 1"),
        (["--length", "64", "--pairs", "40"], "mqar with --pairs 40 needs 162 tokens, but a sequence has 64"),
        (["--length", "64", "--once-ratio", "2"], "--once-ratio is 2.0; it must be between 0 and 1"),
        (["--length", "64", "--seed", "-1"], "--seed is -1; it must be at least 0"),
    ],
)
def test_bad_input_gets_one_sentence(tmp_path, capsys, options, message):
    assert load_door("recall").main(["data", "--task", "mqar", "--output", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err
