"""Tokens that ranks round to fp8 before they gather them give the products of tokens that are gathered first, bit for bit, with half the bytes."""

from unittest import mock

import pytest
import torch

from phase8.distributed.collectives import Axis
from phase8.precision import policy
from phase8.tensor_parallel import gathered_numbers, products
from tests.parallel.pool import GLOO
from tests.parallel.test_overlapped import axis_of_all, gradients

RANKS, OWN, WIDTH, INNER = 2, 128, 256, 512
# What the numbers of a rank are multiplied by, and one of them.
TOKENS = {
    "alike": ((1.0, 1.0), None),
    "large on one rank": ((1.0, 3000.0), None),
    "zeros on one rank": ((0.0, 1.0), None),
    "an outlier": ((1.0, 1.0), 1e4),
    "infinity": ((1.0, 1.0), float("inf")),
    "no number": ((1.0, 1.0), float("nan")),
}


def tokens_of(axis, dtype, kind):
    """Own tokens, whose rows and columns are of unlike size, a weight, and the gradient of the product."""
    factors, planted = TOKENS[kind]
    generator = torch.Generator().manual_seed(axis.index)
    x, weight, grad = (torch.randn(size, generator=generator) for size in ((OWN, WIDTH), (INNER, WIDTH), (RANKS * OWN, INNER)))
    x *= factors[axis.index] * torch.logspace(-1, 1, OWN)[:, None] * torch.logspace(-1, 1, WIDTH).roll(40 * axis.index)
    if planted is not None and axis.index == 1:
        x[5, 7] = planted
    return x.to(dtype), weight.to(dtype), grad.to(dtype)


def both_ways(scaling, dtype, kind, is_compiled=False):
    """Result and gradients of tokens that are rounded first and of ones that are gathered first, and what the former gather: dtype and numbers."""
    axis, number_format = Axis(axis_of_all("cpu").mesh), policy.format_named(f"fp8-{scaling}")
    x, weight, grad = tokens_of(axis, dtype, kind)
    sent = []

    def start_gather(tokens, over):
        sent.append((tokens.dtype, tokens.numel()))
        return original(tokens, over)

    original = gathered_numbers.start_gather
    product = products.gathered_product
    if is_compiled:
        torch.compiler.reset()
        product = torch.compile(product, backend="aot_eager", fullgraph=True)
    with mock.patch.object(gathered_numbers, "start_gather", original if is_compiled else start_gather):
        found = gradients(lambda x, w: product(x, w, axis, number_format), x, weight, grad)
    expected = gradients(lambda x, w: products._GatheredProduct.apply(x, w, axis, number_format), x, weight, grad)
    torch.compiler.reset()
    return found, expected, sent


@pytest.mark.parametrize("kind", TOKENS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scaling", ["tensor", "row"])
def test_products_and_gradients_are_the_same_bits(pool, scaling, dtype, kind):
    for found, expected, sent in pool.run(both_ways, scaling, dtype, kind, world_size=RANKS, backend=GLOO):
        if kind == "no number":  # a maximum passes over it on some backends; whoever looks at the loss finds none either way
            assert not found[0].isfinite().all() and not expected[0].isfinite().all()
            continue
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == dtype and torch.equal(ours.nan_to_num(nan=7.0), theirs.nan_to_num(nan=7.0))
        assert (kind == "infinity") != bool(found[0].isfinite().all())
        numbers, scales = (torch.uint8, OWN * WIDTH), [(torch.float32, OWN)] if scaling == "row" else []
        assert sent == [*scales, numbers, numbers]  # forward, then backward


@pytest.mark.parametrize("scaling", ["tensor", "row"])
def test_a_compiler_takes_them_without_a_break(pool, scaling):
    for found, expected, _ in pool.run(both_ways, scaling, torch.bfloat16, "alike", True, world_size=RANKS, backend=GLOO, timeout_seconds=120):
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours, theirs)


def thin(own, width, inner):
    """Whether so many own tokens of a width are sent as numbers."""
    axis, number_format = Axis(axis_of_all("cpu").mesh), policy.format_named("fp8-tensor")
    x, weight = torch.ones(own, width, dtype=torch.bfloat16), torch.ones(inner, width, dtype=torch.bfloat16)
    with mock.patch.object(gathered_numbers, "gathered_product", side_effect=RuntimeError("numbers")):
        try:
            products.gathered_product(x, weight, axis, number_format)
        except RuntimeError:
            return True
    return False


SIZES = {(OWN, 256, 256): True, (OWN, 256, 64): False, (OWN, 128, 256): False, (OWN, 264, 256): False, (120, 256, 256): False, (132, 256, 256): False}


@pytest.mark.parametrize(("sizes", "expected"), SIZES.items(), ids=str)
def test_what_is_not_multiplied_in_fp8_travels_as_it_is(pool, sizes, expected):
    assert pool.run(thin, *sizes, world_size=RANKS, backend=GLOO) == [expected] * RANKS
