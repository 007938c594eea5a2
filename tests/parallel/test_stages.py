"""What pipeline stages do besides training: evaluation, changing lengths, compiled blocks."""

import os
from unittest import mock

import pytest
import torch

from phase8.config.auto import without_auto
from phase8.config.load import load_config
from phase8.config.model_section import ModelSection
from phase8.config.pipeline import Pipeline
from phase8.data.microbatch import Microbatch
from phase8.kernels.reference.cross_entropy import IGNORED_TARGET
from phase8.model.model import build_model
from phase8.plan.stages import chunk_layers
from phase8.train.engine.measured import evaluate
from phase8.train.engine.stage import Stage, joined
from phase8.train.engine.step import train_step
from tests.parallel.test_parity import BLOCKS, INTERLEAVED, ranks
from tests.parallel.training import MODEL, microbatches_of, new_train_state, take_step

BLOCK = BLOCKS["deep-tied"]
TOPOLOGIES = {
    "pp2 interleaved": ranks(pp=2, more=INTERLEAVED),
    "pp2 dp2 zero 3": ranks(pp=2, dp=2, stage=3),
    "tp2 pp2": ranks(tp=2, pp=2),
}


def start(settings, world_size):
    config = without_auto(load_config(os.devnull, [*MODEL, *BLOCK, *settings]))
    return config, new_train_state(config, world_size, device_type="cpu", dtype=torch.float32)


def shortened(batch, length):
    tokens, targets, starts = (x[:, :length] for x in (batch.tokens, batch.targets, batch.starts))
    return Microbatch(tokens, targets, starts, int((targets != IGNORED_TARGET).sum()))


def evaluate_and_change_length(settings, world_size):
    config, train_state = start(settings, world_size)
    batches = microbatches_of(train_state, config, 0)
    measured = [evaluate(train_state.stage, batches), evaluate(train_state.stage, batches[:1])]
    short = [shortened(batch, 12) for batch in batches]
    losses = [train_step(train_state, each, learning_rate=1e-2, gradient_clip_norm=1.0).loss for each in (batches, short, batches)]
    return [loss for loss, _ in measured], [count for _, count in measured], losses


@pytest.mark.parametrize("name", ["pp2 interleaved", "tp2 pp2"])
def test_evaluation_and_other_lengths(pool, name):
    world_size, settings = TOPOLOGIES[name]
    (measured, counts, losses), *others = pool.run(evaluate_and_change_length, settings, world_size, world_size=world_size)
    (expected, expected_counts, expected_losses), *_ = pool.run(evaluate_and_change_length, ("train.micro_batch_size=2",), 1, world_size=1)
    assert all(other == (measured, counts, losses) for other in others)
    assert counts == expected_counts and measured == pytest.approx(expected, rel=1e-5) and losses == pytest.approx(expected_losses, rel=1e-5)


def moved_to_the_device(settings, world_size):
    """How often a step brings tokens and targets of each microbatch to the device of this rank."""
    config, train_state = start(settings, world_size)
    batches, moved = microbatches_of(train_state, config, 0), []
    with mock.patch.object(Stage, "_moved", autospec=True, side_effect=lambda stage, x: moved.append(x) or x):
        train_step(train_state, batches, learning_rate=1e-2, gradient_clip_norm=1.0)
    return [tuple(sum(x is each for x in moved) for each in (batch.tokens, batch.targets)) for batch in batches]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("one", [(1, 1)]), ("pp2 interleaved", [(1, 0), (0, 1)]), ("pp3", [(1, 0), (0, 0), (0, 1)])],
)
def test_tokens_and_targets_go_once_to_the_stages_that_read_them(pool, name, expected):
    world_size, settings = {**TOPOLOGIES, "one": (1, ()), "pp3": ranks(pp=3)}[name]
    found = pool.run(moved_to_the_device, settings, world_size, world_size=world_size)
    assert [set(each) for each in found] == [{each} for each in expected]


def losses_of_compiled(settings, world_size, compiled):
    config, train_state = start(settings, world_size)
    for block in train_state.stage.module.blocks.values() if compiled else ():
        block.compile(fullgraph=True, backend="aot_eager")
    losses = [take_step(train_state, config, step).loss for step in range(2)]
    torch.compiler.reset()  # or the process groups stay with the compiled blocks
    return losses


def test_compiled_blocks_of_stages(pool):
    world_size, settings = ranks(pp=2, stage=3, more=("model.num_layers=2",))  # one block a stage: each is compiled by itself, within FSDP's hooks
    compiled, plain = ([*pool.run(losses_of_compiled, settings, world_size, flag, world_size=world_size)] for flag in (True, False))
    assert compiled[0] == pytest.approx(plain[0], rel=1e-5)


def test_chunks_have_the_names_of_the_whole_model():
    section = ModelSection(num_layers=5, d_model=16, num_heads=2, vocab_size=31, tie_embeddings=True)
    build = lambda layers: build_model(section, dtype=torch.float32, device=torch.device("meta"), layers=layers)  # noqa: E731
    pipeline = Pipeline("interleaved", 2, 2)
    stages = [dict(joined([build(layers) for layers in chunk_layers(section, pipeline, stage)]).named_parameters()) for stage in range(2)]
    assert stages[0].keys() | stages[1].keys() == dict(build(None).named_parameters()).keys()
    assert stages[0].keys() & stages[1].keys() == {"embedding.weight"}
