"""A small checkpoint as two ranks save one, of a model that it fits, and a reader of the format that shares nothing with the library's.

Shape: embedding.weight [6, 4], divided by rows like its optimizer state; norm.weight [4]; mask [5]; empty [0, 3].
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from phase8.checkpoint.checksum import checksum_of
from phase8.checkpoint.manifest import Manifest, manifest_bytes
from phase8.checkpoint.state import flat_state
from phase8.checkpoint.tensor_file import DTYPE_NAMES, write_tensor_file

TOKENIZER = bytes(range(256))
METADATA = {"tokens": 7000, "config": {"model": {"d_model": 4}}, "name": "Grün ☃", "list": [1, 2.5, None, True]}
ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "BF16": 2, "F16": 2, "I16": 2, "F32": 4, "I32": 4, "U32": 4, "F64": 8, "I64": 8, "C64": 8}


class Model(nn.Module):
    """A parameter that ranks divide, one they do not, and two buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.norm = nn.LayerNorm(4, bias=False, dtype=torch.bfloat16)
        self.register_buffer("mask", torch.arange(5) % 2 == 0)
        self.register_buffer("empty", torch.empty(0, 3))


def build(seed: int, *, trained: bool) -> tuple[Model, torch.optim.AdamW]:
    """Model and optimizer with random numbers, those of the optimizer after a step."""
    torch.manual_seed(seed)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    if trained:
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return model, optimizer


def write_checkpoint(root: Path, step: int, *, seed: int) -> Path:
    """`step-<step>` below a root, in the files of two ranks, with a tokenizer."""
    directory = root / f"step-{step:010d}"
    directory.mkdir(parents=True)
    files: dict[str, dict[str, tuple[str, list[int], Tensor]]] = {}
    tensors = flat_state(*build(seed, trained=True))
    for name, tensor in tensors.items():
        group, _, key = name.partition(".")
        for rank, offset, part in _parts(tensor.detach()):
            entry = key if part.shape == tensor.shape else f"{key}@{offset},0"
            place = name, [offset] + [0] * (tensor.dim() - 1) if tensor.dim() else [], part
            files.setdefault(f"{group}-rank{rank:05d}-00000.safetensors", {})[entry] = place
    written = {file: write_tensor_file(directory / file, {key: part for key, (_, _, part) in entries.items()}) for file, entries in files.items()}
    slices: dict[str, list[dict[str, Any]]] = {name: [] for name in tensors}
    for file, entries in files.items():
        for key, (name, offsets, part) in entries.items():
            checksum = written[file].checksums[key]
            slices[name].append({"file": file, "key": key, "offsets": offsets, "shape": list(part.shape), "checksum": checksum})
    (directory / "tokenizer.model").write_bytes(TOKENIZER)
    manifest = {
        "format": "phase8-checkpoint",
        "format_version": 1,
        "step": step,
        "metadata": METADATA | {"tokens": step * 1000},
        "files": {file: {"size_bytes": w.size_bytes, "header_checksum": w.header_checksum} for file, w in written.items()},
        "tensors": {n: {"dtype": DTYPE_NAMES[t.dtype], "shape": list(t.shape), "slices": slices[n]} for n, t in tensors.items()},
        "attachments": {"tokenizer.model": {"size_bytes": len(TOKENIZER), "checksum": checksum_of(TOKENIZER)}},
    }
    (directory / "manifest.json").write_bytes(manifest_bytes(Manifest.model_validate(manifest)))
    return directory


def _parts(tensor: Tensor) -> list[tuple[int, int, Tensor]]:
    """(rank, first row, part)."""
    if tensor.dim() == 2 and tensor.shape[0] > 0:
        return [(0, 0, tensor[:3]), (1, 3, tensor[3:])]
    return [(0, 0, tensor)]


def bits(tensor: Tensor) -> bytes:
    """The bytes of a tensor."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def stored_bits(directory: Path, entry: dict[str, Any]) -> bytes:
    """The bytes of a tensor by its entry in a manifest and by the headers of the files, checked by nothing."""
    item = np.dtype(f"V{ITEM_BYTES[entry['dtype']]}")
    whole = np.zeros(entry["shape"], item)
    for part in (part for part in entry["slices"] if 0 not in part["shape"]):
        data = (directory / part["file"]).read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        begin, stop = json.loads(data[8:end])[part["key"]]["data_offsets"]
        block = np.frombuffer(data[end + begin : end + stop], item).reshape(part["shape"])
        whole[tuple(slice(offset, offset + size) for offset, size in zip(part["offsets"], part["shape"], strict=True))] = block
    return whole.tobytes()
