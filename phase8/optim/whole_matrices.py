"""Whole matrices for an optimizer that needs them: each goes to one rank of those that hold its parts, and the result goes back in parts.

Of n ranks that divide parameters, each computes about 1 / n of the work: matrices go to the rank that has least so far, the costly ones first. Every
element travels once to the owner and once back. What no ranks divide is computed where it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from phase8.distributed.placement import own_region
from phase8.division import Region, slices_of

Take = Callable[[str], Tensor]
Compute = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class _Holders:
    """The ranks that hold the parts of some matrices.

    Args:
        group: Their process group.
        rank: Place of this rank among them.
        owned: For each of them, the matrices whose result it computes, in order.
        regions: For each of them, the region of each matrix that it holds.
    """

    group: dist.ProcessGroup
    rank: int
    owned: Sequence[Sequence[str]]
    regions: Sequence[Mapping[str, Region]]


class WholeMatrices:
    """Hands parts of matrices to the ranks that compute with the whole. Every rank of a group makes it at the same time, with the same matrices.

    Args:
        matrices: Matrices by name, the divided ones as DTensors.
        group_over: Gives the process group of the ranks along some axes of the mesh of a matrix, given a matrix and the names of the axes.
        device: Device of the collectives and of the computation.
    """

    def __init__(self, matrices: Mapping[str, Tensor], group_over: Callable[[DTensor, frozenset[str]], dist.ProcessGroup], *, device: torch.device):
        self.device, self.shapes = device, {name: matrix.shape for name, matrix in matrices.items()}
        by_axes: dict[tuple[int, frozenset[str]], dict[str, DTensor]] = {}
        self._undivided = []
        for name, matrix in matrices.items():
            axes = _axes_that_divide(matrix)
            if isinstance(matrix, DTensor) and axes:
                by_axes.setdefault((hash(matrix.device_mesh), axes), {})[name] = matrix
            else:
                self._undivided.append(name)
        self._holders = [_holders_of(members, group_over(next(iter(members.values())), axes)) for (_, axes), members in by_axes.items()]

    def map(self, take: Take, compute: Compute, *, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Computes with each whole matrix and yields the names and this rank's parts of the results; a collective of each group.

        Args:
            take: Gives this rank's part of a matrix.
            compute: Computes the result, of the same shape, from the name and the whole matrix.
            dtype: Dtype in which matrices travel and arrive.
        """
        for name in self._undivided:
            yield name, compute(name, take(name).to(self.device, dtype))
        for holders in self._holders:
            for number in range(max(map(len, holders.owned))):
                yield from self._round(holders, number, take, compute, dtype)

    def _round(self, holders: _Holders, number: int, take: Take, compute: Compute, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """One matrix for each owner that has so many."""
        names = [owned[number] if number < len(owned) else None for owned in holders.owned]
        own, regions = names[holders.rank], holders.regions[holders.rank]
        sizes_here = [0 if name is None else regions[name].num_elements for name in names]
        sizes_of_own = [0 if own is None else each[own].num_elements for each in holders.regions]
        parts = [take(name).to(self.device, dtype).flatten() for name in names if name is not None]
        arrived = _exchange(torch.cat(parts), sizes_here, sizes_of_own, holders.group)
        result = arrived
        if own is not None:
            whole = torch.empty(self.shapes[own], dtype=dtype, device=self.device)
            for part, region in zip(arrived.split(sizes_of_own), _regions_of(holders, own), strict=True):
                whole[slices_of(region)] = part.view(region.shape)
            computed = compute(own, whole)
            result = torch.cat([computed[slices_of(region)].flatten() for region in _regions_of(holders, own)])
        returned = _exchange(result, sizes_of_own, sizes_here, holders.group)
        for name, part in zip(names, returned.split(sizes_here), strict=True):
            if name is not None:
                yield name, part.view(regions[name].shape)


def _holders_of(matrices: Mapping[str, DTensor], group: dist.ProcessGroup) -> _Holders:
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    regions: list[dict[str, Region]] = [{} for _ in range(size)]
    dist.all_gather_object(regions, {name: own_region(matrix) for name, matrix in matrices.items()}, group=group)
    owned: list[list[str]] = [[] for _ in range(size)]
    loads = [0] * size
    for name in sorted(matrices, key=lambda name: (-_cost(matrices[name].shape), name)):
        least = loads.index(min(loads))
        owned[least].append(name)
        loads[least] += _cost(matrices[name].shape)
    return _Holders(group, rank, owned, regions)


def _cost(shape: Sequence[int]) -> int:
    """Work for a matrix, or for several of a shape: that of a product of it with its transpose."""
    return math.prod(shape) * min(shape[-2:])


def _axes_that_divide(matrix: Tensor) -> frozenset[str]:
    """The axes of the mesh along which ranks hold different parts."""
    if not isinstance(matrix, DTensor):
        return frozenset()
    names = matrix.device_mesh.mesh_dim_names
    assert names is not None  # `build_mesh` names all dims
    each = zip(names, matrix.placements, matrix.device_mesh.shape, strict=True)
    return frozenset(name for name, placement, size in each if not placement.is_replicate() and size > 1)


def _regions_of(holders: _Holders, name: str) -> list[Region]:
    return [regions[name] for regions in holders.regions]


def _exchange(x: Tensor, num_sent: list[int], num_received: list[int], group: dist.ProcessGroup) -> Tensor:
    received = x.new_empty(sum(num_received))
    dist.all_to_all_single(received, x, num_received, num_sent, group=group)
    return received
