"""Inclusive scan of an associative operation in logarithmic depth and linear work.

Source: G. Blelloch, "Prefix sums and their applications" (1990).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Elements = tuple[Tensor, ...]


def associative_scan(combine: Callable[[Elements, Elements], Elements], elements: Elements) -> Elements:
    """Prefix combinations e_0, e_0 e_1, e_0 e_1 e_2, ... along dim 1.

    Args:
        combine: Associative operation; the first argument holds the earlier elements.
        elements: One element per position of dim 1, as a tuple of tensors.
    """
    length = elements[0].shape[1]
    if length < 2:
        return elements
    pairs = combine(tuple(x[:, 0 : length - 1 : 2] for x in elements), tuple(x[:, 1::2] for x in elements))
    odd = associative_scan(combine, pairs)
    even = tuple(x[:, :1] for x in elements)
    if length > 2:
        rest = combine(tuple(x[:, : (length - 1) // 2] for x in odd), tuple(x[:, 2::2] for x in elements))
        even = tuple(torch.cat(parts, dim=1) for parts in zip(even, rest, strict=True))
    return tuple(_interleave(first, second) for first, second in zip(even, odd, strict=True))


def linear_scan(decay: Tensor, x: Tensor) -> Tensor:
    """The recurrence s_i = decay_i * s_{i-1} + x_i along dim 1, s_{-1} = 0; `decay` broadcasts against `x`."""
    return associative_scan(lambda early, late: (late[0] * early[0], late[0] * early[1] + late[1]), (decay, x))[1]


def _interleave(even: Tensor, odd: Tensor) -> Tensor:
    """even_0, odd_0, even_1, odd_1, ... along dim 1; `even` may have one element more."""
    paired = torch.stack((even[:, : odd.shape[1]], odd), dim=2).flatten(1, 2)
    return torch.cat((paired, even[:, odd.shape[1] :]), dim=1) if even.shape[1] > odd.shape[1] else paired
