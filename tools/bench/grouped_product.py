"""Times the products of experts, forward and backward, against one dense product of as many operations.

    python tools/bench/grouped_product.py
    python tools/bench/grouped_product.py --shape 32768 8 2048 5632

It is bound by arithmetic. Groups have unequal sizes, as tokens choose experts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from measure import Case, benchmark, parser, require_close
from torch import Tensor

from phase8.kernels.grouped_product import grouped_product
from phase8.kernels.reference import grouped_product as reference
from phase8.terminal import run_door

TOLERANCE = 0.02  # share of the largest value


def main() -> int:
    """Runs the command line and returns the exit code."""
    options = parser(__doc__)
    options.add_argument("--shape", nargs=4, type=int, default=[32768, 8, 2048, 5632], metavar=("S", "E", "D", "F"))
    return run_door(lambda: benchmark("grouped_product", options.parse_args(), _cases))


def _cases(arguments: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    num_rows, num_groups, inner, outer = arguments.shape
    generator = torch.Generator(device).manual_seed(0)
    rows = torch.randn(num_rows, inner, device=device, generator=generator).bfloat16().requires_grad_()
    weight = (inner**-0.5 * torch.randn(num_groups, outer, inner, device=device, generator=generator)).bfloat16().requires_grad_()
    shares = torch.rand(num_groups, device=device, generator=generator) + 0.5
    ends = (shares.cumsum(0) / shares.sum() * num_rows).int()
    ends[-1] = num_rows
    ours, plain = partial(grouped_product, rows, weight, ends), partial(reference.grouped_product, rows, weight, ends)
    for found, expected in zip(_both((rows, weight), ours), _both((rows, weight), plain), strict=True):
        require_close("grouped_product", found, expected, tolerance=TOLERANCE)
    dense_weight = weight.detach()[0].clone().requires_grad_()
    dense = partial(F.linear, rows, dense_weight)
    for label, factor in (("forward", 1), ("forward+backward", 3)):
        for name, function, inputs in (("phase8", ours, (rows, weight)), ("one dense product", dense, (rows, dense_weight))):
            run = _forward if factor == 1 else partial(_both, inputs)
            yield Case(label, name, partial(run, function), num_flops=factor * 2 * num_rows * inner * outer)


def _forward(function: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        return function()


def _both(inputs: tuple[Tensor, ...], function: Callable[[], Tensor]) -> tuple[Tensor, ...]:
    y = function()
    return torch.autograd.grad(y, inputs, torch.ones_like(y))


if __name__ == "__main__":
    sys.exit(main())
