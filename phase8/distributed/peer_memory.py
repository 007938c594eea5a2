"""Exchanges through the memory of other GPUs, which is reached over NVLink, overlapped with the matrix products that need or make the data.

NCCL's kernels take multiprocessors of the GPU from products that run at the same time. Here copy engines bring the input of a product, or a
product writes its result to the rank that adds it up; a signal tells the receiver that a place has been filled.

Every rank has a place for each rank of the group, which that rank fills:

| exchange | content of a place | how it is filled |
|---|---|---|
| `gathering` | tokens of the other rank | by copy engine |
| `adding` | the other rank's summand | by a matrix product |
| `places_of_gathers` | the other rank's part of a whole tensor | by copy engine |

The first two exchanges have `ROUNDS` sets of places each. An exchange takes the next set without asking whether it is free. All ranks wait for
each other only before the first set is used again, so a late rank finds its data untouched. The memory is torch's symmetric memory. All ranks of
a group begin the same exchanges in the same order.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _symmetric_memory as symmetric_memory

from phase8 import accelerator
from phase8.errors import ConfigError

ROUNDS = 4
# Sets of places of a gather in place: one is in use while the next is filled.
ROUNDS_IN_PLACE = 2


class PeerMemory:
    """Memory on every rank of a group that all ranks of the group reach.

    Args:
        group: Process group of GPUs in one NVLink domain.

    Raises:
        ConfigError: The GPUs do not reach each other's memory.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.rank, self.size = group, group.rank(), group.size()
        # Each rank begins with its neighbour, so that no two write to the same rank at a time.
        self.others = [(self.rank + step) % self.size for step in range(1, self.size)]
        _Room(group, 1, rounds=1)  # raises now, not in the first step, if the GPUs do not reach each other
        self._copies = accelerator.new_stream(priority=-1)
        self._gathering, self._adding = (Ring(group, rounds=ROUNDS) for _ in range(2))

    @contextmanager
    def gathering(self, x: Tensor) -> Iterator[Exchange]:
        """A context in which the own tokens x [n, D] of every rank are copied to every other rank; `of` waits for the tokens of one rank."""
        current = accelerator.current_stream()
        self._copies.wait_stream(current)
        with accelerator.on_stream(self._copies):
            exchange = self._gathering.begin(x.shape, x.dtype)
            for rank in self.others:
                exchange.place_on(rank).copy_(x)
                exchange.filled(rank)
        yield exchange
        current.wait_stream(self._copies)  # the memory of x may be reused after this

    def adding(self, shape: Sequence[int], dtype: torch.dtype) -> Exchange:
        """Begins an exchange of summands: a rank writes one to `place_on(rank)`, calls `filled(rank)`, and reads those of its peers by `of(rank)`."""
        return self._adding.begin(shape, dtype)

    def places_of_gathers(self) -> Ring:
        """Places for gathers of every rank's part into `whole` on every rank, of which one at most may be in use while the next is filled.

        The stream on which a gather begins has to come after what reads the `whole` before the last one. So who gathers on other streams, which wait
        for other readers, needs places of his own.
        """
        return Ring(self.group, rounds=ROUNDS_IN_PLACE, asks_every_time=True)


class Ring:
    """Sets of places that exchanges of one kind use in turn.

    Args:
        group: Process group of the ranks.
        rounds: Number of sets.
        asks_every_time: Whether all ranks wait for each other before every exchange; otherwise only before one that uses the first set.
    """

    def __init__(self, group: dist.ProcessGroup, *, rounds: int, asks_every_time: bool = False):
        self._group, self._rounds, self._asks_every_time = group, rounds, asks_every_time
        self._rooms: list[_Room] = []
        self._next, self._is_recorded = 0, False

    def begin(self, shape: Sequence[int], dtype: torch.dtype) -> Exchange:
        """Begins the next exchange, on the current stream."""
        num_bytes = self._group.size() * torch.Size(shape).numel() * dtype.itemsize
        if not self._rooms or num_bytes > self._rooms[-1].num_bytes:
            self._rooms.append(_Room(self._group, num_bytes, rounds=self._rounds))  # smaller rooms stay: a recorded step may use them
            self._next = 0
        if accelerator.is_recording() != self._is_recorded:  # a recording begins with the first set, and so do the exchanges after it
            self._is_recorded = not self._is_recorded
            self._next = 0
        room, number = self._rooms[-1], self._next
        self._next = (number + 1) % self._rounds
        if number == 0 or self._asks_every_time:
            room.handle.barrier(channel=self._rounds)
        return Exchange(self._group.rank(), room, number, shape, dtype)


class _Room:
    """Memory of a ring on every rank; making it is a collective of the group.

    Args:
        group: Process group of the ranks.
        num_bytes: Bytes of a set of places, which is one round.
        rounds: Number of rounds.
    """

    def __init__(self, group: dist.ProcessGroup, num_bytes: int, *, rounds: int):
        self.size = group.size()
        self.num_bytes = -(-num_bytes // 256) * 256  # products are fastest on places that begin at multiples of 256 bytes
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # newer versions of torch do not need the call
                symmetric_memory.enable_symm_mem_for_group(group.group_name)
            self._own = symmetric_memory.empty(rounds * self.num_bytes, dtype=torch.uint8, device=accelerator.own_gpu())
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
        """The place on `rank`, in round `number`, that rank `of` fills; the places of a round lie in the order of the ranks."""
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        begin = number * self.num_bytes + of * num_bytes
        return self._parts[rank][begin : begin + num_bytes].view(dtype).view(tuple(shape))


class Exchange:
    """One exchange between the ranks of a group. Its waits and signals are enqueued on the stream that is current when they are called.

    Args:
        rank: This rank.
        room: Memory of the exchange.
        number: Number of the round.
        shape: Shape of a place.
        dtype: Dtype of a place.
    """

    def __init__(self, rank: int, room: _Room, number: int, shape: Sequence[int], dtype: torch.dtype):
        self._rank, self._room, self._number, self._shape, self._dtype = rank, room, number, shape, dtype

    def place_on(self, rank: int) -> Tensor:
        """The place on another rank that this rank fills."""
        return self._room.place(rank, self._number, self._rank, self._shape, self._dtype)

    def filled(self, rank: int) -> None:
        """Signals another rank that this rank has filled its place there."""
        self._room.handle.put_signal(rank, channel=self._number)

    def of(self, rank: int) -> Tensor:
        """Waits for another rank's data and returns them; to be called once for each rank, and used before the next exchange of this kind."""
        self._room.handle.wait_signal(rank, channel=self._number)
        return self._room.place(self._rank, self._number, rank, self._shape, self._dtype)

    def whole(self) -> Tensor:
        """The parts of all ranks, flat and in order. A peer's part is there once `of` has waited for it, this rank's once it was written."""
        return self._room.place(self._rank, self._number, 0, (self._room.size * torch.Size(self._shape).numel(),), self._dtype)


_OF_GROUPS: dict[str, PeerMemory] = {}


def peer_memory(group_name: str) -> PeerMemory:
    """The peer memory of a process group; the first call is a collective of its ranks.

    Raises:
        ConfigError: The GPUs of the group do not reach each other's memory.
    """
    group = dist.distributed_c10d._resolve_process_group(group_name)
    memory = _OF_GROUPS.get(group_name)
    if memory is None or memory.group is not group:  # after all groups are destroyed, torch uses their names again
        memory = _OF_GROUPS[group_name] = PeerMemory(group)
    return memory
