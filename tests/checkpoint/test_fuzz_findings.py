"""What the fuzzers found, one test each."""

from __future__ import annotations

import base64
import json
import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from phase8.checkpoint.checksum import checksum_of
from phase8.checkpoint.load import open_checkpoint
from phase8.checkpoint.manifest import json_problem, parse_manifest
from phase8.checkpoint.random_state import capture_random_state, restore_random_state
from phase8.checkpoint.save import save_checkpoint
from phase8.checkpoint.state import flat_state, restore_state
from phase8.checkpoint.tensor_file import TensorFile
from phase8.errors import CheckpointCorruptError, CheckpointMismatchError
from tests.checkpoint.fuzzing import seal
from tests.checkpoint.sample_checkpoint import bits, build, write_checkpoint

CPU = torch.device("cpu")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path, 2, seed=2)


def change(directory: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edits the manifest and gives it a right checksum."""
    document = json.loads((directory / "manifest.json").read_bytes())
    del document["checksum"]
    edit(document)
    (directory / "manifest.json").write_bytes(seal(json.dumps(document)))


def peak_bytes(function: Callable[[], object]) -> int:
    """Most memory that Python and numpy held at once for a function."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def write_header(path: Path, header: bytes, data: bytes) -> TensorFile:
    """Opens a file of this header that a manifest vouches for."""
    head = len(header).to_bytes(8, "little") + header
    path.write_bytes(head + data)
    return TensorFile(path, size_bytes=len(head) + len(data), header_checksum=checksum_of(head))


def test_opening_a_small_checkpoint_takes_little_memory(directory: Path):
    """A buffer for the longest manifest there may be, 1 GiB, was taken before the first byte was read."""
    assert peak_bytes(lambda: open_checkpoint(directory)) < 2**20


def test_a_manifest_longer_than_any_is_not_read(directory: Path):
    os.truncate(directory / "manifest.json", 2**40)
    with pytest.raises(CheckpointCorruptError, match="longer than"):
        open_checkpoint(directory)


def test_a_forged_shape_takes_no_memory(directory: Path):
    """Memory was taken for the shape in the manifest before anything was compared with it."""

    def enlarge(document: dict[str, Any]) -> None:
        entry = document["tensors"]["model.embedding.weight"]
        entry["shape"][0] = entry["slices"][1]["shape"][0] = 2**40
        entry["shape"][0] += 3

    change(directory, enlarge)
    with pytest.raises(CheckpointCorruptError, match=r"safetensors' has \d+ bytes, but its tensors have 17592186044\d+"):
        open_checkpoint(directory)


def test_a_shape_that_the_file_does_not_have_is_refused(directory: Path):
    def reshape(document: dict[str, Any]) -> None:
        entry = document["tensors"]["model.norm.weight"]
        entry["shape"], entry["slices"][0]["shape"], entry["slices"][0]["offsets"] = [2, 2], [2, 2], [0, 0]

    change(directory, reshape)
    with pytest.raises(CheckpointCorruptError, match=r"its manifest says BF16 \[2, 2\]"):
        open_checkpoint(directory).read("model.norm.weight")


def test_a_header_of_a_hundred_thousand_dims_is_refused_at_once(tmp_path: Path):
    """The product of its sizes, a number of a megabyte, took minutes."""
    header = json.dumps({"a": {"dtype": "U8", "shape": [2**62] * 100_000, "data_offsets": [0, 2]}})
    begin = time.thread_time()
    with pytest.raises(CheckpointCorruptError, match="at most 64"):
        write_header(tmp_path / "a.safetensors", header.encode(), b"ab")
    assert time.thread_time() - begin < 2


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "utf-32-be"])
def test_json_is_read_in_one_encoding_only(encoding: str, directory: Path, tmp_path: Path):
    """Python's JSON reader looks for UTF-16 and UTF-32 as well: the same bytes then mean one thing here and another elsewhere."""
    header = json.dumps({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}})
    assert list(write_header(tmp_path / "good.safetensors", header.encode(), b"ab").tensors) == ["a"]
    with pytest.raises(CheckpointCorruptError, match="not valid"):
        write_header(tmp_path / "a.safetensors", header.encode(encoding), b"ab")
    body = (directory / "manifest.json").read_bytes()[:-31].decode().encode(encoding)
    with pytest.raises(CheckpointCorruptError, match="not valid JSON"):
        parse_manifest(body + f'"checksum": "{checksum_of(body)}"\n}}\n'.encode(), Path("manifest.json"))


def test_a_manifest_is_ascii(directory: Path):
    body = (directory / "manifest.json").read_bytes()[:-31].replace(rb"Gr\u00fcn", "Grün".encode())
    with pytest.raises(CheckpointCorruptError, match="not valid JSON"):
        parse_manifest(body + f'"checksum": "{checksum_of(body)}"\n}}\n'.encode(), Path("manifest.json"))


@pytest.mark.parametrize("header", ['{"a": %s, "a": %s}', '{"a": {"dtype": "F32", "dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}'])
def test_a_header_with_the_same_key_twice_is_refused(header: str, tmp_path: Path):
    """The last one counted here, the first one in other readers."""
    entry = '{"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}'
    with pytest.raises(CheckpointCorruptError, match="same key twice"):
        write_header(tmp_path / "a.safetensors", header.replace("%s", entry).encode(), b"ab")


@pytest.mark.parametrize(
    "entries",
    [
        {"x" * 100_000: {"dtype": "BOOL", "shape": [5], "data_offsets": [0, 5]}},
        {"mask": {"dtype": "x" * 100_000, "shape": [5], "data_offsets": [0, 5]}},
        {"mask": {"dtype": "BOOL", "shape": [5, *[1] * 100_000], "data_offsets": [0, 5]}},
    ],
    ids=["name", "dtype", "shape"],
)
def test_the_message_about_a_header_is_short(entries: dict[str, Any], directory: Path):
    header = json.dumps(entries).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(5)
    name = "model-rank00001-00000.safetensors"

    def point_to_it(document: dict[str, Any]) -> None:
        entry = {"file": name, "key": "mask", "offsets": [0], "shape": [5], "checksum": "crc32:00000000"}
        document["tensors"] = {"model.mask": {"dtype": "BOOL", "shape": [5], "slices": [entry]}}
        document["files"] = {name: {"size_bytes": len(content), "header_checksum": checksum_of(content[:-5])}}

    change(directory, point_to_it)
    for path in directory.glob("*-rank*"):
        path.unlink()
    (directory / name).write_bytes(content)
    with pytest.raises(CheckpointCorruptError) as caught:
        open_checkpoint(directory).read("model.mask")
    assert len(str(caught.value)) < 1000


def test_a_long_name_does_not_multiply_by_the_values_under_it():
    """Every value's path was written out: a file of a megabyte became terabytes."""
    value = {"x" * 100_000: [0] * 10_000}
    assert json_problem(value, "metadata") is None
    assert peak_bytes(lambda: json_problem(value, "metadata")) < 16 * 2**20
    value["x" * 100_000][-1] = float("nan")
    problem = json_problem(value, "metadata")
    assert problem is not None and problem.startswith("metadata.xxx") and "[9999] is nan" in problem and len(problem) < 1000


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("optimizer.norm.weight.exp_avg", "other.mask", r"lacks optimizer\.norm\.weight\.exp_avg, which the optimizer keeps"),
        ("optimizer.norm.weight.exp_avg", "optimizer.norm.weight.momentum", r"optimizer\.norm\.weight\.momentum is nothing that the optimizer keeps"),
        ("optimizer.norm.weight.exp_avg", None, r"lacks optimizer\.norm\.weight\.exp_avg, which the optimizer keeps"),
        ("model.mask", "other.mask", r"other\.mask is neither of the model nor of the optimizer"),
    ],
)
@pytest.mark.parametrize("trained", [False, True])
def test_optimizer_state_is_whole_or_refused(old: str, new: str | None, message: str, trained: bool, tmp_path: Path):
    """A new optimizer took what there was: the next step failed for the moment that was left out, or went on from zeros."""
    tensors = flat_state(*build(2, trained=True))
    tensor = tensors.pop(old)
    checkpoint = open_checkpoint(
        save_checkpoint(tmp_path, step=1, tensors=tensors | ({} if new is None else {new: tensor}), metadata={}, attachments={})
    )
    model, optimizer = build(3, trained=trained)
    before = {name: bits(value) for name, value in flat_state(model, optimizer).items()}
    with pytest.raises(CheckpointCorruptError if "lacks" in message else CheckpointMismatchError, match=message):
        restore_state(checkpoint, model, optimizer)
    assert {name: bits(value) for name, value in flat_state(model, optimizer).items()} == before


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("numpy", "position", 625),
        ("numpy", "position", 10**6),
        ("numpy", "position", -5),
        ("numpy", "position", 2**70),
        ("numpy", "position", True),
        ("numpy", "has_gauss", 2**70),
        ("numpy", "has_gauss", "x"),
        ("numpy", "gauss", None),
        ("python", "gauss_next", "x"),
        ("python", "version", "x" * 100_000),
    ],
)
def test_a_generator_state_that_numpy_would_read_beyond_is_refused(section: str, key: str, value: object):
    """numpy takes any position and then reads so far behind its words."""
    state = capture_random_state(CPU)
    state[section][key] = value
    with pytest.raises(CheckpointCorruptError, match="random state") as caught:
        restore_random_state(state, CPU)
    assert len(str(caught.value)) < 1000
    restore_random_state(capture_random_state(CPU), CPU)


def test_a_generator_state_that_torch_does_not_accept_is_refused():
    state = capture_random_state(CPU)
    num_bytes = len(base64.b64decode(state["torch"]))
    state["torch"] = base64.b64encode(np.full(num_bytes, 255, np.uint8).tobytes()).decode()
    with pytest.raises(CheckpointCorruptError, match="random state"):
        restore_random_state(state, CPU)
