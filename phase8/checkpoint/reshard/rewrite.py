"""Writes the tensors of a checkpoint to other files: region by region, compared with the original, and renamed when complete.

    .rewriting-<name>/          beside the destination; locked by whoever writes, taken up again by the next call for the same files
        job                     identifies the files and the checkpoint
        written/<file>.json     a file that is complete, with its checksums
        content/                what becomes the destination

Memory: a region and the slice of the original from which it is cut; during the comparison a whole tensor and one of its slices or regions.
Both are at most twice the largest tensor; the two buffers of the file being written are added.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from phase8.checkpoint.checksum import crc32, format_crc32, read_chunks
from phase8.checkpoint.load import Checkpoint
from phase8.checkpoint.manifest import manifest_bytes
from phase8.checkpoint.tensor_file import DTYPE_NAMES, TensorFile, WrittenFile, byte_view, open_for_reading, write_tensor_file
from phase8.checkpoint.untrusted import strict_json
from phase8.division import Region, slices_of
from phase8.durable import fsync_path, replace_file, storage_errors
from phase8.errors import CheckpointCorruptError, CheckpointError, StorageError

WORK_PREFIX = ".rewriting-"
OnProgress = Callable[[str, int, int], None]  # stage, bytes done, bytes in all


@dataclass(frozen=True)
class Entry:
    """An entry of a file to be written.

    Args:
        tensor: Name of the tensor in the original.
        region: Region of that tensor.
        dtype: Dtype in which it is stored.
    """

    tensor: str
    region: Region
    dtype: torch.dtype

    @property
    def form(self) -> Tensor:
        """Dtype and shape of the entry."""
        return torch.empty(self.region.shape, dtype=self.dtype, device="meta")

    @property
    def num_bytes(self) -> int:
        """Bytes of the entry."""
        return self.form.numel() * self.dtype.itemsize


@dataclass(frozen=True)
class PlannedFile:
    """A file to be written: its name, and its entries by their key."""

    name: str
    entries: dict[str, Entry]


@contextmanager
def rewriting(source: Checkpoint, destination: Path, files: Sequence[PlannedFile]) -> Iterator[Rewrite]:
    """Opens the working directory of `files`; it keeps what an interrupted call for the same files has finished.

    Raises:
        CheckpointError: The destination exists, or lies inside the original.
        StorageError: Another call is writing it, or the place cannot be written.
    """
    check_destination(source.path, destination)
    work = destination.with_name(WORK_PREFIX + destination.name)
    with storage_errors(destination), _locked(work, destination):
        job = _job(source, files)
        mark = work / "job"
        places = [work / name for name in ("written", "content")]
        is_ours = mark.is_file() and all(place.is_dir() for place in places)
        is_linked = any(path.is_symlink() for path in (mark, *places))  # a link would redirect what is read and written
        if is_linked or not is_ours or mark.read_bytes() != job.encode():
            for found in work.iterdir():
                shutil.rmtree(found) if found.is_dir() and not found.is_symlink() else found.unlink()
            replace_file(mark, job.encode())
        for place in places:
            place.mkdir(exist_ok=True)
        yield Rewrite(source, destination, files, work)


def check_destination(source: Path, destination: Path) -> None:
    """Refuses a path at which no rewritten checkpoint can be placed.

    Raises:
        CheckpointError: It exists, or lies inside the original.
    """
    origin, target = source.resolve(), destination.resolve()
    if target == origin:
        raise CheckpointError(f"SRC and DST are both {origin}; give another DST, for a checkpoint is never rewritten in place")
    if target.is_relative_to(origin):
        raise CheckpointError(f"DST {destination} lies in SRC {source}, which is never touched; give a DST beside it")
    if os.path.lexists(destination):
        raise CheckpointError(f"DST {destination} is there already; give another DST, or remove it")


@contextmanager
def _locked(work: Path, destination: Path) -> Iterator[None]:
    work.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StorageError(f"another call is writing {destination}; wait for it, or give another DST") from None
    except OSError:
        pass  # a file system without locks: two calls at once are found by the comparison at the end
    try:
        yield
    finally:
        os.close(descriptor)


def _job(source: Checkpoint, files: Sequence[PlannedFile]) -> str:
    """A record that identifies these files of this checkpoint."""
    plan = {
        file.name: {key: (entry.tensor, asdict(entry.region), DTYPE_NAMES[entry.dtype]) for key, entry in file.entries.items()} for file in files
    }
    return hashlib.sha256(manifest_bytes(source.manifest) + json.dumps(plan).encode()).hexdigest()


class Rewrite:
    """Files being written for a destination; created by `rewriting`.

    Args:
        source: The original.
        destination: Final name of `content`.
        files: The files to be written.
        work: The hidden working directory.
    """

    def __init__(self, source: Checkpoint, destination: Path, files: Sequence[PlannedFile], work: Path):
        self._source, self._destination, self._files, self._work = source, destination, files, work
        self.content = work / "content"

    def write(self, on_progress: OnProgress) -> dict[str, WrittenFile]:
        """Writes the files that are missing, and returns the description of all of them.

        Raises:
            CheckpointCorruptError: The original is damaged.
        """
        total = sum(entry.num_bytes for file in self._files for entry in file.entries.values())
        self._remove_unfinished()
        result, done = {}, 0
        for file in self._files:
            written = self._finished(file)
            if written is None:
                written = self._write(file, lambda num_bytes, done=done: on_progress("writing", done + num_bytes, total))
            result[file.name] = written
            done += sum(entry.num_bytes for entry in file.entries.values())
            on_progress("writing", done, total)
        return result

    def add(self, name: str, chunks: Iterator[bytes]) -> None:
        """Writes a file without tensors, replacing what an interrupted call left of it."""
        (self.content / name).unlink(missing_ok=True)
        with open(self.content / name, "xb") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())

    def compare(self, written: dict[str, WrittenFile], on_progress: OnProgress) -> None:
        """Reads everything back: headers and checksums must be those written, and every element must equal the original.

        Raises:
            StorageError: A file differs from what was written.
            CheckpointCorruptError: The original is damaged.
        """
        places: dict[str, list[tuple[TensorFile, str, Entry, str]]] = {}
        for planned in self._files:
            file = self._open(written[planned.name], planned.name)
            for key, entry in planned.entries.items():
                places.setdefault(entry.tensor, []).append((file, key, entry, written[planned.name].checksums[key]))
        total = sum(entry.num_bytes for regions in places.values() for _, _, entry, _ in regions)
        done = 0
        for name, regions in places.items():
            original = self._source.read(name)
            for file, key, entry, checksum in regions:
                if not _is_stored(file, key, _cut(original, entry.region).to(entry.dtype), checksum):
                    self._record(file.path.name).unlink()  # the next call writes it again
                    raise StorageError(f"{file.path}: entry {key!r} is not as it was written; run the same command again, or use another disk")
                done += entry.num_bytes
                on_progress("verifying", done, total)
            del original  # before the next one is read

    def commit(self) -> None:
        """Renames the content to the destination, which must not exist."""
        fsync_path(self.content)
        check_destination(self._source.path, self._destination)
        self.content.rename(self._destination)
        fsync_path(self._destination.parent)
        shutil.rmtree(self._work, ignore_errors=True)

    def _remove_unfinished(self) -> None:
        names = {file.name for file in self._files}
        for path in self.content.iterdir():
            if path.name not in names or not self._record(path.name).exists():
                path.unlink()

    def _record(self, name: str) -> Path:
        return self._work / "written" / f"{name}.json"

    def _write(self, file: PlannedFile, on_bytes: Callable[[int], None]) -> WrittenFile:
        path = self.content / file.name
        path.unlink(missing_ok=True)
        num_bytes = 0

        def read(key: str) -> Tensor:
            nonlocal num_bytes
            on_bytes(num_bytes)
            entry = file.entries[key]
            num_bytes += entry.num_bytes
            return self._source.read_region(entry.tensor, entry.region).to(entry.dtype)

        written = write_tensor_file(path, {key: entry.form for key, entry in file.entries.items()}, read=read)
        fsync_path(self.content)
        replace_file(self._record(file.name), json.dumps(asdict(written)).encode())
        return written

    def _finished(self, file: PlannedFile) -> WrittenFile | None:
        """The description of a file that an earlier call finished, if its bytes still match."""
        try:
            with open_for_reading(self._record(file.name)) as record:
                written = WrittenFile(**strict_json(record.read(), encoding="utf-8"))
            stored = self._open(written, file.name)
            is_whole = type(written.size_bytes) is int and dict(stored.checksums()) == written.checksums
            if is_whole and written.checksums.keys() == file.entries.keys():
                return written
        except (ValueError, TypeError, StorageError, CheckpointCorruptError):
            pass  # written again
        self._record(file.name).unlink(missing_ok=True)
        return None

    def _open(self, written: WrittenFile, name: str) -> TensorFile:
        try:
            return TensorFile(self.content / name, size_bytes=written.size_bytes, header_checksum=written.header_checksum)
        except CheckpointCorruptError as error:
            raise StorageError(f"{self.content / name} is not as it was written; run the same command again, or use another disk") from error


def _is_stored(file: TensorFile, key: str, expected: Tensor, checksum: str) -> bool:
    """Whether an entry, read in constant memory, has its checksum and the expected elements."""
    data = torch.frombuffer(byte_view(expected), dtype=torch.uint8) if expected.numel() else torch.empty(0, dtype=torch.uint8)
    crc, begin, equal = 0, 0, True
    with open_for_reading(file.path) as stream:
        stream.seek(file.tensors[key].begin)
        for chunk in read_chunks(stream, file.tensors[key].num_bytes):
            crc = crc32(chunk, crc)
            equal = equal and torch.equal(torch.frombuffer(chunk, dtype=torch.uint8), data[begin : begin + len(chunk)])
            begin += len(chunk)
    return equal and begin == len(data) and format_crc32(crc) == checksum


def _cut(tensor: Tensor, region: Region) -> Tensor:
    return tensor[slices_of(region)].contiguous()
