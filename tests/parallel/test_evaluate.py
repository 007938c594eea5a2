"""An evaluation by several ranks finds what one process finds."""

import dataclasses

import pytest

from phase8.distributed.collectives import Axis
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
