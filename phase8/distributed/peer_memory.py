"""Exchanges through memory of other GPUs that this one reaches over NVLink, beside the matrix products that need or make what is exchanged.

NCCL's kernels take processors of the GPU from the products beside them. Here copy engines bring what a product reads, and a product itself
writes what another rank adds up; a signal says when a place has been filled.

| exchange | places on every rank, one for each rank | who fills them |
|---|---|---|
| `gathering` | tokens of that rank | that rank, by copy engine |
| `adding` | what that rank adds to a sum | that rank, by a product |
| `gathering_in_place` | the part of that rank of something whole | that rank, by copy engine |

Of the first two there are `ROUNDS` sets of places. An exchange takes the next set without asking whether it is free: only where the first one's
turn comes again do all ranks wait for each other, so that one that is late finds everything there. The memory is torch's symmetric memory.
All ranks of a group begin the same exchanges in the same order.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _symmetric_memory as symmetric_memory

from phase8.errors import ConfigError

ROUNDS = 4
# Of `gathering_in_place`: one in use, one on its way.
ROUNDS_IN_PLACE = 2


class PeerMemory:
    """Memory on every rank of a group that all of them reach.

    Args:
        group: GPUs of one NVLink domain.

    Raises:
        ConfigError: They do not reach each other's memory.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.rank, self.size = group, group.rank(), group.size()
        # Each rank begins with its neighbour: no two write to the same one at a time.
        self.others = [(self.rank + step) % self.size for step in range(1, self.size)]
        _Room(group, 1, rounds=1)  # fails now, not in the first step
        self._copies = torch.cuda.Stream(priority=-1)
        self._gathering, self._adding = (_Ring(group, rounds=ROUNDS) for _ in range(2))
        self._gathering_in_place = _Ring(group, rounds=ROUNDS_IN_PLACE, asks_every_time=True)

    @contextmanager
    def gathering(self, x: Tensor) -> Iterator[Exchange]:
        """While the block runs, brings the own tokens x [n, D] of every rank to every other, who takes each rank's with `of`."""
        current = torch.cuda.current_stream()
        self._copies.wait_stream(current)
        with torch.cuda.stream(self._copies):
            exchange = self._gathering.begin(x.shape, x.dtype)
            for rank in self.others:
                exchange.place_on(rank).copy_(x)
                exchange.filled(rank)
        yield exchange
        current.wait_stream(self._copies)  # x may be given back now

    def adding(self, shape: Sequence[int], dtype: torch.dtype) -> Exchange:
        """Lets every rank leave a summand of this shape with every other: it fills `place_on` that one, says so, and takes each rank's with `of`."""
        return self._adding.begin(shape, dtype)

    def gathering_in_place(self, shape: Sequence[int], dtype: torch.dtype) -> Exchange:
        """Lets every rank bring its part, of this shape, to `whole` of every rank. One `whole` may be in use while the next is gathered, no more."""
        return self._gathering_in_place.begin(shape, dtype)


class _Ring:
    """Sets of places that exchanges of one kind take in turn.

    Args:
        group: The ranks.
        rounds: Sets.
        asks_every_time: All ranks wait for each other before every exchange; otherwise before those that take the first set.
    """

    def __init__(self, group: dist.ProcessGroup, *, rounds: int, asks_every_time: bool = False):
        self._group, self._rounds, self._asks_every_time = group, rounds, asks_every_time
        self._rooms: list[_Room] = []
        self._next, self._is_recorded = 0, False

    def begin(self, shape: Sequence[int], dtype: torch.dtype) -> Exchange:
        """The next exchange, on the current stream."""
        num_bytes = self._group.size() * torch.Size(shape).numel() * dtype.itemsize
        if not self._rooms or num_bytes > self._rooms[-1].num_bytes:
            self._rooms.append(_Room(self._group, num_bytes, rounds=self._rounds))  # smaller ones stay: a recorded step may use them
            self._next = 0
        if torch.cuda.is_current_stream_capturing() != self._is_recorded:  # what is replayed begins with the first, and so does what comes between
            self._is_recorded = not self._is_recorded
            self._next = 0
        room, number = self._rooms[-1], self._next
        self._next = (number + 1) % self._rounds
        if number == 0 or self._asks_every_time:
            room.handle.barrier(channel=self._rounds)
        return Exchange(self._group.rank(), room, number, shape, dtype)


class _Room:
    """Memory of a ring on every rank; making it is a collective.

    Args:
        group: The ranks.
        num_bytes: Of a round.
        rounds: How many.
    """

    def __init__(self, group: dist.ProcessGroup, num_bytes: int, *, rounds: int):
        self.size = group.size()
        self.num_bytes = -(-num_bytes // 256) * 256  # products are fastest on places that begin at round addresses
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # not needed by every torch that this runs on
                symmetric_memory.enable_symm_mem_for_group(group.group_name)
            device = torch.device("cuda", torch.cuda.current_device())
            self._own = symmetric_memory.empty(rounds * self.num_bytes, dtype=torch.uint8, device=device)
            self.handle = symmetric_memory.rendezvous(self._own, group)
            self._parts = [self.handle.get_remote_tensor(rank, self._own.shape, torch.uint8) for rank in range(self.size)]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise ConfigError(
                f"parallel.async_tensor_parallel or zero.copy_engine_gather is true, but GPUs do not reach each other's memory ({reason}); "
                "set it to false."
            ) from error

    def place(self, rank: int, number: int, of: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """On a rank, in a round, what another rank fills; the places of a round follow one another in the order of the ranks."""
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        begin = number * self.num_bytes + of * num_bytes
        return self._parts[rank][begin : begin + num_bytes].view(dtype).view(tuple(shape))


class Exchange:
    """What ranks bring each other once. Whatever is waited for or said is so on the stream that is current then.

    Args:
        rank: This one.
        room: Where.
        number: Of the round.
        shape: Of what a rank brings.
        dtype: Of it.
    """

    def __init__(self, rank: int, room: _Room, number: int, shape: Sequence[int], dtype: torch.dtype):
        self._rank, self._room, self._number, self._shape, self._dtype = rank, room, number, shape, dtype

    def place_on(self, rank: int) -> Tensor:
        """What this rank fills on another."""
        return self._room.place(rank, self._number, self._rank, self._shape, self._dtype)

    def filled(self, rank: int) -> None:
        """Says so to that rank."""
        self._room.handle.put_signal(rank, channel=self._number)

    def of(self, rank: int) -> Tensor:
        """What another rank has brought, which is waited for: once for each rank, and to be used before the next exchange of the kind."""
        self._room.handle.wait_signal(rank, channel=self._number)
        return self._room.place(self._rank, self._number, rank, self._shape, self._dtype)

    def whole(self) -> Tensor:
        """The parts of all ranks, one after the other in one dim; each is there when it was waited for, that of this rank when this one fills it."""
        return self._room.place(self._rank, self._number, 0, (self._room.size * torch.Size(self._shape).numel(),), self._dtype)


_OF_GROUPS: dict[str, PeerMemory] = {}


def peer_memory(group_name: str) -> PeerMemory:
    """That of a process group; the first call is a collective of its ranks.

    Raises:
        ConfigError: They do not reach each other's memory.
    """
    group = dist.distributed_c10d._resolve_process_group(group_name)
    memory = _OF_GROUPS.get(group_name)
    if memory is None or memory.group is not group:  # once all groups were destroyed their names come again
        memory = _OF_GROUPS[group_name] = PeerMemory(group)
    return memory
