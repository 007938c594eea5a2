"""A passkey in very long sequences through all that training consists of: data, slices of ranks or of recomputation, evaluation, recall.

A few steps learn nothing: that every number is that of one process is tested, in float64. With `-m full` a tiny model learns to recall.
"""

import json
import os
from contextlib import contextmanager

import pytest
import torch
from rich.console import Console

from phase8.config.load import load_config
from phase8.observe.metrics import read_metrics
from phase8.precision.policy import COMPUTE_DTYPES
from phase8.recall.evaluate import evaluate_recall
from phase8.recall.tasks import Task
from phase8.train.build import build_run
from phase8.train.loop import train
from tests.recall.oracle import look_up
from tests.tools.doors import load_door

VOCABULARY, KEY_TOKENS = 96, 1
TASK = ("--task", "passkey", "--key-tokens", str(KEY_TOKENS))
MODEL = (
    "model.d_model=16", "model.num_layers=1", "model.num_heads=2", "model.ffn_size=16", "model.local_window_size=32", "model.global_tokens=3",
    f"model.vocab_size={VOCABULARY}", "data.num_workers=0", "data.reset_at_document_boundaries=true", "precision.dtype=fp32",
    "observe.tensorboard=false", "observe.report=false",
)  # fmt: skip
SHORT = 1000  # tokens of packed documents; slices are no multiple of it, so that documents cross them
NUM_STEPS = 2


@contextmanager
def in_float64():
    """Makes `precision.dtype: fp32` float64, so that the order of sums does not show."""
    torch.set_default_dtype(torch.float64)
    COMPUTE_DTYPES["fp32"] = torch.float64
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        COMPUTE_DTYPES["fp32"] = torch.float32


def write(directory, length, *, num_sequences, held_out=1):
    """Writes passkeys in sequences of a length by the command line."""
    size = ("--length", str(length), "--tokens", str(length * num_sequences), "--validation-sequences", str(held_out))
    assert load_door("recall").main(["data", *TASK, *size, "--vocab-size", str(VOCABULARY), "--output", str(directory)]) == 0


def data_of(directory, *lengths):
    """Settings of a blend, in equal parts, of sequences of several lengths, to train and to evaluate on."""

    def blend(split):
        return "[" + ", ".join(f"{{path: {directory}/passkey_{length}_{split}, weight: 1}}" for length in lengths) + "]"

    return f"data.train={blend('train')}", f"data.validation={blend('validation')}"


def trained(settings, world_size):
    """What a rank does: trains as launch/pretrain.py does; returns loss and gradient norm of every step, and the validation losses."""
    config = load_config(os.devnull, [*MODEL, *settings])
    run = build_run(config, device=torch.device("cpu"), resume="none", console=Console(quiet=True), world_size=world_size)
    train(run, resume_command="")
    records = read_metrics(run.directory.metrics)
    steps = [(record["loss"], record["grad_norm"]) for record in records if "loss" in record]
    return steps, [source["loss"] for record in records for source in record.get("validation_sources", {}).values()]


def trained_in_float64(settings, world_size):
    """A job of the pool: the same in float64."""
    with in_float64():
        return trained(settings, world_size)


def recall_of(run_directory, length, *, num_sequences):
    """The recall of a run's checkpoint, as the command line measures it."""
    output = run_directory / f"recall_{length}.json"
    options = ["--checkpoint", str(run_directory), "--lengths", str(length), "--sequences", str(num_sequences), "--output", str(output)]
    assert load_door("recall").main(["evaluate", *TASK, *options, "--device", "cpu"]) == 0
    (result,) = json.loads(output.read_text())["results"]
    return result


@pytest.mark.parametrize("length", [8192, pytest.param(65536, marks=pytest.mark.full), pytest.param(262144, marks=pytest.mark.full)])
def test_slices_train_on_long_sequences_as_one_process(pool, tmp_path, length):
    write(tmp_path, length, num_sequences=NUM_STEPS)
    write(tmp_path, SHORT, num_sequences=NUM_STEPS * length // SHORT + 2, held_out=length // SHORT + 2)
    batch = ("train.global_batch_size=2", "train.micro_batch_size=1", f"train.num_steps={NUM_STEPS}", "optim.warmup_steps=0")
    evaluation = (f"train.evaluate_every_n_steps={NUM_STEPS}", "train.evaluation_sequences=2", "optim.learning_rate=1e-2")
    settings = (*data_of(tmp_path, length, SHORT), *batch, *evaluation, f"model.sequence_length={length}", f"run.output_dir={tmp_path}")
    alone = trained_in_float64((*settings, "run.name=alone", "train.recompute=slices", f"train.recompute_slice_tokens={length // 8}"), 1)
    assert len(alone[0]) == NUM_STEPS and len(alone[1]) == 2
    together = (*settings, "run.name=together", "parallel.context_parallel_size=4", "train.recompute=full", "zero.stage=1")
    for found in pool.run(trained_in_float64, together, 4, world_size=4, timeout_seconds=600):
        torch.testing.assert_close(found, alone, rtol=1e-9, atol=0)
    with in_float64():
        recalls = [recall_of(tmp_path / name, length, num_sequences=2) for name in ("alone", "together")]
    assert recalls[0] == recalls[1] and (recalls[0]["length"], recalls[0]["num_sequences"]) == (length, 2)


@pytest.mark.parametrize("length", [65536, 262144])
def test_an_oracle_recalls_passkeys_of_long_sequences(length):
    (found,) = evaluate_recall(Task("passkey", VOCABULARY, (6,)), look_up, lengths=[length], num_sequences=3, seed=1)
    assert found.answer_ratio == found.sequence_ratio == 1


@pytest.mark.full
def test_a_passkey_is_recalled_over_the_slices_of_other_ranks(pool, tmp_path):
    """One process learns to recall in short documents, of which it recalls a third in long ones; four ranks go on with slices longer than those."""
    short, long = 1024, 8192
    for length in (32, 128, short, long // 2, long):
        write(tmp_path, length, num_sequences=(1 << 20) // length, held_out=2 * long // length)
    model = ("model.d_model=32", "model.ffn_size=32", "model.local_window_size=16", "model.global_path=delta", "model.memory_tokens=[1e6,1e6]")
    shared = (*model, "optim.learning_rate=1e-2", "train.evaluate_every_n_steps=0", f"run.output_dir={tmp_path}")
    batch = ("train.global_batch_size=2", "train.micro_batch_size=2", "train.num_steps=1500", "optim.warmup_steps=10")
    trained((*shared, *data_of(tmp_path, 32, 128, short), *batch, f"model.sequence_length={short}", "run.name=short"), 1)
    batch = ("train.global_batch_size=1", "train.num_steps=450", "optim.warmup_steps=2", f"checkpoint.initialise_from={tmp_path}/short")
    settings = (*shared, *data_of(tmp_path, 128, short, long // 2, long), *batch, f"model.sequence_length={long}", "run.name=long")
    pool.run(trained, (*settings, "parallel.context_parallel_size=4"), 4, world_size=4, timeout_seconds=900)
    assert recall_of(tmp_path / "long", long, num_sequences=32)["answer_ratio"] > 0.8
