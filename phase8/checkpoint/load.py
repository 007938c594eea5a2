"""Finding and reading checkpoints. Every byte is compared with its checksum before it is used; nothing is ever executed."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phase8.checkpoint.checksum import checksum_of_next
from phase8.checkpoint.manifest import MAX_MANIFEST_BYTES, Manifest, Slice, TensorEntry, parse_manifest
from phase8.checkpoint.renamed_tensors import in_present_form
from phase8.checkpoint.step_directories import MANIFEST_NAME, RUN_CHECKPOINTS_NAME, committed_directories, holds_weights_only, step_of
from phase8.checkpoint.tensor_file import DTYPES, TensorFile, open_for_reading
from phase8.checkpoint.untrusted import shortened, shown, shown_name
from phase8.division import RegionLike, common_region, overlap, whole_region
from phase8.errors import CheckpointCorruptError, CheckpointError, CheckpointMismatchError


class Checkpoint:
    """A committed checkpoint whose manifest is intact; tensors are read from its files one by one.

    Args:
        path: Its directory.
        manifest: Contents that its files must have.
    """

    def __init__(self, path: Path, manifest: Manifest):
        self.path = path
        self.manifest = manifest
        self._entries = in_present_form(manifest.tensors)
        self._slices = manifest.slices_by_file()
        self._files: dict[str, TensorFile] = {}

    @property
    def step(self) -> int:
        """Number of optimizer steps done when it was saved."""
        return self.manifest.step

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata given to `save_checkpoint`."""
        return self.manifest.metadata

    @property
    def tensor_names(self) -> list[str]:
        """Names of all tensors, in the order in which they were saved; names of earlier revisions are translated to today's."""
        return list(self._entries)

    def entry(self, name: str) -> TensorEntry:
        """Dtype, global shape and slices of a tensor.

        Raises:
            CheckpointMismatchError: There is no such tensor.
        """
        if name not in self._entries:
            raise CheckpointMismatchError(f"{self.path} has no tensor {shown_name(name)}; tools/inspect_checkpoint.py lists those it has")
        return self._entries[name]

    def read(self, name: str) -> Tensor:
        """Reads a tensor into new host memory; its bytes are read once and checked on the way.

        Raises:
            CheckpointCorruptError: Its bytes are missing or altered.
            CheckpointMismatchError: There is no such tensor.
        """
        return self.read_region(name, whole_region(self.entry(name).shape))

    def read_region(self, name: str, region: RegionLike, *, into: Tensor | None = None, for_the_last_time: bool = False) -> Tensor:
        """Reads a region of a tensor into host memory. Slices that overlap the region are read completely, because only then can they be checked.

        Args:
            name: The tensor.
            region: Region of its elements.
            into: A contiguous tensor on the host of the region's shape and the stored dtype, to be overwritten; None: a new one.
            for_the_last_time: No process on this host will read the region again soon.

        Raises:
            CheckpointCorruptError: Bytes are missing or altered.
            CheckpointMismatchError: There is no such tensor.
        """
        dtype = DTYPES[self.entry(name).dtype]
        # Headers come first: memory is allocated only for sizes that the files have as well.
        parts = [(part, self._file(part.file)) for part in self._slices_in(name, region)]
        tensor = torch.empty(region.shape, dtype=dtype) if into is None else into
        for part, file in parts:
            here, there = common_region(region, part)
            target = tensor[here]
            fits = list(target.shape) == part.shape and target.is_contiguous()
            block = target if fits else torch.empty(part.shape, dtype=dtype)
            self._check_slice(name, part, file.read_into(part.key, block, for_the_last_time=for_the_last_time and fits))
            if not fits:
                target.copy_(block[there])
        return tensor

    def verify(self) -> None:
        """Checks every byte of every file, in constant memory.

        Raises:
            CheckpointCorruptError: The first file or tensor that is missing or altered.
        """
        for file_name, slices in self._slices.items():
            for key, checksum in self._file(file_name).checksums():
                name, part = slices[key]
                self._check_slice(name, part, checksum)
        for name in self.manifest.attachments:
            self.attachment(name)

    def attachment(self, name: str) -> Path:
        """Path of an attached file whose bytes were checked.

        Raises:
            CheckpointCorruptError: It is missing or altered.
            CheckpointMismatchError: There is no such attachment.
        """
        if name not in self.manifest.attachments:
            known = shortened(", ".join(self.manifest.attachments)) or "none"
            raise CheckpointMismatchError(f"{self.path} has no attachment {shown_name(name)} (it has: {known}); use another checkpoint")
        expected = self.manifest.attachments[name]
        with open_for_reading(self.path / name) as file:
            checksum = checksum_of_next(file, expected.size_bytes)
        if checksum != expected.checksum:
            raise CheckpointCorruptError(
                f"{self.path / name} is altered: its checksum is {checksum}, not {expected.checksum}; use another checkpoint"
            )
        return self.path / name

    def _check_slice(self, name: str, part: Slice, checksum: str) -> None:
        if checksum != part.checksum:
            raise CheckpointCorruptError(
                f"{self.path / part.file} is altered: tensor {shown_name(name)} has checksum {checksum}, not {part.checksum}; use another checkpoint"
            )

    def _slices_in(self, name: str, region: RegionLike) -> list[Slice]:
        """The slices that overlap a region."""
        return [part for part in self.entry(name).slices if overlap(region, part)]

    def _file(self, file_name: str) -> TensorFile:
        """The opened file; at first use its header is compared with the manifest, key by key."""
        if file_name not in self._files:
            expected = self.manifest.files[file_name]
            path = self.path / file_name
            file = TensorFile(path, size_bytes=expected.size_bytes, header_checksum=expected.header_checksum)
            self._check_entries(file, self._slices[file_name])
            self._files[file_name] = file
        return self._files[file_name]

    def _check_entries(self, file: TensorFile, slices: dict[str, tuple[str, Slice]]) -> None:
        if (differing := file.tensors.keys() ^ slices.keys()) != set():
            raise CheckpointCorruptError(
                f"{file.path} and its manifest disagree about which entries it has ({_first(differing)}); use another checkpoint"
            )
        for key, stored in file.tensors.items():
            name, part = slices[key]
            dtype = self.manifest.tensors[name].dtype
            if (stored.dtype, stored.shape) != (dtype, part.shape):
                found = f"{stored.dtype} {shown(stored.shape)}"
                expected = f"{dtype} {shown(part.shape)}"
                raise CheckpointCorruptError(
                    f"{file.path}: entry {shown_name(key)} is {found}, its manifest says {expected}; use another checkpoint"
                )


def list_checkpoints(root: Path) -> list[Path]:
    """Committed checkpoints under `root`, newest first; their content is not checked.

    Raises:
        CheckpointError: `root` exists but cannot be listed.
    """
    try:
        return committed_directories(root)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"the checkpoints under {root} cannot be listed ({error.strerror}); give a directory you can read") from error


def is_saved_run(path: Path) -> bool:
    """Whether a directory is a run with checkpoints, which it stays where it began inside a checkpoint or an exported model.

    Raises:
        CheckpointError: Its checkpoints cannot be listed.
    """
    root = path / RUN_CHECKPOINTS_NAME
    return step_of(path.name) is None and os.path.isdir(root) and bool(list_checkpoints(root))


def find_checkpoint(path: Path) -> Path:
    """Finds the checkpoint that a path stands for: `path` itself, or the newest one in it if it is a `checkpoints` or a run directory.

    Raises:
        CheckpointError: There is none.
    """
    if is_saved_run(path):
        return list_checkpoints(path / RUN_CHECKPOINTS_NAME)[0]
    is_checkpoint = os.path.lexists(path / MANIFEST_NAME) or (step_of(path.name) is not None and not holds_weights_only(path))
    if is_checkpoint:
        return path
    for root in (path, path / RUN_CHECKPOINTS_NAME):
        if found := list_checkpoints(root):
            return found[0]
    if holds_weights_only(path):
        raise CheckpointError(
            f"{path} holds weights alone (consolidated, quantised, or a model of Hugging Face's form), no optimizer and no position in the data; "
            f"begin a new run with them by --set checkpoint.initialise_from={path}, or make a checkpoint of them with tools/reshard_checkpoint.py "
            "SRC DST; quantised ones only generate and evaluate"
        )
    raise CheckpointError(f"there is no checkpoint at {path}; give a step-... directory, or a directory of them, or a run directory")


def open_checkpoint(directory: Path) -> Checkpoint:
    """Opens a checkpoint after checking that its manifest is intact, and that exactly its files are there with the right lengths.

    The bytes of tensors are checked when they are read, or all at once by `Checkpoint.verify`.

    Raises:
        CheckpointCorruptError: A file is damaged, missing or does not belong.
        CheckpointMismatchError: Its format is of a newer version.
        CheckpointError: There is no such directory.
    """
    if not os.path.isdir(directory):  # unlike Path.is_dir, False when a parent may not be entered
        raise CheckpointError(f"there is no checkpoint directory {directory}; tools/inspect_checkpoint.py on its parent shows the newest")
    path = directory / MANIFEST_NAME
    with open_for_reading(path) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes > MAX_MANIFEST_BYTES:
            raise CheckpointCorruptError(f"{path} is longer than the {MAX_MANIFEST_BYTES} bytes a manifest can have; use another checkpoint")
        data = file.read(num_bytes)  # a larger size would be allocated before anything is read
    manifest = parse_manifest(data, path)
    if step_of(directory.name) not in (None, manifest.step):
        raise CheckpointCorruptError(f"{path} is the manifest of step {manifest.step}; use another checkpoint")
    _check_directory(directory, manifest)
    return Checkpoint(directory, manifest)


def _check_directory(directory: Path, manifest: Manifest) -> None:
    """Compares names, kinds and lengths of the files with the manifest."""
    expected = {name: entry.size_bytes for name, entry in (manifest.files | manifest.attachments).items()}
    try:
        with os.scandir(directory) as entries:
            found = {entry.name: entry.stat(follow_symlinks=False) for entry in entries}
    except OSError as error:
        raise CheckpointCorruptError(f"{directory} cannot be listed ({error.strerror}); use another checkpoint") from error
    found.pop(MANIFEST_NAME, None)
    if missing := expected.keys() - found.keys():
        raise CheckpointCorruptError(f"{directory} lacks {_first(missing)}; use another checkpoint")
    if extra := found.keys() - expected.keys():
        raise CheckpointCorruptError(f"{directory} holds what its manifest does not name ({_first(extra)}); remove it or use another checkpoint")
    for name, status in found.items():
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointCorruptError(f"{directory / name} is not a regular file; use another checkpoint")
        if status.st_size != expected[name]:
            raise CheckpointCorruptError(
                f"{directory / name} has {status.st_size} bytes, its manifest says {expected[name]}; use another checkpoint"
            )


def newest_good_checkpoint(
    root: Path,
    *,
    on_damaged: Callable[[Path, CheckpointError], None],
    check: Callable[[Checkpoint], None] = Checkpoint.verify,
) -> Checkpoint | None:
    """The newest checkpoint under `root` that passes `check`; None if there are no checkpoints.

    Args:
        root: The `checkpoints` directory of a run.
        on_damaged: Called with every newer checkpoint that failed the check, and its error.
        check: Raises CheckpointError for a damaged one. Reads every byte by default; a caller that will read every tensor anyway
            passes the function that does, so that bytes are read once, e.g. `lambda c: restore_state(c, model, optimizer)`.

    Raises:
        CheckpointCorruptError: There are checkpoints and all are damaged.
        CheckpointMismatchError: An intact checkpoint belongs to another model, to other data or to a later release.
    """
    directories = list_checkpoints(root)
    for directory in directories:
        try:
            checkpoint = open_checkpoint(directory)
            check(checkpoint)
        except CheckpointMismatchError:
            raise  # the checkpoint is intact: an older one would not fit either
        except CheckpointError as error:
            on_damaged(directory, error)
        else:
            return checkpoint
    if directories:
        raise CheckpointCorruptError(
            f"all {len(directories)} checkpoints under {root} are damaged (newest: {directories[0].name}); restore one from a copy, or start "
            "again from the beginning with --resume none"
        )
    return None


def _first(names: set[str]) -> str:
    """A few names for a message, free of control characters."""
    first = ", ".join(shown_name(name) for name in sorted(names)[:3])
    return first if len(names) <= 3 else f"{first} and {len(names) - 3} more"
