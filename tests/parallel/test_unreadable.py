"""Data that one of several ranks cannot read: no rank changes its weights, and all ranks know."""

import os

import pytest
import torch

from phase8.config.auto import without_auto
from phase8.config.load import load_config
from phase8.data.microbatch import stand_in
from phase8.errors import DataError
from phase8.train.engine.step import train_step
from phase8.train.unreadable import UnreadableData, read_together
from tests.parallel.training import MODEL, microbatches_of, new_train_state

TOPOLOGIES = {
    "dp2 zero 3": ("zero.stage=3",),
    "tp2": ("parallel.tensor_parallel_size=2",),
    "cp2": ("parallel.context_parallel_size=2",),
    "pp2": ("parallel.pipeline_parallel_size=2", "parallel.num_microbatches=4"),
}


def step_without_data_on_the_last_rank(settings, resets):
    config = without_auto(load_config(os.devnull, [*MODEL, *settings, f"data.reset_at_document_boundaries={str(resets).lower()}"]))
    train_state = new_train_state(config, 2, device_type="cpu", dtype=torch.float32)
    batches = microbatches_of(train_state, config, 0)
    before = {name: part.detach().clone() for name, part in train_state.shards.parts.items()}
    is_unreadable = torch.distributed.get_rank() == 1
    if is_unreadable:
        size = (len(batches[0].tokens), config.model.sequence_length)
        batches = [stand_in(*size, reset_at_document_boundaries=resets, own_slice=train_state.mesh.own_slice)] * len(batches)
    result = train_step(train_state, batches, learning_rate=1e-2, gradient_clip_norm=1.0, unreadable=is_unreadable)
    same = all(torch.equal(part, before[name]) for name, part in train_state.shards.parts.items())
    good = train_step(train_state, microbatches_of(train_state, config, 0), learning_rate=1e-2, gradient_clip_norm=1.0)
    return result.unreadable, result.skipped, same, good.unreadable, good.skipped


@pytest.mark.parametrize(("topology", "resets"), [("dp2 zero 3", False), ("tp2", True), ("cp2", True), ("pp2", False)])
def test_a_step_that_a_rank_has_no_data_for_changes_nothing(pool, topology, resets):
    found = pool.run(step_without_data_on_the_last_rank, TOPOLOGIES[topology], resets, world_size=2)
    assert found == [(True, True, True, False, False)] * 2


def read_on_all_but_one():
    def read():
        if torch.distributed.get_rank() == 1:
            raise DataError("rank 1's file is gone")
        return "read"

    try:
        return read_together(read)
    except UnreadableData as unreadable:
        return str(unreadable.own)


def test_all_ranks_know_who_cannot_read(pool):
    assert pool.run(read_on_all_but_one, world_size=3) == ["None", "rank 1's file is gone", "None"]


def test_a_process_alone_raises_its_error():
    def fail():
        raise DataError("gone")

    with pytest.raises(DataError, match="gone"):
        read_together(fail)
    assert read_together(lambda: 3) == 3
