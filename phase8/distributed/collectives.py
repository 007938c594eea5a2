"""Collectives over one axis of the mesh, each with the collective that is its dual in backward. On an axis of one rank all are the identity.

| forward | backward |
|---|---|
| `gather_tokens`: all-gather | reduce-scatter |
| `scatter_tokens`: reduce-scatter | all-gather |

Tokens are the first dim, in the order of the ranks. Nothing but by `add_up_over` is reduced in place: the input of a layer stays what it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

# The operators behind torch's functional collectives: torch.compile traces them, and their results are waited for explicitly.
_OPS = torch.ops._c10d_functional


@dataclass(frozen=True)
class Axis:
    """One axis of the rank grid as a rank sees it.

    Args:
        mesh: The ranks along it; None: this rank alone.
        has_peer_memory: Layers exchange tokens through memory of the other ranks (`peer_memory.py`), not by collectives.
    """

    mesh: DeviceMesh | None = None
    has_peer_memory: bool = False

    @property
    def size(self) -> int:
        """Number of ranks."""
        return 1 if self.mesh is None else self.mesh.size()

    @property
    def index(self) -> int:
        """Position of this rank."""
        return 0 if self.mesh is None else self.mesh.get_local_rank()

    @property
    def group(self) -> dist.ProcessGroup:
        """Process group of an axis of several ranks."""
        assert self.mesh is not None
        return self.mesh.get_group()


ALONE = Axis()


def gather_tokens(x: Tensor, axis: Axis) -> Tensor:
    """The tokens of all ranks: [N / size, ...] -> [N, ...]. Backward sums what the ranks say of each token and scatters it."""
    return x if axis.size == 1 else _GatherTokens.apply(x, axis)


def begin_to_gather(x: Tensor, axis: Axis) -> Tensor:
    """Begins with `gather_tokens`; the result may be used after `end_gather` only, and other work may come before that."""
    return x if axis.size == 1 else _BeginToGather.apply(x, axis)


def end_gather(pending: Tensor, axis: Axis) -> Tensor:
    """Waits for the tokens that `begin_to_gather` has begun to gather over this axis."""
    return pending if axis.size == 1 else _Await.apply(pending)


def scatter_tokens(x: Tensor, axis: Axis) -> Tensor:
    """The sum over the ranks of their contributions, cut by tokens: [..., F] of N tokens -> [N / size, F]. Backward gathers."""
    return x if axis.size == 1 else _ScatterTokens.apply(x.flatten(0, -2), axis)


@torch.no_grad()
def sum_over(x: Tensor, *axes: Axis) -> Tensor:
    """The sum over the ranks of an axis, or of several axes one after the other; not differentiable."""
    for axis in axes:
        x = _all_reduce(x, axis, dist.ReduceOp.SUM)
    return x


@torch.no_grad()
def add_up_over(x: Tensor, axis: Axis) -> None:
    """Replaces x by the sum over several ranks, without the memory of a copy; not differentiable."""
    dist.all_reduce(x, group=axis.group)


@torch.no_grad()
def maximum_over(x: Tensor, axis: Axis) -> Tensor:
    """The maximum over the ranks; not differentiable."""
    return _all_reduce(x, axis, dist.ReduceOp.MAX)


def broadcast_text(text: str | None) -> str | None:
    """What rank 0 of the world says, on every rank; None travels too."""
    if not dist.is_initialized():
        return text
    data = torch.frombuffer(bytearray(text.encode(errors="surrogatepass")), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)
    size = torch.tensor(-1 if text is None else len(data))
    dist.broadcast(size, src=0)
    if size < 0:
        return None
    data = data if dist.get_rank() == 0 else torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(data, src=0)
    return bytes(data.tolist()).decode(errors="surrogatepass")  # a path need not be UTF-8


def gather_texts(text: str | None, group: dist.ProcessGroup | None = None) -> list[str | None]:
    """What every rank of the world says, in order, on every rank; over a group of all ranks if one is given."""
    if not dist.is_initialized():
        return [text]
    texts: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, text, group=group)
    return texts


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _all_gather(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(grad, ctx.axis), None


class _BeginToGather(_GatherTokens):
    """Returns what is not there yet; `_Await` has to come between it and its users."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _begin_to_gather(x, axis)


class _Await(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pending: Tensor) -> Tensor:
        return _OPS.wait_tensor(pending)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _ScatterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _reduce_scatter(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_gather(grad, ctx.axis), None


def start_gather(x: Tensor, axis: Axis) -> Callable[[], Tensor]:
    """Begins to gather the tokens of all ranks [N, ...]; what it returns waits for them. Not differentiable."""
    return _when_done(_begin_to_gather(x, axis))


def start_scatter(x: Tensor, axis: Axis) -> Callable[[], Tensor]:
    """Begins to sum over the ranks and to scatter by tokens [N / size, ...]; what it returns waits. Not differentiable."""
    return _when_done(_OPS.reduce_scatter_tensor(x.contiguous(), "sum", axis.size, axis.group.group_name))


def _begin_to_gather(x: Tensor, axis: Axis) -> Tensor:
    return _OPS.all_gather_into_tensor(x.contiguous(), axis.size, axis.group.group_name)


def _when_done(pending: Tensor) -> Callable[[], Tensor]:
    return lambda: _OPS.wait_tensor(pending)


def _all_gather(x: Tensor, axis: Axis) -> Tensor:
    return start_gather(x, axis)()


def _reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    return start_scatter(x, axis)()


def _all_reduce(x: Tensor, axis: Axis, operation: dist.ReduceOp) -> Tensor:
    if axis.size == 1:
        return x
    reduced = x.clone()
    dist.all_reduce(reduced, op=operation, group=axis.group)
    return reduced
