import subprocess
import sys
from pathlib import Path

import pytest

from phase8.observe.metrics import MetricsWriter

ROOT = Path(__file__).parents[2]


def call(*arguments, cwd=ROOT):
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, str(ROOT / "tools/report.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
    return done.returncode, done.stdout, done.stderr


def test_a_run_is_drawn_and_several_are_compared(tmp_path):
    runs = [tmp_path / name for name in ("one", "two")]
    for run in runs:
        with MetricsWriter(run, resume_step=0) as writer:
            writer.log_evaluation(7, validation_loss=2.0, validation_tokens=8)
        (run / "config.yaml").write_text(f"run: {{name: {run.name}}}\n")
    page = runs[0] / "report" / "index.html"
    assert call(runs[0]) == (0, f"report: {page}\n", "") and page.exists()
    assert call(*runs, cwd=tmp_path) == (0, "report: comparison.html\n", "")
    text = (tmp_path / "comparison.html").read_text()
    assert "2 runs compared" in text and "<td>run.name</td><td>one</td><td>two</td>" in text


def only_start(path):
    with MetricsWriter(path.parent, resume_step=0) as writer:
        writer.log_event(0, "start")


@pytest.mark.parametrize("write", [Path.touch, only_start, lambda path: path.write_text("not metrics\n")], ids=["empty", "start", "foreign"])
@pytest.mark.parametrize("is_compared", [False, True])
def test_a_run_without_steps_is_not_drawn(tmp_path, write, is_compared):
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir()
    write(run / "metrics.jsonl")
    with MetricsWriter(other, resume_step=0) as writer:
        writer.log_evaluation(7, validation_loss=2.0, validation_tokens=8)
    code, output, errors = call(*[other][:is_compared], run, cwd=tmp_path)
    sentence = f"error: the metrics.jsonl of {run} holds no step and no evaluation; let the run take a step, or give another run.\n"
    assert (code, output, errors) == (2, "", sentence)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["metrics.jsonl", "metrics.jsonl", "other", "run"]


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["{}/none"], 2, "there is no run at {}/none: it holds no metrics.jsonl; give the directory of a run"),
        (["{}/a", "--output", "x"], 2, "--output x is for several runs"),
        ([], 2, "RUN"),
    ],
)
def test_what_cannot_be_drawn_is_one_sentence(tmp_path, arguments, code, sentence):
    found, output, errors = call(*(argument.format(tmp_path) for argument in arguments))
    assert (found, output) == (code, "") and sentence.format(tmp_path) in errors and "Traceback" not in errors
