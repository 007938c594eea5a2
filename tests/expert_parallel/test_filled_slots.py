"""Experts compute the rows in filled slots alone, those of one expert after those of the other."""

import itertools

import pytest
import torch

from phase8.exchanges import groups_of_rows
from phase8.expert_parallel.exchange import _computed_where_filled
from phase8.expert_parallel.slots import padded_slots, places_in_sequence
from phase8.kernels.grouped_product import grouped_product

RANKS, EXPERTS, SEQUENCES, CAPACITY, WIDTH = 2, 3, 2, 4, 5
FILLS = {"some": None, "none": 0, "all": CAPACITY}


def arrived(fill):
    """Rows of which empty slots hold zeros, as ranks send them, the filled slots, and the expert of each row."""
    generator = torch.Generator().manual_seed(0)
    segments = (RANKS, EXPERTS, SEQUENCES)
    filled = torch.randint(0, CAPACITY + 1, segments, generator=generator) if fill is None else torch.full(segments, fill)
    is_filled = torch.arange(CAPACITY) < filled[..., None]
    rows = torch.randn(*segments, CAPACITY, WIDTH, generator=generator, dtype=torch.float64) * is_filled[..., None]
    expert = torch.arange(EXPERTS)[:, None, None].expand(*segments, CAPACITY)
    return rows.flatten(0, 3), filled, is_filled.flatten(), expert.flatten()


@pytest.mark.parametrize("fill", FILLS)
def test_filled_rows_are_computed_by_their_expert_and_empty_ones_by_none(fill):
    rows, filled, is_filled, expert = arrived(FILLS[fill])
    rows.requires_grad_()
    seen = []

    def compute(rows, ends):
        """Multiplies by the number of the expert; what belongs to none becomes no number, in the gradient too."""
        seen.append((rows.detach(), ends))
        number = (torch.arange(len(rows))[:, None] >= ends).sum(1)
        return rows * torch.where(number < EXPERTS, number + 1.0, torch.nan)[:, None]

    y = _computed_where_filled(rows, filled, compute)
    factor = ((expert + 1.0) * is_filled)[:, None]
    assert torch.equal(y, rows * factor)
    dy = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, rows, dy)
    assert torch.equal(found, dy * factor)
    ((computed, ends),) = seen
    assert ends.tolist() == [int(is_filled[expert <= last].sum()) for last in range(EXPERTS)]
    by_expert = [rows[is_filled & (expert == each)] for each in range(EXPERTS)]
    assert torch.equal(computed[: ends[-1]], torch.cat(by_expert))


def test_padded_slots_know_how_many_of_them_are_filled():
    chosen = torch.tensor([[[0, 1], [0, 2], [0, 1]], [[2, 3], [3, 1], [2, 3]]])
    places, counts = places_in_sequence(chosen, 4)
    slots = padded_slots(chosen, places, counts, 2, num_ranks=2)
    assert slots.filled.tolist() == [[2, 0], [2, 1], [1, 2], [0, 2]]
    assert slots.filled.sum() == (slots.choice < chosen.numel()).sum() == slots.is_kept.sum()


@pytest.mark.parametrize(
    ("experts", "sequences", "groups"),
    [(4, 4, (4, 1)), (2, 4, (2, 2)), (2, 3, (2, 1)), (1, 4, (1, 4)), (1, 6, (1, 3)), (3, 2, (3, 1)), (8, 1, (4, 1))],
)
def test_rows_of_few_experts_are_grouped_by_sequences_too(experts, sequences, groups):
    assert groups_of_rows(experts, sequences) == groups


def test_rows_are_in_the_order_in_which_they_travel():
    """Two ranks with two experts each, four sequences: the first and the second expert of every rank for two sequences, then for two others."""
    num_ranks, num_experts, batch, capacity = 2, 4, 4, 3
    chosen = torch.rand(batch, 5, num_experts, generator=torch.Generator().manual_seed(0)).argsort(-1)[..., :2]
    places, counts = places_in_sequence(chosen, num_experts)
    slots = padded_slots(chosen, places, counts, capacity, num_ranks=num_ranks)
    order = [(s, rank * 2 + e) for first in (0, 2) for e in (0, 1) for rank in (0, 1) for s in (first, first + 1)]
    expected = [[[] for _ in range(num_experts)] for _ in range(batch)]
    for sequence, token, choice in itertools.product(range(batch), range(5), range(2)):
        expected[sequence][chosen[sequence, token, choice]].append((sequence * 5 + token) * 2 + choice)
    empty = [chosen.numel()] * capacity
    assert slots.choice.view(-1, capacity).tolist() == [(expected[s][e] + empty)[:capacity] for s, e in order]


@pytest.mark.gpu
@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize("compiles", [False, True])
def test_bf16_on_a_gpu_equals_the_products_of_each_row(experts, compiles):
    """Rows that no expert computes hold anything there; nothing of it arrives, and the sizes are those of a microbatch."""
    ranks, sequences, capacity, width, inner = 2, 4, 640, 512, 384
    generator = torch.Generator("cuda").manual_seed(0)
    filled = torch.randint(0, capacity + 1, (ranks, experts, sequences), device="cuda", generator=generator)
    is_filled = (torch.arange(capacity, device="cuda") < filled[..., None])[..., None]
    shape = (ranks, experts, sequences, capacity, width)
    rows = (torch.randn(shape, device="cuda", generator=generator).bfloat16() * is_filled).flatten(0, 3).requires_grad_()
    sizes = ((experts, inner, width), (experts, width, inner))
    up, down = (torch.randn(each, device="cuda", generator=generator).mul(each[2] ** -0.5).bfloat16().requires_grad_() for each in sizes)

    def through_experts(rows, filled, up, down):
        return _computed_where_filled(rows, filled, lambda x, ends: grouped_product(grouped_product(x, up, ends), down, ends))

    y = (torch.compile(through_experts) if compiles else through_experts)(rows, filled, up, down)
    dy = torch.randn(y.shape, device="cuda", generator=generator).bfloat16() * is_filled.flatten(0, 3)
    found = (y, *torch.autograd.grad(y, (rows, up, down), dy))
    exact = [each.detach().double().requires_grad_() for each in (rows, up, down)]
    expected = torch.einsum("rebcd,efd,egf->rebcg", exact[0].view(shape), exact[1], exact[2]).flatten(0, 3)
    expected = (expected, *torch.autograd.grad(expected, exact, dy.double()))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.double() - theirs).norm() <= 2**-6 * theirs.norm()
