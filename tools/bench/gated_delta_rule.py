"""Times the gated delta rule, forward and backward, against gated linear attention and against flash-linear-attention.

    python tools/bench/gated_delta_rule.py
    python tools/bench/gated_delta_rule.py --size 8 4096 32 64 --sweep

Bytes: q, k and v read and y written, in bf16, the decays and the replaced shares; for backward q, k, v and dy read and dq, dk and dv written,
and both scalars and their gradients. The peer chunk_gated_delta_rule gets keys and queries of length one.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
from measure import Case, benchmark, parser, require_close
from torch import Tensor

from phase8.kernels.gated_delta_rule import gated_delta_rule
from phase8.kernels.gated_linear_attention import gated_linear_attention
from phase8.kernels.reference import gated_delta_rule as reference
from phase8.terminal import run_door

SIZES = ((8, 4096, 32, 64), (4, 4096, 16, 128), (1, 32768, 16, 128))
CHECKED_HEADS = 2  # heads are independent, and the exact ones take memory
TOLERANCE = 0.02  # share of the largest value: products and results are rounded to bf16

Function = Callable[..., tuple[Tensor, ...]]


class Problem(NamedTuple):
    """Tensors of one size.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        log_decay: Decays for memories between 2 and 500 tokens.
        beta: Replaced shares between 0 and 1, divided by the squared length of the keys.
        dy: Gradient of the result.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    beta: Tensor
    dy: Tensor

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Arguments of the operation."""
        return self.q, self.k, self.v, self.log_decay, self.beta

    def moved_bytes(self, num_tensors: int, num_scalars: int) -> int:
        """Bytes of a number of tensors like q, and of a number of tensors like the decays."""
        return num_tensors * self.q.numel() * self.q.element_size() + num_scalars * self.log_decay.numel() * self.log_decay.element_size()


def main() -> int:
    """Runs the command line and returns the exit code."""
    options = parser(__doc__)
    options.set_defaults(repeats=30)
    metavar = ("B", "T", "H", "K")
    options.add_argument("--size", nargs=4, type=int, action="append", metavar=metavar, help="batch, tokens, heads, head size; repeatable")
    options.add_argument("--sweep", action="store_true", help="also time other tiles, each checked first, to tune for a GPU")
    return run_door(lambda: benchmark("gated_delta_rule", options.parse_args(), _cases))


def _cases(arguments: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    for size in arguments.size or SIZES:
        problem = _problem(*size, device)
        name = " x ".join(map(str, size))
        _check(problem, name)
        yield from _against_peers(problem, name)
        if arguments.sweep:
            yield from _sweep(problem, name)


def _problem(batch: int, length: int, heads: int, size: int, device: torch.device) -> Problem:
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, dy = (torch.randn(batch, length, heads, size, dtype=torch.bfloat16, device=device, generator=generator) for _ in range(4))
    memory = torch.logspace(0.3, 2.7, heads, device=device)
    log_decay = -torch.nn.functional.softplus(torch.randn(batch, length, heads, device=device, generator=generator) + (1 / memory).expm1().log())
    q, k = (torch.nn.functional.rms_norm(x, x.shape[-1:]) for x in (q, k))
    beta = torch.rand(batch, length, heads, device=device, generator=generator) / size
    return Problem(*(x.requires_grad_() for x in (q, k, v, log_decay, beta)), dy)


def _against_peers(problem: Problem, size: str) -> Iterator[Case]:
    fla, reason = _flash_linear_attention(problem)
    groups = (("forward", problem.moved_bytes(4, 2), _forward), ("forward and backward", problem.moved_bytes(11, 6), _gradients))
    for group, num_bytes, run in groups:
        case = partial(Case, f"{size}, {group}", num_bytes=num_bytes)
        yield case("triton", partial(run, lambda *inputs: gated_delta_rule(*inputs)[0], problem.inputs, problem.dy))
        yield case("gated linear attention", partial(run, lambda *inputs: gated_linear_attention(*inputs)[0], problem.inputs[:4], problem.dy))
        if fla is None:
            yield case("flash-linear-attention", None, reason=reason)
        else:
            yield case("flash-linear-attention", partial(run, fla, _with_unit_keys(problem), problem.dy))


def _sweep(problem: Problem, size: str) -> Iterator[Case]:
    from phase8.kernels.gpu.gated_delta_rule import gated_delta_rule as forward
    from phase8.kernels.gpu.gated_delta_rule_backward import gated_delta_rule_backward as backward
    from phase8.kernels.gpu.gated_linear_attention import Tiles, block_size

    inputs, widest = tuple(x.detach() for x in problem.inputs), block_size(problem.q.shape[-1])
    for columns, warps, stages in itertools.product((16, 32, 64), (4, 8), (1, 2)):  # wider ones do not fit into registers or shared memory
        if columns > widest:
            continue
        tiles, name = Tiles(columns, warps, stages), f"columns {columns} warps {warps} stages {stages}"
        y = forward(*inputs, None, None, tiles=tiles)[0]
        gradients = backward(problem.dy, None, *inputs, None, None, tiles=tiles)[:5]
        _compare(problem, f"{size}, {name}", (y, *gradients))
        yield Case(f"{size}, forward", name, partial(forward, *inputs, None, None, tiles=tiles), num_bytes=problem.moved_bytes(4, 2))
        run = partial(backward, problem.dy, None, *inputs, None, None, tiles=tiles)
        yield Case(f"{size}, backward", name, run, num_bytes=problem.moved_bytes(7, 4))


def _check(problem: Problem, size: str) -> None:
    """Result and gradients of a few heads of one sequence against fp64."""
    gradients = _gradients(lambda *inputs: gated_delta_rule(*inputs)[0], problem.inputs, problem.dy)
    _compare(problem, size, (gated_delta_rule(*problem.inputs)[0], *gradients))


def _compare(problem: Problem, size: str, found: tuple[Tensor, ...]) -> None:
    exact = [x[:1, :, :CHECKED_HEADS].detach().double() for x in (*problem.inputs, problem.dy)]
    gradients = reference.gated_delta_rule_backward(exact[5], None, *exact[:5], None, None)
    expected = (reference.gated_delta_rule(*exact[:5])[0], *gradients[:5])
    for name, ours, theirs in zip(("y", "dq", "dk", "dv", "dlog_decay", "dbeta"), found, expected, strict=True):
        require_close(f"{name} of {size}", ours[:1, :, :CHECKED_HEADS], theirs, tolerance=TOLERANCE)


def _forward(function: Function, inputs: tuple[Tensor, ...], dy: Tensor) -> Tensor:
    with torch.no_grad():
        return function(*inputs)


def _gradients(function: Function, inputs: tuple[Tensor, ...], dy: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(function(*inputs), inputs, dy)


def _flash_linear_attention(problem: Problem) -> tuple[Function | None, str]:
    """The peer, checked on this problem, or the reason why it cannot be used."""
    if find_spec("fla") is None:
        return None, "fla-core is not installed"
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    def attend(*inputs: Tensor) -> Tensor:
        return chunk_gated_delta_rule(*inputs, scale=1.0)[0]

    inputs = _with_unit_keys(problem)
    try:
        _gradients(attend, inputs, problem.dy)
    except RuntimeError as error:  # some versions refuse combinations of GPU and Triton that are known to be wrong
        return None, f"fla-core refuses: {error}".splitlines()[0]
    exact = _forward(lambda *given: gated_delta_rule(*given)[0], problem.inputs, problem.dy)
    require_close("flash-linear-attention", _forward(attend, inputs, problem.dy), exact, tolerance=TOLERANCE)
    return attend, ""


def _with_unit_keys(problem: Problem) -> tuple[Tensor, ...]:
    """The arguments of the peer: keys and queries of length one, and shares that are not divided by a length."""
    size = problem.q.shape[-1]
    q, k = ((x.detach() * size**-0.5).to(x.dtype).requires_grad_() for x in (problem.q, problem.k))
    return q, k, problem.v, problem.log_decay, (problem.beta.detach() * size).requires_grad_()


if __name__ == "__main__":
    sys.exit(main())
