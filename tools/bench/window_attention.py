"""Times window attention, forward and backward, against FlexAttention with the same score and mask.

    python tools/bench/window_attention.py
    python tools/bench/window_attention.py --shape 4 4096 16 128 --window 512 --globals 0

TFLOP/s counts the pairs that a query really sees: 4 K operations for each in forward, 14 K in forward and backward together.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from measure import Case, benchmark, parser, require_close
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from phase8.kernels.reference.window_attention import ARCCOSH_EPS
from phase8.kernels.window_attention import window_attention
from phase8.terminal import run_door

SHAPES = (((4, 4096, 16, 128), 512, 0), ((4, 4096, 16, 128), 256, 64), ((8, 4096, 32, 64), 512, 0))
TOLERANCE = 0.05  # share of the largest value: products and results are bf16 on both sides
RADIUS, BETA = 4.0, 2.0  # values at initialisation


def main() -> int:
    """Runs the command line and returns the exit code."""
    options = parser(__doc__)
    options.set_defaults(repeats=30)
    options.add_argument("--shape", nargs=4, type=int, metavar=("B", "T", "H", "K"), help="batch, tokens, heads, head size")
    options.add_argument("--window", type=int, default=256, metavar="W", help="with --shape (default: %(default)s)")
    options.add_argument("--globals", type=int, default=64, metavar="G", help="with --shape (default: %(default)s)")
    return run_door(lambda: benchmark("window_attention", options.parse_args(), _cases))


def _cases(arguments: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    chosen = SHAPES if arguments.shape is None else ((tuple(arguments.shape), arguments.window, arguments.globals),)
    for shape, window, global_tokens in chosen:
        for score in ("lorentz", "dot"):
            yield from _cases_of_one(shape, window, global_tokens, score, device)


def _cases_of_one(shape: tuple[int, int, int, int], window: int, global_tokens: int, score: str, device: torch.device) -> Iterator[Case]:
    batch, length, heads, head_size = shape
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(shape, device=device, generator=generator).mul_(RADIUS * head_size**-0.5).bfloat16().requires_grad_() for _ in range(3))
    beta = torch.full((heads,), BETA, device=device, requires_grad=True) if score == "lorentz" else None
    ours = partial(window_attention, q, k, v, window=window, global_tokens=global_tokens, beta=beta)
    mask = create_block_mask(_visible(window, global_tokens), None, None, length, length, device=device)
    flex = partial(_flex, torch.compile(flex_attention, dynamic=False), q, k, v, beta, mask)
    require_close("window attention", ours()[0], flex(), tolerance=TOLERANCE)

    pairs = sum(min(i + 1, window) + max(0, min(global_tokens, i - window + 1)) for i in range(length)) * batch * heads
    what = f"{score} B{batch} T{length} H{heads} K{head_size} W{window} G{global_tokens}"
    inputs = [x for x in (q, k, v, beta) if x is not None]
    for label, run, flops in (("forward", _forward, 4), ("forward+backward", partial(_both, inputs), 14)):
        for name, function in (("phase8", lambda: ours()[0]), ("FlexAttention", flex)):
            yield Case(f"{what}, {label}", name, partial(run, function), num_flops=flops * head_size * pairs)


def _visible(window: int, global_tokens: int) -> Callable[..., Tensor]:
    return lambda batch, head, query, key: (key <= query) & ((query - key < window) | (key < global_tokens))


def _flex(attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, mask: BlockMask) -> Tensor:
    queries, keys, values = (x.transpose(1, 2) for x in (q, k, v))
    if beta is None:
        return attention(queries, keys, values, block_mask=mask).transpose(1, 2)
    q_height, k_height = _height(queries), _height(keys)

    def score(dot: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        height = k_height[batch, head, key]
        u = torch.clamp(q_height[batch, head, query] * (1 + height) + (height - dot), min=0)
        return -beta[head] * torch.log(1 + u + torch.sqrt(u * (u + 2) + ARCCOSH_EPS))

    return attention(queries, keys, values, score_mod=score, block_mask=mask, scale=1.0).transpose(1, 2)


def _height(x: Tensor) -> Tensor:
    square = x.float().square().sum(-1)
    return square / (1 + (1 + square).sqrt())


def _forward(function: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        return function()


def _both(inputs: list[Tensor], function: Callable[[], Tensor]) -> tuple[Tensor, ...]:
    y = function()
    return torch.autograd.grad(y, inputs, torch.ones_like(y))


if __name__ == "__main__":
    sys.exit(main())
