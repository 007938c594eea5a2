"""One token of both paths of the mixer in one Triton kernel, in which a program has both paths of a head of a sequence, or a part of them.

Many sequences fill the device with one program for a head, which moves all of the head's state once and leaves nothing for others. Few sequences need
several programs for a head to keep memory busy: each has a part of the window, whose softmax it computes for itself, or some columns of the memory of
the global path. It leaves its part in a buffer, and the last one of a head that arrives merges the parts: so a layer has one launch.
`mixer_step_tiling.py` chooses.

A program reads its part of the state, the position and the angles before the kernel in front has ended. So two steps of a layer need another kernel
between them, as the layer's output is, and that kernel must not write the place of the token.

Each of the heads of queries that share a head of keys reads it, and the first of them writes it. They have no convolution here: one program would
move up its inputs before another has read them.

Shapes: B sequences, H heads of queries, J heads of keys and values, K head size, W window, G global tokens, R rank of the gate per channel.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from phase8.kernels.decoding_state import MixerConstants, MixerStepState, TokenPlace
from phase8.kernels.gpu.layout import with_rows_contiguous
from phase8.kernels.gpu.mixer_step_parts import move_up
from phase8.kernels.gpu.mixer_step_programs import both_paths, columns_of_memory, merged, part_of_window
from phase8.kernels.gpu.mixer_step_tiling import tiling_for
from phase8.kernels.gpu.overlap import overlap_options

PROCESSORS_OF_NO_GPU = 132  # of an H100, for the interpreter


def mixer_step(
    qkv: Tensor, scalars: Tensor | None, channels: Tensor | None, constants: MixerConstants, state: MixerStepState, place: TokenPlace
) -> Tensor:
    """Computes the reference `mixer_step`, without the Lorentz score, without the chain, and with a convolution only where J is H."""
    qkv, scalars, channels = with_rows_contiguous(qkv, scalars, channels)
    batch, num_heads, window = len(qkv), constants.num_heads, constants.window
    head_size = qkv.shape[1] // (num_heads + 2 * constants.num_key_heads)
    path = constants.global_path
    decay_and_gate = None if path is None else path.decay_and_gate
    out = torch.empty(batch, num_heads * head_size, dtype=state.convolution.dtype, device=qkv.device)
    tiling = tiling_for(batch * num_heads, _num_processors(qkv.device))
    block = triton.next_power_of_2(head_size)
    columns = block if tiling.is_whole else min(tiling.columns, block)
    window_parts, memory_parts = tiling.window_parts(batch * num_heads, window), 0 if path is None else triton.cdiv(head_size, columns)
    left = 0 if tiling.is_whole else window_parts * (head_size + 2) + 2 * head_size
    parts = torch.empty(batch, num_heads, left, dtype=torch.float32, device=qkv.device)
    rank = 0 if constants.gate_up is None else constants.gate_up.shape[1]
    block_of_rank = triton.next_power_of_2(max(rank, 1))

    def given(tensor: Tensor | None) -> Tensor:
        """What the kernel adds to, even where it reads nothing."""
        return qkv if tensor is None else tensor

    _step_kernel[(1 if tiling.is_whole else window_parts + memory_parts, num_heads, batch)](
        qkv, qkv.stride(0), state.convolution, given(constants.taps),
        place.cos, place.sin, given(constants.scale), given(state.keys), given(state.values), place.position,
        given(scalars), 0 if scalars is None else scalars.stride(0), given(channels), 0 if channels is None else channels.stride(0),
        given(constants.gate_up), given(None if decay_and_gate is None else decay_and_gate.decay_bias),
        given(None if decay_and_gate is None else decay_and_gate.gate_bias), given(None if path is None else path.skip),
        given(None if path is None else path.norm_weight), given(state.memory), out, parts, state.arrivals,
        window, constants.global_tokens, head_size**-0.5, constants.eps,
        0.0 if decay_and_gate is None or decay_and_gate.decay_floor is None else decay_and_gate.decay_floor,
        NUM_HEADS=num_heads, KEY_HEADS=constants.num_key_heads, HEAD_SIZE=head_size, BLOCK_K=block, BLOCK_J=tiling.slots,
        ROWS=max(4, tiling.num_warps), BLOCK_V=columns, BLOCK_P=triton.next_power_of_2(max(window_parts, 1)), WINDOW_PARTS=window_parts,
        MEMORY_PARTS=memory_parts, IS_WHOLE=tiling.is_whole, TAPS=1 if constants.taps is None else len(constants.taps), ROTARY=constants.has_rotary,
        SCALE=constants.scale is not None, GLOBALS=constants.global_tokens > 0, RANK=rank, BLOCK_R=block_of_rank,
        TILE_R=min(tiling.gate_tile, block_of_rank), SILU=constants.has_silu, SCALARS=0 if scalars is None else scalars.shape[1] // num_heads,
        DELTA=decay_and_gate is not None and decay_and_gate.delta_size is not None,
        FLOOR=decay_and_gate is not None and decay_and_gate.decay_floor is not None,
        SILU_VALUES=constants.silu_of_values,
        SILU_GATE=decay_and_gate is not None and decay_and_gate.has_silu, SKIP=path is not None and path.skip is not None,
        num_warps=tiling.num_warps, maxnreg=tiling.max_registers, **overlap_options(qkv.device),
    )  # fmt: skip
    return out


@cache
def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else PROCESSORS_OF_NO_GPU


@triton.jit
def _step_kernel(
    qkv, qkv_stride, before, taps, cosines, sines, scale, keys, values, positions,
    scalars, scalars_stride, channels, channels_stride, gate_up, decay_bias, gate_bias, skip, norm_weight, memory, out, parts, arrivals,
    window, global_tokens, score_scale, eps, decay_floor,
    NUM_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_P: tl.constexpr, WINDOW_PARTS: tl.constexpr, MEMORY_PARTS: tl.constexpr, IS_WHOLE: tl.constexpr,
    TAPS: tl.constexpr, ROTARY: tl.constexpr, SCALE: tl.constexpr, GLOBALS: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr,
    TILE_R: tl.constexpr, SILU: tl.constexpr, SCALARS: tl.constexpr, DELTA: tl.constexpr, FLOOR: tl.constexpr,
    SILU_VALUES: tl.constexpr, SILU_GATE: tl.constexpr, SKIP: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    part, head, row = tl.program_id(0), tl.program_id(1), tl.cast(tl.program_id(2), tl.int64)
    WIDTH: tl.constexpr = NUM_HEADS * HEAD_SIZE
    KEY_WIDTH: tl.constexpr = KEY_HEADS * HEAD_SIZE
    ROW: tl.constexpr = WIDTH + 2 * KEY_WIDTH
    TYPE: tl.constexpr = out.dtype.element_ty
    first, lane = head * HEAD_SIZE, row * NUM_HEADS + head
    key_head, is_writer = head // (NUM_HEADS // KEY_HEADS), head % (NUM_HEADS // KEY_HEADS) == 0
    to_key = WIDTH + (key_head - head) * HEAD_SIZE  # from the queries of the head
    slots = row * (global_tokens + window) * KEY_WIDTH + key_head * HEAD_SIZE
    x = qkv + row * qkv_stride + first
    before += row * (TAPS - 1) * ROW + first
    taps += first
    cosines += row * (HEAD_SIZE // 2)
    sines += row * (HEAD_SIZE // 2)
    scalars += row * scalars_stride + head * SCALARS
    channels += row * channels_stride
    gate_up += first * RANK
    memory += lane * (HEAD_SIZE * HEAD_SIZE)
    norm_weight += first
    channel = tl.arange(0, BLOCK_K)
    inside = channel < HEAD_SIZE
    out += row * WIDTH + first + channel
    if IS_WHOLE:
        y = both_paths(
            x, before, taps, to_key, cosines, sines, scale + head, scale + NUM_HEADS + key_head, keys + slots, values + slots,
            positions + row, is_writer, scalars, channels, gate_up, decay_bias + head, gate_bias + head, skip + head, norm_weight, memory,
            window, global_tokens, score_scale, eps, decay_floor, TYPE, ROW, KEY_WIDTH, HEAD_SIZE, BLOCK_K, BLOCK_J, ROWS, TAPS,
            WINDOW_PARTS > 0, ROTARY, SCALE, GLOBALS, MEMORY_PARTS > 0, SILU, RANK, BLOCK_R, TILE_R, SCALARS, DELTA, FLOOR,
            SILU_VALUES, SILU_GATE, SKIP, OVERLAPS,
        )  # fmt: skip
        tl.store(out, y.to(TYPE), mask=inside)
    else:
        parts += lane * (WINDOW_PARTS * (HEAD_SIZE + 2) + 2 * HEAD_SIZE)
        if MEMORY_PARTS > 0:  # noqa: SIM102  (a constant decides what is compiled)
            if part < MEMORY_PARTS:
                columns_of_memory(
                    x, before, taps, scalars, channels, gate_up, decay_bias + head, gate_bias + head, skip + head, memory,
                    parts + WINDOW_PARTS * (HEAD_SIZE + 2), part * BLOCK_V, score_scale, eps, decay_floor,
                    TYPE, WIDTH, HEAD_SIZE, BLOCK_K, BLOCK_V, ROWS, TAPS, SILU, RANK, BLOCK_R, TILE_R, SCALARS, DELTA, FLOOR,
                    SILU_VALUES, SILU_GATE, SKIP, OVERLAPS,
                )  # fmt: skip
        if WINDOW_PARTS > 0:  # noqa: SIM102
            if part >= MEMORY_PARTS:
                part_of_window(
                    x, before, taps, to_key, cosines, sines, scale + head, scale + NUM_HEADS + key_head, keys + slots, values + slots,
                    positions + row, parts, part - MEMORY_PARTS, is_writer, window, global_tokens, score_scale, eps,
                    TYPE, ROW, KEY_WIDTH, HEAD_SIZE, BLOCK_K, BLOCK_J, ROWS, WINDOW_PARTS, TAPS, ROTARY, SCALE, GLOBALS, SILU_VALUES, OVERLAPS,
                )  # fmt: skip
        tl.debug_barrier()  # all threads have written before one of them says so
        if tl.atomic_add(arrivals + lane, 1) == WINDOW_PARTS + MEMORY_PARTS - 1:
            tl.store(arrivals + lane, 0)
            y = merged(parts, norm_weight, eps, TYPE, HEAD_SIZE, BLOCK_K, BLOCK_P, WINDOW_PARTS, MEMORY_PARTS)
            tl.store(out, y.to(TYPE), mask=inside)
            move_up(x, before, HEAD_SIZE, BLOCK_K, WIDTH, TAPS)
