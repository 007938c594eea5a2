"""Times the preparation of the inputs of both mixer paths, forward and backward, against the compiler on the reference.

    python tools/bench/mixer_inputs.py
    python tools/bench/mixer_inputs.py --shape 4 4096 16 128
    python tools/bench/mixer_inputs.py --silu-values

Floor: the projections read once and the five results written once; in backward, the projections and the five gradients read once and the
gradient of the projections written once.
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

from phase8.kernels.mixer_inputs import mixer_inputs
from phase8.kernels.reference import mixer_inputs as reference
from phase8.kernels.rotary import rotary_angles
from phase8.terminal import run_door

TAPS, EPS = 4, 1e-5
TOLERANCE = 0.05  # share of the largest value: the reference rounds the convolution to bf16


def main() -> int:
    """Runs the command line and returns the exit code."""
    options = parser(__doc__)
    options.add_argument("--shape", nargs=4, type=int, default=[4, 4096, 16, 128], metavar=("B", "T", "H", "K"), help="(default: 4 4096 16 128)")
    options.add_argument("--silu-values", action="store_true", help="values pass SiLU: in the kernel, and in an operation after it")
    return run_door(lambda: benchmark("mixer_inputs", options.parse_args(), _cases))


def _cases(arguments: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    batch, length, heads, head_size = arguments.shape
    generator = torch.Generator(device).manual_seed(0)
    qkv = torch.randn(batch, length, 3, heads, head_size, device=device, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(3 * heads * head_size, TAPS, device=device, generator=generator).requires_grad_()
    angles = rotary_angles(length, head_size, base=1e4, first_position=0, device=device)
    part_bytes = qkv.numel() * qkv.element_size() // 3
    for radius in (torch.full((heads,), 4.0, device=device, requires_grad=True), None):
        inputs = [x for x in (qkv, weight, radius) if x is not None]
        functions = {"phase8": mixer_inputs, "compiled reference": torch.compile(reference.mixer_inputs, dynamic=False)}
        if arguments.silu_values:
            functions["phase8, then SiLU"] = _then_silu
        arranged = (qkv, weight, angles, radius)
        runs = {name: partial(_results, function, *arranged, silu_values=arguments.silu_values) for name, function in functions.items()}
        for other in [*runs.values()][1:]:
            for found, expected in zip(_both(inputs, runs["phase8"]), _both(inputs, other), strict=True):
                require_close("mixer_inputs", found, expected, tolerance=TOLERANCE)
        score = "dot" if radius is None else "lorentz"
        for label, run, parts in (("forward", _forward, 3 + 5), ("forward+backward", partial(_both, inputs), 8 + 3 + 5 + 3)):
            for name, function in runs.items():
                yield Case(f"{score}, {label}", name, partial(run, function), num_bytes=parts * part_bytes)


def _results(
    function: Callable[..., tuple[reference.MixerInputs, Tensor]], *arguments: Tensor | None, silu_values: bool
) -> reference.MixerInputs:  # fmt: skip
    return function(*arguments, eps=EPS, silu_values=silu_values)[0]


def _then_silu(*arguments: Tensor | None, eps: float, silu_values: bool) -> tuple[reference.MixerInputs, Tensor]:
    """The operator without SiLU of values and an operation after it, which reads and writes them once more and keeps what it reads."""
    inputs, state = mixer_inputs(*arguments, eps=eps)
    return inputs._replace(v=F.silu(inputs.v)), state


def _forward(function: Callable[[], reference.MixerInputs]) -> reference.MixerInputs:
    with torch.no_grad():
        return function()


def _both(inputs: list[Tensor], function: Callable[[], reference.MixerInputs]) -> tuple[Tensor, ...]:
    results = function()
    return torch.autograd.grad(results, inputs, [torch.ones_like(x) for x in results])


if __name__ == "__main__":
    sys.exit(main())
