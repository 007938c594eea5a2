"""Rewrites a checkpoint for a layout, so that each rank finds its regions in files of its own, or merges all weights into one file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from phase8.checkpoint.checksum import read_chunks
from phase8.checkpoint.load import Checkpoint, open_checkpoint
from phase8.checkpoint.manifest import TENSOR_FILE_SUFFIX, Manifest, Slice, TensorEntry, TensorFileEntry, manifest_bytes
from phase8.checkpoint.reshard.rank_regions import TensorForm, regions_by_rank
from phase8.checkpoint.reshard.rewrite import Entry, OnProgress, PlannedFile, Rewrite, rewriting
from phase8.checkpoint.state import MODEL_PREFIX, OPTIMIZER_PREFIX
from phase8.checkpoint.step_directories import INDEX_NAME, MANIFEST_NAME, WEIGHTS_CONFIG_NAME, WEIGHTS_NAME, step_of
from phase8.checkpoint.tensor_file import DTYPE_NAMES, DTYPES, WrittenFile, open_for_reading
from phase8.checkpoint.untrusted import shortened, shown
from phase8.checkpoint.writer import group_of, key_of
from phase8.division import DividedShape, Region, whole_region
from phase8.errors import CheckpointError, CheckpointMismatchError
from phase8.optim.state import DeclareState
from phase8.topology import Topology


@dataclass(frozen=True)
class ConsolidatedForm:
    """Names and config of weights for any ranks, and what lies beside them.

    Args:
        config: Content of config.json.
        rename: Maps the name of a parameter to its name in the file.
        keeps_dtype: Whether a parameter of this name is stored as it is where others are converted.
        files: Further files, by name; they take the place of attachments of these names.
        max_file_bytes: Size beyond which weights are divided over several files, with an index as transformers writes it; None: one file.
    """

    config: Mapping[str, object]
    rename: Callable[[str], str] = str
    keeps_dtype: Callable[[str], bool] = lambda _: False
    files: Mapping[str, bytes] = field(default_factory=dict)
    max_file_bytes: int | None = None


def reshard(
    source: Checkpoint,
    destination: Path,
    *,
    stages: Sequence[Mapping[str, DividedShape]],
    topology: Topology,
    declare: DeclareState,
    dtype: torch.dtype | None = None,
    on_progress: OnProgress,
) -> Checkpoint:
    """Writes a checkpoint with the same content, step and metadata, with one file per rank and group of tensors.

    The destination appears when everything has been written and compared with the original; the next call finishes an interrupted one.

    Args:
        source: The checkpoint; it is not changed.
        destination: The new checkpoint; it must not exist.
        stages: The parameters of each pipeline stage of the layout.
        topology: The layout; its data-parallel ranks are the shards.
        declare: What the optimizer of the checkpoint keeps of each parameter.
        dtype: Floating-point tensors are converted to it, for weights of another program; None: no conversion.
        on_progress: Called with the bytes written and verified.

    Raises:
        CheckpointError: The original is damaged or belongs to another model, or the destination cannot be used.
        StorageError: The destination cannot be written.
    """
    if step_of(destination.name) not in (None, source.step):
        raise CheckpointError(f"DST {destination.name} has the name of another step's checkpoint; SRC is of step {source.step}")
    forms = {name: _form(source, name, stages, declare) for name in source.tensor_names}
    dtypes = {name: _target_dtype(source, name, dtype) for name in forms}
    files = _files_of_ranks(regions_by_rank(forms, stages, topology), dtypes, whole=forms, num_ranks=topology.world_size)
    with rewriting(source, destination, files) as rewrite:
        written = rewrite.write(on_progress)
        _add_attachments(source, rewrite)
        rewrite.add(MANIFEST_NAME, iter([manifest_bytes(_manifest(source, files, written))]))
        copy = open_checkpoint(rewrite.content)
        rewrite.compare(written, on_progress)
        for name in source.manifest.attachments:
            copy.attachment(name)
        rewrite.commit()
    return open_checkpoint(destination)


def consolidate(
    source: Checkpoint, destination: Path, *, form: ConsolidatedForm, dtype: torch.dtype | None, on_progress: OnProgress
) -> Path:
    """Writes the weights to one safetensors file, or several, beside a config, the attachments and the files of the form.

    Args:
        source: The checkpoint; it is not changed.
        destination: A directory that must not exist.
        form: Names of the weights, the config, and further files.
        dtype: Floating-point tensors are converted to it; None: no conversion.
        on_progress: Called with the bytes written and verified.

    Returns:
        The file of the weights, or the index of the files.

    Raises:
        CheckpointError: The original is damaged or has no weights, or the destination cannot be used.
        StorageError: The destination cannot be written.
    """
    names = [name for name in source.tensor_names if name.startswith(MODEL_PREFIX)]
    if not names:
        raise CheckpointError(f"{source.path} holds no weights; give a checkpoint of launch/pretrain.py")
    entries = {}
    for name in names:
        key = key_of(name)
        target = _target_dtype(source, name, None if form.keeps_dtype(key) else dtype)
        entries[form.rename(key)] = Entry(name, whole_region(source.entry(name).shape), target)
    files = _files_of_size(entries, form.max_file_bytes)
    beside = {WEIGHTS_CONFIG_NAME: json.dumps(form.config, indent=1).encode() + b"\n", **_index(files)}
    if (taken := {*beside, *(file.name for file in files)} & source.manifest.attachments.keys()) != set():
        raise CheckpointError(f"{source.path} has an attachment {min(taken)}, the name of a file to be written; choose --format phase8")
    with rewriting(source, destination, files) as rewrite:
        written = rewrite.write(on_progress)
        _add_attachments(source, rewrite)
        for name, content in (beside | form.files).items():
            rewrite.add(name, iter([content]))
        rewrite.compare(written, on_progress)
        rewrite.commit()
    return destination / (files[0].name if len(files) == 1 else INDEX_NAME)


def _files_of_size(entries: Mapping[str, Entry], max_bytes: int | None) -> list[PlannedFile]:
    """The entries in files of at most this size, or of one entry that is larger."""
    groups: list[dict[str, Entry]] = []
    size = 0
    for key, entry in entries.items():
        if not groups or (max_bytes is not None and size + entry.num_bytes > max_bytes):
            groups.append({})
            size = 0
        groups[-1][key] = entry
        size += entry.num_bytes
    if len(groups) == 1:
        return [PlannedFile(WEIGHTS_NAME, groups[0])]
    stem, suffix = WEIGHTS_NAME.removesuffix(TENSOR_FILE_SUFFIX), TENSOR_FILE_SUFFIX
    return [PlannedFile(f"{stem}-{number:05d}-of-{len(groups):05d}{suffix}", group) for number, group in enumerate(groups, start=1)]


def _index(files: Sequence[PlannedFile]) -> dict[str, bytes]:
    """The index of several files, by its name; a single one has none."""
    if len(files) == 1:
        return {}
    total = sum(entry.num_bytes for file in files for entry in file.entries.values())
    places = {key: file.name for file in files for key in file.entries}
    return {INDEX_NAME: json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=1).encode() + b"\n"}


def _form(source: Checkpoint, name: str, stages: Sequence[Mapping[str, DividedShape]], declare: DeclareState) -> TensorForm:
    """Which parameter a tensor belongs to.

    Raises:
        CheckpointMismatchError: The model has no such parameter, or its optimizer keeps no such tensor of it.
    """
    shape = source.entry(name).shape
    is_parameter = name.startswith(MODEL_PREFIX)
    key = "" if is_parameter else name.rpartition(".")[2]
    parameter = name.removeprefix(MODEL_PREFIX) if is_parameter else name.removeprefix(OPTIMIZER_PREFIX).removesuffix(f".{key}")
    declared = next((parameters[parameter] for parameters in stages if parameter in parameters), None)
    if declared is None or group_of(name) + "." not in (MODEL_PREFIX, OPTIMIZER_PREFIX):
        raise CheckpointMismatchError(
            f"{source.path}: {shortened(name)} belongs to no parameter of the model its config describes; use another checkpoint"
        )
    if is_parameter and list(declared.shape) != shape:
        by_config = f"by its config it has {list(declared.shape)}"
        raise CheckpointMismatchError(f"{source.path}: {name} has shape {shown(shape)}, {by_config}; use another checkpoint")
    if is_parameter:
        return TensorForm(parameter, shape)
    kept = declare(parameter, declared.shape).tensor(key)
    expected = None if kept is None else list(declared.shape if kept.shape is None else kept.shape)
    if kept is None or shape != expected:
        problem = "is nothing that its optimizer keeps" if kept is None else f"has shape {shown(shape)}, but its optimizer keeps {expected}"
        raise CheckpointMismatchError(f"{source.path}: {name} {problem} of this parameter; use another checkpoint")
    return TensorForm(parameter, shape, is_divided=kept.shape is None)


def _files_of_ranks(
    regions: Mapping[int, Mapping[str, Region]], dtypes: Mapping[str, torch.dtype], *, whole: Mapping[str, TensorForm], num_ranks: int
) -> list[PlannedFile]:
    files = []
    for rank, own in regions.items():
        prefix = f"rank{rank:05d}-" if num_ranks > 1 else ""
        for group in dict.fromkeys(map(group_of, own)):
            entries = {
                _key(name, region, whole[name].shape): Entry(name, region, dtypes[name]) for name, region in own.items() if group_of(name) == group
            }
            files.append(PlannedFile(f"{group}-{prefix}00000{TENSOR_FILE_SUFFIX}", entries))
    return files


def _key(name: str, region: Region, shape: Sequence[int]) -> str:
    """The key of a region in its file, as saving ranks name it."""
    return key_of(name) + ("" if region.shape == shape else f"@{','.join(map(str, region.offsets))}")


def _manifest(source: Checkpoint, files: Sequence[PlannedFile], written: Mapping[str, WrittenFile]) -> Manifest:
    slices: dict[str, list[Slice]] = {name: [] for name in source.tensor_names}
    dtypes = {entry.tensor: DTYPE_NAMES[entry.dtype] for file in files for entry in file.entries.values()}
    for file in files:
        for key, entry in file.entries.items():
            checksum = written[file.name].checksums[key]
            place = Slice(file=file.name, key=key, offsets=entry.region.offsets, shape=entry.region.shape, checksum=checksum)
            slices[entry.tensor].append(place)
    entries = {
        name: TensorEntry(dtype=dtypes[name], shape=source.entry(name).shape, slices=sorted(found, key=lambda region: region.offsets))
        for name, found in slices.items()
    }
    sizes = {name: TensorFileEntry(size_bytes=file.size_bytes, header_checksum=file.header_checksum) for name, file in sorted(written.items())}
    return source.manifest.model_copy(update={"files": sizes, "tensors": entries})


def _add_attachments(source: Checkpoint, rewrite: Rewrite) -> None:
    """Copies the attachments; their checksums are those of the original."""

    def chunks(path: Path, num_bytes: int) -> Iterator[bytes]:
        with open_for_reading(path) as file:
            yield from read_chunks(file, num_bytes)

    for name, entry in source.manifest.attachments.items():
        rewrite.add(name, chunks(source.attachment(name), entry.size_bytes))


def _target_dtype(source: Checkpoint, name: str, dtype: torch.dtype | None) -> torch.dtype:
    stored = DTYPES[source.entry(name).dtype]
    return stored if dtype is None or not stored.is_floating_point else dtype
