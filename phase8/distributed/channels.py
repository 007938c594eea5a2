"""Point-to-point channels between pipeline stages: each a communicator of two ranks, used in one direction for one kind of payload.

    N  tokens of this rank in a microbatch        D  width of the residual stream

Messages [N, D] carry neither label nor shape. Their order is that of the posts on both sides, which `lowering.lower` guarantees; their
shapes are known to both sides beforehand, and may change from step to step. A difference would be accepted in silence (a short message
fills the front of the buffer), so two things are checked: what is sent has the shape and dtype of the step's form, and, by eight bytes per
channel before the step begins, both ends mean the same form.

A send is started and not waited for: waiting one by one deadlocks 1f1b. Its tensor stays alive until it is known to have left, at the
latest until the flush at the end of the step.

All communicators come into being when the channels are opened, in one order on all ranks. NCCL would otherwise make each at its first
message, and the sender would stand still until the receiver gets there.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from phase8.distributed.mesh import Mesh
from phase8.errors import CommunicationError


class Route(NamedTuple):
    """Which channel it is.

    Args:
        source: Stage that sends.
        destination: Stage that receives.
        payload: What goes through it.
    """

    source: int
    destination: int
    payload: str


@dataclass(frozen=True)
class MessageForm:
    """What the messages of a step look like, the same on all stages of a pipeline.

    Args:
        shapes: Of each microbatch, [N, D] or any other that every chunk keeps.
        dtype: Of all messages.
        device: Where they lie; stages need not agree about it.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    device: torch.device

    def fits(self, tensor: Tensor, microbatch: int) -> bool:
        """Whether a tensor may be sent for a microbatch."""
        return tuple(tensor.shape) == self.shapes[microbatch] and tensor.dtype == self.dtype


@dataclass(frozen=True)
class _Channel:
    """One end of a channel.

    Args:
        group: The two ranks.
        peer: Rank in the world at the other end.
        sends: This end is the source.
    """

    group: dist.ProcessGroup
    peer: int
    sends: bool

    def start(self, tensor: Tensor) -> dist.Work:
        """Begins to send a tensor or to fill it."""
        work = dist.isend(tensor, self.peer, group=self.group) if self.sends else dist.irecv(tensor, self.peer, group=self.group)
        assert work is not None  # this rank belongs to the group
        return work


class Channels:
    """The channels of one stage; get them by `open_channels`.

    Args:
        ends: Of this stage, in the order in which all ranks opened them.
    """

    def __init__(self, ends: dict[Route, _Channel]):
        self._ends = ends
        self._leaving: deque[tuple[dist.Work, Tensor]] = deque()

    @torch.no_grad()
    def agree(self, form: MessageForm, step: str) -> None:
        """Makes sure that the neighbours are about to exchange the same messages.

        Args:
            form: Of this step's messages.
            step: What else both sides must agree about, such as the number of stages.

        Raises:
            CommunicationError: A neighbour announces something else.
        """
        if not self._ends:
            return
        said = f"{step}, {form.dtype} messages of shapes {form.shapes}"
        own = torch.tensor([int.from_bytes(hashlib.sha256(said.encode()).digest()[:7])], device=form.device)
        announced = {route: own if end.sends else torch.empty_like(own) for route, end in self._ends.items()}
        # Started in the order of opening: at the first call, NCCL waits here for the other end.
        for work in [end.start(announced[route]) for route, end in self._ends.items()]:
            work.wait()
        for route, digest in announced.items():
            if not torch.equal(digest, own):
                raise CommunicationError(
                    f"pipeline stage {route.source} announces another step than stage {route.destination}, which expects {said}; "
                    "give all stages the same microbatches."
                )

    @torch.no_grad()
    def send(self, route: Route, tensor: Tensor) -> None:
        """Starts to send a tensor, which must not change until the flush."""
        tensor = tensor.detach().contiguous()
        self._leaving.append((self._ends[route].start(tensor), tensor))
        while self._leaving and self._leaving[0][0].is_completed():
            self._await_oldest()

    @torch.no_grad()
    def receive(self, route: Route, form: MessageForm, microbatch: int) -> Callable[[], Tensor]:
        """Posts the receive of the next message of a channel; what it returns waits for the message.

        Args:
            route: The channel.
            form: Of this step's messages.
            microbatch: Whose message it is.
        """
        message = torch.empty(form.shapes[microbatch], dtype=form.dtype, device=form.device)
        work = self._ends[route].start(message)

        def wait() -> Tensor:
            work.wait()
            return message

        return wait

    def flush(self) -> None:
        """Waits until everything has left."""
        while self._leaving:
            self._await_oldest()

    def _await_oldest(self) -> None:
        work, _ = self._leaving.popleft()
        work.wait()


def open_channels(routes: Sequence[Route], mesh: Mesh) -> Channels:
    """Makes the communicators of every pipeline of the mesh, and uses each once. All ranks must call it at the same time.

    Args:
        routes: Between the stages, in one order on all ranks; none for a single stage.
        mesh: The ranks; each pipeline runs along its axis pp.

    Raises:
        CommunicationError: The ranks were not given the same routes.
    """
    if not routes or mesh.device_mesh is None:
        return Channels({})
    ends = {}
    for route in routes:
        for ranks in mesh.device_mesh.mesh.flatten(1).T.tolist():
            source, destination = ranks[route.source], ranks[route.destination]
            group = dist.new_group([source, destination])  # by all ranks: names of groups are counted
            if mesh.rank in (source, destination):
                sends = mesh.rank == source
                ends[route] = _Channel(group, peer=destination if sends else source, sends=sends)
    channels = Channels(ends)
    form = MessageForm((), torch.int64, torch.device(mesh.device_mesh.device_type))
    channels.agree(form, f"channels {[tuple(map(str, route)) for route in routes]}")
    return channels
