"""Weights of a checkpoint read as those of a model whose dense layers have few bits (precision/weight_format.py)."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from phase8.checkpoint.load import Checkpoint
from phase8.checkpoint.manifest import TensorEntry
from phase8.checkpoint.state import MODEL_PREFIX
from phase8.checkpoint.tensor_file import DTYPE_NAMES, DTYPES
from phase8.division import RegionLike, slices_of, whole_region
from phase8.precision.weight_format import WeightFormat


class QuantizedWeights(Checkpoint):
    """A checkpoint that holds weights alone: those of some layers as whole numbers with their scales, other matrices in bf16.

    Args:
        source: The checkpoint.
        layers: Names of these layers.
        weight_format: Format of their weights.
    """

    def __init__(self, source: Checkpoint, layers: Collection[str], weight_format: WeightFormat):
        super().__init__(source.path, source.manifest)
        self._source, self._format = source, weight_format
        # Name of a tensor that is made -> the weight that it is made of, and which of both it is.
        self._made = {f"{MODEL_PREFIX}{layer}.{part}": (f"{MODEL_PREFIX}{layer}.weight", part) for layer in layers for part in ("weight", "scale")}

    @property
    def tensor_names(self) -> list[str]:
        """Names of the weights and the scales."""
        stored = [name for name in self._source.tensor_names if name.startswith(MODEL_PREFIX)]
        return [*stored, *(name for name, (weight, _) in self._made.items() if name != weight)]

    def entry(self, name: str) -> TensorEntry:
        """Dtype and shape of a tensor; there are no slices, since it lies in no file."""
        if name in self._made:
            weight, part = self._made[name]
            dtype, shape = self._format.tensors(*self._source.entry(weight).shape)[part]
            return TensorEntry.model_construct(dtype=DTYPE_NAMES[dtype], shape=list(shape), slices=[])
        return TensorEntry.model_construct(dtype=DTYPE_NAMES[self._dtype(name)], shape=self._source.entry(name).shape, slices=[])

    def read_region(self, name: str, region: RegionLike, *, into: Tensor | None = None, for_the_last_time: bool = False) -> Tensor:
        """Reads a region of a tensor."""
        if name in self._made:
            weight, part = self._made[name]
            whole = self._source.read_region(weight, whole_region(self._source.entry(weight).shape))
            found = self._format.quantized(whole)[part][slices_of(region)].contiguous()
        else:
            found = self._source.read_region(name, region, for_the_last_time=for_the_last_time).to(self._dtype(name))
        return found if into is None else into.copy_(found)

    def verify_region(self, name: str, region: RegionLike) -> None:
        """Checks the bytes that `read_region` would read."""
        if name in self._made:
            name, _ = self._made[name]
            region = whole_region(self._source.entry(name).shape)
        self._source.verify_region(name, region)

    def verify(self) -> None:
        """Checks every byte of the original."""
        self._source.verify()

    def _dtype(self, name: str) -> torch.dtype:
        """The dtype in which a tensor that is not made is read: vectors and scalars keep theirs."""
        stored = self._source.entry(name)
        return torch.bfloat16 if stored.dtype == "F32" and len(stored.shape) > 1 else DTYPES[stored.dtype]
