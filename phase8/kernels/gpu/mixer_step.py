"""One token of both paths of the mixer in one Triton kernel, where several programs share a head of a sequence.

Each has a part of the window, whose softmax it computes for itself, or some columns of the memory of the global path, which it holds in registers. It
leaves its part in a buffer, and the last one of a head that arrives merges the parts: so reading the state has as many programs as memory
needs to be busy, and a layer has one launch.

A program reads its part of the global path's memory before the kernels in front have ended, so two steps of a layer need another kernel between
them, as the layer's output is.

Each of the heads of queries that share a head of keys reads it, and the first of them writes it. They have no convolution here: one program would
move up its inputs before another has read them.

Shapes: B sequences, H heads of queries, J heads of keys and values, K head size, W window, G global tokens, R rank of the gate per channel.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from phase8.kernels.decoding_state import MixerConstants, MixerStepState, TokenPlace
from phase8.kernels.gpu.mixer_step_parts import merged, move_up, read_window, remember
from phase8.kernels.gpu.overlap import await_results, overlap_options


@dataclass(frozen=True)
class Tiling:
    """How the state of a head is divided.

    Args:
        slots: Slots of a tile of keys or values.
        columns: Columns of the memory that a program holds.
        num_warps: Warps of a program.
        max_registers: Registers of a thread at most, of which a processor has 65,536.
        num_programs: Programs that the windows of all heads are divided over, as far as each has `part_tiles` tiles.
        part_tiles: The fewest tiles of a window that are worth a program of their own.
    """

    slots: int = 32
    columns: int = 32
    num_warps: int = 4
    max_registers: int = 128
    num_programs: int = 1024
    part_tiles: int = 1


# Candidates that tools/bench/mixer_step.py --tilings times.
TILINGS = (
    Tiling(), Tiling(max_registers=96), Tiling(columns=64, max_registers=168), Tiling(slots=64), Tiling(slots=64, columns=64, max_registers=168),
    Tiling(slots=64, num_warps=8), Tiling(slots=16, columns=16, num_warps=2), Tiling(num_programs=4096), Tiling(num_programs=512),
)  # fmt: skip
TILING = Tiling()


def mixer_step(
    qkv: Tensor, scalars: Tensor | None, channels: Tensor | None, constants: MixerConstants, state: MixerStepState, place: TokenPlace
) -> Tensor:
    """Computes the reference `mixer_step`, without the Lorentz score, without the chain, and with a convolution only where J is H."""
    batch, num_heads, window = len(qkv), constants.num_heads, constants.window
    head_size = qkv.shape[1] // (num_heads + 2 * constants.num_key_heads)
    path = constants.global_path
    decay_and_gate = None if path is None else path.decay_and_gate
    out = torch.empty(batch, num_heads * head_size, dtype=state.convolution.dtype, device=qkv.device)
    block = triton.next_power_of_2(head_size)
    columns = min(TILING.columns, block)
    window_parts, memory_parts = num_parts(batch * num_heads, window), 0 if path is None else triton.cdiv(head_size, columns)
    parts = torch.empty(batch, num_heads, window_parts * (head_size + 2) + 2 * head_size, dtype=torch.float32, device=qkv.device)
    rank = 0 if constants.gate_up is None else constants.gate_up.shape[1]

    def given(tensor: Tensor | None) -> Tensor:
        """What the kernel adds to, even where it reads nothing."""
        return qkv if tensor is None else tensor

    _step_kernel[(window_parts + memory_parts, num_heads, batch)](
        qkv, qkv.stride(0), state.convolution, given(constants.taps),
        place.cos, place.sin, given(constants.scale), state.keys, state.values, place.position,
        scalars, 0 if scalars is None else scalars.stride(0), given(channels), 0 if channels is None else channels.stride(0),
        given(constants.gate_up), None if decay_and_gate is None else decay_and_gate.decay_bias,
        None if decay_and_gate is None else decay_and_gate.gate_bias,
        given(None if path is None else path.norm_weight), state.memory, out, parts, state.arrivals,
        window, constants.global_tokens, head_size**-0.5, constants.eps,
        0.0 if decay_and_gate is None or decay_and_gate.decay_floor is None else decay_and_gate.decay_floor,
        NUM_HEADS=num_heads, KEY_HEADS=constants.num_key_heads, HEAD_SIZE=head_size, BLOCK_HALF=triton.next_power_of_2(head_size // 2),
        BLOCK_K=block, BLOCK_J=TILING.slots, BLOCK_V=columns, BLOCK_G=triton.next_power_of_2(max(constants.global_tokens, 1)),
        BLOCK_P=triton.next_power_of_2(max(window_parts, 1)), WINDOW_PARTS=window_parts, MEMORY_PARTS=memory_parts,
        TAPS=1 if constants.taps is None else len(constants.taps), ROTARY=constants.has_rotary, SCALE=constants.scale is not None,
        GLOBALS=constants.global_tokens > 0, RANK=rank, BLOCK_R=triton.next_power_of_2(max(rank, 1)), SILU=constants.has_silu,
        SCALARS=0 if scalars is None else scalars.shape[1] // num_heads,
        DELTA=decay_and_gate is not None and decay_and_gate.delta_size is not None,
        FLOOR=decay_and_gate is not None and decay_and_gate.decay_floor is not None,
        num_warps=TILING.num_warps, maxnreg=TILING.max_registers, **overlap_options(qkv.device),
    )  # fmt: skip
    return out


def num_parts(num_heads: int, window: int) -> int:
    """Number of programs that share the window of each of so many heads, of all sequences together; 0 without a window."""
    wanted = triton.cdiv(TILING.num_programs, num_heads)
    return 0 if window == 0 else max(1, min(wanted, window // (TILING.slots * TILING.part_tiles)))


@triton.jit
def _step_kernel(
    qkv, qkv_stride, before, taps, cosines, sines, scale, keys, values, positions,
    scalars, scalars_stride, channels, channels_stride, gate_up, decay_bias, gate_bias, norm_weight, memory, out, parts, arrivals,
    window, global_tokens, score_scale, eps, decay_floor,
    NUM_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr, WINDOW_PARTS: tl.constexpr,
    MEMORY_PARTS: tl.constexpr, TAPS: tl.constexpr, ROTARY: tl.constexpr, SCALE: tl.constexpr, GLOBALS: tl.constexpr, RANK: tl.constexpr,
    BLOCK_R: tl.constexpr, SILU: tl.constexpr, SCALARS: tl.constexpr, DELTA: tl.constexpr, FLOOR: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    part, head, row = tl.program_id(0), tl.program_id(1), tl.cast(tl.program_id(2), tl.int64)
    WIDTH: tl.constexpr = NUM_HEADS * HEAD_SIZE
    KEY_WIDTH: tl.constexpr = KEY_HEADS * HEAD_SIZE
    ROW: tl.constexpr = WIDTH + 2 * KEY_WIDTH
    TYPE: tl.constexpr = out.dtype.element_ty
    first = head * HEAD_SIZE
    x = qkv + row * qkv_stride + first
    before += row * (TAPS - 1) * ROW + first
    taps += first
    lane = row * NUM_HEADS + head
    parts += lane * (WINDOW_PARTS * (HEAD_SIZE + 2) + 2 * HEAD_SIZE)
    if MEMORY_PARTS > 0:  # noqa: SIM102  (a constant decides what is compiled)
        if part < MEMORY_PARTS:
            remember(
                x, before, taps, scalars + row * scalars_stride + head * SCALARS, channels + row * channels_stride, gate_up + first * RANK,
                tl.load(decay_bias + head), tl.load(gate_bias + head), memory + lane * (HEAD_SIZE * HEAD_SIZE), part * BLOCK_V,
                parts + WINDOW_PARTS * (HEAD_SIZE + 2), score_scale, eps, decay_floor,
                TYPE, WIDTH, HEAD_SIZE, BLOCK_K, BLOCK_V, TAPS, SILU, RANK, BLOCK_R, SCALARS, DELTA, FLOOR, OVERLAPS,
            )  # fmt: skip
    if WINDOW_PARTS > 0:  # noqa: SIM102
        if part >= MEMORY_PARTS:
            if OVERLAPS:
                await_results()
            key_head = head // (NUM_HEADS // KEY_HEADS)
            slots = row * (global_tokens + window) * KEY_WIDTH + key_head * HEAD_SIZE
            read_window(
                x, before, taps, cosines + row * (HEAD_SIZE // 2), sines + row * (HEAD_SIZE // 2), scale, keys + slots, values + slots,
                tl.load(positions + row), parts, part - MEMORY_PARTS, head, key_head, head % (NUM_HEADS // KEY_HEADS) == 0,
                window, global_tokens, score_scale, eps,
                TYPE, NUM_HEADS, KEY_HEADS, HEAD_SIZE, BLOCK_HALF, BLOCK_K, BLOCK_J, BLOCK_G, WINDOW_PARTS, TAPS, ROTARY, SCALE, GLOBALS,
            )  # fmt: skip
    tl.debug_barrier()  # all threads have written before one of them says so
    if tl.atomic_add(arrivals + lane, 1) == WINDOW_PARTS + MEMORY_PARTS - 1:
        tl.store(arrivals + lane, 0)
        channel = tl.arange(0, BLOCK_K)
        inside = channel < HEAD_SIZE
        y = merged(parts, norm_weight + first, eps, TYPE, HEAD_SIZE, BLOCK_K, BLOCK_P, WINDOW_PARTS, MEMORY_PARTS)
        tl.store(out + row * WIDTH + first + channel, y.to(TYPE), mask=inside)
        move_up(x, before, channel, inside, WIDTH, TAPS)
