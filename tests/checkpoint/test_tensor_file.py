from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from phase8.checkpoint.checksum import CHUNK_BYTES, checksum_of
from phase8.checkpoint.tensor_file import DTYPES, TensorFile, open_for_reading, write_tensor_file
from phase8.errors import CheckpointCorruptError


def random_bits(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Every bit pattern, NaNs and infinities included; booleans are 0 or 1."""
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    data = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(num_bytes))
    return (data % 2 == 0).reshape(shape) if dtype == torch.bool else data.view(dtype).reshape(shape)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def read_all(path: Path, written) -> dict[str, torch.Tensor]:
    file = TensorFile(path, size_bytes=written.size_bytes, header_checksum=written.header_checksum)
    result = {}
    for key, stored in file.tensors.items():
        result[key] = torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
        assert file.read_into(key, result[key]) == written.checksums[key] == file.checksum(key)
    assert dict(file.checksums()) == written.checksums
    return result


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_comes_back_bit_for_bit_and_the_safetensors_library_reads_the_same(name: str, tmp_path: Path):
    tensors = {f"t{shape}": random_bits(DTYPES[name], *shape) for shape in ((), (0,), (3, 0, 2), (5,), (2, 3, 4))}
    written = write_tensor_file(tmp_path / "a.safetensors", tensors)
    ours, theirs = read_all(tmp_path / "a.safetensors", written), safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert ours.keys() == theirs.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert ours[key].shape == theirs[key].shape == tensor.shape
        assert ours[key].dtype == theirs[key].dtype == tensor.dtype
        assert bits(ours[key]) == bits(theirs[key]) == bits(tensor)
        assert written.checksums[key] == checksum_of(bits(tensor))


def test_views_with_strides_offsets_and_conjugation_are_stored_as_they_look(tmp_path: Path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "transposed": base.t(),
        "strided": base[::2, 1::2],
        "expanded": torch.ones(3, 1).expand(3, 5),
        "conjugate": torch.tensor([1 + 2j, 3 - 1j]).conj(),
        "needs_gradient": torch.nn.Parameter(base[1]),
    }
    found = read_all(tmp_path / "a.safetensors", write_tensor_file(tmp_path / "a.safetensors", tensors))
    for key, tensor in tensors.items():
        assert torch.equal(found[key], tensor.detach())


def test_a_tensor_longer_than_a_chunk_is_read_and_summed_whole(tmp_path: Path):
    tensors = {"long": random_bits(torch.uint8, CHUNK_BYTES + 5), "after": torch.ones(3)}
    written = write_tensor_file(tmp_path / "a.safetensors", tensors)
    assert written.checksums["long"] == checksum_of(bits(tensors["long"]))
    assert torch.equal(read_all(tmp_path / "a.safetensors", written)["long"], tensors["long"])


def test_the_data_of_every_tensor_is_aligned_for_readers_that_map_the_file(tmp_path: Path):
    tensors = {"odd": torch.ones(3, dtype=torch.bool), "wide": torch.ones(2, dtype=torch.float64), "half": torch.ones(1, dtype=torch.float16)}
    written = write_tensor_file(tmp_path / "a.safetensors", tensors)
    file = TensorFile(tmp_path / "a.safetensors", size_bytes=written.size_bytes, header_checksum=written.header_checksum)
    assert all(stored.begin % DTYPES[stored.dtype].itemsize == 0 for stored in file.tensors.values())


def test_an_existing_file_is_not_overwritten(tmp_path: Path):
    (tmp_path / "a.safetensors").write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        write_tensor_file(tmp_path / "a.safetensors", {"a": torch.ones(1)})
    assert (tmp_path / "a.safetensors").read_bytes() == b"precious"


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"a": None},
        {"a": {**GOOD, "dtype": "F33"}},
        {"a": {**GOOD, "dtype": ["F32"]}},
        {"a": {**GOOD, "shape": [3]}},
        {"a": {**GOOD, "shape": [-2]}},
        {"a": {**GOOD, "shape": [2.0]}},
        {"a": {**GOOD, "shape": "ab"}},
        {"a": {**GOOD, "shape": [True, 2]}},
        {"a": {**GOOD, "data_offsets": [8, 16]}},
        {"a": {**GOOD, "data_offsets": [8, 0]}},
        {"a": {**GOOD, "data_offsets": [0]}},
        {"a": {**GOOD, "data_offsets": [0, 8, 8]}},
        {"a": {"dtype": "F32", "shape": [2]}},
        {"a": {**GOOD, "shape": [1], "data_offsets": [0, 4]}},
        {"a": GOOD, "b": GOOD},
        {},
    ],
    ids=str,
)
def test_a_header_that_does_not_tile_the_file_is_refused_even_with_a_right_checksum(header: object, tmp_path: Path):
    text = json.dumps(header).encode()
    head = len(text).to_bytes(8, "little") + text
    (tmp_path / "a.safetensors").write_bytes(head + bytes(8))
    with pytest.raises(CheckpointCorruptError, match=r"a\.safetensors: its safetensors header is not valid"):
        TensorFile(tmp_path / "a.safetensors", size_bytes=len(head) + 8, header_checksum=checksum_of(head))


@pytest.mark.parametrize("data", [b"", b"\x08\0\0", (2**40).to_bytes(8, "little") + b"{}", (3).to_bytes(8, "little") + b"{}"])
def test_a_file_too_short_for_its_header_is_refused(data: bytes, tmp_path: Path):
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(CheckpointCorruptError, match="not a safetensors file"):
        TensorFile(tmp_path / "a.safetensors", size_bytes=len(data), header_checksum=checksum_of(data))


def test_links_pipes_and_directories_are_refused_without_waiting_on_them(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "directory").mkdir()
    num_open_files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    for name in ("link", "pipe", "directory", "missing"):
        with pytest.raises(CheckpointCorruptError, match=name), open_for_reading(tmp_path / name):
            pass
    if num_open_files is not None:
        assert len(os.listdir("/proc/self/fd")) == num_open_files
