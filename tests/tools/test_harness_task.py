"""A local task of EleutherAI's lm-evaluation-harness (package lm_eval) on exported models: its accuracy is that computed by hand."""

import json
import re
import subprocess
import sys

import pytest
import torch
import yaml

from tests.documented_commands import ROOT, commands_of
from tests.processes.launched import environment
from tests.tools.exported_model import export

BLOCKS = {
    "phase8": ("model.local_window_size=8",),
    "transformer": ("model.block=transformer",),
}
WORDS = ("red", "tan", "sky", "ash")  # of one length, or else the shortest one is the likeliest
QUESTIONS = [
    {"question": f"Which colour has {3 * chr(ord('a') + number)}", "choices": list(WORDS), "answer": number % len(WORDS)} for number in range(12)
]
TEXTS = [question["question"] for question in QUESTIONS]
TASK = {
    "task": "colours",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}],
}


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    for name, value in {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf_home")}.items():
        monkeypatch.setenv(name, value)


def chosen_by_hand(model, tokenizer, question):
    """The choice whose tokens have the greatest probability after the question and a space."""
    scores = []
    for choice in question["choices"]:
        before, whole = (tokenizer.encode(text).ids for text in (question["question"], f"{question['question']} {choice}"))
        with torch.no_grad():
            hidden, _ = model(torch.tensor([whole]))
            logits = model.logits(hidden)
        logs = logits[0, :-1].log_softmax(-1)
        scores.append(sum(logs[at - 1, whole[at]].item() for at in range(len(before), len(whole))))
    return max(range(len(scores)), key=scores.__getitem__)


def write_task(directory):
    """The questions, and the task in a directory of tasks."""
    (directory / "questions.jsonl").write_text("\n".join(json.dumps(question) for question in QUESTIONS))
    (directory / "tasks").mkdir()
    task = TASK | {"dataset_kwargs": {"data_files": {"test": str(directory / "questions.jsonl")}}}
    (directory / "tasks" / "colours.yaml").write_text(yaml.safe_dump(task))


@pytest.mark.parametrize("block", BLOCKS)
def test_the_accuracy_of_a_task_is_that_computed_by_hand(tmp_path, block):
    lm_eval, tasks = pytest.importorskip("lm_eval"), pytest.importorskip("lm_eval.tasks")
    model, tokenizer, directory = export(tmp_path, BLOCKS[block], texts=TEXTS, noise=0.4)
    chosen = [chosen_by_hand(model, tokenizer, question) for question in QUESTIONS]
    assert len(set(chosen)) > 1  # the model does not choose the same word always
    write_task(tmp_path)
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={directory},dtype=float32,trust_remote_code=True",
        tasks=["colours"],
        task_manager=tasks.TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        device="cpu",
        batch_size=4,
        bootstrap_iters=0,
    )
    by_hand = sum(choice == question["answer"] for choice, question in zip(chosen, QUESTIONS, strict=True)) / len(QUESTIONS)
    assert found["results"]["colours"]["acc,none"] == pytest.approx(by_hand)
    samples = sorted(found["samples"]["colours"], key=lambda sample: sample["doc_id"])
    scores = [[score for score, _ in sample["filtered_resps"]] for sample in samples]
    assert [max(range(len(WORDS)), key=each.__getitem__) for each in scores] == chosen


def test_the_documented_command_prints_its_table(tmp_path):
    """It runs as a program, which imports what the calls above do not."""
    pytest.importorskip("lm_eval")
    export(tmp_path, BLOCKS["phase8"], texts=TEXTS, noise=0.4).directory.rename(tmp_path / "exported")
    write_task(tmp_path)
    (command,) = (each for each in commands_of((ROOT / "docs/quality.md").read_text()) if each.words[0] == "lm_eval")
    here = {"--device": "cpu", "--tasks": "colours"}
    assert {"pretrained=exported", "trust_remote_code=True"} < set(command.words[command.words.index("--model_args") + 1].split(","))
    words = [here.get(before, word) for before, word in zip(command.words, command.words[1:], strict=False)]
    words = [sys.executable, "-m", "lm_eval", *words, "--include_path", "tasks"]
    done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\|colours *\|.*\|acc +\|.*\|[01]\.\d+\|±", done.stdout, re.M), done.stdout
