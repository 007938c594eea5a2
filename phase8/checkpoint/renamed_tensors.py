"""Tensors that earlier revisions named or shaped otherwise, in today's form: the same bytes, so a checkpoint of then is read as one of today.

| before | today |
|---|---|
| `blocks.<n>.mixer.{decay_bias,gate_bias,scalars,chain}` | the same in `blocks.<n>.mixer.global_path` |
| `blocks.<n>.mixer.global_norm` | `blocks.<n>.mixer.global_path.norm` |
| `blocks.<n>.mixer.convolution.weight` [3 N, taps] | [3, N, taps] |

Optimizer state follows its parameter.

Shape: N channels of q, of k and of v.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from phase8.checkpoint.manifest import TensorEntry

_MIXER = r"^((?:model|optimizer)\.blocks\.[0-9]+\.mixer)\."
_RENAMED = (
    (re.compile(_MIXER + r"(decay_bias|gate_bias|scalars\.|chain\.)"), r"\1.global_path.\2"),
    (re.compile(_MIXER + r"global_norm\."), r"\1.global_path.norm."),
)
_CONVOLUTION = re.compile(_MIXER + r"convolution\.weight(\.|$)")


def in_present_form(tensors: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The tensors of a manifest under today's names and in today's shapes, in the same order."""
    result = {}
    for name, entry in tensors.items():
        present = _present_name(name)
        result[name if present in tensors else present] = _present_shape(name, entry)
    return result


def _present_name(name: str) -> str:
    for pattern, replacement in _RENAMED:
        name = pattern.sub(replacement, name)
    return name


def _present_shape(name: str, entry: TensorEntry) -> TensorEntry:
    """Only what lies in one piece, as all tensors did then, keeps its order of bytes."""
    is_whole = len(entry.slices) == 1 and entry.slices[0].shape == entry.shape
    if _CONVOLUTION.match(name) is None or len(entry.shape) != 2 or entry.shape[0] % 3 != 0 or not is_whole:
        return entry
    shape = [3, entry.shape[0] // 3, entry.shape[1]]
    return entry.model_copy(update={"shape": shape, "slices": [entry.slices[0].model_copy(update={"offsets": [0, 0, 0], "shape": shape})]})
