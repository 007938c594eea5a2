"""Storage of phase8 below torch's distributed checkpoint: every rank writes its own files, and the coordinator writes the manifest last.

torch's planner decides which rank writes which part of which tensor (what several ranks hold is written once) and passes plans and
results between them:

    coordinator    makes the directory, which is locked while it lives, and puts its name into every plan
    every rank     writes its parts into files that nobody else writes, and reports where they lie, with checksums
    coordinator    writes attachments and manifest, checks that every element is there once, and gives the directory its name

A file name is `<group>-<number>.safetensors`, of several ranks `<group>-rank<rank>-<number>.safetensors`. An entry that is a whole tensor
has its name without the group, so that the model file of one process is a plain state dict; a part has `@` and its offsets after it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from phase8.checkpoint.checksum import checksum_of
from phase8.checkpoint.manifest import (
    FORMAT,
    FORMAT_VERSION,
    TENSOR_FILE_SUFFIX,
    AttachmentEntry,
    Manifest,
    Slice,
    TensorEntry,
    TensorFileEntry,
    consistency_problem,
    manifest_bytes,
)
from phase8.checkpoint.step_directories import MANIFEST_NAME, commit, saving_directory
from phase8.checkpoint.tensor_file import DTYPE_NAMES, write_tensor_file
from phase8.durable import fsync_path
from phase8.errors import CheckpointError


@dataclass(frozen=True)
class _Task:
    """The coordinator's instructions to a rank.

    Args:
        directory: Name of the directory under the root.
        file_prefix: Distinguishes the files of this rank from those of other ranks.
    """

    directory: str
    file_prefix: str


@dataclass(frozen=True)
class _Written:
    """The place of a part of a tensor, and the file that holds it."""

    part: Slice
    file: TensorFileEntry


class CheckpointWriter(StorageWriter):
    """Writes one checkpoint; a context manager that removes what was not committed when it ends.

    Args:
        root: The `checkpoints` directory of a run; created if missing.
        step: Optimizer steps done.
        metadata: JSON; the coordinator's is stored.
        attachments: Maps file names in the checkpoint to their content; the coordinator's are stored.
        max_file_bytes: A new file is begun when the tensors of a file would exceed this size.
    """

    def __init__(self, root: Path, *, step: int, metadata: dict[str, Any], attachments: Mapping[str, bytes], max_file_bytes: int):
        self.root, self.step, self.metadata, self.attachments, self.max_file_bytes = root, step, metadata, attachments, max_file_bytes
        self._open = ExitStack()
        self._directory: Path | None = None

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Does nothing: a writer writes one checkpoint, whose path it already has."""

    def set_up_storage_writer(self, is_coordinator: bool, *_: Any, **__: Any) -> None:
        """Does nothing: `prepare_global_plan` and `finish` do the additional work of the coordinator."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Ids are not used, so none is valid."""
        return False

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Drops empty parts: an empty part may begin where another rank's part begins, and only one of the two would be written."""
        return replace(plan, items=[item for item in plan.items if _num_elements(_box(item)[1]) > 0 or _num_elements(_size(item)) == 0])

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Creates the directory."""
        if not self.root.is_dir():
            self.root.mkdir(parents=True, exist_ok=True)
            fsync_path(self.root.parent)
        self._directory = self._open.enter_context(saving_directory(self.root, self.step))
        prefixes = [f"rank{rank:05d}-" for rank in range(len(plans))] if len(plans) > 1 else [""]
        return [replace(plan, storage_data=_Task(self._directory.name, prefix)) for plan, prefix in zip(plans, prefixes, strict=True)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes this rank's parts, and waits until they are on the disk."""
        results: list[WriteResult] = []
        for name, items in _plan_files(plan.items, plan.storage_data.file_prefix, self.max_file_bytes).items():
            path = self.root / plan.storage_data.directory / name
            written = write_tensor_file(path, {_key(item): planner.resolve_data(item) for item in items})
            file = TensorFileEntry(size_bytes=written.size_bytes, header_checksum=written.header_checksum)
            for item in items:
                offsets, shape = _box(item)
                part = Slice(file=name, key=_key(item), offsets=offsets, shape=shape, checksum=written.checksums[_key(item)])
                results.append(WriteResult(item.index, _num_bytes(item), _Written(part, file)))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Writes attachments and manifest, and commits."""
        assert self._directory is not None
        files: dict[str, TensorFileEntry] = {}
        slices: dict[str, list[Slice]] = {name: [] for name in metadata.state_dict_metadata}
        for result in (result for of_rank in results for result in of_rank):
            files[result.storage_data.part.file] = result.storage_data.file
            slices[result.index.fqn].append(result.storage_data.part)
        manifest = Manifest(
            format=FORMAT,
            format_version=FORMAT_VERSION,
            step=self.step,
            metadata=self.metadata,
            files=dict(sorted(files.items())),
            tensors={name: _entry(stored, slices[name]) for name, stored in metadata.state_dict_metadata.items()},
            attachments={name: _attach(content, self._directory / name) for name, content in self.attachments.items()},
        )
        if (problem := consistency_problem(manifest)) is not None:
            raise CheckpointError(f"the parts that the ranks hold are not the whole: {problem}; nothing was saved")
        _write_durably(self._directory / MANIFEST_NAME, manifest_bytes(manifest))
        fsync_path(self._directory)
        commit(self._directory, self.root, self.step)


def _entry(stored: Any, slices: list[Slice]) -> TensorEntry:
    assert isinstance(stored, TensorStorageMetadata)  # `check_savable` lets nothing else pass
    return TensorEntry(dtype=DTYPE_NAMES[stored.properties.dtype], shape=list(stored.size), slices=sorted(slices, key=lambda part: part.offsets))


def _plan_files(items: Iterable[WriteItem], prefix: str, max_file_bytes: int) -> dict[str, list[WriteItem]]:
    """Assigns tensors to files: one group per file, in the given order; a file is closed before it exceeds the limit."""
    groups: dict[str, list[list[WriteItem]]] = {}
    num_bytes = 0
    for item in sorted(items, key=lambda item: group_of(item.index.fqn)):
        files = groups.setdefault(group_of(item.index.fqn), [])
        if not files or num_bytes + _num_bytes(item) > max_file_bytes:
            files.append([])
            num_bytes = 0
        files[-1].append(item)
        num_bytes += _num_bytes(item)
    return {f"{group}-{prefix}{index:05d}{TENSOR_FILE_SUFFIX}": found for group, files in groups.items() for index, found in enumerate(files)}


def group_of(name: str) -> str:
    """The group of a tensor: the beginning of its name, and of its file's."""
    return name.partition(".")[0]


def key_of(name: str) -> str:
    """The key of a whole tensor in its file."""
    return name.partition(".")[2]


def _key(item: WriteItem) -> str:
    offsets, shape = _box(item)
    is_whole = shape == list(_size(item))
    return key_of(item.index.fqn) + ("" if is_whole else f"@{','.join(map(str, offsets))}")


def _box(item: WriteItem) -> tuple[list[int], list[int]]:
    """Offsets and shape of a part."""
    assert item.tensor_data is not None
    return list(item.tensor_data.chunk.offsets), list(item.tensor_data.chunk.sizes)


def _size(item: WriteItem) -> tuple[int, ...]:
    """Shape of the whole tensor."""
    assert item.tensor_data is not None
    return tuple(item.tensor_data.size)


def _num_elements(shape: Iterable[int]) -> int:
    return math.prod(shape)


def _num_bytes(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return _num_elements(_box(item)[1]) * item.tensor_data.properties.dtype.itemsize


def _attach(content: bytes, path: Path) -> AttachmentEntry:
    _write_durably(path, content)
    return AttachmentEntry(size_bytes=len(content), checksum=checksum_of(content))


def _write_durably(path: Path, content: bytes) -> None:
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
