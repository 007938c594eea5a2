"""Times the products of decoding against torch's, whose norm and gate are kernels of their own.

    python tools/bench/decoding_product.py
    python tools/bench/decoding_product.py --tiles --repeats 30
    python tools/bench/decoding_product.py --shape 1 4096 14336 gated

Floor: the weight read once. The default shapes are those of configs/phase8_1b.yaml.
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

from phase8.kernels.decoding_product import gated, normed_product, product
from phase8.kernels.limits import MAX_FEW_TOKENS
from phase8.kernels.reference import decoding_product as reference
from phase8.kernels.residual_norm import residual_norm
from phase8.terminal import run_door

EPS = 1e-5
TOLERANCE = 0.03  # share of the largest value: results are rounded to bf16
KINDS = ("normed", "wide", "gated", "plain")
SHAPES = ((1, 2048, 6288, "wide"), (1, 2048, 2048, "plain"), (1, 2048, 10752, "gated"), (1, 5376, 2048, "plain"), (1, 2048, 32000, "normed"))
MANY = tuple((64, *shape[1:]) for shape in SHAPES)


def main() -> int:
    """Runs the command line and returns the exit code."""
    options = parser(__doc__)
    metavar = ("B", "D", "F", "KIND")
    options.add_argument("--shape", nargs=4, action="append", metavar=metavar, help=f"tokens, widths, {' | '.join(KINDS)}; repeatable")
    options.add_argument("--tiles", action="store_true", help="time every tile for few tokens")
    return run_door(lambda: benchmark("decoding_product", options.parse_args(), _cases))


def _cases(arguments: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    from phase8.kernels.gpu import decoding_product as gpu

    shapes = [(*map(int, sizes), kind) for *sizes, kind in arguments.shape or (SHAPES if arguments.tiles else SHAPES + MANY)]
    for tokens, width, outputs, kind in shapes:
        inputs = _inputs(tokens, width, outputs, device)
        ours, torchs = partial(_run, kind, inputs), partial(_run_torch, kind, inputs)
        expected = reference.product(inputs[0], inputs[-1]) if kind == "plain" else reference.normed_product(*inputs, is_gated=kind == "gated")[1]
        require_close("decoding_product", ours(), expected, tolerance=TOLERANCE)
        case = partial(Case, f"{tokens} x {width} -> {outputs}, {kind}", num_bytes=inputs[-1].nbytes)
        chosen = gpu.TILE
        if tokens <= MAX_FEW_TOKENS and arguments.tiles:
            yield from (case(f"{tile.numbers} x {tile.num_warps}", _with_tile(tile, ours)) for tile in gpu.TILES)
        else:
            yield case(f"triton, {chosen.numbers} x {chosen.num_warps}" if tokens <= MAX_FEW_TOKENS else "triton norm and gate", ours)
        yield case("torch's product", torchs)


def _with_tile(tile: object, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    from phase8.kernels.gpu import decoding_product as gpu

    def tiled() -> Tensor:
        chosen, gpu.TILE = gpu.TILE, tile
        try:
            return run()
        finally:
            gpu.TILE = chosen

    return tiled


def _run(kind: str, inputs: tuple[Tensor, Tensor, Tensor, float, Tensor]) -> Tensor:
    if kind == "plain":
        return product(inputs[0], inputs[-1])
    return normed_product(*inputs, is_gated=kind == "gated", is_wide=kind == "wide")[1]


def _run_torch(kind: str, inputs: tuple[Tensor, Tensor, Tensor, float, Tensor]) -> Tensor:
    """With the norm and the gate in Triton."""
    *stream, weight = inputs
    x = stream[0] if kind == "plain" else residual_norm(*stream)[1]
    y = torch.mm(x, weight.T, out_dtype=torch.float32) if kind == "wide" else F.linear(x, weight)
    return gated(y) if kind == "gated" else y


def _inputs(tokens: int, width: int, outputs: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, float, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    x, summand = torch.randn(2, tokens, width, device=device, generator=generator).bfloat16()
    weight = (torch.randn(outputs, width, device=device, generator=generator) * width**-0.5).bfloat16()
    return x, summand, torch.randn(width, device=device, generator=generator), EPS, weight


if __name__ == "__main__":
    sys.exit(main())
