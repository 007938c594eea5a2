"""Weights of a checkpoint read as those of a model in which some have few bits (precision/weight_format.py)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from phase8.checkpoint.load import Checkpoint
from phase8.checkpoint.manifest import TensorEntry
from phase8.checkpoint.state import MODEL_PREFIX
from phase8.checkpoint.tensor_file import DTYPE_NAMES, DTYPES
from phase8.division import Region, RegionLike, slices_of
from phase8.precision.weight_format import WeightFormat


class QuantizedWeights(Checkpoint):
    """A checkpoint that holds weights alone: some as whole numbers with their scales, other matrices in bf16.

    Args:
        source: The checkpoint.
        names: Names of these weights and of their scales.
        weight_format: Their format.
    """

    def __init__(self, source: Checkpoint, names: Iterable[tuple[str, str]], weight_format: WeightFormat):
        super().__init__(source.path, source.manifest)
        self._source, self._format = source, weight_format
        # Name of a tensor that is made -> the weight that it is made of, and which of both it is.
        self._made: dict[str, tuple[str, str]] = {}
        for weight, scale in names:
            of = MODEL_PREFIX + weight
            self._made |= {of: (of, "weight"), MODEL_PREFIX + scale: (of, "scale")}

    @property
    def tensor_names(self) -> list[str]:
        """Names of the weights and the scales."""
        stored = [name for name in self._source.tensor_names if name.startswith(MODEL_PREFIX)]
        return [*stored, *(name for name, (weight, _) in self._made.items() if name != weight)]

    def entry(self, name: str) -> TensorEntry:
        """Dtype and shape of a tensor; there are no slices, since it lies in no file."""
        if name in self._made:
            weight, part = self._made[name]
            dtype, shape = self._format.tensors(self._source.entry(weight).shape)[part]
            return TensorEntry.model_construct(dtype=DTYPE_NAMES[dtype], shape=list(shape), slices=[])
        return TensorEntry.model_construct(dtype=DTYPE_NAMES[self._dtype(name)], shape=self._source.entry(name).shape, slices=[])

    def read_region(self, name: str, region: RegionLike, *, into: Tensor | None = None, for_the_last_time: bool = False) -> Tensor:
        """Reads a region of a tensor."""
        if name in self._made:
            found = self._quantized(name, region)
        else:
            found = self._source.read_region(name, region, for_the_last_time=for_the_last_time).to(self._dtype(name))
        return found if into is None else into.copy_(found)

    def verify(self) -> None:
        """Checks every byte of the original."""
        self._source.verify()

    def _quantized(self, name: str, region: RegionLike) -> Tensor:
        """A region of numbers or scales; of experts, which are many, one is read and rounded after the other."""
        weight, part = self._made[name]
        first, count = region.offsets[0], region.shape[0]
        step = 1 if len(self._source.entry(weight).shape) > 2 else max(count, 1)
        inner = Region([0, *region.offsets[1:]], [step, *region.shape[1:]])
        found = torch.empty(tuple(region.shape), dtype=DTYPES[self.entry(name).dtype])
        for begin in range(0, count, step):
            rows = self._source.read_region(weight, self._rows_of(weight, first + begin, step))
            found[begin : begin + step] = self._format.quantized(rows)[part][slices_of(inner)]
        return found

    def _rows_of(self, weight: str, first: int, count: int) -> Region:
        """The region of whole rows, of which each has scales of its own."""
        shape = self._source.entry(weight).shape
        return Region([first, *(0 for _ in shape[1:])], [count, *shape[1:]])

    def _dtype(self, name: str) -> torch.dtype:
        """The dtype in which a tensor that is not made is read: vectors and scalars keep theirs."""
        stored = self._source.entry(name)
        return torch.bfloat16 if stored.dtype == "F32" and len(stored.shape) > 1 else DTYPES[stored.dtype]
