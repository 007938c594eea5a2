"""Keyed permutation of [0, size) with random access: the shuffle that needs no table and no generator state.

A Feistel network whose round is the multiplication of Philox, on two parts of about equal width, followed by cycle walking: a value
that falls outside [0, size) is permuted again until it falls inside. The domain is the next power of two, so fewer than two tries are
needed on average. Integers only, 64 bit, hence the same on every platform.

Source: Mitchell, Stokes, Frank, Holmes, "Bandwidth-Optimal Random Shuffling for GPUs" (2022), the bijection of thrust::shuffle; Salmon
et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (2011); Black, Rogaway, "Ciphers with Arbitrary Finite Domains" (2002).
"""

from __future__ import annotations

import hashlib
import operator
import struct
from typing import TypeVar

import numpy as np

from phase8.errors import DataError

Index = TypeVar("Index", int, np.ndarray)

NUM_ROUNDS = 24
MAX_SIZE = 2**62

_MULTIPLIER = 0xD2B74407B1CE6E93
_MASK_32 = 0xFFFFFFFF
_MASK_64 = 0xFFFFFFFFFFFFFFFF
_ROUND_KEYS = struct.Struct(f"<{NUM_ROUNDS}I")


def permute(index: Index, *, size: int, key: tuple[int, ...]) -> Index:
    """Where the permutation of [0, size) chosen by `key` sends `index`.

    Args:
        index: A number in [0, size), or an array of them.
        size: Number of permuted values.
        key: Any integers; every key gives its own permutation.

    Returns:
        A number in [0, size), or a uint64 array of them.

    Raises:
        DataError: A size or an index out of range.
    """
    if not 1 <= size <= MAX_SIZE:
        raise DataError(f"cannot permute {size} values; 1 to {MAX_SIZE} are allowed")
    round_keys = _ROUND_KEYS.unpack(hashlib.shake_128(",".join(map(str, key)).encode()).digest(_ROUND_KEYS.size))
    # Below four bits the two parts are too narrow to be mixed.
    bits = max(4, (size - 1).bit_length())
    if isinstance(index, np.ndarray):
        return _permute_array(index, size, bits, round_keys)
    if not 0 <= index < size:
        raise DataError(f"cannot permute {index}; it must be at least 0 and below {size}")
    value = _bijection(operator.index(index), bits, round_keys)  # a numpy scalar would overflow
    while value >= size:
        value = _bijection(value, bits, round_keys)
    return value


def _permute_array(index: np.ndarray, size: int, bits: int, round_keys: tuple[int, ...]) -> np.ndarray:
    if index.size and not 0 <= int(index.min()) <= int(index.max()) < size:
        raise DataError(f"cannot permute {index.min()} to {index.max()}; they must be at least 0 and below {size}")
    values = _bijection(index.astype(np.uint64), bits, round_keys)
    while (outside := np.flatnonzero(values >= size)).size:
        values[outside] = _bijection(values[outside], bits, round_keys)
    return values


def _bijection(value: Index, bits: int, round_keys: tuple[int, ...]) -> Index:
    """One pass over [0, 2**bits): invertible, since multiplication by an odd number is invertible modulo 2**left_bits."""
    left_bits = bits // 2
    right_bits = bits - left_bits
    left_mask, right_mask = (1 << left_bits) - 1, (1 << right_bits) - 1
    left, right = value >> right_bits, value & right_mask
    for key in round_keys:
        product = (left * _MULTIPLIER) & _MASK_64
        low = ((product & _MASK_32) << (right_bits - left_bits)) | (right >> left_bits)
        left, right = ((product >> 32) ^ key ^ right) & left_mask, low & right_mask
    return (left << right_bits) | right
