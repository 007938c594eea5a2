from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors
import torch

from phase8.checkpoint.load import list_checkpoints, newest_good_checkpoint, open_checkpoint
from phase8.checkpoint.save import save_checkpoint
from phase8.errors import CheckpointError, StorageError


def never_damaged(path: Path, error: CheckpointError) -> None:
    raise AssertionError(f"{path} is damaged: {error}")


def save(root: Path, step: int = 1, **changes: object) -> Path:
    arguments = {"tensors": {"model.w": torch.ones(3)}, "metadata": {}, "attachments": {}} | changes
    return save_checkpoint(root, step=step, **arguments)


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path, save_sample, make_tensors):
    path = save_sample(tmp_path / "run" / "checkpoints", 100)
    assert path == tmp_path / "run" / "checkpoints" / "step-0000000100"
    checkpoint = open_checkpoint(path)
    checkpoint.verify()
    assert checkpoint.step == 100
    assert checkpoint.metadata == {"tokens": 100_000, "config": {"model": {"d_model": 4}}, "name": "Grün ☃"}
    assert checkpoint.attachment("tokenizer.model").read_bytes() == bytes(range(256)) * 2
    expected = make_tensors(100)
    assert checkpoint.tensor_names == list(expected)
    for name, tensor in expected.items():
        found = checkpoint.read(name)
        assert found.dtype == tensor.dtype and torch.equal(found, tensor)


def test_an_independent_reader_written_from_the_format_page_reads_it(tmp_path: Path, save_sample, make_tensors):
    path = save_sample(tmp_path, 3)
    data = (path / "manifest.json").read_bytes()
    manifest = json.loads(data)
    assert data[-31:] == f'"checksum": "crc32:{zlib.crc32(data[:-31]):08x}"\n}}\n'.encode()
    assert {entry.name for entry in path.iterdir()} == {"manifest.json", *manifest["files"], *manifest["attachments"]}
    assert set(manifest["files"]) == {"model-00000.safetensors", "optimizer-00000.safetensors"}
    for file, entry in manifest["files"].items():
        content = (path / file).read_bytes()
        header_end = 8 + int.from_bytes(content[:8], "little")
        assert len(content) == entry["size_bytes"]
        assert entry["header_checksum"] == f"crc32:{zlib.crc32(content[:header_end]):08x}"
    for name, tensor in make_tensors(3).items():
        (part,) = manifest["tensors"][name]["slices"]
        with safetensors.safe_open(path / part["file"], framework="pt") as file:
            found = file.get_tensor(part["key"])
        assert torch.equal(found, tensor) and list(found.shape) == manifest["tensors"][name]["shape"] == part["shape"]
        assert part["checksum"] == f"crc32:{zlib.crc32(found.view(-1).view(torch.uint8).numpy().tobytes()):08x}"
        assert name.split(".", 1)[1] == part["key"]


def test_files_are_cut_before_the_limit_and_a_larger_tensor_has_its_own(tmp_path: Path):
    tensors = {f"model.{name}": torch.full((count,), 1.0) for name, count in (("a", 10), ("b", 10), ("c", 6), ("big", 100), ("d", 1))}
    path = save(tmp_path, tensors=tensors, max_file_bytes=100)
    manifest = open_checkpoint(path).manifest
    assert [entry.slices[0].file[6:11] for entry in manifest.tensors.values()] == ["00000", "00000", "00001", "00002", "00003"]
    open_checkpoint(path).verify()


def test_groups_have_their_own_files_even_when_their_tensors_alternate(tmp_path: Path):
    tensors = {f"{group}.t{index}": torch.full((2,), float(index)) for index in range(3) for group in ("model", "optimizer")}
    checkpoint = open_checkpoint(save(tmp_path, tensors=tensors))
    assert set(checkpoint.manifest.files) == {"model-00000.safetensors", "optimizer-00000.safetensors"}
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": -1}, "step is a whole number"),
        ({"step": 10**18}, "step is a whole number"),
        ({"step": True}, "step is a whole number"),
        ({"tensors": {"model.w": 3}}, "'model.w' as a tensor: it is of type int"),
        ({"tensors": {"model.w": torch.ones(2, 2).to_sparse()}}, "sparse"),
        ({"tensors": {"model.w": torch.ones(2, device="meta")}}, "meta"),
        ({"tensors": {"model.w": torch.ones(2, dtype=torch.complex128)}}, "complex128"),
        ({"tensors": {"w": torch.ones(2)}}, "group"),
        ({"tensors": {"../x.w": torch.ones(2)}}, "group"),
        ({"tensors": {"model.__metadata__": torch.ones(2)}}, "group"),
        ({"tensors": {"model.a b": torch.ones(2)}}, "printable"),
        ({"tensors": {"model.a\n": torch.ones(2)}}, "printable"),
        ({"metadata": {"loss": float("nan")}}, "metadata.loss is nan"),
        ({"metadata": {"loss": float("inf")}}, "metadata.loss is inf"),
        ({"metadata": {"random": b"bytes"}}, "metadata.random is of type bytes"),
        ({"metadata": {"betas": (0.9, 0.95)}}, "metadata.betas is of type tuple"),
        ({"metadata": {"step": torch.tensor(1)}}, "metadata.step is of type Tensor"),
        ({"metadata": [1]}, "metadata is of type list"),
        ({"attachments": {"../tok": b"x"}}, "cannot be the name"),
        ({"attachments": {"tok\n": b"x"}}, "cannot be the name"),
        ({"attachments": {"manifest.json": b"x"}}, "cannot be the name"),
        ({"attachments": {"model-00000.safetensors": b"x"}}, "cannot be the name"),
        ({"attachments": {"tok": Path(__file__)}}, "attachment 'tok' is of type .*Path"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_would_not_come_back_is_refused_before_anything_is_written(changes: dict, message: str, tmp_path: Path):
    with pytest.raises(CheckpointError, match=message) as caught:
        save(tmp_path / "checkpoints", **changes)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "checkpoints").exists()


def test_a_subclass_of_tensor_is_refused_rather_than_stored_as_its_local_part(tmp_path: Path):
    class Sharded(torch.Tensor):
        pass

    with pytest.raises(CheckpointError, match="of type Sharded"):
        save(tmp_path, tensors={"model.w": torch.ones(2).as_subclass(Sharded)})


def test_the_same_step_saved_again_replaces_the_older_one(tmp_path: Path, save_sample, make_tensors):
    save_sample(tmp_path / "c", 5, seed=1)
    assert save_sample(tmp_path / "c", 5, seed=2).name == "step-0000000005"
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["step-0000000005"]
    checkpoint = newest_good_checkpoint(tmp_path / "c", on_damaged=never_damaged)
    assert torch.equal(checkpoint.read("model.embedding.weight"), make_tensors(2)["model.embedding.weight"])


def test_a_replacement_that_was_interrupted_is_preferred_and_finished_by_the_next_save(tmp_path: Path, save_sample, make_tensors):
    root = tmp_path / "c"
    save_sample(root, 5, seed=1)
    os.rename(save_sample(tmp_path / "d", 5, seed=2), root / "step-0000000005.resaved")
    newest = newest_good_checkpoint(root, on_damaged=never_damaged)
    assert torch.equal(newest.read("model.embedding.weight"), make_tensors(2)["model.embedding.weight"])
    save_sample(root, 5, seed=3)
    assert [path.name for path in root.iterdir()] == ["step-0000000005"]
    newest = newest_good_checkpoint(root, on_damaged=never_damaged)
    assert torch.equal(newest.read("model.embedding.weight"), make_tensors(3)["model.embedding.weight"])


def test_something_else_under_the_name_of_the_step_is_not_removed(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "step-0000000001").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="in the way"):
        save(tmp_path / "c")
    assert os.listdir(tmp_path / "c") == ["step-0000000001"] and (tmp_path / "elsewhere").is_dir()


def test_every_file_and_directory_is_synced_before_and_after_the_commit(tmp_path: Path, save_sample, monkeypatch: pytest.MonkeyPatch):
    save_sample(tmp_path / "c", 1)
    events = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real_fsync(descriptor)

    def rename(source: Path, destination: Path) -> None:
        events.append(f"rename to {Path(destination).name}")
        real_rename(source, destination)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    save_sample(tmp_path / "c", 2)
    files, end = set(events[:3]), events[3:]
    assert files == {"model-00000.safetensors", "optimizer-00000.safetensors", "tokenizer.model"}
    assert end[0] == "manifest.json" and end[1].startswith(".saving-step-0000000002-") and end[2:] == ["rename to step-0000000002", "c"]


class Failing:
    """An operating system call that fails the n-th time it is used."""

    def __init__(self, real: Callable, number: int, error: int):
        self.real, self.remaining, self.error, self.failed = real, number, error, False

    def __call__(self, *arguments: object, **options: object) -> object:
        self.remaining -= 1
        if self.remaining == 0:
            self.failed = True
            raise OSError(self.error, os.strerror(self.error))
        return self.real(*arguments, **options)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
def test_a_failing_disk_is_one_sentence_and_leaves_older_checkpoints_alone(
    call: str, error: int, tmp_path: Path, save_sample, monkeypatch: pytest.MonkeyPatch
):
    root = tmp_path / "c"
    save_sample(root, 1)
    number, failed = 0, True
    while failed:
        number += 1
        failing = Failing(getattr(os, call), number, error)
        monkeypatch.setattr(os, call, failing)
        if call == "mkdir":
            monkeypatch.setattr(Path, "mkdir", lambda path, *rest, failing=failing: failing(path))
        try:
            save_sample(root, 2)
        except StorageError as caught:
            assert os.strerror(error) in str(caught) and str(root) in str(caught) and "\n" not in str(caught)
        failed = failing.failed
        monkeypatch.undo()
        # The parent is synced after the renames: when that fails the new checkpoint is in place, what it replaced perhaps not yet deleted.
        present = {path.name for path in root.iterdir() if not path.name.startswith(".removing-")}
        assert present in ({"step-0000000001"}, {"step-0000000001", "step-0000000002"})
        newest_good_checkpoint(root, on_damaged=never_damaged)
    assert number > 1 and {"step-0000000001", "step-0000000002"} == present


def test_a_file_that_cannot_grow_is_reported_by_the_kernel_and_removed(tmp_path: Path, save_sample, run_in_fork):
    """A limit on the length of files makes write(2) itself fail in the middle of a tensor."""
    root = tmp_path / "c"
    save_sample(root, 1)

    def child() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(StorageError, match="File too large"):
            save(root, 2, tensors={"model.w": torch.ones(100_000)})

    assert run_in_fork(child) == 0
    assert [path.name for path in root.iterdir()] == ["step-0000000001"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of one MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False).returncode != 0:
        pytest.skip("this environment does not allow mounting")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_really_full_disk_and_a_really_read_only_one(small_disk: Path):
    root = small_disk / "checkpoints"
    save(root, 1, tensors={"model.w": torch.ones(100_000)})
    for _ in range(3):  # the space of a failed save is free again
        with pytest.raises(StorageError, match="No space left on device"):
            save(root, 2, tensors={"model.w": torch.ones(200_000)})
    assert [path.name for path in root.iterdir()] == ["step-0000000001"]
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(StorageError, match="Read-only file system"):
        save(root, 2)
    assert [path.name for path in list_checkpoints(root)] == ["step-0000000001"]
    newest_good_checkpoint(root, on_damaged=never_damaged)


def test_an_interrupt_while_saving_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    (tmp_path / "c").mkdir()
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "c")
    assert os.listdir(tmp_path / "c") == []
