"""The command on other formats than plain text: what it prints and refuses."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from phase8.data.indexed import IndexedDataset
from phase8.data.made_with import made_with
from phase8.data.tokenizer import load_tokenizer
from phase8.data.tokenizer_training import train_sentencepiece
from tests.tools.doors import load_door

TEXTS = [f"document {i} holds the number {i * i}\n" for i in range(80)]


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_sentencepiece(TEXTS, tmp_path_factory.mktemp("tokenizer") / "t.model", vocab_size=300)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """The command line in this process: exit code, lines of output, error output."""
    main = load_door("prepare_data").main

    def run_arguments(*arguments: object) -> tuple[int, list[str], str]:
        exit_code = main(list(map(str, arguments)))
        output = capsys.readouterr()
        return exit_code, output.out.splitlines(), output.err

    return run_arguments


def test_a_directory_of_formats_is_read_and_what_is_left_out_is_named(run, tokenizer_path: Path, tmp_path: Path):
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"body": TEXTS[:40]}), inputs / "a.parquet")
    (inputs / "b.txt").write_text("<|endoftext|>\n".join(TEXTS[40:]))
    for name in ("c.docx", "d.docx", "e.pdf"):
        (inputs / name).write_bytes(b"")
    (inputs / "gone.txt").symlink_to("/no/such/file")
    arguments = [inputs, "--tokenizer", tokenizer_path, "--json-key", "body", "--document-separator", "<|endoftext|>", "--workers", 1]
    exit_code, lines, progress = run(*arguments, "--output-prefix", tmp_path / "out" / "x")
    assert exit_code == 0, progress
    dataset, tokenizer = IndexedDataset(tmp_path / "out" / "x_body_document"), load_tokenizer(tokenizer_path)
    assert [tokenizer.decode(dataset.document(k)[0]) for k in range(80)] == TEXTS
    assert any("read: 3 files have no suffix of text (.docx: 2, .pdf: 1); name a file" in line for line in lines)
    assert f"symbolic links of directories that lead to nothing: 1, the first: {inputs}/gone.txt" in lines
    assert "tokenizing: 100 % (0.0 of 0.0 MB)" in progress


@pytest.mark.parametrize("given", ["--eod-id", "--tokenizer"])
def test_raw_tokens_are_imported(run, tokenizer_path: Path, tmp_path: Path, given: str):
    tokenizer = load_tokenizer(tokenizer_path)
    tokens = np.concatenate([[*tokenizer.encode(text), tokenizer.eod_id] for text in TEXTS]).astype("<u2")
    tokens.tofile(tmp_path / "train.bin")
    prefix = tmp_path / "out" / "x"
    value = tokenizer.eod_id if given == "--eod-id" else tokenizer_path
    exit_code, lines, errors = run("--import-raw", tmp_path / "train.bin", "--dtype", "uint16", given, value, "--output-prefix", prefix)
    assert exit_code == 0, errors
    dataset = IndexedDataset(f"{prefix}_text_document")
    assert dataset.num_documents == 80
    assert dataset.record.made_with == (made_with(tokenizer, eod_id=tokenizer.eod_id) if given == "--tokenizer" else None)
    np.testing.assert_array_equal(dataset.tokens(0, tokens.size), tokens)
    assert lines[:3] == [
        f"{prefix}_text_document.bin/.idx: 80 documents, {tokens.size:,} tokens of uint16",
        f"read as raw uint16 tokens, the largest id: {tokens.max()}",
        f"documents that end in the end-of-document token {tokenizer.eod_id}: 80",
    ]
    known = f" data.tokenizer={tokenizer_path} model.vocab_size=300" if given == "--tokenizer" else " and the data.tokenizer that made the tokens"
    assert lines[-1] == f"train on it with: --set data.train={prefix}_text_document{known}"
    assert json.loads(Path(f"{prefix}_text_document.import.json").read_text())["largest_id"] == tokens.max()
    assert "importing: 100 %" in errors


@pytest.mark.parametrize(
    ("arguments", "exit_code", "finding"),
    [
        (["--import-raw", "absent.bin", "--dtype", "uint16", "--eod-id", 0], 3, "cannot read the input absent.bin: No such file or directory"),
        (["--import-raw", __file__], 3, "give --dtype uint16 or --dtype uint32"),
        ([__file__, "--import-raw", __file__], 2, "--import-raw takes the place of inputs"),
        (["--import-raw", "x", "--import-muse", "y"], 2, "--import-muse takes the place of inputs"),
        ([__file__, "--eod-id", 3], 2, "--dtype and --eod-id belong to --import-raw"),
        (["--import-muse", "gone"], 2, "--import-muse takes the place of inputs and needs --tokenizer"),
        (["gone"], 3, "cannot read the input gone: it is a symbolic link to /no/such/place, which does not exist; give existing"),
        ([__file__, "--tokenizer", "gone"], 3, "cannot read the tokenizer gone: it is a symbolic link to /no/such/place, which does not exist; give"),
    ],
)
def test_mistakes_are_one_sentence(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list, exit_code: int, finding: str):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").symlink_to("/no/such/place")
    if "--tokenizer" not in arguments and "--import-muse" not in arguments and "--import-raw" not in arguments:
        arguments = [*arguments, "--train-tokenizer", "--vocab-size", 300]
    found, lines, errors = run(*arguments, "--output-prefix", tmp_path / "out" / "x")
    assert (found, lines) == (exit_code, [])
    assert finding in errors
    assert not (tmp_path / "out" / "x_text_document.idx").exists()


def test_an_archive_is_refused_and_nul_bytes_are_told(run, tokenizer_path: Path, tmp_path: Path):
    (tmp_path / "inputs").mkdir()
    (tmp_path / "inputs" / "a.txt").write_text("a text\n")
    (tmp_path / "inputs" / "nul.txt").write_bytes(b"a\0b")
    with tarfile.open(tmp_path / "d.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "inputs", "d")
    options = ["--tokenizer", tokenizer_path, "--workers", 1, "--output-prefix", tmp_path / "x"]
    exit_code, lines, errors = run(tmp_path / "d.tar.gz", *options)
    assert (exit_code, lines) == (3, [])
    assert errors == f"error: the input {tmp_path}/d.tar.gz is a tar archive and not a text; unpack it and give the directory with its files\n"
    exit_code, lines, errors = run(tmp_path / "inputs", *options)
    assert exit_code == 0, errors
    assert "documents with NUL bytes, which text rarely has, kept as they are: 1" in lines
