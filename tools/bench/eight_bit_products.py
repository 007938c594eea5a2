"""Times the products of a layer of configs/phase8_1b.yaml in fp8 and int8 against bf16, of numbers that are rounded already.

    python tools/bench/eight_bit_products.py
    python tools/bench/eight_bit_products.py --tokens 32768

A format gains in training what is left of the difference after its numbers are made. `int8` stops at sums in int32, `int8, scaled` makes bf16 of
them, as a layer needs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from measure import Case, benchmark, parser, require_close
from torch import Tensor

from phase8.precision.fp8 import E4M3, Factor, product
from phase8.terminal import run_door

# Widths in and out: q, k, v; output; gate and up; down.
LAYERS = ((2048, 6144), (2048, 2048), (2048, 10752), (5376, 2048))
TOLERANCE = 0.05  # share of the largest value: eight bits


def main() -> int:
    """Runs the command line and returns the exit code."""
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, default=16384, help="tokens of a microbatch (default: %(default)s)")
    return run_door(lambda: benchmark("fp8_numbers", options.parse_args(), _cases))


def _cases(arguments: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    generator = torch.Generator(device).manual_seed(0)
    tokens = arguments.tokens
    # Each product is left [M, K] right^T [K, N]: of outputs, of the inputs' gradient, of the weight's gradient.
    shapes = {
        "outputs": [(tokens, outer, inner) for inner, outer in LAYERS],
        "gradient of inputs": [(tokens, inner, outer) for inner, outer in LAYERS],
        "gradient of weights": [(outer, inner, tokens) for inner, outer in LAYERS],
    }
    scale = torch.compile(lambda sums, of_row, of_column: (sums * of_row * of_column).bfloat16(), dynamic=False)
    for label, sizes in shapes.items():
        num_flops = sum(2 * M * N * K for M, N, K in sizes)
        factors = [tuple(torch.randn(rows, K, device=device, generator=generator) for rows in (M, N)) for M, N, K in sizes]
        for name, prepare, multiply in (("bf16", _bf16, _multiply), ("fp8", _fp8, _multiply_fp8), ("int8", _int8, _multiply_int8)):
            prepared = [tuple(prepare(factor) for factor in pair) for pair in factors]
            yield Case(label, name, partial(_all, multiply, prepared), num_flops=num_flops)
        scaled = partial(_scaled_int8, scale)
        require_close("int8", scaled(*prepared[0]).float(), factors[0][0] @ factors[0][1].T, tolerance=TOLERANCE)
        yield Case(label, "int8, scaled", partial(_all, scaled, prepared), num_flops=num_flops)


def _all(multiply: Callable[..., Tensor], pairs: Sequence[tuple[object, object]]) -> None:
    for left, right in pairs:
        multiply(left, right)


def _bf16(factor: Tensor) -> Tensor:
    return factor.bfloat16()


def _multiply(left: Tensor, right: Tensor) -> Tensor:
    return left @ right.T


def _fp8(factor: Tensor) -> Factor:
    scale = factor.abs().amax().reshape(1, 1) / torch.finfo(E4M3).max
    return Factor((factor / scale).to(E4M3), scale)


def _multiply_fp8(left: Factor, right: Factor) -> Tensor:
    return product(left, right, torch.bfloat16)


def _int8(factor: Tensor) -> tuple[Tensor, Tensor]:
    scale = factor.abs().amax(dim=1, keepdim=True) / 127
    return (factor / scale).round().to(torch.int8), scale


def _multiply_int8(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> Tensor:
    return torch._int_mm(left[0], right[0].T)


def _scaled_int8(scale: Callable[..., Tensor], left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> Tensor:
    return scale(_multiply_int8(left, right), left[1], right[1].T)


if __name__ == "__main__":
    sys.exit(main())
