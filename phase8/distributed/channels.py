"""Point-to-point channels between pipeline stages; each is a communicator of two ranks, used in one direction for one kind of payload.

    N  tokens of this rank in a microbatch        D  width of the residual stream

Messages [N, D] carry neither label nor shape. Both sides post them in the same order, which `lowering.lower` guarantees, and know their shapes
beforehand; shapes may change from step to step. A difference would go unnoticed (a short message fills the front of the buffer), so two things
are checked: each message that is sent has the shape and dtype of the step's form, and both ends of a channel have the same form, which they
compare by eight bytes per channel before the step begins.

A send is started and not waited for: waiting for each one would deadlock 1f1b. Its tensor stays alive until the send has completed, at the
latest until the flush at the end of the step.

All communicators are made when the channels are opened, in one order on all ranks. NCCL would otherwise make each at its first message, and
the sender would block until the receiver reaches it.
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
    """The identity of a channel.

    Args:
        source: Stage that sends.
        destination: Stage that receives.
        payload: Kind of tensor that the channel carries.
    """

    source: int
    destination: int
    payload: str


@dataclass(frozen=True)
class MessageForm:
    """The form of the messages of a step, the same on all stages of a pipeline.

    Args:
        shapes: Message shape of each microbatch: [N, D], or any other that every chunk keeps.
        dtype: Dtype of all messages.
        device: Device of this stage's messages; it may differ between stages.
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
        group: Process group of the two ranks.
        peer: Rank at the other end, counted in the world.
        sends: Whether this end is the source.
    """

    group: dist.ProcessGroup
    peer: int
    sends: bool

    def start(self, tensor: Tensor) -> dist.Work:
        """Begins to send a tensor or, at the destination, to receive into it."""
        work = dist.isend(tensor, self.peer, group=self.group) if self.sends else dist.irecv(tensor, self.peer, group=self.group)
        assert work is not None  # this rank belongs to the group
        return work


class Channels:
    """The channels of one stage; `open_channels` makes them.

    Args:
        ends: Ends at this stage, in the order in which all ranks opened the channels.
    """

    def __init__(self, ends: dict[Route, _Channel]):
        self._ends = ends
        self._leaving: deque[tuple[dist.Work, Tensor]] = deque()

    @torch.no_grad()
    def agree(self, form: MessageForm, step: str) -> None:
        """Checks that this stage and its neighbours are about to exchange the same messages.

        Args:
            form: Form of this step's messages.
            step: Text that both sides must have in common too, such as the number of stages.

        Raises:
            CommunicationError: A neighbour announces another form or another text.
        """
        if not self._ends:
            return
        said = f"{step}, {form.dtype} messages of shapes {form.shapes}"
        own = torch.tensor([int.from_bytes(hashlib.sha256(said.encode()).digest()[:7])], device=form.device)
        announced = {route: own if end.sends else torch.empty_like(own) for route, end in self._ends.items()}
        # The order is that of opening: at the first call, NCCL waits here for the other end.
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
        """Posts the receive of the next message of a channel; returns a function that waits for the message and returns it.

        Args:
            route: Route of the channel.
            form: Form of this step's messages.
            microbatch: Microbatch of the message.
        """
        message = torch.empty(form.shapes[microbatch], dtype=form.dtype, device=form.device)
        work = self._ends[route].start(message)

        def wait() -> Tensor:
            work.wait()
            return message

        return wait

    def flush(self) -> None:
        """Waits until every send has completed."""
        while self._leaving:
            self._await_oldest()

    def _await_oldest(self) -> None:
        work, _ = self._leaving.popleft()
        work.wait()


def open_channels(routes: Sequence[Route], mesh: Mesh) -> Channels:
    """Makes the communicators of every pipeline of the mesh and uses each once; a collective of all ranks.

    Args:
        routes: Routes between the stages, in one order on all ranks; empty for a single stage.
        mesh: Mesh of the ranks; each pipeline runs along its axis pp.

    Raises:
        CommunicationError: The ranks were not given the same routes.
    """
    if not routes or mesh.device_mesh is None:
        return Channels({})
    ends = {}
    for route in routes:
        for ranks in mesh.device_mesh.mesh.flatten(1).T.tolist():
            source, destination = ranks[route.source], ranks[route.destination]
            group = dist.new_group([source, destination])  # all ranks make every group, since torch numbers groups
            if mesh.rank in (source, destination):
                sends = mesh.rank == source
                ends[route] = _Channel(group, peer=destination if sends else source, sends=sends)
    channels = Channels(ends)
    form = MessageForm((), torch.int64, torch.device(mesh.device_mesh.device_type))
    channels.agree(form, f"channels {[tuple(map(str, route)) for route in routes]}")
    return channels
