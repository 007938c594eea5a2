"""Times both paths of the mixer for one token of each sequence against plain torch.

    python tools/bench/mixer_step.py
    python tools/bench/mixer_step.py --shape 64 16 128 2048
    python tools/bench/mixer_step.py --tilings --repeats 30

Floor: keys and values of the window read once, the memory of the global path read and written once.

--tilings times every candidate of phase8/kernels/gpu/mixer_step_tiling.py, by default with 1 to 256 sequences, after a check at the timed size.
`whole s32 w4 r255` is one program for a head, tiles of 32 slots, 4 warps and 255 registers a thread; `c32 ... n256 t2` are programs for 32 columns
of a memory each, and up to 256 for the windows, with 2 tiles at least. `triton` is what is chosen.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from measure import Case, benchmark, parser, require_close
from torch import Tensor

from phase8.kernels.decay_and_gate import DecayAndGate
from phase8.kernels.decoding_state import GlobalConstants, MixerConstants, MixerStepState, TokenPlace
from phase8.kernels.mixer_step import mixer_step
from phase8.kernels.reference import mixer_step as reference
from phase8.kernels.rotary import angles_at, rotary_frequencies
from phase8.terminal import run_door

TAPS, EPS = 4, 1e-5
TOLERANCE = 0.03  # share of the largest value: the reference rounds weights and products to bf16
SHAPES = ((1, 16, 128, 128), (1, 16, 128, 2048), (64, 16, 128, 128), (64, 16, 128, 2048))
SHAPES_OF_TILINGS = tuple((batch, 16, 128, window) for batch in (1, 8, 64, 256) for window in (128, 2048))
POSITION = 100_000


def main() -> int:
    """Runs the command line and returns the exit code."""
    options = parser(__doc__)
    metavar = ("B", "H", "K", "W")
    options.add_argument("--shape", nargs=4, type=int, action="append", metavar=metavar, help="sequences, heads, head size, window; repeatable")
    options.add_argument("--tilings", action="store_true", help="time every way to divide the state over programs")
    return run_door(lambda: benchmark("mixer_step", options.parse_args(), _cases))


def _cases(arguments: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    for shape in arguments.shape or (SHAPES_OF_TILINGS if arguments.tilings else SHAPES):
        inputs, before = _inputs(*shape, device), _inputs(*shape, device)[4]
        expected = reference.mixer_step(*_inputs(*shape, device))
        state = inputs[4]
        num_bytes = sum(x.numel() * x.element_size() for x in (state.keys, state.values, state.memory, state.memory) if x is not None)
        case, run = partial(Case, " x ".join(map(str, shape)), num_bytes=num_bytes), partial(mixer_step, *inputs)
        for name, timed in {"triton": run, **(_tilings(run) if arguments.tilings else {})}.items():
            state.take_over(before)
            require_close(f"mixer_step ({name})", timed(), expected, tolerance=TOLERANCE)
            yield case(name, timed)
        yield case("plain torch", partial(reference.mixer_step, *inputs))


def _tilings(run: Callable[[], Tensor]) -> dict[str, Callable[[], Tensor]]:
    """The same with every candidate, by name."""
    from phase8.kernels.gpu import mixer_step as gpu
    from phase8.kernels.gpu.mixer_step_tiling import CANDIDATES, Tiling

    def tiled(tiling: Tiling) -> Tensor:
        chosen, gpu.tiling_for = gpu.tiling_for, lambda num_heads, num_processors: tiling
        try:
            return run()
        finally:
            gpu.tiling_for = chosen

    return {str(tiling): partial(tiled, tiling) for tiling in CANDIDATES}


def _inputs(
    batch: int, heads: int, size: int, window: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, MixerConstants, MixerStepState, TokenPlace]:
    generator, width = torch.Generator(device).manual_seed(0), heads * size

    def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator).to(dtype)

    wide = torch.float32
    gates = DecayAndGate(draw(heads, dtype=wide), draw(heads, dtype=wide), None, None)
    path = GlobalConstants(gates, None, draw(heads, size, dtype=wide))
    constants = MixerConstants(
        taps=draw(TAPS, 3 * width, dtype=wide),
        scale=torch.ones(2 * heads, device=device),
        beta=None,
        global_path=path,
        gate_up=draw(width, size),
        window=window,
        global_tokens=0,
        num_heads=heads,
        num_key_heads=heads,
        has_silu=True,
        has_rotary=True,
        eps=EPS,
    )
    arrivals = torch.zeros(batch, heads, dtype=torch.int32, device=device)
    kept = (batch, window, heads, size)
    state = MixerStepState(draw(batch, TAPS - 1, 3 * width), draw(*kept), draw(*kept), draw(batch, heads, size, size, dtype=wide), None, arrivals)
    position = torch.full((batch,), POSITION, device=device)
    angles = angles_at(position, rotary_frequencies(size, base=1e4, device=device))
    place = TokenPlace(position, angles.cos(), angles.sin())
    return draw(batch, 3 * width, dtype=wide), draw(batch, heads, dtype=wide), draw(batch, size, dtype=wide), constants, state, place


if __name__ == "__main__":
    sys.exit(main())
