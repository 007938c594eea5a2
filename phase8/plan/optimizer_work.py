"""What the optimizer does in a step on a rank, from the declaration of its state and the shapes of the parameters.

Muon orthogonalises a matrix by five iterations x <- a x + (b s + c s s) x with s = x x^T (`optim/muon.py`): with m rows and n >= m columns they
take 5 * 2 * (2 m^2 n + m^3) FLOPs. Of n ranks that divide matrices each takes about 1 / n of them, whole (`optim/whole_matrices.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from phase8.config.model_section import ModelSection
from phase8.config.schema import OptimSection, ZeroSection
from phase8.division import DividedShape
from phase8.formatting import format_flops, format_ratio
from phase8.optim.muon import NUM_ITERATIONS, has_heads, shape_apart
from phase8.optim.state import declared_for, is_orthogonalised
from phase8.plan.chunks import chunk_parameters
from phase8.plan.communication import Chunk, Grid
from phase8.plan.cost_facts import Fact
from phase8.plan.memory import FP32_BYTES
from phase8.plan.update_cost import MuonWork, UpdateWork
from phase8.topology import AxisName

_PLACES = {"cpu": "in host memory", "nvme": "on NVMe"}


@dataclass(frozen=True)
class Matrices:
    """The matrices of a parameter that Muon orthogonalises apart.

    Args:
        count: Number of matrices.
        small: The smaller one of rows and columns.
        large: The larger one.
    """

    count: int
    small: int
    large: int

    @property
    def flops(self) -> int:
        """FLOPs of the products."""
        return NUM_ITERATIONS * 2 * self.count * (2 * self.small**2 * self.large + self.small**3)


def matrices_in(model: ModelSection, layers: range) -> dict[str, Matrices]:
    """The matrices that Muon orthogonalises in some layers, by name of their parameter."""
    return {name: found for name, shape in chunk_parameters(model, layers).parameters.items() for found in _matrices(name, shape.shape, model)}


def _matrices(name: str, shape: Sequence[int], model: ModelSection) -> list[Matrices]:
    """The matrices of a parameter; none if Muon leaves it to AdamW."""
    if not is_orthogonalised(name, shape):
        return []
    *others, rows, columns = shape_apart(name, shape, head_size=model.head_width)
    return [Matrices(math.prod(others), *sorted((rows, columns)))]


def update_work(optim: OptimSection, model: ModelSection, chunks: Iterable[Chunk], grid: Grid) -> UpdateWork:
    """The work of the optimizer on a rank.

    Args:
        optim: Optimizer section.
        model: Model section with the shapes.
        chunks: Chunks of the rank's stage.
        grid: Place of the rank.
    """
    declare, num_updated, moments_bytes, shared = declared_for(optim), 0, 0, list[tuple[DividedShape, Matrices, int]]()
    for name, parameter, times in (each for chunk in chunks for each in _named(chunk)):
        part = parameter.held(grid.places, grid.shards).num_elements
        num_updated += times * part
        found = _matrices(name, parameter.shape, model) if optim.name == "muon" else []
        shared += [(parameter, matrices, times) for matrices in found]
        if not found:
            tensors = [each for each in declare(name, parameter.shape).tensors if not each.is_scalar]
            moments_bytes += times * sum(each.num_bytes(part, parameter_bytes=FP32_BYTES) for each in tensors)
    return UpdateWork(num_updated, moments_bytes, _muon_work(shared, grid))


def _named(chunk: Chunk) -> Iterator[tuple[str, DividedShape, int]]:
    """A parameter of each kind with its name, and how many there are."""
    for group, times in (*chunk.counted_blocks, (chunk.rest, 1)):
        yield from ((name, parameter, times) for name, parameter in group.items())


def _muon_work(shared: Sequence[tuple[DividedShape, Matrices, int]], grid: Grid) -> MuonWork:
    """The part of a rank in the work for some parameters, of which each is there so many times."""
    total = MuonWork()
    by_ranks: dict[int, list[tuple[Matrices, int]]] = {}
    sent: dict[AxisName, float] = {}
    for parameter, matrices, times in shared:
        part = times * parameter.held(grid.places, grid.shards).num_elements
        num_ranks, axis = _dividing_ranks(parameter, grid)
        by_ranks.setdefault(num_ranks, []).append((matrices, times))
        total = total._replace(num_parts=total.num_parts + part)
        if num_ranks > 1:  # to the owner and back
            sent[axis] = sent.get(axis, 0.0) + 2 * part * (num_ranks - 1) / num_ranks
    for num_ranks, alike in by_ranks.items():
        own = _share(alike, num_ranks)
        total = total._replace(**{name: getattr(total, name) + value for name, value in own.items()})
    return total._replace(sent=tuple(sorted(sent.items())))


def _share(alike: Sequence[tuple[Matrices, int]], num_ranks: int) -> Mapping[str, float]:
    """What one of some ranks does for parameters that they divide: an equal share, but at least the costliest parameter."""
    flops = sum(times * each.flops for each, times in alike)
    share = max(1 / num_ranks, max(each.flops for each, _ in alike) / flops)
    return {
        "flops": share * flops,
        "num_tensors": share * sum(times for _, times in alike),
        "num_whole": share * sum(times * each.count * each.small * each.large for each, times in alike),
        "num_squares": share * sum(times * each.count * each.small**2 for each, times in alike),
    }


def _dividing_ranks(parameter: DividedShape, grid: Grid) -> tuple[int, AxisName]:
    """The number of ranks that hold different parts of a parameter, and the widest axis along which they do."""
    shards = parameter.shards(grid.places, grid.shards).size
    axes = {AxisName(axis): place.size for axis, place in grid.places.items() if axis in parameter.divided and place.size > 1}
    widest = AxisName.SHARD if shards > 1 else AxisName.EXPERT if AxisName.EXPERT in axes else AxisName.TENSOR
    return shards * math.prod(axes.values()), widest


def optimizer_fact(optim: OptimSection, zero: ZeroSection, model: ModelSection, *, share: float | None = None) -> Fact:
    """The optimizer, what it keeps in which format and where, and what it takes.

    Args:
        optim: Optimizer section.
        zero: Section that says what is offloaded.
        model: Model section with the shapes.
        share: Predicted share of a step; None: not predicted.
    """
    short = "moments in fp32" if optim.state_dtype == "fp32" else f"moments of matrices in {optim.state_dtype}"
    adamw, muon = f"learning rate {optim.learning_rate:g}, {short}", []
    if optim.name == "muon":
        found = matrices_in(model, range(model.num_layers))
        count, flops = sum(each.count for each in found.values()), sum(each.flops for each in found.values())
        apart = " (heads apart)" if any(map(has_heads, found)) else ""
        muon = [f"muon on {count:,} matrices{apart} with momentum {optim.momentum:g} in fp32, {format_flops(flops)} a step; adamw on all else"]
    where = [f"state {_PLACES[zero.offload_optimizer]}"] if zero.offload_optimizer != "none" else []
    predicted = [f"{format_ratio(share)} of a step by prediction"] if share is not None else []
    return "optimizer", ", ".join([*(muon or ["adamw"]), adamw, *where, *predicted])
