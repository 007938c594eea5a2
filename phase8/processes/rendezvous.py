"""How the processes of a run meet: a store, the name of the attempt, and the default process group.

torchrun keeps one store over all its restarts, and none of its variables names the attempt consistently on every host. So rank 0 chooses
a name for the attempt, and all keys of the attempt begin with it: an attempt never reads what an earlier one left in the store.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from phase8 import accelerator
from phase8.closing import Tolerated
from phase8.errors import CommunicationError, ConfigError
from phase8.processes.bootstrap import World
from phase8.processes.exit import first_line
from phase8.processes.failure import describe_ranks
from phase8.terminal import warn

POLL_SECONDS = 0.02
# The backends time out later than the watch, which can report who hangs and where.
BACKEND_MARGIN_SECONDS = 60.0


@contextmanager
def process_group(world: World, *, device_type: str = "cpu", timeout_seconds: float = 600.0) -> Iterator[str | None]:
    """A context manager for the default process group; yields the name of the attempt.

    A single process without a launcher gets no group, and None. After an error with several ranks the group is not destroyed: destroying it
    could wait for a rank that never comes, and the process is about to end.

    Args:
        world: From `world_from_environment`.
        device_type: An accelerator adds its own backend, NCCL on GPUs; tensors on the host always go through gloo.
        timeout_seconds: How long to wait for the other ranks.

    Raises:
        CommunicationError: The store cannot be reached, or some ranks did not arrive in time.
        ConfigError: There are more processes than accelerators on this host, or no backend joins these.
    """
    if world.address is None:
        yield None
        return
    backends = accelerator.collectives(device_type)
    if accelerator.is_accelerator(device_type) and accelerator.count(device_type) < world.local_world_size:
        raise ConfigError(
            f"{world.local_world_size} processes were started on a host with {accelerator.in_words(device_type, accelerator.count(device_type))}; "
            "start one process per device (torchrun --nproc_per_node), or use --device cpu."
        )
    store = connect(world, timeout_seconds=timeout_seconds, serve=world.hosts_store)
    attempt = meet(store, world, timeout_seconds=timeout_seconds)
    _initialise(world, dist.PrefixStore(f"{attempt}/group", store), backends=backends, timeout_seconds=timeout_seconds)
    completed = False
    try:
        yield attempt
        completed = True
    finally:
        if completed or world.world_size == 1:
            with Tolerated("the process group did not end as it should", warn):
                dist.destroy_process_group()
                _say_goodbye(dist.PrefixStore(attempt, store), world)


def connect(world: World, *, timeout_seconds: float, serve: bool = False) -> dist.Store:
    """Opens a separate connection to the store; with `serve`, opens the store itself.

    Raises:
        CommunicationError: The store cannot be reached.
    """
    host, port = world.address
    timeout = timedelta(seconds=timeout_seconds)
    try:
        return dist.TCPStore(host, port, is_master=serve, timeout=timeout, wait_for_workers=False)
    except (dist.DistError, ValueError) as error:
        raise CommunicationError(
            f"rank {world.rank} of {world.world_size} cannot {'open' if serve else 'reach'} the store at {host}:{port} within {timeout_seconds:g} s "
            f"({first_line(error)}); check that rank 0 has been started, its address, and that the network lets this port through."
        ) from None


def meet(store: dist.Store, world: World, *, timeout_seconds: float) -> str:
    """Waits until all ranks of this attempt have arrived; returns the attempt's name.

    Each rank writes a word of its own; rank 0 answers each word with the name, until every rank has confirmed the name.

    Raises:
        CommunicationError: Some ranks did not arrive in time; the message names them, as far as this rank knows.
    """
    deadline = time.monotonic() + timeout_seconds
    if world.rank == 0:
        attempt = secrets.token_hex(8)
        missing = _welcome(store, attempt, world.world_size, deadline)
        if missing:
            raise _incomplete(world, missing, timeout_seconds)
        store.set(f"{attempt}/everyone", "")
        return attempt
    word = secrets.token_hex(8)
    store.set(f"hello/{world.rank}", word)
    if not _appears(store, f"welcome/{word}", deadline):
        raise _incomplete(world, [0], timeout_seconds)
    attempt = store.get(f"welcome/{word}").decode()
    store.set(f"{attempt}/arrived/{world.rank}", "")
    if not _appears(store, f"{attempt}/everyone", deadline):
        absent = [rank for rank in range(1, world.world_size) if not store.check([f"{attempt}/arrived/{rank}"])]
        raise _incomplete(world, absent, timeout_seconds)
    return attempt


def _welcome(store: dist.Store, attempt: str, world_size: int, deadline: float) -> list[int]:
    """Answers every rank until all have arrived; returns the ranks that have not arrived by the deadline."""
    missing = list(range(1, world_size))
    while missing:
        for rank in missing:
            if store.check([f"hello/{rank}"]):
                store.set(f"welcome/{store.get(f'hello/{rank}').decode()}", attempt)
        missing = [rank for rank in missing if not store.check([f"{attempt}/arrived/{rank}"])]
        if missing and time.monotonic() > deadline:
            return missing
        time.sleep(POLL_SECONDS if missing else 0)
    return []


def _appears(store: dist.Store, key: str, deadline: float) -> bool:
    while not store.check([key]):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _incomplete(world: World, missing: list[int], timeout_seconds: float) -> CommunicationError:
    who = f"{describe_ranks(missing)} of {world.world_size} did not come" if missing else "rank 0 did not say that all ranks are there"
    return CommunicationError(
        f"{who} within {timeout_seconds:g} s; start all {world.world_size} processes, and look at the output of those for an earlier error."
    )


def _initialise(world: World, store: dist.Store, *, backends: str, timeout_seconds: float) -> None:
    timeout = timedelta(seconds=timeout_seconds + BACKEND_MARGIN_SECONDS)
    try:
        dist.init_process_group(backends, store=store, rank=world.rank, world_size=world.world_size, timeout=timeout)
    except RuntimeError as error:  # gloo raises nothing narrower
        raise CommunicationError(
            f"all {world.world_size} ranks met, but rank {world.rank} cannot connect to the others ({first_line(error)}); "
            "name the network interface that joins the hosts in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, and open its ports."
        ) from None


def _say_goodbye(store: dist.Store, world: World) -> None:
    """Keeps the store open until no rank reads it any more."""
    if world.hosts_store:
        deadline = time.monotonic() + BACKEND_MARGIN_SECONDS
        for rank in range(1, world.world_size):
            _appears(store, f"goodbye/{rank}", deadline)
    else:
        store.set(f"goodbye/{world.rank}", "")
