"""Times the gated feed-forward between bottlenecks, forward and backward, against the compiler on the reference.

    python tools/bench/low_rank_swiglu.py
    python tools/bench/low_rank_swiglu.py --shape 131072 32 2752

It is bound by arithmetic: each of gate, factor and down projection takes two operations per number and rank.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from measure import Case, benchmark, parser, require_close
from torch import Tensor

from phase8.kernels.low_rank_swiglu import low_rank_swiglu
from phase8.kernels.reference import low_rank_swiglu as reference
from phase8.terminal import run_door

TOLERANCE = 0.05  # share of the largest value: the reference rounds gate, factor and their product to bf16


def main() -> int:
    """Runs the command line and returns the exit code."""
    options = parser(__doc__)
    options.add_argument("--shape", nargs=3, type=int, default=[131072, 16, 1408], metavar=("N", "R", "F"), help="(default: 131072 16 1408)")
    return run_door(lambda: benchmark("low_rank_swiglu", options.parse_args(), _cases))


def _cases(arguments: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    num_tokens, rank, width = arguments.shape
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, device=device, generator=generator)

    bottlenecks = draw(num_tokens, 2 * rank).bfloat16().requires_grad_()
    weights = [draw(width, rank, scale=rank**-0.5), draw(width, rank, scale=rank**-0.5), draw(rank, width, scale=width**-0.5)]
    inputs = [bottlenecks, *(weight.requires_grad_() for weight in weights)]
    ours, compiled = partial(low_rank_swiglu, *inputs), partial(torch.compile(reference.low_rank_swiglu, dynamic=False), *inputs)
    for found, expected in zip(_both(inputs, ours), _both(inputs, compiled), strict=True):
        require_close("low_rank_swiglu", found, expected, tolerance=TOLERANCE)
    num_flops = 2 * 3 * num_tokens * rank * width
    for label, run, factor in (("forward", _forward, 1), ("forward+backward", partial(_both, inputs), 3)):
        for name, function in (("phase8", ours), ("compiled reference", compiled)):
            yield Case(label, name, partial(run, function), num_flops=factor * num_flops)


def _forward(function: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        return function()


def _both(inputs: list[Tensor], function: Callable[[], Tensor]) -> tuple[Tensor, ...]:
    y = function()
    return torch.autograd.grad(y, inputs, torch.ones_like(y))


if __name__ == "__main__":
    sys.exit(main())
