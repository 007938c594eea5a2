"""Runs whose ranks share sequences: they read their slices, train, and evaluate as one process does."""

import functools
import os
from contextlib import closing, contextmanager

import numpy as np
import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from phase8.config.load import load_config
from phase8.data.indexed import IndexedWriter
from phase8.data.token_file import TokenFile
from phase8.observe.metrics import read_metrics
from phase8.observe.progress import Progress
from phase8.train.build import build_run
from phase8.train.loop import train
from phase8.train.signals import StopRequest
from phase8.train.trainer import Trainer
from phase8.train.unreadable import UnreadableData
from tests.train.tiny_run import write_documents

LENGTH, BATCH, STEPS, HELD_OUT = 24, 4, 2, 6
SETTINGS = (
    "model.d_model=24", "model.num_layers=2", "model.num_heads=4", "model.vocab_size=61", f"model.sequence_length={LENGTH}", "model.ffn_size=40",
    "model.local_window_size=6", "model.global_tokens=3", "precision.dtype=fp32", f"train.global_batch_size={BATCH}", "train.micro_batch_size=2",
    f"train.num_steps={STEPS}", f"train.evaluate_every_n_steps={STEPS}", f"train.evaluation_sequences={HELD_OUT}", "optim.learning_rate=1e-2",
    "optim.warmup_steps=1", "data.num_workers=0", "observe.tensorboard=false", "observe.report=false",
)  # fmt: skip

LAYOUTS = {  # number of slices and of ranks
    "cp2": (2, 2, ()),
    "cp4 zero 3": (4, 4, ("zero.stage=3",)),
    "pp2 cp2": (2, 4, ("parallel.pipeline_parallel_size=2", "parallel.num_microbatches=2")),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Settings of a blend to train on and of one to evaluate on, packed documents of a few dozen tokens."""
    directory = tmp_path_factory.mktemp("context")
    for seed, name in enumerate(("a", "b", "c", "d")):
        write_documents(directory / name, num_documents=12, seed=seed)

    def blend(first, second):
        return f"[{{path: {directory}/{first}, weight: 3}}, {{path: {directory}/{second}, weight: 1}}]"

    return f"data.train={blend('a', 'b')}", f"data.validation={blend('c', 'd')}"


@contextmanager
def counted_tokens():
    """A list to which the number of tokens of every read from a file is added."""
    read, numbers = TokenFile.read, []

    def counting(file, start, number, dtype):
        numbers.append(number)
        return read(file, start, number, dtype)

    TokenFile.read = counting
    try:
        yield numbers
    finally:
        TokenFile.read = read


def run_of(settings, world_size):
    """What a rank does, as launch/pretrain.py does it: trains and evaluates.

    Returns:
        Loss and gradient norm of every step, the validation losses and numbers of targets, and the number of tokens that the rank has read.
    """
    config = load_config(os.devnull, [*SETTINGS, *settings])
    with counted_tokens() as numbers:
        run = build_run(config, device=torch.device("cpu"), resume="none", console=Console(quiet=True), world_size=world_size)
        train(run, resume_command="")
    records = read_metrics(run.directory.metrics)
    steps = [(record["loss"], record["grad_norm"]) for record in records if "loss" in record]
    (evaluation,) = [record for record in records if "validation_loss" in record]
    losses = [evaluation["validation_loss"], *(source["loss"] for source in evaluation["validation_sources"].values())]
    return steps, losses, evaluation["validation_tokens"], sum(numbers)


@pytest.fixture(scope="module")
def of_one_process(data, tmp_path_factory):
    """The result of one process, computed once with and once without resets."""
    return functools.cache(lambda resets: run_of([*data, resets, f"run.output_dir={tmp_path_factory.mktemp('one')}"], 1))


# Without resets nothing depends on where documents begin: one layout shows it in every run.
@pytest.mark.parametrize(
    ("resets", "layout"),
    [pytest.param(resets, name, marks=[] if resets or name == "cp4 zero 3" else [pytest.mark.full]) for resets in (False, True) for name in LAYOUTS],
)
def test_ranks_read_their_slices_and_train_and_evaluate_as_one_process(pool, data, of_one_process, tmp_path, resets, layout):
    num_slices, world_size, settings = LAYOUTS[layout]
    resets_setting, num_sequences = f"data.reset_at_document_boundaries={str(resets).lower()}", STEPS * BATCH + HELD_OUT
    expected_steps, expected_losses, num_targets, num_read = of_one_process(resets_setting)
    assert num_read == num_sequences * (LENGTH + 1) and (num_targets < HELD_OUT * LENGTH) == resets
    settings = (*data, resets_setting, f"run.output_dir={tmp_path}", f"parallel.context_parallel_size={num_slices}", *settings)
    found = pool.run(run_of, settings, world_size, world_size=world_size)
    for steps, losses, targets, tokens in found:
        torch.testing.assert_close(steps, expected_steps, rtol=1e-4, atol=0)
        torch.testing.assert_close(losses, expected_losses, rtol=1e-4, atol=0)
        assert targets == num_targets
        assert tokens == num_sequences * (LENGTH // num_slices + 1)


def step_without_the_last_slice(prefix, settings):
    """What a rank is told when the file ends amid the last slice, and how many steps it has taken."""
    config, console = load_config(os.devnull, [*SETTINGS, f"data.train={prefix}", *settings]), Console(quiet=True)
    run = build_run(config, device=torch.device("cpu"), resume="none", console=console, world_size=dist.get_world_size())
    if run.is_main:
        os.truncate(f"{prefix}.bin", 2 * (LENGTH - 2))
    dist.barrier()
    progress = Progress(total_steps=1, start_step=0, log_every_n_steps=1, console=console, epochs=lambda: run.data.epochs(0))
    with run.lock, closing(Trainer(run, None, progress, lambda step, doing: None)) as trainer:
        try:
            trainer.train_until(1, StopRequest())
        except UnreadableData as unreadable:
            return str(unreadable.own), run.position.step
    return None


@pytest.mark.parametrize("resets", [False, True])
def test_a_slice_that_one_rank_cannot_read_ends_the_step_of_all(pool, tmp_path, resets):
    with IndexedWriter(tmp_path / "short", dtype=np.dtype("<u2")) as writer:
        writer.add_document(np.arange(LENGTH + 1))
    settings = (f"run.output_dir={tmp_path}", f"data.reset_at_document_boundaries={str(resets).lower()}", "parallel.context_parallel_size=4")
    *earlier, last = pool.run(step_without_the_last_slice, str(tmp_path / "short"), settings, world_size=4)
    assert earlier == [("None", 0)] * 3
    assert last[1] == 0 and "short.bin is shorter than when it was opened" in last[0]
