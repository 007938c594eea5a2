"""Times the products of decoding against torch's, whose norm and gate are kernels of their own.

    python tools/bench/decoding_product.py
    python tools/bench/decoding_product.py --tiles --tokens 1 --repeats 30
    python tools/bench/decoding_product.py --tiles --tokens 64 --repeats 30
    python tools/bench/decoding_product.py --shape 1 4096 14336 gated

A tile of several tokens is named by its rows of the weight (f), inputs (d), warps (w), stages (s), programs that share the width (n), and KiB that
it asks for before the kernel in front has ended (a).

Floor: the weight read once. The default shapes are those of configs/phase8_1b.yaml.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from measure import Case, benchmark, parser, require_close
from torch import Tensor

from phase8.kernels.decoding_product import gated, normed_product, product
from phase8.kernels.limits import MAX_FEW_TOKENS, MAX_SEVERAL_TOKENS
from phase8.kernels.reference import decoding_product as reference
from phase8.kernels.residual_norm import residual_norm
from phase8.terminal import run_door

EPS = 1e-5
TOLERANCE = 0.03  # share of the largest value: results are rounded to bf16
KINDS = ("normed", "wide", "gated", "plain")
SHAPES = ((2048, 6288, "wide"), (2048, 2048, "plain"), (2048, 10752, "gated"), (5376, 2048, "plain"), (2048, 32000, "normed"))


def main() -> int:
    """Runs the command line and returns the exit code."""
    options = parser(__doc__)
    metavar = ("B", "D", "F", "KIND")
    options.add_argument("--shape", nargs=4, action="append", metavar=metavar, help=f"tokens, widths, {' | '.join(KINDS)}; repeatable")
    options.add_argument("--tokens", type=int, nargs="+", default=[1, MAX_SEVERAL_TOKENS], help="tokens of the default shapes (default: %(default)s)")
    options.add_argument("--tiles", action="store_true", help="time every tile for as many tokens")
    return run_door(lambda: benchmark("decoding_product", options.parse_args(), _cases))


def _cases(arguments: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    shapes = [(*map(int, sizes), kind) for *sizes, kind in arguments.shape or ()] or [(tokens, *s) for tokens in arguments.tokens for s in SHAPES]
    for tokens, width, outputs, kind in shapes:
        inputs = _inputs(tokens, width, outputs, device)
        ours, torchs = partial(_run, kind, inputs), partial(_run_torch, kind, inputs)
        expected = reference.product(inputs[0], inputs[-1]) if kind == "plain" else reference.normed_product(*inputs, is_gated=kind == "gated")[1]
        case = partial(Case, f"{tokens} x {width} -> {outputs}, {kind}", num_bytes=inputs[-1].nbytes)
        tiles = _tiles(tokens, width, outputs, device, is_gated=kind == "gated")
        for name, module, attribute, value in tiles[: None if arguments.tiles else 1]:
            run = partial(_with, module, attribute, value, ours)
            require_close(f"decoding_product, {name}", run(), expected, tolerance=TOLERANCE)
            yield case(name, run)
        if not tiles:
            yield case("triton norm and gate", ours)
        yield case("torch's product", torchs)


def _tiles(tokens: int, width: int, outputs: int, device: torch.device, *, is_gated: bool) -> list[tuple[str, ModuleType, str, object]]:
    """Name of each tile for so many tokens, the chosen one first, and what of which module to set to it; none where torch computes the product."""
    from phase8.kernels.gpu import decoding_product as of_few
    from phase8.kernels.gpu import decoding_product_of_several as of_several
    from phase8.kernels.gpu import decoding_product_tiling as tiling

    if tokens <= MAX_FEW_TOKENS:
        return [(f"{tile.numbers} x {tile.num_warps}", of_few, "TILE", tile) for tile in _first(of_few.TILE, of_few.TILES)]
    if tokens > MAX_SEVERAL_TOKENS:
        return []
    shape, facts = of_several.shape_of(tokens, width, outputs, is_gated=is_gated), of_several.device_of(device)
    tiles = _first(tiling.tile_for(shape, facts), tiling.candidates(shape, facts))
    return [(str(tile), of_several, "tile_for", lambda *_, tile=tile: tile) for tile in tiles]


def _first(chosen: Any, tiles: Iterable[Any]) -> list[Any]:
    return [chosen, *(tile for tile in tiles if tile != chosen)]


def _with(module: ModuleType, attribute: str, value: object, run: Callable[[], Tensor]) -> Tensor:
    """Runs with a module's attribute set for the time being."""
    before = getattr(module, attribute)
    setattr(module, attribute, value)
    try:
        return run()
    finally:
        setattr(module, attribute, before)


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
