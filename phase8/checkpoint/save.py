"""Saving a checkpoint: it is written under a temporary name, made durable, then renamed. Existing files are never overwritten."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from phase8.checkpoint.manifest import FILE_NAME_PATTERN, MAX_STEP, TENSOR_FILE_SUFFIX, TENSOR_NAME_PATTERN, json_problem
from phase8.checkpoint.step_directories import MANIFEST_NAME, step_directory_name
from phase8.checkpoint.tensor_file import DTYPE_NAMES, MAX_DIMS, RESERVED_KEY
from phase8.checkpoint.writer import CheckpointWriter, group_of, key_of
from phase8.distributed.placement import held_part, own_region
from phase8.errors import CheckpointError, Phase8Error, StorageError

DEFAULT_MAX_FILE_BYTES = 4 * 2**30
_GROUP = re.compile(r"[a-z][a-z0-9_]{0,49}")


def save_checkpoint(
    root: Path,
    *,
    step: int,
    tensors: Mapping[str, Tensor],
    metadata: dict[str, Any],
    attachments: Mapping[str, bytes],
    max_file_bytes: int = DEFAULT_MAX_FILE_BYTES,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Saves a checkpoint; when this returns, its directory is complete and on the disk.

    At every instant, a crash of the machine included, the directory under `root` holds every checkpoint it held before and no
    part of a new one under a checkpoint's name. A step that already exists is replaced only after its successor is committed.
    Of several processes all must call it, and all learn of a failure on any of them.

    Args:
        root: The `checkpoints` directory of a run, the same for all ranks; created if missing.
        step: Optimizer steps done.
        tensors: Named `<group>.<name>`, e.g. `model.head.weight`; each group is stored in its own files. A rank passes what it has: local
            parts of DTensors, and whole tensors (of which one rank's copy is stored).
        metadata: Exactly JSON: null, booleans, finite numbers, strings, lists, dicts with string keys. The first rank's is stored.
        attachments: Maps file names in the checkpoint to their content; the first rank's are stored. No file is read, since it could be gone.
        max_file_bytes: A new file is begun when the tensors of a file would exceed this size.
        group: The ranks, with a CPU backend; None: all ranks, or a single process.

    Raises:
        CheckpointError: An argument contains something that cannot be stored; nothing was written.
        StorageError: The disk is full, read-only or failing; what was written is removed.
    """
    writer = CheckpointWriter(root, step=step, metadata=metadata, attachments=attachments, max_file_bytes=max_file_bytes)
    with _storage_errors(root, step), writer, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a single process needs no group
        try:
            dcp.save(dict(tensors), storage_writer=writer, planner=_Planner(writer), process_group=group, no_dist=not dist.is_initialized())
        except CheckpointException as error:
            raise _first_failure(error) from None
    return root / step_directory_name(step)


class _Planner(dcp.DefaultSavePlanner):
    """torch's planner, which refuses on every rank what cannot be stored on one. `own_region` says what a rank has of a tensor."""

    def __init__(self, writer: CheckpointWriter):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._writer = writer

    def create_local_plan(self) -> dcp.SavePlan:
        writer = self._writer
        _check_savable(step=writer.step, tensors=self.state_dict, metadata=writer.metadata, attachments=writer.attachments)
        return dcp.SavePlan([_write_item(name, tensor) for name, tensor in self.state_dict.items()])

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The part of a tensor that this rank has, which is one."""
        return held_part(self.state_dict[index.fqn])


def _write_item(name: str, tensor: Tensor) -> WriteItem:
    """What this rank has of a tensor."""
    region = own_region(tensor)
    chunk = ChunkStorageMetadata(torch.Size(region.offsets), torch.Size(region.shape))
    data = TensorWriteData(chunk, TensorProperties.create_from_tensor(held_part(tensor)), tensor.size())
    return WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)


def _first_failure(error: CheckpointException) -> BaseException:
    """The error of the first rank that failed."""
    rank = min(error.failures)
    failure = error.failures[rank][0]
    if dist.is_initialized() and isinstance(failure, Phase8Error | OSError):
        failure.add_note(f"on rank {rank}")
    return failure


def _check_savable(*, step: int, tensors: Mapping[str, Tensor], metadata: dict[str, Any], attachments: Mapping[str, bytes]) -> None:
    """Refuses, before anything is written, values that would come back changed."""
    if type(step) is not int or not 0 <= step <= MAX_STEP:
        raise CheckpointError(f"a checkpoint's step is a whole number from 0 to {MAX_STEP}, not {step!r}")
    for name, tensor in tensors.items():
        if (problem := _tensor_problem(name, tensor)) is not None:
            raise CheckpointError(f"cannot save {name!r} as a tensor: {problem}")
    if type(metadata) is not dict:
        raise CheckpointError(f"metadata is of type {type(metadata).__name__}; it must be a dict of JSON values")
    if (problem := json_problem(metadata, "metadata")) is not None:
        raise CheckpointError(f"cannot save the metadata: {problem}")
    for name, content in attachments.items():
        if not re.fullmatch(FILE_NAME_PATTERN, name) or name.endswith(TENSOR_FILE_SUFFIX) or name == MANIFEST_NAME:
            raise CheckpointError(
                f"{name!r} cannot be the name of an attachment; use letters, digits, '.', '_' and '-', and no name of the checkpoint's own files"
            )
        if not isinstance(content, bytes):
            raise CheckpointError(f"the content of the attachment {name!r} is of type {type(content).__name__}; give its bytes")


def _tensor_problem(name: str, tensor: Tensor) -> str | None:
    if not re.fullmatch(TENSOR_NAME_PATTERN, name):
        return "a name is at most 1000 printable ASCII characters without spaces"
    if not _GROUP.fullmatch(group_of(name)) or key_of(name) in ("", RESERVED_KEY):
        return "a name is a group of files and a name in it, such as model.head.weight"
    tensor = held_part(tensor)
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return f"it is of type {type(tensor).__name__}; only plain tensors are stored, everything else belongs into the metadata as JSON"
    if tensor.layout != torch.strided or tensor.is_meta or tensor.dim() > MAX_DIMS:
        return f"it is a {tensor.layout} tensor of {tensor.dim()} dims on {tensor.device}; only dense ones of up to {MAX_DIMS} dims are stored"
    if tensor.dtype not in DTYPE_NAMES:
        return f"its dtype {tensor.dtype} is none that safetensors files can hold"
    return None


@contextmanager
def _storage_errors(root: Path, step: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place = "" if error.filename is None else f": {error.filename}"
        raise StorageError(
            f"step {step} could not be saved under {root} ({error.strerror}{place}); "
            "make room or permission there, or choose another run.output_dir; checkpoints saved before are untouched"
        ) from error
