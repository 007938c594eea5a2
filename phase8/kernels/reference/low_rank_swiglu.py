"""The gated feed-forward between the bottlenecks of low-rank linears, in plain torch.

Shapes: N tokens, R rank, F feed-forward width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from phase8.kernels.dtypes import at_least_fp32


def low_rank_swiglu(bottlenecks: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x')).

    Args:
        bottlenecks: x and beside it x' [..., 2 R].
        gate: [F, R]; like the other weights it is cast to the dtype of the bottlenecks.
        up: [F, R].
        down: [R, F].

    Returns:
        [..., R].
    """
    x_gate, x_up = bottlenecks.chunk(2, dim=-1)
    gate, up, down = (weight.to(bottlenecks.dtype) for weight in (gate, up, down))
    return F.linear(F.silu(F.linear(x_gate, gate)) * F.linear(x_up, up), down)


def low_rank_swiglu_backward(dy: Tensor, bottlenecks: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the four arguments, from that of the result [N, R], without autograd; `bottlenecks` is [N, 2 R]."""
    dy, wide, wide_gate, wide_up, wide_down = (at_least_fp32(x) for x in (dy, bottlenecks, gate, up, down))
    x_gate, x_up = wide.chunk(2, dim=-1)
    before, factor, dhidden = x_gate @ wide_gate.T, x_up @ wide_up.T, dy @ wide_down
    sigmoid = torch.sigmoid(before)
    silu = before * sigmoid
    dbefore, dfactor = dhidden * factor * (sigmoid + silu * (1 - sigmoid)), dhidden * silu
    dbottlenecks = torch.cat((dbefore @ wide_gate, dfactor @ wide_up), dim=-1).to(bottlenecks.dtype)
    dgate, dup, ddown = dbefore.T @ x_gate, dfactor.T @ x_up, dy.T @ (silu * factor)
    return dbottlenecks, dgate.to(gate.dtype), dup.to(up.dtype), ddown.to(down.dtype)
