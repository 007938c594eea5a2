"""Products of linear layers: a number format computes all of them, and each gradient alone is what autograd has of both."""

import functools
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from phase8.config.model_section import ModelSection
from phase8.distributed.collectives import ALONE
from phase8.model.block import Block
from phase8.model.model import build_model
from phase8.model.parameters import initialise
from phase8.precision import policy
from phase8.precision.formats import OPERAND_DTYPE, OperandDtype, linear_by_products
from phase8.tensor_parallel import overlapped, products
from tests.parallel.pool import GLOO
from tests.parallel.test_overlapped import CollectiveMemory, axis_of_all, gradients, relative_difference


class Counted(OperandDtype):
    """A format of its own, whose every product is counted."""

    name = "counted"

    def __init__(self):
        self.calls = []

    def linear(self, x, weight):
        return linear_by_products(x, weight, self)

    def output(self, x, weight, **where):
        self.calls.append("output")
        return super().output(x, weight, **where)

    def input_gradient(self, grad, weight, **where):
        self.calls.append("input")
        return super().input_gradient(grad, weight, **where)

    def weight_gradient(self, grad, x, **where):
        self.calls.append("weight")
        return super().weight_gradient(grad, x, **where)


class Plain(OperandDtype):
    """A format of its own."""

    name = "plain"

    def linear(self, x, weight):
        return linear_by_products(x, weight, self)


SECTION = ModelSection(d_model=24, num_layers=1, num_heads=4, ffn_size=40, vocab_size=61, sequence_length=16, local_window_size=6)
LOW_RANK = {"low_rank_rank": 5, "ffn": "low_rank_swiglu"}


@pytest.mark.parametrize(
    ("changes", "num_products"),
    [({}, 6), ({"block": "transformer"}, 4), (LOW_RANK, 6)],
    # phase8: down and up of the gates, too. low-rank: down and up of qkv, of the output; bottlenecks of gate and up; up of the last one.
    ids=["phase8", "transformer", "low-rank"],
)
def test_a_format_computes_every_product_of_the_linear_layers_of_a_block(changes, num_products):
    section, chosen, tokens = SECTION.model_copy(update=changes), Counted(), torch.arange(32).reshape(2, 16)
    losses = []
    for number_format in (OPERAND_DTYPE, chosen):
        model = build_model(section, dtype=torch.float32, device=torch.device("cpu"), number_format=number_format)
        initialise(model, seed=0)
        losses.append((model.loss_sum(tokens, tokens), model))
        losses[-1][0].backward()
    assert sorted(chosen.calls) == sorted(["output", "input", "weight"] * num_products)
    (expected, reference), (found, model) = losses
    assert torch.equal(found, expected)
    for (name, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad), name


def test_a_compiled_block_takes_another_format_without_a_break():
    with torch.device("cpu"):
        block = Block(SECTION, 0, axis=ALONE, number_format=Plain())
    initialise(block, seed=0)
    x, angles = torch.randn(2, 16, 24, generator=torch.Generator().manual_seed(0)), torch.zeros(16, SECTION.head_width // 2)
    expected = block(x, angles)[0]
    torch.compiler.reset()
    found = torch.compile(block, backend="aot_eager", fullgraph=True)(x, angles)[0]
    torch.compiler.reset()
    torch.testing.assert_close(found, expected)


def worst_difference(number_format, has_peer_memory):
    """Largest relative difference of each gradient alone from the same gradient by autograd of `F.linear` after and before collectives."""
    axis = axis_of_all("cpu")
    reference, axis = type(axis)(axis.mesh), type(axis)(axis.mesh, has_peer_memory=has_peer_memory)
    generator = torch.Generator().manual_seed(axis.index)
    random = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    own, every, column, row = random(6, 8), random(6 * axis.size, 10), random(10, 8), random(8, 10)
    worst = 0.0
    with mock.patch.object(overlapped, "peer_memory", functools.cache(CollectiveMemory)), mock.patch.dict(
        policy._FORMATS_BY_NAME, {number_format.name: number_format}
    ):
        for kind, x, weight, grad in (("gathered", own, column, random(6 * axis.size, 10)), ("scattered", every, row, random(6, 8))):
            product, of_input, of_weight = (getattr(products, f"{kind}_{what}") for what in ("product", "input_gradient", "weight_gradient"))
            gather, scatter = (products.gather_tokens, lambda y, _: y) if kind == "gathered" else (lambda y, _: y, products.scatter_tokens)
            plain = lambda x, w: scatter(F.linear(gather(x, reference), w), reference)  # noqa: B023, E731
            expected = gradients(plain, x, weight, grad)
            together = gradients(lambda x, w: product(x, w, axis, number_format), x, weight, grad)  # noqa: B023
            alone = together[0], of_input(grad, weight, axis, number_format), of_weight(grad, x, axis, number_format)
            for found in (together, alone):
                worst = max(worst, *(relative_difference(*pair) for pair in zip(found, expected, strict=True)))
    return worst


@pytest.mark.parametrize("number_format", [OPERAND_DTYPE, Plain()], ids=["operand dtype", "another"])
@pytest.mark.parametrize("has_peer_memory", [False, True], ids=["collectives", "peer memory"])
def test_each_gradient_alone_is_that_of_autograd(pool, number_format, has_peer_memory):
    for worst in pool.run(worst_difference, number_format, has_peer_memory, world_size=2, backend=GLOO, timeout_seconds=120):
        assert worst < 1e-14


@pytest.mark.parametrize("number_format", [OPERAND_DTYPE, Plain()], ids=["operand dtype", "another"])
def test_on_one_rank_all_products_are_the_plain_one(number_format):
    x, weight, grad = torch.randn(6, 8), torch.randn(10, 8), torch.randn(6, 10)
    expected = gradients(F.linear, x, weight, grad)
    for product in (products.gathered_product, products.scattered_product):
        for found, other in zip(gradients(lambda x, w: product(x, w, ALONE, number_format), x, weight, grad), expected, strict=True):  # noqa: B023
            assert torch.equal(found, other)
    for kind in ("gathered", "scattered"):
        of_input, of_weight = (getattr(products, f"{kind}_{what}_gradient") for what in ("input", "weight"))
        assert torch.equal(of_input(grad, weight, ALONE, number_format), expected[1])
        assert torch.equal(of_weight(grad, x, ALONE, number_format), expected[2])


def fp8_error(scaling, has_peer_memory):
    """Largest relative error of the products of two ranks, and of their gradients, in fp8 against fp32."""
    axis = axis_of_all("cpu")
    axis, number_format = type(axis)(axis.mesh, has_peer_memory=has_peer_memory), policy.format_named(f"fp8-{scaling}")
    generator = torch.Generator().manual_seed(axis.index)
    own, every, weight, grad = (torch.randn(size, 256, generator=generator) for size in (256, 256 * axis.size, 256, 256 * axis.size))
    worst = 0.0
    with mock.patch.object(overlapped, "peer_memory", functools.cache(CollectiveMemory)):
        for product, x, gradient in ((products.gathered_product, own, grad), (products.scattered_product, every, grad[:256])):
            found, expected = (
                gradients(lambda x, w: product(x, w, axis, number_format), x, weight, gradient)  # noqa: B023
                for number_format in (number_format, OPERAND_DTYPE)
            )
            worst = max(worst, *(((ours - theirs).norm() / theirs.norm()).item() for ours, theirs in zip(found, expected, strict=True)))
    return worst


@pytest.mark.parametrize("scaling", ["row", "tensor"])
@pytest.mark.parametrize("has_peer_memory", [False, True], ids=["collectives", "peer memory"])
def test_ranks_multiply_in_fp8(pool, scaling, has_peer_memory):
    for worst in pool.run(fp8_error, scaling, has_peer_memory, world_size=2, backend=GLOO, timeout_seconds=120):
        assert 0.01 < worst < (0.05 if scaling == "row" else 0.09)  # as one rank's, tests/precision/test_fp8.py
