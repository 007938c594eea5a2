"""Names and shapes of tensors in earlier revisions, translated to today's; the bytes are the same, so old checkpoints load unchanged.

| before | today |
|---|---|
| `blocks.<n>.mixer.{decay_bias,gate_bias,scalars,chain}` | the same names in `blocks.<n>.mixer.global_path` |
| `blocks.<n>.mixer.global_norm` | `blocks.<n>.mixer.global_path.norm` |
| `blocks.<n>.mixer.convolution.weight` [3 N, taps] | [3, N, taps] |

Optimizer state is renamed with its parameter.

Shape: N channels for each of q, k and v.
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
    """The new shape of a tensor; only a tensor stored in one piece (as all were then) keeps the order of its bytes."""
    is_whole = len(entry.slices) == 1 and entry.slices[0].shape == entry.shape
    if _CONVOLUTION.match(name) is None or len(entry.shape) != 2 or entry.shape[0] % 3 != 0 or not is_whole:
        return entry
    shape = [3, entry.shape[0] // 3, entry.shape[1]]
    return entry.model_copy(update={"shape": shape, "slices": [entry.slices[0].model_copy(update={"offsets": [0, 0, 0], "shape": shape})]})
