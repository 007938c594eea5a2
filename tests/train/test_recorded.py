"""Runs whose steps are recorded: what happens between the steps sees what they did, and they see what it did."""

from contextlib import nullcontext

import pytest
import torch
from rich.console import Console

from phase8.checkpoint.load import list_checkpoints, open_checkpoint
from phase8.data.tokenizer_training import train_sentencepiece
from phase8.train.build import build_run
from phase8.train.loop import train
from tests.tape import recorded_on_a_cpu
from tests.train.tiny_run import losses, records, tiny_config

# Evaluations, samples and checkpoints written from copies are between the steps. The ninth is an anomaly: the run goes back to the eighth.
SETTINGS = (
    "model.vocab_size=300", "observe.sample_prompt=def", "observe.sample_tokens=3", "observe.sample_at_evaluations=true",
    "train.num_steps=12", "train.evaluate_every_n_steps=3", "checkpoint.every_n_steps=4", "checkpoint.asynchronous=true", "checkpoint.keep_last=9",
    "train.anomaly.policy=rollback", "data.reset_at_document_boundaries=true",
)  # fmt: skip
ANOMALY = 9


def trained(path, device, *settings, is_recorded):
    """The run, and copies of what it gave to each checkpoint."""
    config = tiny_config(path, *SETTINGS, *settings, f"run.name={is_recorded}", f"train.cuda_graphs={is_recorded}")
    run = build_run(config, device=torch.device(device), resume="none", console=Console(quiet=True))
    update, state, spoiled, saved = run.engine.update, run.engine.state, [], {}

    def spoil(*arguments, largest_loss, **options):
        is_spoiled = run.position.step == ANOMALY - 1 and not spoiled
        spoiled.extend([ANOMALY] * is_spoiled)
        return update(*arguments, largest_loss=0.0 if is_spoiled else largest_loss, **options)

    def remember():
        saved[run.position.step] = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state().items()}
        return state()

    run.engine.update, run.engine.state = spoil, remember
    with recorded_on_a_cpu() if is_recorded and device == "cpu" else nullcontext():
        train(run, resume_command="")
    return run, saved


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_recorded_run_is_the_launched_one(tiny, tmp_path, device):
    tokenizer = train_sentencepiece(["def main(): pass\n"] * 50, tmp_path / "tokenizer.model", vocab_size=280)
    settings = (f"data.tokenizer={tokenizer}", *(["precision.dtype=bf16"] if device == "cuda" else []))
    (launched, _), (recorded, saved) = (trained(tiny, device, *settings, is_recorded=how) for how in (False, True))
    tolerance = {"rel": 1e-4 if device == "cpu" else 1e-2}  # on a GPU sums of gradients are in an order of their own
    assert list(losses(recorded).values()) == pytest.approx(list(losses(launched).values()), **tolerance)
    found, expected = ([record["validation_loss"] for record in records(run) if "validation_loss" in record] for run in (recorded, launched))
    assert len(found) == 4 and found == pytest.approx(expected, **tolerance)
    for event, steps in {"rollback": [8], "sample": [3, 6, 9, 12]}.items():
        for run in (launched, recorded):
            assert [record["step"] for record in records(run) if record.get("event") == event] == steps
    checkpoints = [open_checkpoint(path) for path in list_checkpoints(recorded.directory.checkpoints)]
    assert sorted(each.step for each in checkpoints) == [4, 8, 12]
    for checkpoint in checkpoints:
        assert all(torch.equal(checkpoint.read(name), value) for name, value in saved[checkpoint.step].items())
