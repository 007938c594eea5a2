"""An evaluation by several ranks finds what one process finds."""

import dataclasses

import numpy as np
import pytest

from phase8.data.indexed import IndexedWriter
from phase8.distributed.collectives import Axis
from phase8.errors import DataError
from tests.evaluate.measuring import measure, pairs, tiny_model, write_pairs


def of_rank(directory, carry_state):
    from torch.distributed.device_mesh import init_device_mesh

    ranks = Axis(init_device_mesh("cpu", (2,)))
    return measure(tiny_model(), pairs([directory / name for name in "ab"]), ranks=ranks, batch_size=2 + ranks.index, carry_state=carry_state)


@pytest.mark.parametrize("carry_state", [False, True])
def test_two_ranks_find_what_one_finds(pool, tmp_path, carry_state):
    prefixes = write_pairs(tmp_path)
    expected = measure(tiny_model(), pairs(prefixes), batch_size=2, carry_state=carry_state)
    for found in pool.run(of_rank, tmp_path, carry_state, world_size=2):
        for result, one in zip(found, expected, strict=True):
            assert dataclasses.replace(result, loss=0, positions=()) == dataclasses.replace(one, loss=0, positions=())
            assert result.loss == pytest.approx(one.loss, rel=1e-12)
            assert [position.num_tokens for position in result.positions] == [position.num_tokens for position in one.positions]


def of_host(directory):
    from torch.distributed.device_mesh import init_device_mesh

    ranks = Axis(init_device_mesh("cpu", (2,)))
    try:
        measure(tiny_model(), pairs([directory / str(ranks.index) / "a"]), ranks=ranks)
    except DataError as error:
        return str(error)


@pytest.mark.parametrize("other", [None, "token", "length"])
def test_ranks_whose_hosts_hold_other_data_are_refused_on_all_of_them(pool, tmp_path, other):
    """Each took its share of its own data, and the sum was the loss of nothing."""
    for rank in (0, 1):
        tokens = np.arange(20_000) % 97
        if rank and other is not None:
            tokens = tokens[:-1] if other == "length" else np.where(np.arange(20_000) == 9_000, 98, tokens)
        with IndexedWriter(tmp_path / str(rank) / "a", dtype=np.dtype(np.uint16)) as writer:
            writer.add_document(tokens)
    said = pool.run(of_host, tmp_path, world_size=2)
    refusal = "the ranks do not read the same tokens: hosts hold other data under the same names; copy the same files to every host"
    assert said == [None if other is None else refusal] * 2
