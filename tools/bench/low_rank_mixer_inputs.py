"""Times the inputs of both mixer paths from the bottlenecks of q, k and v, forward and backward, against a product and `mixer_inputs`.

    python tools/bench/low_rank_mixer_inputs.py
    python tools/bench/low_rank_mixer_inputs.py --shape 256 512 8 64 16 --tiles all
    python tools/bench/low_rank_mixer_inputs.py --silu-values

Floor: bottlenecks read once and the five results written once; in backward, bottlenecks and the five gradients read once and the gradient of the
bottlenecks written once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F
from measure import Case, benchmark, parser, require_close
from torch import Tensor

from phase8.kernels.low_rank_mixer_inputs import low_rank_mixer_inputs
from phase8.kernels.mixer_inputs import MixerInputs, mixer_inputs
from phase8.kernels.rotary import rotary_angles
from phase8.terminal import run_door

SHAPES = [[16, 512, 8, 64, 16], [256, 512, 8, 64, 16], [32, 1024, 16, 64, 32]]
TAPS, EPS = 4, 1e-5
TOLERANCE = 0.05  # share of the largest value: the product rounds q, k and v, the operator their weights times the taps
# Changes to the fields of `Tiles`, for --tiles all: of the forward, then of the backward.
FORWARD_TILES = [{"steps": 1}, {"steps": 2}, {"steps": 4}, {"steps": 8}, {"tokens": 128, "num_warps": 8, "steps": 1}, {"num_warps": 8, "steps": 1}]
BACKWARD_TILES = [
    {"stages": 1}, {"stages": 2}, {"stages": 3}, {"stages": 4}, {"rows": 128, "backward_warps": 8, "stages": 1},
    {"rows": 128, "backward_warps": 8, "stages": 2},
    {"programs": 1}, {"programs": 2}, {"programs": 8},
]  # fmt: skip


def main() -> int:
    """Runs the command line and returns the exit code."""
    options = parser(__doc__)
    options.add_argument("--shape", nargs=5, type=int, metavar=("B", "T", "H", "K", "R"), help=f"(default: each of {SHAPES})")
    options.add_argument("--tiles", choices=("chosen", "all"), default="chosen", help="all: other tiles than those chosen too (default: chosen)")
    options.add_argument("--silu-values", action="store_true", help="values pass SiLU: in the kernel, and in an operation after it")
    return run_door(lambda: benchmark("low_rank_mixer_inputs", options.parse_args(), _cases))


def _cases(arguments: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    for shape in [arguments.shape] if arguments.shape else SHAPES:
        yield from _cases_of(shape, device, with_all_tiles=arguments.tiles == "all", silu_values=arguments.silu_values)


def _cases_of(shape: list[int], device: torch.device, *, with_all_tiles: bool, silu_values: bool) -> Iterator[Case]:
    batch, length, heads, head_size, rank = shape
    generator = torch.Generator(device).manual_seed(0)

    def draw(*sizes: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*sizes, device=device, generator=generator)

    bottlenecks = draw(batch, length, 3 * rank).bfloat16().requires_grad_()
    ups = [draw(heads * head_size, rank, scale=rank**-0.5).requires_grad_() for _ in range(3)]
    taps = draw(3 * heads * head_size, TAPS).requires_grad_()
    radius = torch.full((heads,), 4.0, device=device, requires_grad=True)
    angles = rotary_angles(length, head_size, base=1e4, first_position=0, device=device)
    inputs = [bottlenecks, *ups, taps, radius]
    gradients = [draw(batch, length, heads, head_size).bfloat16() for _ in MixerInputs._fields]
    plain = partial(low_rank_mixer_inputs, bottlenecks, ups, taps, angles, radius, num_heads=heads, eps=EPS, silu=True)
    ours = partial(plain, silu_values=silu_values)
    others = {"product, mixer_inputs": partial(torch.compile(_separately, dynamic=False), bottlenecks, ups, taps, angles, radius, heads, silu_values)}
    if silu_values:
        others["phase8, then SiLU"] = partial(_then_silu, plain)
    both = partial(_both, inputs, gradients)
    for other in others.values():
        for found, expected in zip(both(ours), both(other), strict=True):
            require_close("low_rank_mixer_inputs", found, expected, tolerance=TOLERANCE)
    once, part_bytes = bottlenecks.numel() * bottlenecks.element_size(), gradients[0].numel() * gradients[0].element_size()
    for label, run, num_bytes, tiles in (
        ("forward", _forward, once + 5 * part_bytes, FORWARD_TILES),
        ("forward+backward", both, 3 * once + 10 * part_bytes, BACKWARD_TILES),
    ):
        group = f"{' x '.join(map(str, shape))}, {label}"
        yield Case(group, "phase8", partial(run, ours), num_bytes=num_bytes)
        for name, other in others.items():
            yield Case(group, name, partial(run, other), num_bytes=num_bytes)
        for changes in tiles if with_all_tiles else []:
            name = " ".join(f"{key}={value}" for key, value in changes.items())
            yield Case(group, name, partial(_with_tiles, changes, partial(run, ours)), num_bytes=num_bytes)


def _separately(
    bottlenecks: Tensor, ups: list[Tensor], taps: Tensor, angles: Tensor, radius: Tensor, num_heads: int, silu_values: bool
) -> MixerInputs:  # fmt: skip
    """What a model does for which the operator is not made."""
    projected = F.linear(bottlenecks, torch.block_diag(*(up.to(bottlenecks.dtype) for up in ups)))
    qkv = projected.unflatten(2, (3, num_heads, -1))
    return mixer_inputs(qkv, taps, angles, radius, eps=EPS, silu=True, silu_values=silu_values)[0]


def _then_silu(function: Callable[[], MixerInputs]) -> MixerInputs:
    """The operator without SiLU of values and an operation after it, which reads and writes them once more and keeps what it reads."""
    inputs = function()
    return inputs._replace(v=F.silu(inputs.v))


def _with_tiles(changes: dict[str, int], run: Callable[[], object]) -> object:
    """Runs with other tiles than those chosen."""
    from phase8.kernels.gpu.low_rank_mixer_inputs import choose_tiles

    def changed(num_tokens: int, num_heads: int, rank: int, device: torch.device) -> object:
        return choose_tiles(num_tokens, num_heads, rank, device)._replace(**changes)

    gpu = "phase8.kernels.gpu.low_rank_mixer_inputs"
    with patch(f"{gpu}.choose_tiles", changed), patch(f"{gpu}_backward.choose_tiles", changed):
        return run()


def _forward(function: Callable[[], MixerInputs]) -> MixerInputs:
    with torch.no_grad():
        return function()


def _both(inputs: list[Tensor], gradients: list[Tensor], function: Callable[[], MixerInputs]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(function(), inputs, gradients)


if __name__ == "__main__":
    sys.exit(main())
