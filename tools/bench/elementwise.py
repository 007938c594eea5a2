"""Times the parts of the block that are left to the compiler, relative to the memory traffic that they need at least.

    python tools/bench/elementwise.py

The share of the ceiling compares each pass, its inputs read once and its outputs written once, with a plain copy. Where the
compiler comes close to it, a kernel has nothing to gain.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from measure import Case, benchmark, parser, require_close
from torch import Tensor

from phase8.kernels.causal_convolution import causal_convolution
from phase8.kernels.dtypes import at_least_fp32
from phase8.kernels.rotary import rotary_angles, rotate
from phase8.model.norm import rms_normalise
from phase8.terminal import run_door

EPS = 1e-5
TAPS = 4
TOLERANCE = 0.02  # share of the largest value, between two roundings to bf16
TESTED = "causal_convolution"  # the one part with its own tests; all are checked against eager torch before they are timed


class Part(NamedTuple):
    """One elementwise part of the block.

    Args:
        name: Name in the table.
        variants: Implementations, from inputs and constants to a tuple of outputs.
        inputs: Activations and parameters that need a gradient.
        constants: Further arguments, without a gradient.
        passed_on: Number of first inputs whose gradient is that of the output: backward reads and writes nothing for them.
    """

    name: str
    variants: dict[str, Callable[..., tuple[Tensor, ...]]]
    inputs: tuple[Tensor, ...]
    constants: tuple[Tensor, ...] = ()
    passed_on: int = 0


def main() -> int:
    """Runs the command line and returns the exit code."""
    options = parser(__doc__)
    options.add_argument("--num-tokens", type=int, default=16384)
    options.add_argument("--num-heads", type=int, default=16)
    options.add_argument("--head-size", type=int, default=128)
    return run_door(lambda: benchmark(TESTED, options.parse_args(), _cases))


def _cases(arguments: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    for part in _parts(arguments.num_tokens, arguments.num_heads, arguments.head_size, device):
        yield from _cases_of(part)


def _parts(num_tokens: int, num_heads: int, head_size: int, device: torch.device) -> Iterator[Part]:
    """The parts as model/norm.py, feed_forward.py and mixer.py implement them."""
    heads, width = (1, num_tokens, num_heads, head_size), num_heads * head_size

    def activation(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device).requires_grad_()

    parameter = partial(activation, dtype=torch.float32)
    x = activation(1, num_tokens, width)
    yield Part("rms_norm", {"": lambda *inputs: (_norm(*inputs),)}, (x, parameter(width)))
    yield Part("silu * mul", {"": lambda gate, up: (F.silu(gate) * up,)}, (x, activation(1, num_tokens, width)))
    gated = (activation(*heads), activation(*heads), activation(*heads[:3], dtype=torch.float32), parameter(num_heads, head_size))
    yield Part("local + gate * norm(global)", {"": _combine}, gated, passed_on=1)
    angles = rotary_angles(num_tokens, head_size, base=10000.0, first_position=0, device=device)
    variants = {"shifts": partial(_chain, lambda x, taps: causal_convolution(x, taps)[0]), "conv1d": partial(_chain, _conv1d)}
    yield Part("conv, rotate, normalise", variants, (x, parameter(width, TAPS), parameter(num_heads)), (angles,))


def _cases_of(part: Part) -> Iterator[Case]:
    eager = next(iter(part.variants.values()))
    expected = eager(*part.inputs, *part.constants)
    grads = tuple(torch.randn_like(output) for output in expected)
    expected_gradients = torch.autograd.grad(expected, part.inputs, grads)
    own = part.inputs[part.passed_on :]
    forward_bytes = _num_bytes(*part.inputs, *part.constants, *expected)
    backward_bytes = _num_bytes(*grads, *part.constants, *own, *own)
    cases = {name: torch.compile(function, dynamic=False, fullgraph=True) for name, function in part.variants.items()}
    for name, function in cases.items():
        outputs = function(*part.inputs, *part.constants)
        found = (*outputs, *torch.autograd.grad(outputs, part.inputs, grads))
        for number, pair in enumerate(zip(found, (*expected, *expected_gradients), strict=True)):
            require_close(f"result {number} of {part.name}, compiled {name}", *pair, tolerance=TOLERANCE)
    del expected, expected_gradients, outputs, found

    cases = {f"compiled {name}": function for name, function in cases.items()} | {"eager": eager}
    for name, function in cases.items():
        yield Case(f"{part.name}, forward", name, partial(function, *part.inputs, *part.constants), num_bytes=forward_bytes)
    for name, function in cases.items():
        run = partial(_forward_and_backward, function, part, grads)
        yield Case(f"{part.name}, both", name, run, num_bytes=forward_bytes + backward_bytes)


def _forward_and_backward(function: Callable[..., tuple[Tensor, ...]], part: Part, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(function(*part.inputs, *part.constants), part.inputs, grads)


def _num_bytes(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return (rms_normalise(at_least_fp32(x), EPS) * weight).to(x.dtype)


def _combine(local: Tensor, y: Tensor, gate: Tensor, weight: Tensor) -> tuple[Tensor]:
    return (local + gate[..., None].to(y.dtype) * _norm(y, weight),)


def _chain(convolve: Callable[[Tensor, Tensor], Tensor], x: Tensor, taps: Tensor, radius: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """The preparation of q or k: one input, and one output for each of the two paths."""
    q = convolve(x, taps).unflatten(-1, (len(radius), -1))
    return rms_normalise(q, EPS), _norm(rotate(q, angles), radius[:, None])


def _conv1d(x: Tensor, taps: Tensor) -> Tensor:
    """The causal convolution by torch's own operator, in its layout, for comparison with shifted products."""
    num_channels, num_taps = taps.shape
    padded = F.pad(x, (0, 0, num_taps - 1, 0)).transpose(1, 2)
    return F.conv1d(padded, taps.to(x.dtype)[:, None], groups=num_channels).transpose(1, 2)


if __name__ == "__main__":
    sys.exit(main())
