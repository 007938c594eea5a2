"""Weights of another model on ranks that divide them: each has its parts of them, whatever directory holds them."""

import os

import pytest
import torch

from phase8.checkpoint.load import open_checkpoint
from phase8.checkpoint.reshard.reshard import ConsolidatedForm, consolidate
from phase8.checkpoint.save import save_checkpoint
from phase8.config.auto import without_auto
from phase8.config.load import config_to_mapping, load_config
from phase8.distributed.collectives import broadcast_text
from phase8.distributed.placement import collected
from phase8.errors import CheckpointMismatchError
from phase8.model.model import build_model
from phase8.model.parameters import initialise
from phase8.train.engine.fsdp import FsdpEngine
from phase8.train.initialise import initialise_run
from phase8.train.run_directory import run_directory
from tests.parallel.test_parity import INTERLEAVED, ranks
from tests.parallel.training import MODEL, new_train_state

BLOCK = ("model.num_layers=4", "model.score=lorentz", "model.chain=both")
TOPOLOGIES = {
    "tp2": ranks(tp=2),
    "pp2 interleaved": ranks(pp=2, more=INTERLEAVED),
    "dp2 zero 3, optimizer offloaded": ranks(dp=2, stage=3, more=("zero.offload_optimizer=cpu",)),
}


@pytest.fixture
def source(tmp_path):
    """A checkpoint of the model, and the same weights in bf16 without a manifest."""
    config = without_auto(load_config(os.devnull, [*MODEL, *BLOCK]))
    model = build_model(config.model, dtype=torch.float32, device=torch.device("cpu"))
    initialise(model, seed=5)
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    path = save_checkpoint(tmp_path / "a", step=3, tensors=tensors, metadata={"config": config_to_mapping(config)}, attachments={})
    form = ConsolidatedForm(config_to_mapping(config))
    consolidate(open_checkpoint(path), tmp_path / "b", form=form, dtype=torch.bfloat16, on_progress=lambda *_: None)
    return path, tmp_path / "b"


def initialised(settings, world_size, path, directory):
    """A train state that has begun, and where its weights came from."""
    settings = (*BLOCK, *settings, f"run.output_dir={directory}", f"checkpoint.initialise_from={path}", "model.sequence_length=48")
    config = without_auto(load_config(os.devnull, [*MODEL, *settings]))
    train_state = new_train_state(config, world_size, device_type="cpu", dtype=torch.float32)
    engine = FsdpEngine(train_state, config)
    return train_state, initialise_run(config, engine, None, directory=run_directory(config.run), resume="auto")


def begin(settings, world_size, path, directory):
    """Where the weights came from; and what the ranks have together (on the first one), as parameters and as the optimizer sees them."""
    train_state, origin = initialised(settings, world_size, path, directory)
    before = whole_weights(train_state)
    train_state.shards.write_back()  # what is offloaded is what the next step begins with
    return str(origin), before, whole_weights(train_state)


def whole_weights(train_state):
    return {name: tensor.detach().clone() for name, tensor in collected(dict(train_state.stage.module.named_parameters()), train_state.mesh).items()}


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_every_rank_has_its_parts(pool, tmp_path, source, name):
    world_size, settings = TOPOLOGIES[name]
    checkpoint = open_checkpoint(source[0])
    expected = {name.removeprefix("model."): checkpoint.read(name) for name in checkpoint.tensor_names}
    for path in source:
        (said, before, after), *others = pool.run(begin, settings, world_size, path, tmp_path, world_size=world_size)
        assert said == f"initialised from {path}" + (", step 3" if path == source[0] else "") and all(said == other[0] for other in others)
        for name, value in expected.items():
            value = value if path == source[0] else value.bfloat16().float()
            assert torch.equal(before[name], value) and torch.equal(after[name], value), name
        assert before.keys() == expected.keys()


def begin_with_fewer_layers(settings, world_size, path, directory):
    """What the first rank says."""
    try:
        initialised((*settings, "model.num_layers=2"), world_size, path, directory)
    except CheckpointMismatchError as error:
        broadcast_text(None)  # the other ranks would learn from the launcher that this one has ended
        return str(error)
    return None


def test_a_stage_refuses_layers_that_no_stage_has(pool, tmp_path, source):
    world_size, settings = ranks(pp=2)
    first, _ = pool.run(begin_with_fewer_layers, settings, world_size, source[0], tmp_path, world_size=world_size)
    assert "is of another model: model.num_layers was 4 and is 2; the run has its shape with --set model.num_layers=4" in first
