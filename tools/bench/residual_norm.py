"""Times the residual stream and its norm of a decoding step against plain torch.

    python tools/bench/residual_norm.py
    python tools/bench/residual_norm.py --shape 64 4096

Floor: stream and summand read once, stream and norm written once. A row of a single sequence is launch time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial

import torch
from measure import Case, benchmark, parser, require_close

from phase8.kernels.reference import residual_norm as reference
from phase8.kernels.residual_norm import residual_norm
from phase8.terminal import run_door

EPS = 1e-5
TOLERANCE = 0.02  # share of the largest value: results are rounded to bf16
SHAPES = ((1, 2048), (64, 2048), (4096, 2048))


def main() -> int:
    """Runs the command line and returns the exit code."""
    options = parser(__doc__)
    options.add_argument("--shape", nargs=2, type=int, action="append", metavar=("B", "D"), help="rows, width; repeatable")
    return run_door(lambda: benchmark("residual_norm", options.parse_args(), _cases))


def _cases(arguments: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    for rows, width in arguments.shape or SHAPES:
        x, summand = torch.randn(2, rows, width, dtype=torch.bfloat16, device=device)
        weight = torch.randn(width, device=device)
        inputs = (x, summand, weight, EPS)
        for found, expected in zip(residual_norm(*inputs), reference.residual_norm(*inputs), strict=True):
            require_close("residual_norm", found, expected, tolerance=TOLERANCE)
        case = partial(Case, f"{rows} x {width}", num_bytes=4 * x.numel() * x.element_size())
        yield case("triton", partial(residual_norm, *inputs))
        yield case("plain torch", partial(reference.residual_norm, *inputs))


if __name__ == "__main__":
    sys.exit(main())
