"""Times the Green scan and its adjoint against the plain reference, compiled and eager.

    python tools/bench/green_scan.py
    python tools/bench/green_scan.py --batch-size 1 --sequence-length 131072 --sweep

Bytes: the potential read and g written, 12 per element; for the adjoint g and its gradient read and one number written, 20.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from functools import partial

import torch
from measure import Case, benchmark, parser, require_close

from phase8.kernels.reference import green_scan as reference
from phase8.terminal import run_door


def main() -> int:
    """Runs the command line and returns the exit code."""
    options = parser(__doc__)
    options.add_argument("--batch-size", type=int, default=8)
    options.add_argument("--sequence-length", type=int, default=4096)
    options.add_argument("--num-heads", type=int, default=32)
    options.add_argument("--sweep", action="store_true", help="also time other ways to cut the work, to tune for a GPU")
    return run_door(lambda: benchmark("green_scan", options.parse_args(), _cases))


def _cases(arguments: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    from phase8.kernels.gpu.green_scan import forward_schedule, green_scan
    from phase8.kernels.gpu.green_scan_backward import backward_schedule, green_scan_backward

    shape = (arguments.batch_size, arguments.sequence_length, arguments.num_heads)
    potential, energy = torch.randn(shape, device=device), torch.linspace(-1.5, 1.5, shape[2], device=device)
    scalars = (energy, 0.1 + torch.rand_like(energy), 0.5 + torch.rand_like(energy))
    inputs = (potential, *scalars, None, None)
    g, grad = green_scan(*inputs), torch.randn(*shape, 2, device=device)
    adjoint_inputs = (grad, g, scalars[2], None, None)
    exact = reference.green_scan(*(None if x is None else x.double() for x in inputs))
    require_close("g", g, exact, tolerance=1e-5)
    exact_adjoint = reference.green_scan_backward(*(None if x is None else x.double() for x in adjoint_inputs))
    require_close("dpotential", green_scan_backward(*adjoint_inputs)[0], exact_adjoint[0], tolerance=1e-5)
    del exact, exact_adjoint

    num_elements = potential.numel()
    plans = (
        ("forward", green_scan, forward_schedule(*shape, packed=False), inputs, reference.green_scan, 12),
        ("backward", green_scan_backward, backward_schedule(*shape), adjoint_inputs, reference.green_scan_backward, 20),
    )
    for group, kernel, schedule, given, plain, bytes_of_an_element in plans:
        case = partial(Case, group, num_bytes=bytes_of_an_element * num_elements)
        yield case("triton", partial(kernel, *given))
        yield case("reference, torch.compile", partial(torch.compile(plain, dynamic=False), *given))
        yield case("reference, eager", partial(plain, *given))
        if arguments.sweep:
            for other in _schedules(type(schedule)):
                name = f"N {other.heads} S {other.segments} L {other.tokens} warps {other.num_warps}"
                yield case(name, partial(kernel, *given, schedule=other))


def _schedules(schedule_type: type) -> Iterator:
    """Heads, segments, tokens and warps that keep one or two chains in a thread."""
    for heads, segments, tokens, chains in itertools.product((1, 2, 4, 8), (32, 64, 128, 256), (8, 16, 32), (1, 2)):
        num_warps = segments * heads // (32 * chains)
        if 1 <= num_warps <= 16 and tokens * chains <= 64:
            yield schedule_type(heads, segments, tokens, num_warps)


if __name__ == "__main__":
    sys.exit(main())
