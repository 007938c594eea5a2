from __future__ import annotations

import itertools
import json
import os
import pickle
import random
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from phase8.checkpoint.checksum import checksum_of
from phase8.checkpoint.load import Checkpoint, find_checkpoint, list_checkpoints, newest_good_checkpoint, open_checkpoint
from phase8.checkpoint.manifest import Manifest, manifest_bytes
from phase8.checkpoint.tensor_file import write_tensor_file
from phase8.errors import CheckpointCorruptError, CheckpointError, CheckpointMismatchError

FILES = ("manifest.json", "model-00000.safetensors", "optimizer-00000.safetensors", "tokenizer.model")


@pytest.fixture
def root(tmp_path: Path, save_sample) -> Path:
    """Two good checkpoints: steps 1 and 2."""
    save_sample(tmp_path / "c", 1)
    save_sample(tmp_path / "c", 2)
    return tmp_path / "c"


@pytest.fixture
def newest(root: Path) -> Path:
    return root / "step-0000000002"


def assert_refused(directory: Path) -> CheckpointError:
    """Opening and verifying names the checkpoint, and resuming takes the one before it."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(directory).verify()
    assert str(directory) in str(caught.value) and "\n" not in str(caught.value)
    passed_over = []
    good = newest_good_checkpoint(directory.parent, on_damaged=lambda path, error: passed_over.append((path, str(error))))
    assert good.path == directory.parent / "step-0000000001"
    assert passed_over == [(directory, str(caught.value))]
    return caught.value


def sign_again(directory: Path, edit: Callable[[dict], None], sign) -> None:
    document = json.loads((directory / "manifest.json").read_bytes())
    edit(document)
    (directory / "manifest.json").write_bytes(sign(document))


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_byte_of_any_file_is_found(name: str, newest: Path):
    generator = random.Random(name)
    path = newest / name
    original = path.read_bytes()
    for position in range(len(original)):
        flipped = bytearray(original)
        flipped[position] ^= generator.randrange(1, 256)
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError):
            open_checkpoint(newest).verify()
    assert_refused(newest)


@pytest.mark.parametrize("name", FILES)
def test_reading_what_is_damaged_is_refused_without_verifying_first(name: str, newest: Path):
    data = bytearray((newest / name).read_bytes())
    data[-1] ^= 1
    (newest / name).write_bytes(data)
    with pytest.raises(CheckpointCorruptError, match=name):
        checkpoint = open_checkpoint(newest)
        for tensor_name in checkpoint.tensor_names:
            checkpoint.read(tensor_name)
        checkpoint.attachment("tokenizer.model")


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_or_lengthened_file_is_found(name: str, newest: Path):
    original = (newest / name).read_bytes()
    for content in (b"", original[:7], original[: len(original) // 2], original[:-1], original + b"\0", original + original):
        (newest / name).write_bytes(content)
        assert name in str(assert_refused(newest))


@pytest.mark.parametrize("name", FILES)
def test_a_deleted_file_is_found(name: str, newest: Path):
    (newest / name).unlink()
    assert name in str(assert_refused(newest))


@pytest.mark.parametrize("pair", itertools.combinations(FILES, 2), ids=str)
def test_two_swapped_files_are_found(pair: tuple[str, str], newest: Path):
    first, second = (newest / name for name in pair)
    first_bytes, second_bytes = first.read_bytes(), second.read_bytes()
    first.write_bytes(second_bytes)
    second.write_bytes(first_bytes)
    assert isinstance(assert_refused(newest), CheckpointCorruptError)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_checkpoint_is_found(name: str, newest: Path, root: Path, save_sample):
    other = save_sample(root.parent / "other", 2, seed=9)
    if name == "tokenizer.model":
        (newest / name).write_bytes(b"other" + (newest / name).read_bytes()[5:])
    elif (other / name).read_bytes() != (newest / name).read_bytes():
        shutil.copy(other / name, newest / name)
    assert_refused(newest)


def test_the_manifest_of_another_step_is_named(newest: Path, root: Path):
    shutil.copy(root / "step-0000000001" / "manifest.json", newest / "manifest.json")
    assert "manifest of step 1" in str(assert_refused(newest))


def test_a_copy_under_a_name_of_its_own_opens(newest: Path, tmp_path: Path):
    shutil.copytree(newest, tmp_path / "best")
    open_checkpoint(tmp_path / "best").verify()


def test_something_additional_is_named(newest: Path):
    for name in ("model-00001.safetensors", "extra\x1b.bin"):
        (newest / name).write_bytes(b"x")
        error = assert_refused(newest)
        assert "does not name" in str(error) and str(error).isprintable()
        (newest / name).unlink()
    (newest / "directory").mkdir()
    assert "directory" in str(assert_refused(newest))


@pytest.mark.parametrize("name", FILES)
def test_links_in_place_of_files_are_refused(name: str, newest: Path, tmp_path: Path):
    os.rename(newest / name, tmp_path / "moved")
    (newest / name).symlink_to(tmp_path / "moved")
    assert name in str(assert_refused(newest))


def test_a_directory_or_pipe_in_place_of_a_file_is_refused(newest: Path):
    (newest / "tokenizer.model").unlink()
    os.mkfifo(newest / "tokenizer.model")
    assert "not a regular file" in str(assert_refused(newest))
    (newest / "manifest.json").unlink()
    (newest / "manifest.json").mkdir()
    assert "not a regular file" in str(assert_refused(newest))


def test_a_newer_format_is_named_and_not_passed_over(newest: Path, sign):
    sign_again(newest, lambda document: document.update(format_version=2), sign)
    with pytest.raises(CheckpointMismatchError, match="format_version 2 is newer"):
        newest_good_checkpoint(newest.parent, on_damaged=lambda path, error: pytest.fail(str(path)))


@pytest.mark.parametrize("name", ["/etc/hostname", "../step-0000000001/model-00000.safetensors", "..", ".", "a/b.safetensors", "a\0.safetensors"])
def test_a_manifest_cannot_name_a_file_outside_its_directory(name: str, newest: Path, sign):
    def edit(document: dict) -> None:
        document["files"][name] = document["files"].pop("model-00000.safetensors")
        for entry in document["tensors"].values():
            for part in entry["slices"]:
                part["file"] = name if part["file"] == "model-00000.safetensors" else part["file"]

    sign_again(newest, edit, sign)
    assert "files" in str(assert_refused(newest))


class Explosive:
    """Unpickling this is noticed."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("disguise", ["pickle", "zip"])
@pytest.mark.parametrize("vouched", [False, True])
def test_a_pickle_in_disguise_is_refused_and_not_executed(
    disguise: str, vouched: bool, newest: Path, sign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    path = newest / "model-00000.safetensors"
    if disguise == "pickle":
        path.write_bytes(pickle.dumps(Explosive()))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Explosive()))
    content = path.read_bytes()
    if vouched:
        entry = {"size_bytes": len(content), "header_checksum": checksum_of(content)}
        sign_again(newest, lambda document: document["files"].update({path.name: entry}), sign)
    assert path.name in str(assert_refused(newest))
    assert not Path("exploded").exists()


def flatten_embedding(tensors: dict) -> None:
    tensors["model.embedding.weight"].update(shape=[32])
    tensors["model.embedding.weight"]["slices"][0].update(offsets=[0], shape=[32])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop("model.mask"), "disagree"),
        (lambda tensors: tensors["model.mask"]["slices"][0].update(key="other"), "disagree"),
        (lambda tensors: tensors["model.mask"].update(dtype="U8"), "'mask' is BOOL"),
        (lambda tensors: tensors["model.embedding.weight"].update(shape=[4, 8]), "outside"),
        (flatten_embedding, r"is F32 \[8, 4\]"),
        (lambda tensors: tensors["model.mask"]["slices"][0].update(checksum="crc32:00000000"), "tensor 'model.mask' has checksum"),
    ],
)
def test_a_manifest_that_disagrees_with_a_header_is_refused(edit: Callable, message: str, newest: Path, sign):
    sign_again(newest, lambda document: edit(document["tensors"]), sign)
    assert re.search(message, str(assert_refused(newest)))


def test_slices_written_by_many_ranks_into_many_files_are_put_together(tmp_path: Path):
    """The format as distributed saving will use it: a grid of regions, one file per rank, keys of the ranks' choice."""
    whole = torch.randn(6, 8).to(torch.bfloat16)
    scalar = torch.tensor(3.0)
    directory = tmp_path / "step-0000000004"
    directory.mkdir()
    files, slices = {}, []
    for rank, (row, column) in enumerate(itertools.product((0, 3), (0, 4))):
        name = f"rank-{rank}.safetensors"
        tensors = {"part": whole[row : row + 3, column : column + 4]} | ({"scalar": scalar} if rank == 3 else {})
        written = write_tensor_file(directory / name, tensors)
        files[name] = {"size_bytes": written.size_bytes, "header_checksum": written.header_checksum}
        slices.append({"file": name, "key": "part", "offsets": [row, column], "shape": [3, 4], "checksum": written.checksums["part"]})
    scalar_slice = {"file": "rank-3.safetensors", "key": "scalar", "offsets": [], "shape": [], "checksum": written.checksums["scalar"]}
    manifest = Manifest.model_validate(
        {
            "format": "phase8-checkpoint",
            "format_version": 1,
            "step": 4,
            "metadata": {},
            "files": files,
            "tensors": {
                "model.w": {"dtype": "BF16", "shape": [6, 8], "slices": slices},
                "model.s": {"dtype": "F32", "shape": [], "slices": [scalar_slice]},
            },
            "attachments": {},
        }
    )
    (directory / "manifest.json").write_bytes(manifest_bytes(manifest))
    checkpoint = open_checkpoint(directory)
    checkpoint.verify()
    assert torch.equal(checkpoint.read("model.w"), whole) and torch.equal(checkpoint.read("model.s"), scalar)
    damaged = bytearray((directory / "rank-2.safetensors").read_bytes())
    damaged[-1] ^= 1
    (directory / "rank-2.safetensors").write_bytes(damaged)
    with pytest.raises(CheckpointCorruptError, match="rank-2"):
        open_checkpoint(directory).read("model.w")


def test_no_checkpoints_is_none_and_all_damaged_is_an_error(root: Path, tmp_path: Path):
    passed_over = []
    assert newest_good_checkpoint(tmp_path / "nowhere", on_damaged=lambda path, error: passed_over.append(path)) is None
    for path in list_checkpoints(root):
        (path / "manifest.json").unlink()
    with pytest.raises(CheckpointCorruptError, match="all 2 checkpoints"):
        newest_good_checkpoint(root, on_damaged=lambda path, error: passed_over.append(path))
    assert passed_over == list_checkpoints(root)


def test_a_mismatch_is_not_taken_for_damage(root: Path):
    def check(checkpoint: Checkpoint) -> None:
        raise CheckpointMismatchError("another model")

    with pytest.raises(CheckpointMismatchError):
        newest_good_checkpoint(root, on_damaged=lambda path, error: pytest.fail(str(path)), check=check)


def test_the_given_check_decides_and_spares_the_full_verification(root: Path, newest: Path):
    checked = []
    data = bytearray((newest / "tokenizer.model").read_bytes())
    data[0] ^= 1
    (newest / "tokenizer.model").write_bytes(data)
    found = newest_good_checkpoint(root, on_damaged=lambda path, error: pytest.fail(str(path)), check=lambda c: checked.append(c.step))
    assert found.path == newest and checked == [2]


def test_only_committed_checkpoints_are_listed_newest_first(root: Path):
    for name in (".saving-step-0000000009-0a1b2c3d", ".removing-step-0000000008-0a1b2c3d", "step-7", "step-0000000007.tmp", "step-00000000007"):
        (root / name).mkdir()
    (root / "step-0000000006").write_text("a file")
    (root / "step-0000000005").symlink_to(root / "step-0000000001")
    shutil.copytree(root / "step-0000000001", root / "step-0000000001.resaved")
    (root / "step-12345678901").mkdir()
    names = [path.name for path in list_checkpoints(root)]
    assert names == ["step-12345678901", "step-0000000002", "step-0000000001.resaved", "step-0000000001"]


def test_a_user_may_name_a_checkpoint_its_parent_or_the_run(root: Path, newest: Path, tmp_path: Path):
    os.rename(root, tmp_path / "checkpoints")
    expected = tmp_path / "checkpoints" / "step-0000000002"
    assert [find_checkpoint(path) for path in (expected, tmp_path / "checkpoints", tmp_path)] == [expected] * 3
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        find_checkpoint(tmp_path / "source")
    with pytest.raises(CheckpointError, match="no checkpoint directory"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="cannot be listed"):
        find_checkpoint(Path(__file__))


def test_unknown_names_are_named(newest: Path):
    checkpoint = open_checkpoint(newest)
    with pytest.raises(CheckpointMismatchError, match=r"model\.other"):
        checkpoint.read("model.other")
    with pytest.raises(CheckpointMismatchError, match=r"has no attachment 'x' \(it has: tokenizer.model\)"):
        checkpoint.attachment("x")
