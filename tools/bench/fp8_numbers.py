"""Times the rounding of a matrix to fp8, as it lies and transposed, against the compiler on the reference.

    python tools/bench/fp8_numbers.py
    python tools/bench/fp8_numbers.py --shape 16384 10752

Floor: the matrix read once in bf16, and both results written once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial

import torch
from measure import Case, benchmark, parser, require_close

from phase8.kernels.fp8_numbers import fp8_numbers
from phase8.kernels.reference import fp8_numbers as reference
from phase8.terminal import run_door


def main() -> int:
    """Runs the command line and returns the exit code."""
    options = parser(__doc__)
    options.add_argument("--shape", nargs=2, type=int, default=[16384, 2048], metavar=("M", "K"), help="(default: 16384 2048)")
    return run_door(lambda: benchmark("fp8_numbers", options.parse_args(), _cases))


def _cases(arguments: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    x = torch.randn(*arguments.shape, device=device, generator=torch.Generator(device).manual_seed(0)).bfloat16()
    factor = torch.full((1, 1), 64.0, device=device)
    compiled = torch.compile(reference.fp8_numbers, dynamic=False)
    for label, of_row, num_bytes in (("both", factor, x.element_size() + 2), ("transposed", None, x.element_size() + 1)):
        given = (x, of_row, factor, torch.float8_e4m3fn)
        for found, expected in zip(fp8_numbers(*given), compiled(*given), strict=True):
            if found is not None and expected is not None:
                require_close("fp8_numbers", found.float(), expected.float(), tolerance=0)
        for name, function in (("phase8", fp8_numbers), ("compiled reference", compiled)):
            yield Case(label, name, partial(function, *given), num_bytes=num_bytes * x.numel())


if __name__ == "__main__":
    sys.exit(main())
