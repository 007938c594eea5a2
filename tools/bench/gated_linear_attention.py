"""Times gated linear attention, forward and backward, against the plain reference, compiled, and against flash-linear-attention.

    python tools/bench/gated_linear_attention.py
    python tools/bench/gated_linear_attention.py --size 8 4096 32 64 --sweep

Bytes: q, k and v read and y written, in bf16, and the decays; for backward q, k, v and dy read and dq, dk and dv written, and the decays
and their gradient. The peer chunk_simple_gla has no weight 1 - alpha: its keys are multiplied by it, and only its own work is timed.
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

from phase8.kernels.gated_linear_attention import gated_linear_attention
from phase8.kernels.reference import gated_linear_attention as reference
from phase8.terminal import run_door

SIZES = ((8, 4096, 32, 64), (4, 4096, 16, 128), (1, 131072, 16, 128))
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
        dy: Gradient of the result.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    dy: Tensor

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Arguments of the operation."""
        return self.q, self.k, self.v, self.log_decay

    def moved_bytes(self, num_tensors: int, num_decays: int) -> int:
        """Bytes of a number of tensors like q, and of a number of tensors like the decays."""
        return num_tensors * self.q.numel() * self.q.element_size() + num_decays * self.log_decay.numel() * self.log_decay.element_size()


def main() -> int:
    """Runs the command line and returns the exit code."""
    options = parser(__doc__)
    options.set_defaults(repeats=30)
    metavar = ("B", "T", "H", "K")
    options.add_argument("--size", nargs=4, type=int, action="append", metavar=metavar, help="batch, tokens, heads, head size; repeatable")
    options.add_argument("--sweep", action="store_true", help="also time other tiles and segments, to tune for a GPU")
    return run_door(lambda: benchmark("gated_linear_attention", options.parse_args(), _cases))


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
    return Problem(*(x.requires_grad_() for x in (q, k, v, log_decay)), dy)


def _against_peers(problem: Problem, size: str) -> Iterator[Case]:
    compiled = torch.compile(lambda *inputs: reference.gated_linear_attention(*inputs)[0], dynamic=False, fullgraph=True)
    fla, reason = _flash_linear_attention(problem)
    groups = (("forward", problem.moved_bytes(4, 1), _forward), ("forward and backward", problem.moved_bytes(11, 3), _gradients))
    for group, num_bytes, run in groups:
        case = partial(Case, f"{size}, {group}", num_bytes=num_bytes)
        yield case("triton", partial(run, lambda *inputs: gated_linear_attention(*inputs)[0], problem.inputs, problem.dy))
        yield case("reference, torch.compile", partial(run, compiled, problem.inputs, problem.dy))
        if fla is None:
            yield case("flash-linear-attention", None, reason=reason)
        else:
            yield case("flash-linear-attention", partial(run, fla, _with_weighted_keys(problem), problem.dy))


def _sweep(problem: Problem, size: str) -> Iterator[Case]:
    from phase8.kernels.gpu import gated_linear_attention as forward
    from phase8.kernels.gpu import gated_linear_attention_backward as backward

    inputs, head_size = tuple(x.detach() for x in problem.inputs), problem.q.shape[-1]
    num_chunks = problem.q.shape[1] // forward.CHUNK_TOKENS
    for (columns, warps), stages, segments in itertools.product(((32, 4), (64, 4), (128, 8)), (1, 2, 3), (1, 2, 4)):
        if columns > forward.block_size(head_size):
            continue
        options = {"tiles": forward.Tiles(columns, warps, stages), "segment_chunks": -(-num_chunks // segments)}
        name = f"columns {columns} warps {warps} stages {stages} segments {segments}"
        run = partial(forward.gated_linear_attention, *inputs, None, None, **options)
        yield Case(f"{size}, forward", name, run, num_bytes=problem.moved_bytes(4, 1))
        run = partial(backward.gated_linear_attention_backward, problem.dy, None, *inputs, None, None, **options)
        yield Case(f"{size}, backward", name, run, num_bytes=problem.moved_bytes(7, 2))


def _check(problem: Problem, size: str) -> None:
    """Result and gradients of a few heads of one sequence against fp64."""
    found = (gated_linear_attention(*problem.inputs)[0], *_gradients(lambda *inputs: gated_linear_attention(*inputs)[0], problem.inputs, problem.dy))
    exact = [x[:1, :, :CHECKED_HEADS].detach().double() for x in (*problem.inputs, problem.dy)]
    gradients = reference.gated_linear_attention_backward(exact[4], None, *exact[:4], None, None)
    expected = (reference.gated_linear_attention(*exact[:4])[0], *gradients[:4])
    for name, ours, theirs in zip(("y", "dq", "dk", "dv", "dlog_decay"), found, expected, strict=True):
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
    from fla.ops.simple_gla import chunk_simple_gla

    def attend(*inputs: Tensor) -> Tensor:
        return chunk_simple_gla(*inputs, scale=1.0)[0]

    inputs = _with_weighted_keys(problem)
    try:
        _gradients(attend, inputs, problem.dy)
    except RuntimeError as error:  # some versions refuse combinations of GPU and Triton that are known to be wrong
        return None, f"fla-core refuses: {error}".splitlines()[0]
    exact = _forward(lambda *given: gated_linear_attention(*given)[0], problem.inputs, problem.dy)
    require_close("flash-linear-attention", _forward(attend, inputs, problem.dy), exact, tolerance=TOLERANCE)
    return attend, ""


def _with_weighted_keys(problem: Problem) -> tuple[Tensor, ...]:
    weight = -torch.expm1(problem.log_decay.detach()) * problem.q.shape[-1] ** -0.5
    weighted = (problem.k.detach() * weight[..., None]).to(problem.k.dtype).requires_grad_()
    return problem.q, weighted, problem.v, problem.log_decay


if __name__ == "__main__":
    sys.exit(main())
