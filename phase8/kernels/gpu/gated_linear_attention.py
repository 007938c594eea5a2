"""Gated linear attention in Triton, forward: a single walk along the sequence where batch, heads and column blocks fill the GPU.

Where they do not, the sequence is cut into segments: first the state that each segment adds is computed, then a scan over segments, then each
segment walks from the state that enters it. States are not written per chunk, and none is kept for backward.

Shapes: B batch, T tokens, H heads, K key size, V value size, S segments; I and O as in gated_linear_attention_walk.py.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from phase8.kernels.gpu.fast_math import has_fast_math, tensor_core_precision
from phase8.kernels.gpu.gated_linear_attention_walk import CHUNK_TOKENS, chunks_of, load_state, store_state, unravel, walk
from phase8.kernels.gpu.layout import as_bytes, with_rows_contiguous

MIN_SEGMENT_CHUNKS = 8


@dataclass(frozen=True)
class Tiles:
    """The layout of a walk.

    Args:
        columns: Columns of the state per program.
        num_warps: Warps per program.
        num_stages: Depth of the load pipeline.
    """

    columns: int
    num_warps: int
    num_stages: int


def walk_tiles(inner: int, outer: int, element_bytes: int) -> Tiles:
    """Chosen for at most 64 registers of state per thread, and two programs per multiprocessor up to a head size of 128.

    A chunk has as many rows as one group of four warps multiplies at once: more warps would repeat each other's products.
    """
    if triton.knobs.runtime.interpret:
        return Tiles(block_size(outer), 4, 1)
    if element_bytes > 2:
        return Tiles(min(block_size(outer), 32), 4, 1)
    return Tiles(min(block_size(outer), 64 if inner <= 128 else 32), 4, 2)


def block_size(size: int) -> int:
    """The smallest power of two that covers a head, at least 16 as matrix products need."""
    return max(triton.next_power_of_2(size), 16)


def choose_segment_chunks(num_programs: int, num_chunks: int, num_processors: int) -> int:
    """Chunks of a segment: all of them where the programs of a launch reach half of the processors or more.

    Segments cost another pass over two of the tensors, so they must gain more than that. Their number lets all programs run at once, two on each
    processor: with one more, nearly the whole GPU would wait for it.

    Args:
        num_programs: Programs of a launch with a single segment.
        num_chunks: Chunks of the sequence.
        num_processors: Multiprocessors of the GPU.
    """
    if 2 * num_programs >= num_processors:
        return num_chunks
    return max(triton.cdiv(num_chunks, 2 * num_processors // num_programs), MIN_SEGMENT_CHUNKS)


@dataclass(frozen=True)
class Decays:
    """Decays and document boundaries as kernel arguments.

    Args:
        arguments: As every kernel takes them: log alpha and its strides, `starts` as bytes or None, T, 1 / sqrt(K).
        num_chunks: Chunks of the sequence.
    """

    arguments: tuple[Tensor | float | int | None, ...]
    num_chunks: int


def prepare_decays(log_decay: Tensor, starts: Tensor | None, key_size: int) -> Decays:
    """Prepares the tensors of the public function."""
    log_decay, length = log_decay.float(), log_decay.shape[1]
    return Decays((log_decay, *log_decay.stride(), as_bytes(starts), length, key_size**-0.5), triton.cdiv(length, CHUNK_TOKENS))


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    starts: Tensor | None,
    initial_state: Tensor | None,
    *,
    tiles: Tiles | None = None,
    segment_chunks: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes the reference with this name; `tiles` and `segment_chunks` override the choice for the shape."""
    (batch, _, num_heads, key_size), value_size = q.shape, v.shape[-1]
    q, k, v = with_rows_contiguous(*(x.to(v.dtype) for x in (q, k, v)))
    decays, tiles = prepare_decays(log_decay, starts, key_size), tiles or walk_tiles(key_size, value_size, v.element_size())
    num_programs = batch * num_heads * triton.cdiv(value_size, tiles.columns)
    if segment_chunks is None:
        segment_chunks = choose_segment_chunks(num_programs, decays.num_chunks, num_processors(v.device))
    entering = entering_states(k, v, decays, initial_state, segment_chunks=segment_chunks, turn=1)
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    final = torch.empty(batch, num_heads, key_size, value_size, dtype=torch.float32, device=v.device)
    num_segments = triton.cdiv(decays.num_chunks, segment_chunks)
    _forward_kernel[(num_programs * num_segments,)](
        q, k, v, *decays.arguments, y, entering, final, *strides(q, k, v), num_heads, segment_chunks, num_segments,
        K=key_size, V=value_size, BLOCK_K=block_size(key_size), **walk_constants(tiles),
    )  # fmt: skip
    return y, final


def entering_states(key: Tensor, value: Tensor, decays: Decays, initial: Tensor | None, *, segment_chunks: int, turn: int) -> Tensor | None:
    """The state that enters each segment, fp32 [B, S, H, I, O], None: 0; with `turn` -1, at the end of the segment."""
    num_segments = triton.cdiv(decays.num_chunks, segment_chunks)
    initial = None if initial is None else initial.float().contiguous()
    if num_segments == 1:
        return initial
    states, shares = _segment_states(key, value, decays, segment_chunks=segment_chunks, turn=turn)
    _scan(states, shares, initial, None, turn=turn)
    return states


def added_state(
    key: Tensor, value: Tensor, log_decay: Tensor, starts: Tensor | None, *, backwards: bool, segment_chunks: int | None = None
) -> Tensor:
    """Computes the reference with this name; `segment_chunks` overrides the choice for the shape."""
    (batch, _, num_heads, key_size), value_size = key.shape, value.shape[-1]
    key, value = with_rows_contiguous(*(x.to(value.dtype) for x in (key, value)))
    decays, turn = prepare_decays(log_decay, starts, key_size), -1 if backwards else 1
    if segment_chunks is None:
        columns = walk_tiles(key_size, value_size, value.element_size()).columns
        num_programs = batch * num_heads * triton.cdiv(value_size, columns)
        segment_chunks = choose_segment_chunks(num_programs, decays.num_chunks, num_processors(value.device))
    states, shares = _segment_states(key, value, decays, segment_chunks=segment_chunks, turn=turn)
    if states.shape[1] == 1:
        return states[:, 0]
    final = torch.empty_like(states[:, 0])
    _scan(states, shares, None, final, turn=turn)
    return final


def _segment_states(key: Tensor, value: Tensor, decays: Decays, *, segment_chunks: int, turn: int) -> tuple[Tensor, Tensor]:
    """The state that each segment adds, fp32 [B, S, H, I, O], and the share of a state that it keeps [B, S, H]."""
    (batch, _, num_heads, inner), outer = key.shape, value.shape[-1]
    num_segments = triton.cdiv(decays.num_chunks, segment_chunks)
    states = torch.empty(batch, num_segments, num_heads, inner, outer, dtype=torch.float32, device=key.device)
    shares = torch.empty(batch, num_segments, num_heads, dtype=torch.float32, device=key.device)
    tiles = walk_tiles(inner, outer, value.element_size())
    _states_kernel[(batch * num_segments * num_heads * triton.cdiv(outer, tiles.columns),)](
        key, value, *decays.arguments, states, shares, *strides(key, value), num_heads, segment_chunks, num_segments,
        TURN=turn, INNER=inner, OUTER=outer, BLOCK_INNER=block_size(inner), **walk_constants(tiles),
    )  # fmt: skip
    return states, shares


def _scan(states: Tensor, shares: Tensor, initial: Tensor | None, final: Tensor | None, *, turn: int) -> None:
    """Replaces the state that each segment adds by the one that enters it, and writes the one after all of them to `final` where it is wanted."""
    batch, num_segments, num_heads, inner, outer = states.shape
    size = inner * outer
    block = min(triton.next_power_of_2(size), 1024)
    grid = (batch * num_heads, triton.cdiv(size, block))
    _scan_kernel[grid](states, shares, initial, final, num_heads, num_segments, size, TURN=turn, BLOCK=block)


def walk_constants(tiles: Tiles) -> dict[str, object]:
    """Compile-time constants and launch options that all walks share."""
    return {
        "COLUMNS": tiles.columns,
        "FAST": has_fast_math(),
        "PRECISION": tensor_core_precision(),
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


def strides(*tensors: Tensor) -> list[int]:
    """Strides of a tensor [B, T, H, ...] for batches, heads and tokens, in this order."""
    return [x.stride(dim) for dim in (0, 2, 1) for x in tensors]


def num_processors(device: torch.device) -> int:
    """Multiprocessors of the GPU; the interpreter counts as one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit
def _forward_kernel(
    q, k, v, decay, decay_b, decay_t, decay_h, starts, length, scale, y, entering, final,
    q_b, k_b, v_b, q_h, k_h, v_h, q_t: tl.constexpr, k_t: tl.constexpr, v_t: tl.constexpr,
    num_heads: tl.constexpr, segment_chunks, num_segments,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes one block of columns of y in one segment. Neighbouring programs share q and k, then rows of memory."""
    block, head, segment, batch = unravel(tl.program_id(0), tl.cdiv(V, COLUMNS), num_heads, num_segments)
    column, width = block * COLUMNS, V - block * COLUMNS
    first_chunk, end_chunk = chunks_of(segment, segment_chunks, length)
    state = tl.zeros([BLOCK_K, COLUMNS], tl.float32)
    if entering is not None:
        offset = ((batch * num_segments + segment) * num_heads + head) * K * V + column
        state = load_state(entering + offset, V, 1, width, K, V, BLOCK_K, COLUMNS)
    state, _ = walk(
        q + batch * q_b + head * q_h, q_t, k + batch * k_b + head * k_h, k_t, v + batch * v_b + head * v_h + column, v_t,
        decay + batch * decay_b + head * decay_h, decay_t, None if starts is None else starts + batch * length, length, scale,
        y + (batch * length * num_heads + head) * V + column, num_heads * V, None, 0, False, None, None, state, first_chunk, end_chunk, width, 1,
        True, False, K, V, BLOCK_K, COLUMNS, FAST, PRECISION,
    )  # fmt: skip
    if segment == num_segments - 1:
        store_state(final + (batch * num_heads + head) * K * V + column, state, width, K, V, BLOCK_K, COLUMNS)


@triton.jit
def _states_kernel(
    key, value, decay, decay_b, decay_t, decay_h, starts, length, scale, states, shares,
    key_b, value_b, key_h, value_h, key_t: tl.constexpr, value_t: tl.constexpr,
    num_heads, segment_chunks, num_segments, TURN: tl.constexpr, INNER: tl.constexpr, OUTER: tl.constexpr,
    BLOCK_INNER: tl.constexpr, COLUMNS: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes the state that each segment adds, and the share of the entering state that it keeps."""
    block, head, segment, batch = unravel(tl.program_id(0), tl.cdiv(OUTER, COLUMNS), num_heads, num_segments)
    column, width = block * COLUMNS, OUTER - block * COLUMNS
    first_chunk, end_chunk = chunks_of(segment, segment_chunks, length)
    state, share = walk(
        None, 0, key + batch * key_b + head * key_h, key_t, value + batch * value_b + head * value_h + column, value_t,
        decay + batch * decay_b + head * decay_h, decay_t, None if starts is None else starts + batch * length, length, scale,
        None, 0, None, 0, False, None, None, tl.zeros([BLOCK_INNER, COLUMNS], tl.float32), first_chunk, end_chunk, width, TURN,
        False, False, INNER, OUTER, BLOCK_INNER, COLUMNS, FAST, PRECISION,
    )  # fmt: skip
    row = (batch * num_segments + segment) * num_heads + head
    store_state(states + row * INNER * OUTER + column, state, width, INNER, OUTER, BLOCK_INNER, COLUMNS)
    if block == 0:
        tl.store(shares + row, share)


@triton.jit
def _scan_kernel(states, shares, initial, final, num_heads, num_segments, size, TURN: tl.constexpr, BLOCK: tl.constexpr):
    """Replaces the state that each segment adds by the state that enters it; `final` is the one after all."""
    sequence, entry = tl.cast(tl.program_id(0), tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    batch, head, mask = sequence // num_heads, sequence % num_heads, entry < size
    state = tl.zeros([BLOCK], tl.float32) if initial is None else tl.load(initial + sequence * size + entry, mask, 0.0)
    for step in range(num_segments):
        segment = step if TURN > 0 else num_segments - 1 - step
        row = (batch * num_segments + segment) * num_heads + head
        added = tl.load(states + row * size + entry, mask, 0.0)
        tl.store(states + row * size + entry, state, mask)
        state = state * tl.load(shares + row) + added
    if final is not None:
        tl.store(final + sequence * size + entry, state, mask)
