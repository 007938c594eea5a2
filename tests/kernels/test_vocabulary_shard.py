"""Processes that share the rows of a head, played by threads: their losses and gradients are those of one that has it whole."""

import threading

import pytest
import torch

from phase8.kernels import vocabulary_shard as operator
from phase8.kernels.reference.cross_entropy import IGNORED_TARGET, linear_cross_entropy_gradients
from phase8.kernels.reference.vocabulary_shard import ELSEWHERE, row_gradients, row_statistics, shard_cross_entropy_gradients, sum_of_losses


class Together:
    """What processes exchange: the statistics of each, combined when all are there."""

    def __init__(self, num_shards):
        self.brought = [None] * num_shards
        self.barrier = threading.Barrier(num_shards, timeout=60)

    def exchange(self, index):
        def of_all(statistics):
            self.brought[index] = statistics
            self.barrier.wait()
            everyone = torch.stack(self.brought)
            self.barrier.wait()
            highest = everyone[:, 0].amax(0)
            totals = (everyone[:, 1] * (everyone[:, 0] - highest).exp2()).sum(0)
            return torch.stack((highest, totals, everyone[:, 2].sum(0)))

        return of_all


def columns_of(targets, first, size):
    own = targets - first
    return own.where((own >= 0) & (own < size), ELSEWHERE).where(targets != IGNORED_TARGET, IGNORED_TARGET)


def in_shards(implementation, hidden, weight, targets, sizes, **options):
    """What every process computes: losses, the sum of the gradients of `hidden`, and those of `weight` one below the other."""
    together, found, firsts = Together(len(sizes)), [None] * len(sizes), [sum(sizes[:index]) for index in range(len(sizes))]

    def process(index, first, size):
        columns = columns_of(targets, first, size)
        found[index] = implementation(hidden, weight[first : first + size], columns, together.exchange(index), **options)

    threads = [threading.Thread(target=process, args=(index, *place)) for index, place in enumerate(zip(firsts, sizes, strict=True))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    losses, dhidden, dweight = zip(*found, strict=True)
    return losses, *((None, None) if dhidden[0] is None else (sum(dhidden), torch.cat(dweight)))


def problem(num_tokens=13, width=5, vocabulary=11, *, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, width, generator=generator, dtype=torch.float64).to(device, dtype)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64).to(device, torch.float32 if dtype == torch.bfloat16 else dtype)
    targets = torch.randint(vocabulary, (num_tokens,), generator=generator)
    targets[[2, 7]] = IGNORED_TARGET
    return hidden, weight, targets.to(device)


@pytest.mark.parametrize("sizes", [(11,), (6, 5), (3, 3, 3, 2), (1, 10)])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 13, 100])
def test_shards_together_are_the_whole(sizes, chunk_tokens):
    hidden, weight, targets = problem()
    losses, *gradients = in_shards(
        operator.shard_cross_entropy_gradients, hidden, weight, targets, sizes, chunk_tokens=chunk_tokens, needs_gradients=True
    )
    expected, *expected_gradients = linear_cross_entropy_gradients(hidden, weight, targets)
    for loss in losses:
        torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradients_that_nobody_needs_are_not_formed():
    hidden, weight, targets = problem()
    losses, *gradients = in_shards(shard_cross_entropy_gradients, hidden, weight, targets, (6, 5), chunk_tokens=4, needs_gradients=False)
    assert gradients == [None, None] and losses[0] == losses[1]
    torch.testing.assert_close(losses[0], linear_cross_entropy_gradients(hidden, weight, targets)[0])


def test_large_logits_overflow_nowhere():
    hidden, weight, targets = problem(dtype=torch.float32)
    losses, *gradients = in_shards(
        shard_cross_entropy_gradients, 1e4 * hidden, weight, targets, (6, 5), chunk_tokens=4, needs_gradients=True
    )
    expected, *expected_gradients = linear_cross_entropy_gradients(1e4 * hidden.double(), weight.double(), targets)
    torch.testing.assert_close(losses[0].double(), expected, rtol=1e-5, atol=1e-2)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert (ours.double() - theirs).norm() <= 1e-2 * theirs.norm()


def test_rows_that_do_not_count_have_no_gradient_whatever_their_logits():
    logits, columns = torch.randn(3, 7), torch.tensor([2, IGNORED_TARGET, ELSEWHERE])
    logits[1] = float("nan")
    whole = row_statistics(logits, columns)
    gradient = row_gradients(logits.clone(), columns, whole)
    assert (gradient[1] == 0).all() and sum_of_losses(whole, columns).isfinite()
    torch.testing.assert_close(gradient[2], logits[2].softmax(0))
    torch.testing.assert_close(gradient[0], logits[0].softmax(0) - torch.eye(7)[2])
