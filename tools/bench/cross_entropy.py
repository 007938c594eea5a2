"""Times output head and cross-entropy, forward and backward, against logits that are kept whole, the compiler and Liger.

    python tools/bench/cross_entropy.py
    python tools/bench/cross_entropy.py --size 32768 131072 2048 --chunk-tokens 1024 2048 3072 4096

Every case casts the fp32 head to bf16 and forms loss and both gradients; "eager" keeps the logits of all tokens, in bf16; "compiled" is
the chunked reference, without the scaling of backward; Liger is given a bf16 head. TFLOP/s counts the three matmuls. The gradients, which
every case has to allocate, are named in the group and part of the memory shown. Bytes of a kernel: logits read once and written once.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from measure import Case, benchmark, parser, require_close
from torch import Tensor

from phase8.formatting import format_bytes
from phase8.kernels.cross_entropy import linear_cross_entropy
from phase8.kernels.reference import cross_entropy as reference
from phase8.terminal import run_door

SIZES = ((32768, 131072, 2048), (16384, 32000, 2048), (8192, 50257, 512))
TOLERANCE = 0.03  # share of the largest gradient: logits, their gradient and that of the hidden states are rounded to bf16
PEER_CHUNK_TOKENS = 4096
KERNEL_ROWS = 2048


def main() -> int:
    """Runs the command line and returns the exit code."""
    options = parser(__doc__)
    options.set_defaults(repeats=20)
    options.add_argument("--size", nargs=3, type=int, action="append", metavar=("N", "V", "D"), help="tokens, vocabulary, width; repeatable")
    options.add_argument("--chunk-tokens", nargs="+", type=int, default=[], metavar="R", help="also time chunks of these lengths")
    return run_door(lambda: benchmark("cross_entropy", options.parse_args(), _cases))


def _cases(arguments: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    for size in arguments.size or SIZES:
        yield from _whole_cases(*_inputs(*size, device), arguments.chunk_tokens)
        yield from _kernel_cases(size[1], device)


def _inputs(num_tokens: int, vocabulary: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(num_tokens, width, dtype=torch.bfloat16, device=device, generator=generator)
    weight = torch.randn(vocabulary, width, device=device, generator=generator) / math.sqrt(width)
    targets = torch.randint(vocabulary, (num_tokens,), device=device, generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def _whole_cases(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_lengths: list[int]) -> Iterator[Case]:
    (num_tokens, width), vocabulary = hidden.shape, weight.shape[0]
    size, num_flops = f"{num_tokens} x {vocabulary} x {width}", 2 * num_tokens * vocabulary * width
    ours = partial(_gradients, linear_cross_entropy, hidden, weight, targets)
    _check(size, ours(), hidden, weight, targets)

    gradients_bytes = sum(x.numel() * x.element_size() for x in (hidden, weight))
    case = partial(Case, f"{size}, {format_bytes(gradients_bytes)}", num_flops=3 * num_flops)
    yield case("phase8", ours)
    for rows in chunk_lengths:
        yield case(f"chunks of {rows}", partial(_gradients, partial(linear_cross_entropy, chunk_tokens=rows), hidden, weight, targets))
    yield case("eager", partial(_gradients, _eager, hidden, weight, targets))
    compiled = torch.compile(reference.linear_cross_entropy_gradients, dynamic=False, fullgraph=True)
    yield case("compiled", partial(compiled, hidden.detach(), weight.detach(), targets, PEER_CHUNK_TOKENS))
    if find_spec("liger_kernel") is None:
        yield case("liger", None, reason="liger-kernel is not installed")
    else:
        yield case("liger", partial(_gradients, _liger(), hidden, weight.detach().bfloat16().requires_grad_(), targets))

    case = partial(Case, f"{size}, no gradients", num_flops=num_flops)
    yield case("phase8", partial(linear_cross_entropy, hidden.detach(), weight.detach(), targets))
    yield case("eager", partial(_eager, hidden.detach(), weight.detach(), targets))


def _kernel_cases(vocabulary: int, device: torch.device) -> Iterator[Case]:
    from phase8.kernels.gpu.cross_entropy import losses_of_rows
    from phase8.kernels.loss_chunks import leading_dimension

    leading = leading_dimension(vocabulary)
    logits = torch.randn(KERNEL_ROWS, leading, dtype=torch.bfloat16, device=device)
    targets, losses = torch.zeros(KERNEL_ROWS, dtype=torch.int64, device=device), torch.empty(KERNEL_ROWS, device=device)
    run = partial(losses_of_rows, logits, targets, losses, vocabulary=vocabulary)
    logits_bytes = logits.numel() * logits.element_size()
    yield Case(f"kernel, {KERNEL_ROWS} x {vocabulary}", "loss and gradient", partial(run, writes_gradient=True), num_bytes=2 * logits_bytes)
    yield Case(f"kernel, {KERNEL_ROWS} x {vocabulary}", "loss", partial(run, writes_gradient=False), num_bytes=logits_bytes)


def _check(size: str, gradients: tuple[Tensor, ...], hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    exact = reference.linear_cross_entropy_gradients(hidden.detach().double(), weight.detach().to(hidden.dtype).double(), targets)
    for name, found, expected in zip(("dhidden", "dweight"), gradients, exact[1:], strict=True):
        require_close(f"{name} of {size}", found, expected / len(targets), tolerance=TOLERANCE)


def _gradients(loss: Callable[[Tensor, Tensor, Tensor], Tensor], hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(hidden, weight, targets) / len(targets), (hidden, weight))


def _eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.to(hidden.dtype).T, targets, reduction="sum")


def _liger() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
    return lambda hidden, weight, targets: fused(weight, hidden, targets)


if __name__ == "__main__":
    sys.exit(main())
