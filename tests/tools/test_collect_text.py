"""The command that collects a text, up to the tokens of both splits."""

import subprocess
import sys
from pathlib import Path

import pytest

from phase8.data.indexed import IndexedDataset
from tests.tools.doors import load_door

ROOT = Path(__file__).parents[2]


@pytest.fixture
def sources(tmp_path):
    directory = tmp_path / "sources"
    directory.mkdir()
    for i in range(80):
        (directory / f"{i}.py").write_text(f"def function_{i}():\n    return 'a text that is long enough to be kept', {i}\n" * 3)
    return directory


def test_collects_and_prepares(sources, tmp_path):
    options = ["--output", tmp_path, "--workers", "1", "--prepare", "--vocab-size", "300", "--validation-fraction", "0.2", "--roots", sources]
    command = [sys.executable, ROOT / "tools/collect_text.py", "python", *options]
    result = subprocess.run(list(map(str, command)), env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "80 documents" in result.stdout and "data.validation=" in result.stdout
    splits = [IndexedDataset(tmp_path / f"python_{name}_text_document") for name in ("train", "validation")]
    assert sum(split.num_documents for split in splits) == 80


def test_a_text_that_is_there_is_recognised_and_another_one_not_replaced(sources, tmp_path):
    options = ["--output", tmp_path, "--workers", "1", "--prepare", "--vocab-size", "300", "--validation-fraction", "0.2", "--roots", sources]

    def collect(*more):
        command = [sys.executable, ROOT / "tools/collect_text.py", "python", *options, *more]
        return subprocess.run(list(map(str, command)), env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)

    assert collect().returncode == 0
    kept = tmp_path / "python.jsonl", tmp_path / "python_train_text_document.bin"
    before = [(path.stat().st_ctime_ns, path.stat().st_ino, path.read_bytes()) for path in kept]
    again = collect()
    assert again.returncode == 0 and "already prepared from the same inputs" in again.stdout, again.stderr
    (sources / "new.py").write_text("def another():\n    return 'a text that is long enough to be kept'\n" * 3)
    refused = collect()
    assert refused.returncode == 2 and f"error: --output has {kept[0]}, which holds another text than is collected now; give" in refused.stderr
    assert [(path.stat().st_ctime_ns, path.stat().st_ino, path.read_bytes()) for path in kept] == before
    replaced = collect("--overwrite")
    assert replaced.returncode == 0 and "81 documents" in replaced.stdout, replaced.stderr


def test_prints_the_command_that_prepares(sources, tmp_path, capsys):
    assert load_door("collect_text").main(["python", "--output", str(tmp_path), "--workers", "1", "--roots", str(sources)]) == 0
    assert "tools/prepare_data.py" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--limit-bytes", "0"], 2, "--limit-bytes is 0; it must be at least 1"),
        (["--roots", "/no/such/place"], 2, "--roots names /no/such/place, which is not a directory"),
        (["--roots", "{empty}"], 3, "there is no document of the kind 'python'"),
    ],
)
def test_bad_input_gets_one_sentence(tmp_path, capsys, options, code, message):
    given = [option.format(empty=tmp_path) for option in options]
    assert load_door("collect_text").main(["python", "--output", str(tmp_path), *given]) == code
    assert message in capsys.readouterr().err


def test_more_workers_than_the_machine_has_cores_for_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert load_door("collect_text").main(["python", "--output", str(tmp_path), "--workers", "100000"]) == 2
    assert "--workers is 100000, but this machine has " in capsys.readouterr().err
