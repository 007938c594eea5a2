"""The command line of tools/evaluate.py: results, formats of the model, several ranks, and what is refused."""

import json

import numpy as np
import pytest
import yaml

from phase8.data.indexed import IndexedWriter
from phase8.data.made_with import made_with
from phase8.data.tokenizer import load_tokenizer
from phase8.data.tokenizer_training import train_sentencepiece
from tests.processes.launched import ROOT, torchrun
from tests.tools.doors import load_door
from tests.train.tiny_run import records, train_tiny, write_config, write_documents

TEXT = "Größe und 日本語, naïve words; plain words too.\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of ten steps with a tokenizer, and its directory."""
    directory = tmp_path_factory.mktemp("evaluated")
    train_sentencepiece([TEXT * 3], directory / "t.model", vocab_size=300)
    tokenizer = f"data.tokenizer={directory / 't.model'}"
    run = train_tiny(write_config(directory), "train.num_steps=10", "train.evaluate_every_n_steps=10", tokenizer, "model.vocab_size=300")
    return run, directory


def evaluate(capsys, *arguments):
    code = load_door("evaluate").main([*map(str, arguments), "--device", "cpu"])
    output, errors = capsys.readouterr()
    return code, output, errors


def test_a_checkpoint_is_evaluated_as_its_training_did(trained, tmp_path, capsys):
    run, directory = trained
    out = tmp_path / "out.json"
    common = ["--checkpoint", run.directory.path, "--data", directory / "validation"]
    code, output, errors = evaluate(capsys, *common, "--sequences", 4, "--output", out)
    (loss,) = [record["validation_loss"] for record in records(run) if "validation_loss" in record]
    found = json.loads(out.read_text())
    assert code == 0 and found["sources"][0]["loss"] == pytest.approx(loss, rel=1e-5) and found["sources"][0]["num_sequences"] == 4
    assert output.startswith("| loss, nats per token | all |") and "| validation | " in output and "evaluating: 100 %" in errors
    code, output, _ = evaluate(capsys, *common, "--length", 48, "--stride", 20, "--json")
    found = json.loads(output)  # nothing but the object
    assert (found["length"], found["stride"], found["total"]["bits_per_byte"]) == (48, 20, None)
    assert found["total"] == found["sources"][0] | {"name": "total"}


@pytest.mark.parametrize("data", ["validation", "split", "blend"])
def test_held_out_data_are_those_of_the_evaluations_of_the_training(data, tiny, tmp_path, capsys):
    directory, config = tmp_path / "data", tiny
    directory.mkdir()
    for number in range(2):
        write_documents(directory / f"part{number}", num_documents=40, seed=number)
    options = {"split": ["data.validation=null", "data.split=80,20,0"], "blend": []}.get(data, [])
    if data == "blend":
        tree = yaml.safe_load(tiny.read_text())
        tree["data"]["validation"] = [{"path": str(directory / f"part{number}"), "weight": weight} for number, weight in ((0, 1), (1, 3))]
        config = tmp_path / "blend.yaml"
        config.write_text(yaml.safe_dump(tree))
    run = train_tiny(config, "train.num_steps=4", "train.evaluate_every_n_steps=4", "train.evaluation_sequences=8", *options)
    code, output, errors = evaluate(capsys, "--checkpoint", run.directory.path, "--held-out", "--sequences", 8, "--json")
    assert code == 0, errors
    found = json.loads(output)
    (measured,) = [record for record in records(run) if "validation_loss" in record]
    assert found["total"]["loss"] == pytest.approx(measured["validation_loss"], rel=1e-6)
    assert [source["num_sequences"] for source in found["sources"]] == ([2, 6] if data == "blend" else [8])
    assert found["total"]["num_tokens"] == measured["validation_tokens"]


def test_held_out_data_that_are_gone_or_unknown_are_refused(tiny, tmp_path, capsys):
    prefix = tmp_path / "own"
    write_documents(prefix, num_documents=20, seed=1)
    run = train_tiny(tiny, "train.num_steps=4", "train.evaluate_every_n_steps=0", f"data.validation={prefix}")
    write_documents(prefix, num_documents=21, seed=2)
    code, output, errors = evaluate(capsys, "--checkpoint", run.directory.path, "--held-out")
    assert (code, output) == (3, "") and "error: --held-out: the data are not those of the training: source 0" in errors
    assert load_door("reshard_checkpoint").main([str(run.directory.path), str(tmp_path / "weights"), "--format", "consolidated"]) == 0
    capsys.readouterr()
    code, output, errors = evaluate(capsys, "--checkpoint", tmp_path / "weights", "--held-out")
    assert (code, output) == (4, "") and f"error: {tmp_path / 'weights'} records no held-out data, which a checkpoint of training does" in errors


def test_every_form_of_a_model_gives_the_same_result(trained, tmp_path, capsys):
    run, _ = trained
    (tmp_path / "book.txt").write_text(TEXT * 20)
    weights, int8 = tmp_path / "weights", tmp_path / "int8"
    assert load_door("reshard_checkpoint").main([str(run.directory.path), str(weights), "--format", "consolidated"]) == 0
    assert load_door("quantize_checkpoint").main([str(run.directory.path), str(int8)]) == 0
    capsys.readouterr()
    options = ("--text", tmp_path / "book.txt", "--carry-state", "--json")
    first, second, third = (json.loads(evaluate(capsys, "--checkpoint", each, *options)[1])["total"] for each in (run.directory.path, weights, int8))
    assert first == second and first["num_bytes"] == len(TEXT.encode()) * 20 and first["positions"][-1]["end"] == first["num_tokens"] > 24
    assert third["num_tokens"] == first["num_tokens"] and third["bits_per_byte"] == pytest.approx(first["bits_per_byte"], rel=0.02)


@pytest.mark.full  # the sums of two ranks are compared in tests/parallel
def test_ranks_of_torchrun_print_the_result_of_one_process_once(trained, tmp_path, capsys):
    run, _ = trained
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(TEXT * (i + 1))
    arguments = ["--checkpoint", run.directory.path, "--text", tmp_path, "--json", "--batch-size", "1"]
    _, expected, _ = evaluate(capsys, *arguments)
    code, output, errors = torchrun(ROOT / "tools/evaluate.py", *arguments, "--device", "cpu", num_processes=2)
    assert code == 0, errors
    found, one = json.loads(output)["total"], json.loads(expected)["total"]
    assert found["loss"] == pytest.approx(one["loss"], rel=1e-12) and found["num_bytes"] == one["num_bytes"] == 6 * len(TEXT.encode())
    assert [each["num_tokens"] for each in found["positions"]] == [each["num_tokens"] for each in one["positions"]]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data", "x", "--length", "0", "--batch-size", "-1"], "--length is 0; it must be at least 1"),
        (["--text", "x", "--sequences", "4"], "--sequences takes some windows of --data or --held-out, but a --text is read as a whole"),
        (["--data", "x", "--stride", "4", "--carry-state"], "--stride and --carry-state are different ways to read the tokens; give one of them"),
        (["--data", "x", "--document-separator", "%"], "--document-separator is for --text"),
        (["--text", "x", "--document-separator", " % "], "--document-separator is ' % '; it must be what one line holds, with something"),
        (["--held-out", "--document-separator", "%"], "--document-separator is for --text"),
        (["--data", "x", "--json-key", "text"], "--json-key is for --text: pairs hold tokens; leave it out"),
    ],
)
def test_options_that_contradict_each_other_are_refused_before_anything_is_read(arguments, sentence, tmp_path, capsys):
    code, output, errors = evaluate(capsys, "--checkpoint", tmp_path / "missing", *arguments)
    assert (code, output) == (2, "") and f"error: {sentence}" in errors


def test_what_cannot_be_read_has_its_exit_code(trained, tmp_path, capsys):
    run, directory = trained
    checkpoint, book = ("--checkpoint", run.directory.path), tmp_path / "book.txt"
    book.write_text(TEXT)
    for code, arguments, sentence in (
        (4, ["--checkpoint", tmp_path, "--data", directory / "validation"], str(tmp_path)),
        (3, [*checkpoint, "--data", tmp_path / "nothing"], "nothing.bin and"),
        (3, [*checkpoint, "--data", book], f"{book} is a file, but --data names .bin/.idx pairs without their ending; read text with --text {book}"),
        (3, [*checkpoint, "--data", tmp_path], f"{tmp_path} is a directory without pairs, but --data names .bin/.idx pairs"),
        (3, [*checkpoint, "--data", directory], f"{directory} is a directory; name a pair in it without its ending"),
        (3, [*checkpoint, "--text", tmp_path / "nothing.txt"], "cannot read the input"),
        (3, [*checkpoint, "--text", directory / "validation"], f"names .bin/.idx pairs, which hold tokens; read them with --data {directory}/"),
        (3, [*checkpoint, "--text", tmp_path / "x", "--tokenizer", tmp_path / "none.model"], "cannot read the tokenizer"),
        (3, [*checkpoint, "--data", directory / "validation", "--eod-token", "nope"], "has no piece 'nope'"),
        (2, [*checkpoint, "--data", directory / "validation", "--stride", "25"], "--stride is 25, but a window has 24 tokens"),
    ):
        found, output, errors = evaluate(capsys, *arguments)
        assert (found, output) == (code, "") and sentence in errors, errors


def test_a_name_of_a_piece_needs_a_tokenizer_and_other_unknown_bytes_a_reason(trained, tiny, capfd):
    run = train_tiny(tiny, "train.num_steps=1", "optim.warmup_steps=0", "train.evaluate_every_n_steps=0")
    arguments = ("--checkpoint", run.directory.path, "--data", trained[1] / "validation", "--sequences", 1)
    code, output, errors = evaluate(capfd, *arguments, "--eod-token", "</s>")
    assert (code, output) == (4, "") and "holds no tokenizer" in errors
    code, output, errors = evaluate(capfd, *arguments)
    assert code == 0 and "unknown" in output and errors.count("bits per byte are unknown: ") == 1, errors


def test_data_and_tokenizers_of_others_are_refused_or_said(trained, tmp_path, capfd):
    run, directory = trained
    path = train_sentencepiece([TEXT[::-1] * 3], tmp_path / "other.model", vocab_size=300)
    other = load_tokenizer(path)
    with IndexedWriter(tmp_path / "foreign", dtype=np.dtype(np.uint16), made_with=made_with(other, eod_id=other.eod_id)) as writer:
        writer.add_document(np.array(other.encode(TEXT * 3)))
    arguments = ("--checkpoint", run.directory.path, "--json", "--data")
    code, output, errors = evaluate(capfd, *arguments, directory / "validation", tmp_path / "foreign")
    assert (code, output) == (3, "") and f"error: {tmp_path / 'foreign'} was made with a tokenizer of sha256 {other.sha256[:12]}" in errors
    stored = next((run.directory.path / "checkpoints").glob("*10")) / "tokenizer.model"
    sentence = f"{stored} is the tokenizer of these weights, but that of --tokenizer, {path}, is another: an id may mean other text\n"
    code, output, errors = evaluate(capfd, *arguments, tmp_path / "foreign", "--tokenizer", path)
    assert code == 0 and errors.count(sentence) == 1 and json.loads(output)["total"]["bits_per_byte"] > 0
    code, _, errors = evaluate(capfd, *arguments, directory / "validation", "--sequences", 2, "--tokenizer", directory / "t.model")
    assert code == 0 and "tokenizer" not in errors


def test_a_result_that_cannot_be_written_is_printed(trained, tmp_path, capsys):
    """An evaluation may take hours."""
    run, directory = trained
    arguments = ("--checkpoint", run.directory.path, "--data", directory / "validation", "--sequences", "2", "--output", tmp_path)
    code, output, errors = evaluate(capsys, *arguments)
    assert code == 5 and "loss" in output and f"cannot write {tmp_path}" in errors
