"""Times a tensor-parallel rank's part of output head and cross-entropy, against the reference and against the whole vocabulary.

    python tools/bench/vocabulary_shard.py
    python tools/bench/vocabulary_shard.py --size 65536 8000 2048 --num-ranks 4

One process plays one rank: the exchange returns what it is given, so no communication is timed. "one process" is the operator of one that
has as many rows of the head and no others. TFLOP/s counts the three matmuls.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from functools import partial

import torch
from measure import Case, benchmark, parser, require_close
from torch import Tensor

from phase8.kernels.cross_entropy import linear_cross_entropy
from phase8.kernels.reference import vocabulary_shard as reference
from phase8.kernels.vocabulary_shard import shard_cross_entropy_gradients
from phase8.tensor_parallel.cross_entropy import chunk_tokens
from phase8.terminal import run_door

SIZES = ((32768, 16000, 2048), (32768, 65536, 2048))
TOLERANCE = 0.03  # share of the largest gradient: logits, their gradient and that of the hidden states are rounded to bf16


def main() -> int:
    """Runs the command line and returns the exit code."""
    options = parser(__doc__)
    options.set_defaults(repeats=20)
    options.add_argument("--size", nargs=3, type=int, action="append", metavar=("N", "V", "D"), help="tokens, vocabulary of a rank, width")
    options.add_argument("--num-ranks", type=int, default=2, metavar="N", help="ranks that share the vocabulary; decides the length of a chunk")
    return run_door(lambda: benchmark("vocabulary_shard", options.parse_args(), _cases))


def _cases(arguments: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    for num_tokens, vocabulary, width in arguments.size or SIZES:
        generator = torch.Generator(device).manual_seed(0)
        hidden = torch.randn(num_tokens, width, dtype=torch.bfloat16, device=device, generator=generator)
        weight = torch.randn(vocabulary, width, device=device, generator=generator) / math.sqrt(width)
        columns = torch.randint(vocabulary, (num_tokens,), device=device, generator=generator)
        options = {"chunk_tokens": chunk_tokens(arguments.num_ranks), "needs_gradients": True}
        ours = partial(shard_cross_entropy_gradients, hidden, weight, columns, _alone, **options)
        plain = partial(reference.shard_cross_entropy_gradients, hidden, weight, columns, _alone, **options)
        for name, found, expected in zip(("dhidden", "dweight"), ours()[1:], plain()[1:], strict=True):
            require_close(f"{name} of {num_tokens} x {vocabulary} x {width}", found, expected, tolerance=TOLERANCE)
        size = f"{num_tokens} x {vocabulary} x {width}, chunks of {options['chunk_tokens']}"
        case = partial(Case, size, num_flops=6 * num_tokens * vocabulary * width)
        yield case("phase8", ours)
        yield case("reference", plain)
        inputs = (hidden.detach().requires_grad_(), weight.detach().requires_grad_())
        yield case("one process", partial(_whole, *inputs, columns))


def _alone(statistics: Tensor) -> Tensor:
    return statistics


def _whole(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), (hidden, weight))


if __name__ == "__main__":
    sys.exit(main())
