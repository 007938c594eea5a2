"""Edits of a manifest that keep several places of it consistent, as damage never would and a forger might."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from tests.checkpoint.fuzzing import NUMBERS, mutated_json

NAMES = (
    "model.embedding.weight", "optimizer.embedding.weight.exp_avg", "model-rank00000-00000.safetensors", "model-rank00001-00000.safetensors",
    "optimizer-rank00000-00000.safetensors", "tokenizer.model", "embedding.weight@3,0", "../step-0000000001/model-rank00000-00000.safetensors",
)  # fmt: skip
FORGED_FILES = ("../outside.safetensors", "../../outside.safetensors", "/etc/x.safetensors", "a\0.safetensors", "x.safetensors", ".safetensors")
SIZES = tuple(number for number in NUMBERS if type(number) is int and number >= 0)
DTYPES = ("BOOL", "U8", "I8", "F8_E4M3", "BF16", "F16", "I16", "F32", "I32", "U32", "F64", "I64", "C64", "F31")
Edit = Callable[[st.DrawFn, dict[str, Any]], None]


def _tensor(draw: st.DrawFn, document: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    name = draw(st.sampled_from(sorted(document["tensors"])))
    return name, document["tensors"][name]


def _resize(draw: st.DrawFn, document: dict[str, Any]) -> None:
    """A dim of a tensor and of the last slice grow or shrink alike."""
    _, entry = _tensor(draw, document)
    if entry["shape"]:
        dim = draw(st.integers(0, len(entry["shape"]) - 1))
        entry["shape"][dim] = draw(st.sampled_from(SIZES))
        last = entry["slices"][-1]
        last["shape"][dim] = max(0, entry["shape"][dim] - last["offsets"][dim])


def _make_huge(draw: st.DrawFn, document: dict[str, Any]) -> None:
    """All of a tensor in one slice, of any size and dtype."""
    _, entry = _tensor(draw, document)
    shape = draw(st.lists(st.sampled_from(SIZES), max_size=3))
    entry.update(shape=shape, dtype=draw(st.sampled_from(DTYPES)))
    entry["slices"] = [entry["slices"][0] | {"offsets": [0] * len(shape), "shape": list(shape)}]


def _redivide(draw: st.DrawFn, document: dict[str, Any]) -> None:
    """The border between two slices moves."""
    entry = document["tensors"]["model.embedding.weight"]
    border = draw(st.integers(0, 6))
    for part, (begin, end) in zip(entry["slices"], ((0, border), (border, 6)), strict=True):
        part.update(offsets=[begin, 0], shape=[end - begin, 4])


def _reshape(draw: st.DrawFn, document: dict[str, Any]) -> None:
    """The same number of elements in another shape."""
    _, entry = _tensor(draw, document)
    shape = draw(st.sampled_from([[3, 4], [4, 3], [12], [1, 12], [2, 2], [4, 1], [5, 1], [1], [1, 1]]))
    entry["shape"] = shape
    entry["slices"] = [entry["slices"][0] | {"offsets": [0] * len(shape), "shape": list(shape)}]


def _change_dtype(draw: st.DrawFn, document: dict[str, Any]) -> None:
    _tensor(draw, document)[1]["dtype"] = draw(st.sampled_from(DTYPES))


def _swap_slices(draw: st.DrawFn, document: dict[str, Any]) -> None:
    """Two tensors' bytes change places."""
    (_, first), (_, second) = _tensor(draw, document), _tensor(draw, document)
    first["slices"], second["slices"] = second["slices"], first["slices"]


def _rename_tensor(draw: st.DrawFn, document: dict[str, Any]) -> None:
    name, entry = _tensor(draw, document)
    del document["tensors"][name]
    document["tensors"][draw(st.sampled_from(["model.other", "other.mask", name + ".", "optimizer.x.exp_avg", "optimizer.norm.weight.new"]))] = entry


def _rename_file(draw: st.DrawFn, document: dict[str, Any]) -> None:
    """Everywhere, to where a forger would like a file to be read."""
    old = draw(st.sampled_from(sorted(document["files"])))
    new = draw(st.sampled_from(FORGED_FILES))
    document["files"][new] = document["files"].pop(old)
    for entry in document["tensors"].values():
        for part in entry["slices"]:
            part["file"] = new if part["file"] == old else part["file"]


def _attach(draw: st.DrawFn, document: dict[str, Any]) -> None:
    """A file under a forger's name is an attachment."""
    entry = document["attachments"]["tokenizer.model"]
    document["attachments"][draw(st.sampled_from(["../outside.safetensors", "/etc/hostname", "manifest.json", "a\0b", "link", *NAMES]))] = entry


def _change_length(draw: st.DrawFn, document: dict[str, Any]) -> None:
    """Changes the recorded length of a file."""
    entries = [*document["files"].values(), *document["attachments"].values()]
    draw(st.sampled_from(entries))["size_bytes"] = draw(st.sampled_from(SIZES))


def _drop_group(draw: st.DrawFn, document: dict[str, Any]) -> None:
    """All of the model or of the optimizer, with its files."""
    group = draw(st.sampled_from(["model", "optimizer"]))
    document["tensors"] = {name: entry for name, entry in document["tensors"].items() if not name.startswith(group)}
    document["files"] = {name: entry for name, entry in document["files"].items() if not name.startswith(group)}


EDITS: tuple[Edit, ...] = (
    _resize, _make_huge, _redivide, _reshape, _change_dtype, _swap_slices, _rename_tensor, _rename_file, _attach, _change_length, _drop_group,
)  # fmt: skip


@st.composite
def mutated_manifest(draw: st.DrawFn, document: dict[str, Any]) -> str:
    """The text of a manifest after one of these edits, of any edits of its JSON, or of both."""
    edited = copy.deepcopy(document)
    kind = draw(st.sampled_from(["values", "values", "consistent", "consistent", "both"]))
    if kind != "values":
        draw(st.sampled_from(EDITS))(draw, edited)
    return draw(mutated_json(edited, *NAMES, num_edits=0 if kind == "consistent" else None))
