"""Detection of silent corruption: copies that several ranks hold are compared bit for bit, and the rank that deviates is named.

| tensor | ranks that hold copies |
|---|---|
| a part of a parameter | data-parallel ranks: all of them with ZeRO 0, those with the same shard with `zero.shard_size` |
| a parameter that tensor parallelism does not divide, such as a norm | tensor-parallel ranks |
| the embedding that is tied to the head | first and last pipeline stage |

The optimizer's state of each of these parameters is compared too. All copies get the same gradients and make the same updates, so they stay
equal. A single bit that memory, a link or a core gets wrong makes them differ from then on, and raises no error by itself.

    C  32-bit words that are hashed at a time
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from phase8.distributed.collectives import Axis
from phase8.errors import CorruptionError
from phase8.train.engine.protocol import Item, TrainingEngine

# Words that are hashed at a time: on the host their products should stay in the cache (8 times faster); on a GPU launches should be few.
_CPU_CHUNK, _GPU_CHUNK = 2**17, 2**22
_BASE = 5
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


@dataclass(frozen=True)
class Holding:
    """One rank's copies of the items of which copies differ.

    Args:
        place: Device and host, as text for people.
        digests: Item -> region of the rank's part (offsets and shape) and hash of its bits.
    """

    place: str
    digests: Mapping[Item, tuple[object, int]]


def check_replicas(engine: TrainingEngine, *, step: int) -> None:
    """Compares the copies that several ranks hold; a collective of all ranks, to be called between steps.

    Weights and optimizer state are read once, on their device; only eight bytes per tensor leave it. Without copies nothing is done.

    Args:
        engine: Engine of this rank.
        step: Number of the last finished step.

    Raises:
        CorruptionError: Copies differ; the message is the same on every rank.
    """
    replicas = engine.replicas()
    if not replicas.axes:
        return
    digests = _digests({item: held.tensor for item, held in replicas.tensors.items()})
    suspects = {item for axis, names in replicas.axes for item in _differing(digests, axis, names)}
    own = {item: (replicas.tensors[item].region, digest) for item, digest in digests.items() if item in suspects}
    holdings: list[Holding] = [Holding("", {})] * dist.get_world_size()
    dist.all_gather_object(holdings, Holding(f"{engine.device} of {platform.node()}" if own else "", own))
    finding = describe_deviation(holdings)
    if finding is not None:
        raise CorruptionError(f"step {step}: {finding}")


def describe_deviation(holdings: Sequence[Holding]) -> str | None:
    """A sentence that names the item that differs and the ranks at fault; None: no copies differ.

    The ranks whose copy deviates from the majority are named; without a majority, all ranks that hold a copy.

    Args:
        holdings: Holdings of all ranks, in order.
    """
    items = dict.fromkeys(item for holding in holdings for item in holding.digests)
    if not items:
        return None
    item = next(iter(items))
    copies = next(copies for copies in _copies(holdings, item) if len(set(copies.values())) > 1)
    (usual, votes), *_ = Counter(copies.values()).most_common(1)
    more = f" (as with {len(items) - 1} other tensor{'s' * (len(items) > 2)})" if len(items) > 1 else ""
    if 2 * votes > len(copies):
        guilty = [rank for rank, digest in copies.items() if digest != usual]
        others = [rank for rank in copies if rank not in guilty]
        found = f"{item} on {_ranks(guilty)} differs from its copies on {_ranks(others)}{more}"
    else:
        guilty = list(copies)
        found = f"{item} should be the same on {_ranks(guilty)}, but is not{more}"
    places = _listed(list(dict.fromkeys(holdings[rank].place for rank in guilty)))
    return f"{found}; resume from a checkpoint of a step up to which this check has passed, and test the memory of {places}."


def bit_hash(tensor: Tensor, powers: Tensor) -> Tensor:
    """A hash of a tensor's bits, as a scalar on its device: its words are the digits of a number to the base 5, modulo 2^64.

    5 is odd, and its first 2^31 powers differ modulo 2^33. For up to 2^31 words it follows that each of these changes always alters the
    hash: any change of one element, one or two flipped bits, a swap of two unequal elements of at most 32 bits, the same number added
    to every word of a run. Other damage goes unnoticed only where its parts happen to cancel.

    Args:
        tensor: Tensor of any dtype.
        powers: Powers of 5 [C] on the same device, from `powers_of_base`.
    """
    words = tensor.detach().reshape(-1).view(_WORDS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    scale, per_chunk = 1, pow(_BASE, len(powers), 2**64)
    for chunk in words.split(len(powers)):
        total += (chunk * powers[: len(chunk)]).sum() * _signed(scale)  # int64 wraps on overflow, which is the reduction modulo 2^64
        scale = scale * per_chunk % 2**64
    return total


def powers_of_base(count: int, device: torch.device) -> Tensor:
    """The first powers of 5 modulo 2^64 [count], as signed numbers."""
    powers = torch.ones(1, dtype=torch.int64, device=device)
    while len(powers) < count:
        powers = torch.cat((powers, powers * _signed(pow(_BASE, len(powers), 2**64))))
    return powers[:count]


def _signed(number: int) -> int:
    """The int64 with the same bits as a number modulo 2^64."""
    return (number + 2**63) % 2**64 - 2**63


def _digests(tensors: Mapping[Item, Tensor]) -> dict[Item, int]:
    """The hash of each tensor; each device is synchronised once."""
    devices = {tensor.device for tensor in tensors.values()}
    digests: dict[Item, int] = {}
    for device in devices:
        on_device = {item: tensor for item, tensor in tensors.items() if tensor.device == device}
        longest = max(tensor.numel() * max(1, tensor.element_size() // 4) for tensor in on_device.values())
        powers = powers_of_base(min(max(1, longest), _CPU_CHUNK if device.type == "cpu" else _GPU_CHUNK), device)
        hashes = torch.stack([bit_hash(tensor, powers) for tensor in on_device.values()])
        digests.update(zip(on_device, hashes.tolist(), strict=True))
    return {item: digests[item] for item in tensors}


def _differing(digests: Mapping[Item, int], axis: Axis, names: set[str]) -> list[Item]:
    """The items of which copies differ along an axis; empty on ranks that hold no copies. A collective of the axis."""
    items = [item for item in digests if item.parameter in names]
    gathered: list[list[int]] = [[]] * axis.size
    dist.all_gather_object(gathered, [digests[item] for item in items], group=axis.group)
    copies = [values for values in gathered if values]
    return [item for item, *values in zip(items, *copies, strict=True) if len(set(values)) > 1] if items else []


def _copies(holdings: Sequence[Holding], item: Item) -> list[dict[int, int]]:
    """A mapping rank -> hash for each part of an item."""
    parts: dict[str, dict[int, int]] = {}
    for rank, holding in enumerate(holdings):
        if item in holding.digests:
            part, digest = holding.digests[item]
            parts.setdefault(repr(part), {})[rank] = digest
    return list(parts.values())


def _ranks(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + _listed([str(rank) for rank in ranks])


def _listed(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
