"""Weights of a checkpoint read as those of a model of eight bits (precision/int8.py)."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from phase8.checkpoint.load import Checkpoint
from phase8.checkpoint.manifest import TensorEntry
from phase8.checkpoint.state import MODEL_PREFIX
from phase8.checkpoint.tensor_file import DTYPE_NAMES, DTYPES
from phase8.division import RegionLike, slices_of, whole_region
from phase8.precision.int8 import quantized


class QuantizedWeights(Checkpoint):
    """A checkpoint that holds weights alone: those of some layers in eight bits with their scales, other matrices in bf16.

    Args:
        source: The checkpoint.
        layers: Names of these layers.
    """

    def __init__(self, source: Checkpoint, layers: Collection[str]):
        super().__init__(source.path, source.manifest)
        self._source = source
        self._weights = {f"{MODEL_PREFIX}{layer}.weight" for layer in layers}
        self._scales = {f"{MODEL_PREFIX}{layer}.scale": f"{MODEL_PREFIX}{layer}.weight" for layer in layers}

    @property
    def tensor_names(self) -> list[str]:
        """Names of the weights and the scales."""
        return [*(name for name in self._source.tensor_names if name.startswith(MODEL_PREFIX)), *self._scales]

    def entry(self, name: str) -> TensorEntry:
        """Dtype and shape of a tensor; there are no slices, since it lies in no file."""
        if name in self._scales:
            return TensorEntry.model_construct(dtype="F32", shape=self._source.entry(self._scales[name]).shape[:1], slices=[])
        stored = self._source.entry(name)
        return TensorEntry.model_construct(dtype=DTYPE_NAMES[self._dtype(name)], shape=stored.shape, slices=[])

    def read_region(self, name: str, region: RegionLike, *, into: Tensor | None = None, for_the_last_time: bool = False) -> Tensor:
        """Reads a region of a tensor."""
        weight = self._scales.get(name, name)
        if weight not in self._weights:
            found = self._source.read_region(name, region, for_the_last_time=for_the_last_time).to(self._dtype(name))
            return found if into is None else into.copy_(found)
        numbers, scale = quantized(self._source.read_region(weight, whole_region(self._source.entry(weight).shape)))
        whole = numbers if name in self._weights else scale.squeeze(-1)
        found = whole[slices_of(region)].contiguous()
        return found if into is None else into.copy_(found)

    def verify_region(self, name: str, region: RegionLike) -> None:
        """Checks the bytes that `read_region` would read."""
        weight = self._scales.get(name, name)
        self._source.verify_region(weight, whole_region(self._source.entry(weight).shape) if weight in self._weights else region)

    def verify(self) -> None:
        """Checks every byte of the original."""
        self._source.verify()

    def _dtype(self, name: str) -> torch.dtype:
        """The dtype in which a tensor is read: vectors and scalars keep theirs."""
        if name in self._weights:
            return torch.int8
        stored = self._source.entry(name)
        return torch.bfloat16 if stored.dtype == "F32" and len(stored.shape) > 1 else DTYPES[stored.dtype]
