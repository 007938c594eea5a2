"""A checkpoint rewritten for some ranks: each of them opens its own files, and those that hold what it shares with earlier ranks."""

import functools
import os

import pytest
import torch

from phase8.checkpoint.load import Checkpoint, open_checkpoint
from phase8.checkpoint.reshard.reshard import reshard
from phase8.config.auto import without_auto
from phase8.config.batch import run_topology
from phase8.config.load import load_config
from phase8.config.pipeline import pipeline_of
from phase8.distributed.placement import collected
from phase8.optim.state import adamw_state
from phase8.plan.chunks import stage_tensors
from tests.parallel.test_checkpoints import ANY, BLOCK, restore, start, state_of, train_and_save
from tests.parallel.training import MODEL


def load_and_watch(settings, world_size, path):
    """The files that this rank opened and what all have restored (on the first rank)."""
    opened = set()
    find = Checkpoint._file

    def watched(self, name):
        opened.add(name)
        return find(self, name)

    Checkpoint._file = watched
    try:
        _, train_state = start(settings, world_size)
        restore(train_state, path)
    finally:
        Checkpoint._file = find
    return opened, {name: tensor.clone() for name, tensor in collected(state_of(train_state), train_state.mesh).items()}


@pytest.fixture(scope="module")
def saved_by(pool, tmp_path_factory):
    """What ranks have saved, and the checkpoint, once for each layout."""

    @functools.cache
    def save(origin):
        directory, (world_size, settings) = tmp_path_factory.mktemp("origin"), ANY[origin]
        (saved, _), *_ = pool.run(train_and_save, settings, world_size, directory, world_size=world_size)
        return saved, open_checkpoint(directory / "step-0000000002")

    return save


@pytest.mark.parametrize(
    ("origin", "name", "stage_size"),
    [
        pytest.param("dp4 zero 1", "tp2 pp2 dp2 zero 2", 4, marks=pytest.mark.full),  # stages are in a case below, what divides them in the next
        ("dp4 zero 1", "tp2 dp2 zero 3", 4),
        ("dp4 zero 1", "pp2 interleaved", 1),
        ("dp4 zero 1, shared keys", "tp2 dp2 zero 3, shared keys", 4),
        ("dp2 zero 3, all experts on each", "ep2 dp4 zero 3", 4),
    ],
)
def test_each_rank_opens_its_own_files(pool, saved_by, tmp_path, origin, name, stage_size):
    saved, source = saved_by(origin)
    world_size, settings = ANY[name]
    config = without_auto(load_config(os.devnull, [*MODEL, *BLOCK, *settings]))
    stages = stage_tensors(config.model, pipeline_of(config.parallel))
    topology = run_topology(config.parallel, world_size=world_size)
    copy = reshard(source, tmp_path / "d", stages=stages, topology=topology, declare=adamw_state, on_progress=lambda *_: None)
    copy.verify()
    results = pool.run(load_and_watch, settings, world_size, tmp_path / "d", world_size=world_size)
    restored = results[0][1]
    assert restored.keys() == saved.keys() and all(torch.equal(restored[each], tensor) for each, tensor in saved.items())
    for rank, (opened, _) in enumerate(results):
        first_of_stage = rank // stage_size * stage_size
        allowed = {rank, first_of_stage}  # the first has what its stage shares: steps, and parameters that nothing divides
        allowed |= {rank % stage_size, 0} if rank >= world_size - stage_size else set()  # the tied embedding lies in the first stage
        allowed |= {rank - rank % 2} if topology.tensor_parallel_size == 1 else set(range(rank // 2 * 2, rank + 1))  # of this shard, tp rank 0
        assert opened <= {f"{group}-rank{each:05d}-00000.safetensors" for group in ("model", "optimizer") for each in allowed}, rank
        assert f"model-rank{rank:05d}-00000.safetensors" in opened
