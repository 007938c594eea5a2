"""The number of tokens whose logits exist at the same time on a GPU, and their memory: plain arithmetic for kernel and planner."""

from __future__ import annotations

SCRATCH_BYTES = 1_500_000_000
SCRATCH_SHARE = 16  # this fraction (1 / 16) of the memory of a small device
MIN_CHUNK_TOKENS = 512
HEAD_ALIGNMENT = 64  # rows of the cast head: whole 128-byte lines of bf16 logits


def choose_chunk_tokens(num_tokens: int, vocabulary: int, width: int, *, element_bytes: int, scratch_bytes: int) -> int:
    """Number of rows whose logits exist at the same time.

    - As many as fit beside the cast head. Each chunk passes over the whole gradient of the head: 8 V D bytes against 6 R V D FLOP, which
      on an H100 (3 TB/s, 700 TFLOP/s) are 31 % of the time of the matmuls at R = 1024, 15 % at 2048, 8 % at 4096, unless overlapped.
    - All tokens, or else a power of two: the tiles of dhidden [R, D] then fill the multiprocessors in nearly whole waves (2048 x 2048 are
      128 tiles of 128 x 256 for 132 of them, 3072 x 2048 are 192).
    - At least `MIN_CHUNK_TOKENS`: with fewer the matmuls are no longer bound by arithmetic, whatever the memory.

    Args:
        num_tokens: N.
        vocabulary: V.
        width: D.
        element_bytes: Bytes per element of logits and cast head.
        scratch_bytes: Bytes for both together.
    """
    fitting = max(scratch_bytes // (leading_dimension(vocabulary) * element_bytes) - width, MIN_CHUNK_TOKENS)  # the head is as large as D rows
    return num_tokens if fitting >= num_tokens else 1 << (fitting.bit_length() - 1)


def leading_dimension(vocabulary: int) -> int:
    """V rounded up, so that every row of logits is aligned."""
    return -(-vocabulary // HEAD_ALIGNMENT) * HEAD_ALIGNMENT


def scratch_limit(device_bytes: int | None) -> int:
    """Bytes that logits and cast head may take on a device with this much memory; None: a large device."""
    return SCRATCH_BYTES if device_bytes is None else min(SCRATCH_BYTES, device_bytes // SCRATCH_SHARE)


def scratch_bytes(num_tokens: int, vocabulary: int, width: int, *, element_bytes: int, device_bytes: int | None) -> int:
    """Bytes of the logits of a chunk and of the cast head; arguments as above."""
    limit = scratch_limit(device_bytes)
    rows = choose_chunk_tokens(num_tokens, vocabulary, width, element_bytes=element_bytes, scratch_bytes=limit)
    return (min(rows, num_tokens) + width) * leading_dimension(vocabulary) * element_bytes
