"""Offloaded blocks that arrive while the one in front of them computes. On a CPU the copies are plain ones, so only their order is seen here."""

import pytest
import torch

from phase8.zero.arrivals import Arrivals, Part
from tests.parallel.test_parity import BLOCKS, OFFLOADED, ranks
from tests.parallel.training import train_steps

CPU = torch.device("cpu")


@pytest.fixture
def begun(monkeypatch):
    """The blocks that were begun, in order."""
    return note_begun(monkeypatch.setattr)


def note_begun(replace):
    seen, begin = [], Arrivals._begin

    def noted(self, block, device):
        seen.append(block)
        begin(self, block, device)

    replace(Arrivals, "_begin", noted)
    return seen


def three_blocks():
    arrivals = Arrivals()
    hosts = [[torch.randn(3, 2 + block), torch.randn(4)] for block in range(3)]
    for block, parts in enumerate(hosts):
        assert arrivals.add_block([Part(part, torch.bfloat16) for part in parts]) == block
    return arrivals, hosts


def use(arrivals, hosts, *blocks):
    for block in blocks:
        for part in hosts[block]:
            assert torch.equal(arrivals.take(block, part, CPU), part.bfloat16())


def test_the_next_block_is_on_its_way_forward_and_backward(begun):
    arrivals, hosts = three_blocks()
    use(arrivals, hosts, 0, 1, 2, 2, 1, 0)
    assert begun == [0, 1, 2, 2, 1, 0]  # the first block, and the last one where the order turns round, are waited for
    use(arrivals, hosts, 0, 1, 2, 2, 1, 0)
    assert begun[6:] == [0, 1, 2, 2, 1, 0]


def test_forwards_alone_begin_at_the_first_block_again(begun):
    arrivals, hosts = three_blocks()
    use(arrivals, hosts, 0, 1, 2, 0, 1, 2)
    assert begun == [0, 1, 2, 0, 1, 2]


def test_a_block_that_nobody_expected_is_fetched_when_it_is_asked_for(begun):
    arrivals, hosts = three_blocks()
    use(arrivals, hosts, 0, 2, 0)
    assert begun == [0, 1, 2, 0]


def test_what_was_fetched_before_a_weight_changed_is_fetched_again(begun):
    arrivals, hosts = three_blocks()
    use(arrivals, hosts, 0)
    hosts[1][1].mul_(2)
    use(arrivals, hosts, 1)
    assert begun == [0, 1, 1, 2]


def trained(settings, world_size, fetches):
    monkeypatch = pytest.MonkeyPatch()
    begun = note_begun(monkeypatch.setattr)
    if not fetches:
        monkeypatch.setattr("phase8.zero.fsdp.Arrivals", lambda: None)
    with monkeypatch.context():
        result = train_steps(settings, 2, world_size, dtype=torch.bfloat16)
    monkeypatch.undo()
    return begun, result


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_offloaded_blocks_arrive_in_their_order_and_change_no_bit(pool, recompute):
    world_size, settings = ranks(more=OFFLOADED)
    settings = (*BLOCKS["default"], *settings, f"train.recompute={recompute}", "train.micro_batch_size=2", "model.num_layers=3")
    (begun, found), (nothing, expected) = (pool.run(trained, settings, world_size, fetches, world_size=world_size)[0] for fetches in (True, False))
    (losses, weights), (other_losses, others) = found, expected
    assert losses == other_losses and all(torch.equal(weights[name], others[name]) for name in weights)
    assert nothing == [] and len(begun) % 6 == 0 and begun == [0, 1, 2, 2, 1, 0] * (len(begun) // 6)
