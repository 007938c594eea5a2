"""A local task of EleutherAI's lm-evaluation-harness (package lm_eval) on exported models: its accuracy is that computed by hand."""

import json

import pytest
import torch
import yaml

from tests.tools.exported_model import export

BLOCKS = {
    "phase8": ("model.local_window_size=8",),
    "transformer": ("model.block=transformer",),
}
WORDS = ("red", "tan", "sky", "ash")  # of one length, or else the shortest one is the likeliest
QUESTIONS = [
    {"question": f"Which colour has {3 * chr(ord('a') + number)}", "choices": list(WORDS), "answer": number % len(WORDS)} for number in range(12)
]
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


@pytest.mark.parametrize("block", BLOCKS)
def test_the_accuracy_of_a_task_is_that_computed_by_hand(tmp_path, block):
    lm_eval, tasks = pytest.importorskip("lm_eval"), pytest.importorskip("lm_eval.tasks")
    texts = [question["question"] for question in QUESTIONS]
    model, tokenizer, directory = export(tmp_path, BLOCKS[block], texts=texts, noise=0.4)
    chosen = [chosen_by_hand(model, tokenizer, question) for question in QUESTIONS]
    assert len(set(chosen)) > 1  # the model does not choose the same word always
    (tmp_path / "questions.jsonl").write_text("\n".join(json.dumps(question) for question in QUESTIONS))
    (tmp_path / "tasks").mkdir()
    task = TASK | {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "questions.jsonl")}}}
    (tmp_path / "tasks" / "colours.yaml").write_text(yaml.safe_dump(task))
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
