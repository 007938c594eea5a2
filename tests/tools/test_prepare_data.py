"""The command: help, output, exit codes without tracebacks, interruption and import of MUSE data."""

from __future__ import annotations

import json
import os
import pty
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from phase8.data.indexed import IndexedDataset
from phase8.data.made_with import made_with
from phase8.data.tokenizer import load_tokenizer
from phase8.data.tokenizer_training import train_sentencepiece

ROOT = Path(__file__).parents[2]
TEXTS = [f"document {i}\n\tholds the number {i * i} — é\n" for i in range(80)]


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / "prepare_data.py"), *map(str, arguments)]


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), env=ENVIRONMENT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inputs")
    (directory / "lines.jsonl").write_text("".join(json.dumps({"content": text}) + "\n" for text in TEXTS))
    (directory / "note.txt").write_text("a note\n")
    (directory / "picture.png").write_bytes(b"\x89PNG")
    (directory / ".hidden.txt").write_text("a hidden note\n")
    return directory


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_sentencepiece(TEXTS, tmp_path_factory.mktemp("tokenizer") / "t.model", vocab_size=300)


def test_a_whole_preparation_from_the_command_line(inputs: Path, tmp_path: Path):
    prefix = tmp_path / "out" / "mine"
    arguments = [inputs, "--train-tokenizer", "--vocab-size", 290, "--json-key", "content", "--output-prefix", prefix]
    arguments += ["--validation-fraction", 0.2, "--workers", 2, "--shard-bytes", 2000, "--no-append-eod"]
    result = run(*arguments)
    assert result.returncode == 0, result.stderr
    train, validation = IndexedDataset(f"{prefix}_train_content_document"), IndexedDataset(f"{prefix}_validation_content_document")
    num_tokens = train.num_tokens + validation.num_tokens
    num_bytes = sum(len(text.encode()) for text in [*TEXTS, "a note\n"])
    lines = result.stdout.splitlines()
    assert lines == [
        f"{prefix}_train_content_document.bin/.idx: {train.num_documents} documents, {train.num_tokens:,} tokens",
        f"{prefix}_validation_content_document.bin/.idx: {validation.num_documents} documents, {validation.num_tokens:,} tokens",
        f"in all: 81 documents, {num_tokens:,} tokens of uint16, {num_bytes / num_tokens:.2f} bytes per token",
        "not everything below the inputs is read: 1 file has no suffix of text (.png: 1), 1 file is hidden by a dot before the name; "
        "name a file or a directory itself to read it",
        f"train on it with: --set data.train={prefix}_train_content_document data.validation={prefix}_validation_content_document "
        f"data.tokenizer={prefix}_content_tokenizer.model model.vocab_size=290",
    ]
    tokenizer = load_tokenizer(f"{prefix}_content_tokenizer.model")
    assert tokenizer.eod_id not in train.tokens(0, train.num_tokens)
    stages = result.stderr.splitlines()
    assert stages[0] == "training the tokenizer: 0 %"
    assert stages[-1] == "writing validation: 100 %"

    again = run(*arguments)
    assert again.stdout.splitlines() == ["already prepared from the same inputs with the same options; nothing to do", *lines]
    assert again.stderr == ""

    refused = run(*arguments[:-1])  # with the end of a document
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
    assert "prepared with other inputs or options: --append-eod was false and is true; give another --output-prefix, or " in refused.stderr
    assert train.num_tokens == IndexedDataset(f"{prefix}_train_content_document").num_tokens
    assert run(*arguments[:-1], "--overwrite").returncode == 0
    assert train.num_tokens < IndexedDataset(f"{prefix}_train_content_document").num_tokens


def test_skipped_and_empty_documents_are_reported(tokenizer_path: Path, tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\nbroken\n{"text": ""}\n')
    arguments = [path, "--tokenizer", tokenizer_path, "--output-prefix", tmp_path / "x", "--workers", 1]
    refused = run(*arguments)
    assert refused.returncode == 3
    assert f"{path.resolve()}, line 2: not JSON" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert refused.stdout == ""
    result = run(*arguments, "--skip-invalid")
    assert result.returncode == 0
    assert "invalid documents skipped: 1, the first: " in result.stdout
    assert "empty documents left out: 1" in result.stdout


def test_a_tokenizer_whose_end_of_document_text_can_give(tmp_path: Path):
    texts = [f"line {i}: the fox <s>struck</s> the dog {i * i}" for i in range(30)]
    (tmp_path / "struck.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, "a \u65e5 dog", "the\x02 dog"]))
    with (tmp_path / "t.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([*texts, "a/b <c>"]), model_writer=file, vocab_size=60, model_type="bpe", user_defined_symbols=["</s>", "[EOS]"]
        )
    arguments = [tmp_path / "struck.jsonl", "--tokenizer", tmp_path / "t.model", "--output-prefix", tmp_path / "x", "--workers", 1]
    asked = run(*arguments)
    assert asked.returncode == 3
    assert "has 2 end-of-document tokens, </s>, [EOS], and does not say which one ends a document; name it with --eod-token" in asked.stderr
    result = run(*arguments, "--eod-token", "</s>")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    lost = "unknown tokens: 1 in 1 documents, for text without a token of its own, the first: '日' in a document that begins with 'a 日 dog'"
    assert lost in lines
    assert r"characters that the tokenizer drops: 1 in 1 documents, the first: U+0002 in a document that begins with 'the\x02 dog'" in lines
    assert lines[-1].endswith(f"data.tokenizer={tmp_path}/t.model 'data.eod_token=</s>' model.vocab_size=60")
    dataset, tokenizer = IndexedDataset(f"{tmp_path}/x_text_document"), load_tokenizer(tmp_path / "t.model", eod_token="</s>")
    documents = [np.concatenate(dataset.document(k)).tolist() for k in range(dataset.num_documents)]
    assert [document.index(tokenizer.eod_id) for document in documents] == [len(document) - 1 for document in documents]
    assert [tokenizer.decode(document) for document in documents[:30]] == texts


@pytest.mark.parametrize(
    ("arguments", "exit_code", "finding"),
    [
        (["absent.txt", "--train-tokenizer", "--vocab-size", "300"], 3, "cannot read the input absent.txt"),
        (["--train-tokenizer", "--vocab-size", "300"], 2, "there is no input"),
        ([__file__], 2, "choose one tokenizer"),
        ([__file__, "--train-tokenizer"], 2, "--vocab-size belongs to --train-tokenizer"),
        ([__file__, "--train-tokenizer", "--vocab-size", "7"], 3, "vocabulary of 7"),
        ([__file__, "--tokenizer", __file__], 3, "neither a sentencepiece model nor"),
        ([__file__, "--import-muse", "x", "--train-tokenizer"], 2, "--import-muse takes the place of inputs"),
        ([__file__, "--train-tokenizer", "--vocab-size", "300", "--eod-token", "</s>"], 2, "--eod-token belongs to --tokenizer"),
        ([__file__, "--tokenizer", "/dev/zero"], 3, "cannot read the tokenizer /dev/zero: it is a pipe or device"),
        ([__file__, "--train-tokenizer", "--vocab-size", "300", "--workers", "100000"], 2, "--workers is 100000, but this machine has "),
        ([__file__, "--workers", "none"], 2, "invalid int value: 'none'"),
    ],
)
def test_mistakes_are_one_sentence_and_a_documented_exit_code(tmp_path: Path, arguments: list[str], exit_code: int, finding: str):
    result = run(*arguments, "--output-prefix", tmp_path / "x")
    assert result.returncode == exit_code
    assert finding in result.stderr
    assert "Traceback" not in result.stderr


def test_an_output_that_cannot_be_written_has_its_own_exit_code(tokenizer_path: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    result = run(__file__, "--tokenizer", tokenizer_path, "--output-prefix", tmp_path / "file" / "x")
    assert result.returncode == 5
    assert result.stderr.startswith("error: cannot write ")


def test_help_names_every_option_and_how_to_go_on():
    result = run("--help")
    assert result.returncode == 0
    options = "--output-prefix --json-key --tokenizer --train-tokenizer --vocab-size --tokenizer-sample-bytes --validation-fraction --append-eod"
    for option in [
        *options.split(),
        "--no-append-eod",
        "--eod-token",
        "--skip-invalid",
        "--workers",
        "--shard-bytes",
        "--import-muse",
        "--import-raw",
        "--dtype",
        "--eod-id",
        "--document-separator",
        "Run the same command again",
    ]:
        assert option in result.stdout


def many_documents(path: Path) -> None:
    line = json.dumps({"text": "some words of text that take a while to encode\n" * 20}) + "\n"
    path.write_text(line * 2000)


def test_ctrl_c_says_how_to_go_on_and_the_next_run_does(tokenizer_path: Path, tmp_path: Path):
    many_documents(tmp_path / "a.jsonl")
    arguments = [tmp_path / "a.jsonl", "--tokenizer", tokenizer_path, "--output-prefix", tmp_path / "x", "--shard-bytes", 100_000, "--workers", 2]
    process = subprocess.Popen(command(*arguments), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    work = tmp_path / "x_text.preparing"
    while not list(work.glob("shard-??????")):
        assert process.poll() is None
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)
    stderr = process.communicate()[1]
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "interrupted; run the same command again to go on"
    assert "Traceback" not in stderr
    num_finished = len(list(work.glob("shard-??????")))
    assert 1 <= num_finished < 20
    result = run(*arguments)
    assert result.returncode == 0
    assert not result.stderr.startswith("tokenizing: 0 %")
    assert IndexedDataset(tmp_path / "x_text_document").num_documents == 2000


def test_a_terminal_gets_a_progress_bar(inputs: Path, tokenizer_path: Path, tmp_path: Path):
    ours, theirs = pty.openpty()
    arguments = [inputs / "note.txt", "--tokenizer", tokenizer_path, "--output-prefix", tmp_path / "x", "--workers", 1]
    environment = ENVIRONMENT | {"TERM": "xterm"}
    process = subprocess.Popen(command(*arguments), env=environment, stdout=subprocess.PIPE, stderr=theirs, text=True)
    stdout = process.communicate()[0]
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert process.returncode == 0
    assert "\x1b[" in shown
    assert "100 %" in shown
    assert "\x1b[" not in stdout


def test_muse_data_is_imported(tokenizer_path: Path, tmp_path: Path):
    tokenizer = load_tokenizer(tokenizer_path)
    sequences = [[*tokenizer.encode("first document"), tokenizer.eod_id], tokenizer.encode("second")]
    offsets = [(0, len(sequences[0])), (len(sequences[0]), len(sequences[1]))]
    (tmp_path / "train.idx").write_bytes(b"MUSE" + struct.pack("<I", 1) + b"".join(struct.pack("<QQ", *pair) for pair in offsets))
    (tmp_path / "train.bin").write_bytes(np.concatenate(sequences).astype("<u4").tobytes())
    prefix = tmp_path / "out" / "muse"
    result = run("--import-muse", tmp_path / "train", "--tokenizer", tokenizer_path, "--output-prefix", prefix)
    assert result.returncode == 0, result.stderr
    dataset = IndexedDataset(f"{prefix}_text_document")
    assert [dataset.document(k)[0].tolist() for k in range(2)] == sequences
    assert dataset.record.made_with == made_with(tokenizer, eod_id=tokenizer.eod_id)
    assert result.stdout.splitlines()[:2] == [
        f"{prefix}_text_document.bin/.idx: 2 documents, {dataset.num_tokens} tokens of uint16",
        f"documents that end in the end-of-document token {tokenizer.eod_id}: 1",
    ]
    assert f"data.train={prefix}_text_document data.tokenizer={tokenizer_path} model.vocab_size=300" in result.stdout
    arguments = ["--import-muse", tmp_path / "train", "--tokenizer", tokenizer_path, "--output-prefix", prefix]
    refused = run(*arguments)
    assert (refused.returncode, refused.stdout) == (2, "") and f"leads to {prefix}_text_document.bin, which exists; give another" in refused.stderr
    assert run(*arguments, "--overwrite").returncode == 0
    Path(f"{prefix}_text_document.idx").unlink()  # as a kill between the two files leaves it
    assert run(*arguments).returncode == 0
    assert run("--import-muse", tmp_path / "absent", "--tokenizer", tokenizer_path, "--output-prefix", tmp_path / "other").returncode == 3
