"""Collectives over an axis of the mesh, each with its dual collective in backward; on an axis of one rank all are the identity.

| forward | backward |
|---|---|
| `gather_tokens`: all-gather | reduce-scatter |
| `scatter_tokens`: reduce-scatter | all-gather |
| `begin_to_exchange`: all-to-all | all-to-all, back |

Tokens are the first dim, in the order of the ranks. Only `add_up_over` reduces in place; every other collective leaves its input unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

# The operators of torch's functional collectives: torch.compile traces them, and `wait_tensor` waits for their results.
_OPS = torch.ops._c10d_functional
# The collectives that exchange tokens or states; the last argument of each is the name of its process group.
EXCHANGES = frozenset({_OPS.all_gather_into_tensor.default, _OPS.reduce_scatter_tensor.default, _OPS.all_to_all_single.default})


@dataclass(frozen=True)
class Axis:
    """One axis of the rank grid as a rank sees it.

    Args:
        mesh: Mesh of the ranks along the axis; None: this rank alone.
        has_peer_memory: Whether layers exchange tokens through memory of the other ranks (`peer_memory.py`) instead of by collectives.
        places: Mesh of all ranks that divide a parameter of this axis, where ranks of tensor parallelism divide it further; None: `mesh`.
    """

    mesh: DeviceMesh | None = None
    has_peer_memory: bool = False
    places: DeviceMesh | None = None

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
    """Gathers the tokens of all ranks: [N / size, ...] -> [N, ...]. Backward sums the ranks' gradients of each token and scatters the sums."""
    return begin_to_gather(x, axis)()


def begin_to_gather(x: Tensor, axis: Axis) -> Callable[[], Tensor]:
    """Begins `gather_tokens`; returns a function, to be called once, that waits for the tokens of all ranks and returns them.

    Other work may run in between, also in backward, which begins the way back where forward waits and waits where forward begins.
    """
    if axis.size == 1:
        return lambda: x
    pending, way_back = _BeginToGather.apply(x, axis)
    return lambda: _EndGather.apply(pending, way_back, axis)


def scatter_tokens(x: Tensor, axis: Axis) -> Tensor:
    """Sums the contributions of all ranks and keeps the own tokens: [..., F] of N tokens -> [N / size, F]. Backward gathers."""
    return x if axis.size == 1 else _ScatterTokens.apply(x.flatten(0, -2), axis)


def exchange_tokens(x: Tensor, num_sent: list[int], num_received: list[int], axis: Axis) -> Tensor:
    """Sends each rank its share of the tokens x [N, ...] and returns the shares that they send, in the order of the ranks. Not differentiable.

    Args:
        x: The shares of all ranks one after the other.
        num_sent: Tokens for each rank.
        num_received: Tokens from each rank.
        axis: Axis of several ranks.
    """
    return start_exchange(x, num_sent, num_received, axis)()


def start_exchange(x: Tensor, num_sent: list[int], num_received: list[int], axis: Axis) -> Callable[[], Tensor]:
    """Begins `exchange_tokens`; returns a function that waits for the tokens."""
    return _when_done(_begin_to_exchange(x, num_sent, num_received, axis))


def begin_to_exchange(x: Tensor, num_sent: list[int], num_received: list[int], axis: Axis) -> Callable[[], Tensor]:
    """Begins `exchange_tokens`, differentiable; returns a function that waits for the tokens, as `begin_to_gather` does."""
    if axis.size == 1:
        return lambda: x
    pending, way_back = _BeginToExchange.apply(x, num_sent, num_received, axis)
    return lambda: _EndExchange.apply(pending, way_back, num_sent, num_received, axis)


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
    """The text that rank 0 of the world passes, on every rank; it may be None."""
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
    """The texts that all ranks of the world pass, in the order of the ranks, on every rank; `group`, if given, must contain all ranks."""
    if not dist.is_initialized():
        return [text]
    texts: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, text, group=group)
    return texts


# Each of these pairs passes on a tensor that a collective still fills: forward from its beginning to its end, and backward, as the gradient of
# `way_back`, from its end to its beginning. Nothing else may use either.
class _BeginToGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return pending_gather(x, axis), placeholder(x.shape, x)

    @staticmethod
    def backward(ctx: Any, _: None, pending: Tensor) -> tuple[Tensor, None]:
        return wait_for(pending), None


class _EndGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pending: Tensor, way_back: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return wait_for(pending)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        return None, _begin_to_scatter(grad, ctx.axis), None


class _BeginToExchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, num_sent: list[int], num_received: list[int], axis: Axis) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return _begin_to_exchange(x, num_sent, num_received, axis), placeholder(x.shape, x)

    @staticmethod
    def backward(ctx: Any, _: None, pending: Tensor) -> tuple[Tensor, None, None, None]:
        return wait_for(pending), None, None, None


class _EndExchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pending: Tensor, way_back: Tensor, num_sent: list[int], num_received: list[int], axis: Axis) -> Tensor:
        ctx.num_sent, ctx.num_received, ctx.axis = num_sent, num_received, axis
        return wait_for(pending)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None, None]:
        return None, _begin_to_exchange(grad, ctx.num_received, ctx.num_sent, ctx.axis), None, None, None


def placeholder(shape: Sequence[int], like: Tensor) -> Tensor:
    """A tensor without memory for its numbers, which nothing reads: its gradient is a way for a tensor of that shape from one backward to another."""
    return like.new_empty(()).expand(shape)


class _ScatterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _reduce_scatter(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_gather(grad, ctx.axis), None


def start_gather(x: Tensor, axis: Axis) -> Callable[[], Tensor]:
    """Begins to gather the tokens of all ranks; returns a function that waits for them and returns them [N, ...]. Not differentiable."""
    return _when_done(pending_gather(x, axis))


def start_scatter(x: Tensor, axis: Axis) -> Callable[[], Tensor]:
    """Begins to sum over the ranks and scatter by tokens; returns a function that waits and returns [N / size, ...]. Not differentiable."""
    return _when_done(_begin_to_scatter(x, axis))


def _begin_to_scatter(x: Tensor, axis: Axis) -> Tensor:
    return _OPS.reduce_scatter_tensor(x.contiguous(), "sum", axis.size, axis.group.group_name)


def _begin_to_exchange(x: Tensor, num_sent: list[int], num_received: list[int], axis: Axis) -> Tensor:
    return _OPS.all_to_all_single(x.contiguous(), num_received, num_sent, axis.group.group_name)


def pending_gather(x: Tensor, axis: Axis) -> Tensor:
    """The tokens of all ranks [N, ...], which a collective still fills: only `wait_for` may use them. Not differentiable."""
    return _OPS.all_gather_into_tensor(x.contiguous(), axis.size, axis.group.group_name)


def wait_for(pending: Tensor) -> Tensor:
    """What a collective has filled, once it is done."""
    return _OPS.wait_tensor(pending)


def _when_done(pending: Tensor) -> Callable[[], Tensor]:
    return lambda: wait_for(pending)


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
