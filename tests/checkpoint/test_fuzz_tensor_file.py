"""Safetensors files and directories that nobody wrote: every tensor is read as it was saved, or refused in one sentence.

Every run of the tests tries 100 to 150 inputs of a kind, always the same. Ten thousand new ones each (minutes):

    python -m pytest -m full -s tests/checkpoint/test_fuzz_tensor_file.py
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phase8.checkpoint.checksum import checksum_of
from phase8.checkpoint.load import newest_good_checkpoint, open_checkpoint
from phase8.checkpoint.tensor_file import DTYPES, TensorFile, write_tensor_file
from phase8.errors import CheckpointError, Phase8Error
from tests.checkpoint.fuzzing import NUMBERS, Tally, Watch, fuzz, mutated_bytes, mutated_json
from tests.checkpoint.sample_checkpoint import TOKENIZER, bits, write_checkpoint

FILE = "model-rank00000-00000.safetensors"
NAMES = ("embedding.weight@0,0", "norm.weight", "mask", "dtype", "shape", "data_offsets")


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 1 and 2, a copy of each, and a file outside."""
    place = tmp_path_factory.mktemp("fuzz")
    for step in (1, 2):
        open_checkpoint(write_checkpoint(place / "checkpoints", step, seed=step)).verify()
    shutil.copytree(place / "checkpoints", place / "originals")
    shutil.copy(place / "originals/step-0000000002" / FILE, place / "outside.safetensors")
    return place / "checkpoints"


def _contents(directory: Path) -> dict[str, bytes]:
    """Tensors and attachments, each read without a look at the others first."""
    checkpoint = open_checkpoint(directory)
    found = {name: bits(checkpoint.read(name)) for name in checkpoint.tensor_names}
    return found | {name: checkpoint.attachment(name).read_bytes() for name in checkpoint.manifest.attachments}


def _originals(root: Path, step: int) -> Path:
    return root.parent / "originals" / f"step-{step:010d}"


def _vouch(directory: Path, content: bytes, *, header_bytes: int) -> None:
    """Puts a file into a checkpoint whose manifest has its length and the checksum of its header."""
    (directory / FILE).write_bytes(content)
    document = json.loads((directory.parent.parent / "originals" / directory.name / "manifest.json").read_bytes())
    document["files"][FILE] = {"size_bytes": len(content), "header_checksum": checksum_of(content[:header_bytes])}
    del document["checksum"]
    body = json.dumps(document)[:-1].encode() + b", "
    (directory / "manifest.json").write_bytes(body + f'"checksum": "{checksum_of(body)}"\n}}\n'.encode())


def _fuzz_headers(root: Path, watch: Watch, *, num_inputs: int, derandomize: bool) -> None:
    """The header is another one, and the manifest vouches for it: the checksums of the slices are those of the original."""
    directory, tally = root / "step-0000000002", Tally()
    original = (_originals(root, 2) / FILE).read_bytes()
    end = 8 + int.from_bytes(original[:8], "little")
    header = json.loads(original[8:end])
    expected = _contents(_originals(root, 2))
    lengths = st.sampled_from([None] * 6 + [number % 2**64 for number in NUMBERS if type(number) is int])

    @given(text=mutated_json(header, *NAMES), length=lengths, tail=mutated_bytes(original[end:]), is_tail_whole=st.integers(0, 3))
    def check(text: str, length: int | None, tail: bytes, is_tail_whole: int) -> None:
        head = text.encode("utf-8", "surrogatepass")
        num_bytes = len(head) if length is None else length
        content = num_bytes.to_bytes(8, "little") + head + (tail if is_tail_whole == 0 else original[end:])
        _vouch(directory, content, header_bytes=8 + num_bytes)
        try:
            with watch.over(directory):
                found = _contents(directory)
        except Phase8Error as error:
            tally.refused(error)
        else:
            tally.count("loaded")
            assert found == expected

    fuzz(check, num_inputs=num_inputs, derandomize=derandomize)()
    tally.check("headers of a tensor file", at_least=num_inputs, among={"loaded", "CheckpointCorruptError"})


def _shifted(original: bytes, shifts: list[tuple[str, int]]) -> bytes:
    """A file of which entries claim other bytes, as many as before."""
    end = 8 + int.from_bytes(original[:8], "little")
    header = json.loads(original[8:end])
    for key, distance in shifts:
        header[key]["data_offsets"] = [offset + distance for offset in header[key]["data_offsets"]]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + original[end:]


def _fuzz_bytes(root: Path, watch: Watch, *, num_inputs: int, derandomize: bool) -> None:
    """A tensor file on its own, with a right checksum of whatever its header is; its entries are those that its bytes say."""
    path, tally = root.parent / "alone.safetensors", Tally()
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4, dtype=torch.uint8), "c": torch.tensor(True), "d": torch.empty(0, 2)}
    path.unlink(missing_ok=True)
    write_tensor_file(path, tensors)
    original = path.read_bytes()
    shift = st.tuples(st.sampled_from("abcd"), st.integers(-5, 5) | st.sampled_from([-24, 24]))
    shifted = st.lists(shift, min_size=1, max_size=2).map(lambda shifts: _shifted(original, shifts))
    lengths = st.sampled_from([None] * 20 + [number for number in NUMBERS if type(number) is int and number >= 0])

    @given(content=st.one_of(mutated_bytes(original), mutated_bytes(original), shifted), claimed=lengths)
    def check(content: bytes, claimed: int | None) -> None:
        path.write_bytes(content)
        header_bytes = min(int.from_bytes(content[:8], "little"), len(content))
        try:
            with watch.over(path):
                size_bytes = len(content) if claimed is None else claimed
                file = TensorFile(path, size_bytes=size_bytes, header_checksum=checksum_of(content[: 8 + header_bytes]))
                found = {key: torch.empty(stored.shape, dtype=DTYPES[stored.dtype]) for key, stored in file.tensors.items()}
                checksums = {key: file.read_into(key, tensor) for key, tensor in found.items()}
                assert checksums == dict(file.checksums())
        except Phase8Error as error:
            tally.refused(error)
            return
        tally.count("loaded")
        entries: dict[str, Any] = json.loads(content[8 : 8 + header_bytes])
        entries.pop("__metadata__", None)
        data = content[8 + header_bytes :]
        ranges = {key: entry["data_offsets"] for key, entry in entries.items()}
        assert {key: bits(tensor) for key, tensor in found.items()} == {key: data[begin:end] for key, (begin, end) in ranges.items()}
        ends = [0, *(end for _, end in sorted(ranges.values()))]
        assert [begin for begin, _ in sorted(ranges.values())] == ends[:-1] and ends[-1] == len(data)

    fuzz(check, num_inputs=num_inputs, derandomize=derandomize)()
    tally.check("bytes of a tensor file", at_least=num_inputs, among={"loaded", "CheckpointCorruptError"})


def _flip(directory: Path, names: tuple[str, str], number: int) -> None:
    data = bytearray((directory / names[0]).read_bytes())
    if data:
        data[number % len(data)] ^= 1 << number % 8
        (directory / names[0]).write_bytes(data)


def _truncate(directory: Path, names: tuple[str, str], number: int) -> None:
    data = (directory / names[0]).read_bytes()
    (directory / names[0]).write_bytes(data[: number % (len(data) + 1)])


def _remove(directory: Path, names: tuple[str, str], number: int) -> None:
    (directory / names[0]).unlink()


def _swap(directory: Path, names: tuple[str, str], number: int) -> None:
    first, second = ((directory / name).read_bytes() for name in names)
    (directory / names[0]).write_bytes(second)
    (directory / names[1]).write_bytes(first)


def _overwrite(directory: Path, names: tuple[str, str], number: int) -> None:
    (directory / names[0]).write_bytes((directory / names[1]).read_bytes())


def _of_another_step(directory: Path, names: tuple[str, str], number: int) -> None:
    shutil.copy(_originals(directory.parent, 1) / names[0], directory / names[0])


def _link(directory: Path, names: tuple[str, str], number: int) -> None:
    """To the very same bytes, outside: whoever follows it finds nothing wrong."""
    (directory / names[0]).unlink()
    (directory / names[0]).symlink_to(_originals(directory.parent, 2) / names[0])


def _pipe(directory: Path, names: tuple[str, str], number: int) -> None:
    (directory / names[0]).unlink()
    os.mkfifo(directory / names[0])


def _directory(directory: Path, names: tuple[str, str], number: int) -> None:
    (directory / names[0]).unlink()
    (directory / names[0]).mkdir()


def _add(directory: Path, names: tuple[str, str], number: int) -> None:
    (directory / ["x.safetensors", ".hidden", "manifest.json.bak", "\x1b[2J", "a\nb", "☃"][number % 6]).write_bytes(b"x")


def _lengthen(directory: Path, names: tuple[str, str], number: int) -> None:
    """A hole at the end, of any size: a file that claims to be huge and takes no room."""
    os.truncate(directory / names[0], min(2**40, number + (directory / names[0]).stat().st_size))


DAMAGES = (_flip, _truncate, _remove, _swap, _overwrite, _of_another_step, _link, _pipe, _directory, _add, _lengthen)


def _fuzz_directories(root: Path, watch: Watch, *, num_inputs: int, derandomize: bool) -> None:
    """Files of the newest checkpoint are damaged: it is as it was, or the one before it is used."""
    directory, tally = root / "step-0000000002", Tally()
    expected = {path.name: _contents(path) for path in (_originals(root, 1), _originals(root, 2))}
    names = sorted(path.name for path in _originals(root, 2).iterdir())
    pairs = st.tuples(st.sampled_from(names), st.sampled_from(names))
    damage = st.tuples(st.sampled_from(DAMAGES), pairs, st.sampled_from([0, 1, 8, 2**20, 2**31, 2**40]) | st.integers(0, 2000))

    @given(damages=st.lists(damage, min_size=1, max_size=2))
    def check(damages: list[Any]) -> None:
        shutil.rmtree(directory)
        shutil.copytree(_originals(root, 2), directory)
        for apply, files, number in damages:
            if all(path.is_file() and not path.is_symlink() and path.stat().st_size < 2**20 for path in (directory / name for name in files)):
                apply(directory, files, number)
        passed_over: list[CheckpointError] = []
        with watch.over(root):
            found = newest_good_checkpoint(root, on_damaged=lambda path, error: passed_over.append(error))
            contents = _contents(found.path)
        assert contents == expected[found.path.name] and contents["tokenizer.model"] == TOKENIZER
        if found.path == directory:
            tally.count("loaded")
            assert all((directory / name).read_bytes() == (_originals(root, 2) / name).read_bytes() for name in names)
        else:
            tally.refused(passed_over[0])

    fuzz(check, num_inputs=num_inputs, derandomize=derandomize)()
    tally.check("files of a checkpoint", at_least=num_inputs, among={"loaded", "CheckpointCorruptError"})


def test_headers_of_a_tensor_file(root: Path, watch: Watch) -> None:
    _fuzz_headers(root, watch, num_inputs=100, derandomize=True)


def test_bytes_of_a_tensor_file(root: Path, watch: Watch) -> None:
    _fuzz_bytes(root, watch, num_inputs=150, derandomize=True)


def test_files_of_a_checkpoint(root: Path, watch: Watch) -> None:
    _fuzz_directories(root, watch, num_inputs=100, derandomize=True)


@pytest.mark.full
def test_many_headers_of_a_tensor_file(root: Path, watch: Watch) -> None:
    _fuzz_headers(root, watch, num_inputs=10_000, derandomize=False)


@pytest.mark.full
def test_many_bytes_of_a_tensor_file(root: Path, watch: Watch) -> None:
    _fuzz_bytes(root, watch, num_inputs=10_000, derandomize=False)


@pytest.mark.full
def test_many_files_of_a_checkpoint(root: Path, watch: Watch) -> None:
    _fuzz_directories(root, watch, num_inputs=10_000, derandomize=False)
