"""Matrix products of consecutive groups of rows, one group after the other. Shapes as in the operator of the same name."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from phase8.kernels.fp32_product import fp32_product


def grouped_product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Product of each group of rows and its weight, rows[begin : end] W^T; rows after the last group get zeros.

    Args:
        rows: Rows [S, D].
        weight: Weight of each group [E, F, D].
        ends: End of each group, which is the begin of the next one, int32 [E].

    Returns:
        Products [S, F].
    """
    if len(weight) == 1:
        return fp32_product(_until(ends, rows), weight[0].T)
    products = [fp32_product(rows[begin:end], each.T) for (begin, end), each in zip(_groups(ends), weight.unbind(), strict=True)]
    return _filled_up(torch.cat(products), len(rows))


def grouped_product_backward(dy: Tensor, rows: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of rows [S, D], zero after the last group, and of the weights [E, F, D], zero where a group is empty; from that of the products."""
    if len(weight) == 1:
        dy, rows = _until(ends, dy), _until(ends, rows)
        return fp32_product(dy, weight[0]), fp32_product(dy.T, rows)[None]
    groups = _groups(ends)
    drows = torch.cat([fp32_product(dy[begin:end], each) for (begin, end), each in zip(groups, weight.unbind(), strict=True)])
    return _filled_up(drows, len(rows)), torch.stack([fp32_product(dy[begin:end].T, rows[begin:end]) for begin, end in groups])


def _until(end: Tensor, rows: Tensor) -> Tensor:
    """The rows of a single group, and zeros for those after it: the host need not know their number, and may record the product."""
    return torch.where(torch.arange(len(rows), device=rows.device)[:, None] < end, rows, 0)


def _groups(ends: Tensor) -> list[tuple[int, int]]:
    return list(pairwise([0, *ends.tolist()]))


def _filled_up(rows: Tensor, count: int) -> Tensor:
    return torch.cat((rows, rows.new_zeros(count - len(rows), rows.shape[1])))
