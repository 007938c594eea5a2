"""Weights of a dense model read as those of a mixture of experts: each expert begins as a copy of the dense feed-forward.

The weights of a token's experts add up to one (`model.routed_scaling_factor`), so the mixture computes what the dense model computes, whatever the
router chooses, as long as no expert drops a token. Of a single expert the weight is its score, by which the router learns: about 1 / E with logits
near zero, for which the last matrix of an expert makes up, E times the dense one.

Source: A. Komatsuzaki et al., "Sparse upcycling" (2023).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from phase8.checkpoint.load import Checkpoint
from phase8.checkpoint.manifest import TensorEntry
from phase8.checkpoint.state import MODEL_PREFIX
from phase8.checkpoint.tensor_file import DTYPE_NAMES
from phase8.division import Region, RegionLike, slices_of

_DENSE = re.compile(r"blocks\.(\d+)\.feed_forward\.(gate|up|down)\.weight")


class UpcycledWeights(Checkpoint):
    """A checkpoint of step 0 that holds the weights of a mixture of experts, read from a dense model.

    Args:
        source: Dense model.
        metadata: Metadata of a run at step 0 whose model is the mixture.
        has_experts: Whether each layer has experts.
        num_experts: Number of experts of such a layer.
        factor: Factor of the last matrix of each expert.
        added: Tensors that the dense model does not have, the routers', by name in the model.
    """

    def __init__(
        self,
        source: Checkpoint,
        metadata: dict[str, Any],
        *,
        has_experts: tuple[bool, ...],
        num_experts: int,
        factor: int = 1,
        added: Mapping[str, Tensor],
    ):
        super().__init__(source.path, source.manifest.model_copy(update={"step": 0, "metadata": metadata}))
        self._source, self._num_experts, self._factor = source, num_experts, factor
        self._added = {MODEL_PREFIX + name: value for name, value in added.items()}
        self._dense_names: dict[str, str] = {}
        for name in source.tensor_names:
            if name.startswith(MODEL_PREFIX):
                self._dense_names[_upcycled_name(name, has_experts)] = name

    @property
    def tensor_names(self) -> list[str]:
        """Names of the weights of the mixture."""
        return [*self._dense_names, *self._added]

    def entry(self, name: str) -> TensorEntry:
        """Dtype and shape of a tensor; there are no slices, since it lies in no file."""
        if name in self._added:
            value = self._added[name]
            return TensorEntry.model_construct(dtype=DTYPE_NAMES[value.dtype], shape=list(value.shape), slices=[])
        stored = self._source.entry(self._dense_names[name])
        shape = [self._num_experts, *stored.shape] if self._is_of_experts(name) else stored.shape
        return TensorEntry.model_construct(dtype=stored.dtype, shape=shape, slices=[])

    def read_region(self, name: str, region: RegionLike, *, into: Tensor | None = None, for_the_last_time: bool = False) -> Tensor:
        """Reads a region of a tensor; of experts, the region of the dense weight as often as the region has experts."""
        if name in self._added:
            found = self._added[name][slices_of(region)].clone()
        elif self._is_of_experts(name):
            dense = self._source.read_region(self._dense_names[name], Region(region.offsets[1:], region.shape[1:]))
            scaled = dense * self._factor if name.endswith(".down") else dense
            found = scaled.expand(region.shape[0], *dense.shape).contiguous()
        else:
            return self._source.read_region(self._dense_names[name], region, into=into, for_the_last_time=for_the_last_time)
        return found if into is None else into.copy_(found)

    def verify(self) -> None:
        """Checks every byte of the dense model."""
        self._source.verify()

    def _is_of_experts(self, name: str) -> bool:
        return self._dense_names[name] != name


def _upcycled_name(name: str, has_experts: tuple[bool, ...]) -> str:
    """The name in the mixture of a tensor of the dense model."""
    found = _DENSE.fullmatch(name.removeprefix(MODEL_PREFIX))
    if found is None or not has_experts[int(found[1])]:
        return name
    return f"{MODEL_PREFIX}blocks.{found[1]}.feed_forward.experts.{found[2]}"
