"""Products of several tokens with large weights in Triton: matrix units compute what memory delivers, a weight is read once.

A program has some rows of the weight and a part of the width. Before it waits for the kernel in front it asks for the first bytes of its part of the
weight, which then lie in the L2 cache. Where several programs share rows, each leaves its sums in a buffer, and the last one that arrives adds them
up in the order of the width: the result does not depend on who was last. That one sets the count of arrivals back to zero.

Tokens are re-read by the programs of all rows, so many rows a program, and fewer programs of a row, are what saves traffic between L2 and processors.

Shapes: B tokens, D width of the input, F width of the output.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from phase8.kernels.gpu.decoding_product_tiling import LEAST_TOKENS, Device, Shape, tile_for
from phase8.kernels.gpu.fast_math import has_fast_math
from phase8.kernels.gpu.overlap import OLDEST_CAPABILITY, await_results, overlap_options

NO_GPU = Device(num_processors=132, shared_bytes=227 * 1024)  # an H100, for the interpreter
PREFETCHED_BYTES = 16  # what a prefetch is a multiple of, and begins at

_ARRIVALS: dict[tuple[torch.device, int], Tensor] = {}


def product(x: Tensor, weight: Tensor, *, is_gated: bool = False, is_wide: bool = False) -> Tensor:
    """Computes the reference `product`, and `gated` of it where the outputs are gated; in bf16 or fp16.

    Launches on one device must follow each other, as those of one stream do: they count arrivals in the same place.
    """
    x, weight = x.contiguous(), weight.contiguous()
    num_tokens, width = x.shape
    num_outputs = len(weight) // 2 if is_gated else len(weight)
    shape = shape_of(num_tokens, width, len(weight), is_gated=is_gated)
    tile = tile_for(shape, device_of(x.device))
    rows = tile.rows // 2 if is_gated else tile.rows
    blocks, steps = triton.cdiv(num_outputs, rows), triton.cdiv(triton.cdiv(width, tile.inputs), tile.splits)
    y = torch.empty(num_tokens, num_outputs, dtype=torch.float32 if is_wide else x.dtype, device=x.device)
    parts = arrivals = y
    if tile.splits > 1:
        parts = torch.empty(blocks * tile.splits * tile.rows * shape.tokens, dtype=torch.float32, device=x.device)
        arrivals = _arrivals(x.device, blocks)
    _product_kernel[(blocks, tile.splits)](
        x, weight, y, parts, arrivals, num_tokens, num_outputs,
        WIDTH=width, TOKENS=shape.tokens, BLOCK_F=rows, BLOCK_D=tile.inputs, STEPS=steps, SPLITS=tile.splits, GATED=is_gated,
        AHEAD=_inputs_ahead(weight, tile.ahead // tile.rows, steps * tile.inputs), num_warps=tile.num_warps, num_stages=tile.num_stages,
        **overlap_options(x.device),
    )  # fmt: skip
    return y


def _inputs_ahead(weight: Tensor, num_bytes: int, width: int) -> int:
    """Inputs of each row of a program that it asks for before it waits; 0 where there is no such instruction, or rows do not begin at 16 bytes."""
    has_instruction = has_fast_math() and torch.cuda.get_device_capability(weight.device) >= OLDEST_CAPABILITY
    is_aligned = (weight.shape[1] * weight.element_size() | weight.data_ptr()) % PREFETCHED_BYTES == 0
    return min(num_bytes // PREFETCHED_BYTES * PREFETCHED_BYTES // weight.element_size(), width) if has_instruction and is_aligned else 0


def _arrivals(device: torch.device, blocks: int) -> Tensor:
    """Zeros, which every launch leaves as zeros. Those made while a graph is recorded are its own, and each replay makes them anew."""
    key = device, blocks
    if key not in _ARRIVALS:
        zeros = torch.zeros(blocks, dtype=torch.int32, device=device)
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return zeros
        _ARRIVALS[key] = zeros
    return _ARRIVALS[key]


def shape_of(tokens: int, width: int, rows: int, *, is_gated: bool) -> Shape:
    """A product, with the tokens of the tile that holds them."""
    return Shape(max(triton.next_power_of_2(tokens), LEAST_TOKENS), width, rows, is_gated)


@cache
def device_of(device: torch.device) -> Device:
    """What tiles depend on."""
    if device.type != "cuda":
        return NO_GPU
    properties = torch.cuda.get_device_properties(device)
    return Device(properties.multi_processor_count, properties.shared_memory_per_block_optin)


@triton.jit
def _product_kernel(
    x, weight, y, parts, arrivals, num_tokens, num_outputs,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, STEPS: tl.constexpr, SPLITS: tl.constexpr,
    GATED: tl.constexpr, AHEAD: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    block, split = tl.program_id(0), tl.program_id(1)
    TILE: tl.constexpr = BLOCK_F * TOKENS
    PARTS: tl.constexpr = 2 if GATED else 1
    IS_EVEN: tl.constexpr = WIDTH == STEPS * BLOCK_D * SPLITS
    row, token, column = tl.arange(0, BLOCK_F), tl.arange(0, TOKENS), tl.arange(0, BLOCK_D)
    feature, first = block * BLOCK_F + row, split * (STEPS * BLOCK_D)
    is_feature, is_token = feature < num_outputs, token < num_tokens
    weight += tl.cast(feature, tl.int64) * WIDTH + first
    to_up = tl.cast(num_outputs, tl.int64) * WIDTH
    if AHEAD > 0:
        _prefetch_rows(weight, is_feature, WIDTH - first, AHEAD)
        if GATED:
            _prefetch_rows(weight + to_up, is_feature, WIDTH - first, AHEAD)
    if OVERLAPS:
        await_results()
    weights = weight[:, None] + column[None, :]
    tokens = x + first + token[None, :] * WIDTH + column[:, None]
    result = tl.zeros((BLOCK_F, TOKENS), tl.float32)
    ups = tl.zeros((BLOCK_F, TOKENS), tl.float32)
    for step in range(STEPS):
        if IS_EVEN:
            of_weight, of_tokens = is_feature[:, None], is_token[None, :]
        else:
            inside = column < WIDTH - first - step * BLOCK_D
            of_weight, of_tokens = is_feature[:, None] & inside[None, :], is_token[None, :] & inside[:, None]
        tile = tl.load(tokens, mask=of_tokens, other=0.0)
        result = tl.dot(tl.load(weights, mask=of_weight, other=0.0), tile, result)
        if GATED:
            ups = tl.dot(tl.load(weights + to_up, mask=of_weight, other=0.0), tile, ups)
        weights += BLOCK_D
        tokens += BLOCK_D
    y += token[None, :] * num_outputs + feature[:, None]
    mask = is_feature[:, None] & is_token[None, :]
    if SPLITS == 1:
        _store_outputs(y, result, ups, mask, x.dtype.element_ty, GATED)
    else:
        parts += tl.cast(block, tl.int64) * (SPLITS * PARTS * TILE) + row[:, None] * TOKENS + token[None, :]
        tl.store(parts + split * (PARTS * TILE), result)
        if GATED:
            tl.store(parts + split * (PARTS * TILE) + TILE, ups)
        tl.debug_barrier()  # all threads have written before one of them says so
        if tl.atomic_add(arrivals + block, 1) == SPLITS - 1:
            tl.store(arrivals + block, 0)
            result = _sum_of_parts(parts, PARTS * TILE, SPLITS)
            if GATED:
                ups = _sum_of_parts(parts + TILE, PARTS * TILE, SPLITS)
            _store_outputs(y, result, ups, mask, x.dtype.element_ty, GATED)


@triton.jit
def _sum_of_parts(parts, stride, SPLITS: tl.constexpr):
    """What the programs of all parts of the width have left, in their order; past the L1 cache, which other processors do not write."""
    result = tl.load(parts, cache_modifier=".cg")
    for split in tl.static_range(1, SPLITS):
        result += tl.load(parts + split * stride, cache_modifier=".cg")
    return result


@triton.jit
def _store_outputs(y, result, ups, mask, TYPE: tl.constexpr, GATED: tl.constexpr):
    if GATED:
        gate = result.to(TYPE).to(tl.float32)
        result = (gate * tl.sigmoid(gate)).to(TYPE).to(tl.float32) * ups.to(TYPE).to(tl.float32)
    tl.store(y, result.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _prefetch_rows(rows, mask, width, AHEAD: tl.constexpr):
    """Asks for the first numbers of some rows, which begin at sixteen bytes, without waiting: as many as AHEAD, and as the width has left."""
    SIZE: tl.constexpr = rows.dtype.element_ty.primitive_bitwidth // 8
    size = tl.where(mask, tl.maximum(tl.minimum(width, AHEAD), 0) * SIZE, 0)
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.gt.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }", "=r,l,r",
        [rows.to(tl.int64), size], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
