"""Matrix products of consecutive groups of rows, each group with a weight of its own, as one operator: the products of experts.

Shapes: S rows, E groups, D inner width, F outer width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from phase8.accelerator import has_kernels
from phase8.kernels.backends import GROUPED, expert_backend
from phase8.kernels.reference import grouped_product as reference


def grouped_product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Products [S, F]; arguments as in the reference of the same name. Rows after the last group get any value, in the result and in gradients."""
    return _forward(rows, weight, ends)


@torch.library.custom_op("phase8::grouped_product", mutates_args=())
def _forward(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    if _is_grouped_by_torch(rows, weight):
        from phase8.kernels.gpu.grouped_product import product

        return product(rows, weight, ends)
    return reference.grouped_product(rows, weight, ends)


@torch.library.custom_op("phase8::grouped_product_backward", mutates_args=())
def _backward(dy: Tensor, rows: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    if _is_grouped_by_torch(rows, weight):
        from phase8.kernels.gpu.grouped_product import product_backward

        return product_backward(dy.contiguous(), rows, weight, ends)
    return reference.grouped_product_backward(dy, rows, weight, ends)


def _is_grouped_by_torch(rows: Tensor, weight: Tensor) -> bool:
    return has_kernels(rows.device.type) and len(rows) > 0 and expert_backend(rows.device, rows.dtype, tuple(weight.shape[1:])).name == GROUPED


@_forward.register_fake
def _(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


@_backward.register_fake
def _(dy: Tensor, rows: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_backward(dy, *ctx.saved_tensors), None


_forward.register_autograd(_autograd, setup_context=_setup_context)
