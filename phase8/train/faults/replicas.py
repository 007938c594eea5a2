"""Silent corruption: what several ranks hold alike is compared bit for bit, and who deviates is named.

| held by several ranks | which |
|---|---|
| a part of a parameter | replicas of data-parallel ranks: all with ZeRO 0, those of each shard with `zero.shard_size` |
| a parameter without a dim to divide, norms for example | tensor-parallel ranks |
| the embedding that is tied to the head | first and last pipeline stage |

and with each parameter the optimizer's state of it. All get the same gradients and make the same updates, so they stay equal for ever;
one bit that memory, a link or a core gets wrong makes them differ for ever, and no error is raised.

    n  32-bit words of a tensor        C  words taken at a time
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

# Words at a time: their products should stay in the cache of the host (8 times faster than those that do not); a GPU wants few launches.
_CPU_CHUNK, _GPU_CHUNK = 2**17, 2**22
_BASE = 5
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


@dataclass(frozen=True)
class Holding:
    """What one rank holds of items whose copies differ.

    Args:
        place: Device and host, for people.
        digests: By item: which part of it, as offsets and shape, and the hash of its bits.
    """

    place: str
    digests: Mapping[Item, tuple[object, int]]


def check_replicas(engine: TrainingEngine, *, step: int) -> None:
    """Compares what several ranks hold alike; a collective of all ranks, between steps.

    Reads these weights and their optimizer state once, where they are; only eight bytes of each tensor leave the device. Nothing is done
    when there is only one of everything.

    Args:
        engine: Of this rank.
        step: The last finished step.

    Raises:
        CorruptionError: Copies differ. Every rank raises the same sentence.
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
    """What differs and who is to blame, as one sentence; None: nothing does.

    The rank whose copy is unlike most others is named; when there is no majority, all that hold one.

    Args:
        holdings: Of every rank.
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
    """A hash of the bits of a tensor and their places: the words as digits of a number to the base 5, modulo 2^64; a scalar on its device.

    5 is odd, and its first 2^31 powers differ modulo 2^33. Up to 2^31 words it follows that each of these changes the hash, always: any
    change of one element, one or two flipped bits, two unequal elements of at most 32 bits swapped, the same number added to every word
    of a run. Other damage goes unnoticed only where its parts happen to cancel.

    Args:
        tensor: Of any dtype.
        powers: Of 5, [C] on the same device, from `powers_of_base`.
    """
    words = tensor.detach().reshape(-1).view(_WORDS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    scale, per_chunk = 1, pow(_BASE, len(powers), 2**64)
    for chunk in words.split(len(powers)):
        total += (chunk * powers[: len(chunk)]).sum() * _signed(scale)  # in 64 bits, which overflow as they should
        scale = scale * per_chunk % 2**64
    return total


def powers_of_base(count: int, device: torch.device) -> Tensor:
    """The first powers of 5 modulo 2^64, [count], as signed numbers."""
    powers = torch.ones(1, dtype=torch.int64, device=device)
    while len(powers) < count:
        powers = torch.cat((powers, powers * _signed(pow(_BASE, len(powers), 2**64))))
    return powers[:count]


def _signed(number: int) -> int:
    """Of a number modulo 2^64, what int64 makes of its bits."""
    return (number + 2**63) % 2**64 - 2**63


def _digests(tensors: Mapping[Item, Tensor]) -> dict[Item, int]:
    """The hash of each tensor. Each device is waited for once."""
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
    """Items that are not the same along an axis; a collective of its ranks. Those that hold no copies learn nothing."""
    items = [item for item in digests if item.parameter in names]
    gathered: list[list[int]] = [[]] * axis.size
    dist.all_gather_object(gathered, [digests[item] for item in items], group=axis.group)
    copies = [values for values in gathered if values]
    return [item for item, *values in zip(items, *copies, strict=True) if len(set(values)) > 1] if items else []


def _copies(holdings: Sequence[Holding], item: Item) -> list[dict[int, int]]:
    """Of each part of an item, the hash by rank."""
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
