"""Manifests that nobody wrote: whatever `manifest.json` says, a checkpoint loads as it is on the disk, or is refused in one sentence.

Every run of the tests tries 100 to 150 inputs of a kind, always the same. Ten thousand new ones each (minutes):

    python -m pytest -m full -s tests/checkpoint/test_fuzz_manifest.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phase8.checkpoint.load import Checkpoint, open_checkpoint
from phase8.checkpoint.state import flat_state, restore_state
from phase8.division import Region
from phase8.errors import Phase8Error
from tests.checkpoint.fuzzing import Tally, Watch, fuzz, mutated_bytes, seal
from tests.checkpoint.manifest_edits import mutated_manifest
from tests.checkpoint.sample_checkpoint import TOKENIZER, bits, build, stored_bits, write_checkpoint

STEP = 2


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good checkpoint, another beside it, and a file outside that manifests try to reach."""
    root = tmp_path_factory.mktemp("fuzz") / "checkpoints"
    write_checkpoint(root, 1, seed=1)
    directory = write_checkpoint(root, STEP, seed=2)
    shutil.copy(directory / "model-rank00000-00000.safetensors", root / "outside.safetensors")
    shutil.copy(directory / "model-rank00000-00000.safetensors", root.parent / "outside.safetensors")
    shutil.copytree(directory, root.parent / "original")
    _read_all(open_checkpoint(directory))  # imports what is imported when it is needed, before anything is watched
    return directory


def _read_all(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Everything in a checkpoint, each thing in the ways there are."""
    checkpoint.verify()
    found = {name: bits(checkpoint.read(name)) for name in checkpoint.tensor_names}
    for name in checkpoint.tensor_names:
        shape = checkpoint.entry(name).shape
        half = Region([size // 2 for size in shape], [size - size // 2 for size in shape])
        whole = checkpoint.read(name)[tuple(slice(offset, None) for offset in half.offsets)]
        assert bits(checkpoint.read_region(name, half)) == bits(whole)
    for name in checkpoint.manifest.attachments:
        assert checkpoint.attachment(name).parent == checkpoint.path
    return found


def _try(content: bytes, directory: Path, watch: Watch, tally: Tally, *, is_sealed: bool) -> None:
    """Opens, reads and restores a checkpoint with this manifest."""
    original = (directory.parent.parent / "original" / "manifest.json").read_bytes()
    (directory / "manifest.json").write_bytes(content)
    try:
        with watch.over(directory):
            checkpoint = open_checkpoint(directory)
            found = _read_all(checkpoint)
    except Phase8Error as error:
        assert content != original
        tally.refused(error)
        _read_unverified(directory, watch)
        return
    document = json.loads(content)
    del document["checksum"]
    assert is_sealed or content == original
    assert json.dumps(checkpoint.manifest.model_dump(), sort_keys=True) == json.dumps(document, sort_keys=True)  # true is not 1, nor is 1.0
    assert found == {name: stored_bits(directory, entry) for name, entry in document["tensors"].items()}
    assert all((directory / name).read_bytes() == TOKENIZER for name in document["attachments"])
    _restore(checkpoint, watch, tally)


def _read_unverified(directory: Path, watch: Watch) -> None:
    """Reads what is refused without a look at the whole first: refused as well, or as it is on the disk."""
    try:
        with watch.over(directory):
            checkpoint = open_checkpoint(directory)
    except Phase8Error:
        return
    document = json.loads((directory / "manifest.json").read_bytes())
    for name in checkpoint.tensor_names:
        try:
            with watch.over(directory):
                found = bits(checkpoint.read(name))
        except Phase8Error:
            continue
        assert found == stored_bits(directory, document["tensors"][name])


def _restore(checkpoint: Checkpoint, watch: Watch, tally: Tally) -> None:
    """Into a model: all of it or nothing."""
    model, optimizer = build(9, trained=False)
    before = {name: bits(tensor) for name, tensor in flat_state(model, optimizer).items()}
    try:
        with watch.over(checkpoint.path):
            restore_state(checkpoint, model, optimizer)
    except Phase8Error as error:
        tally.refused(error)
        assert {name: bits(tensor) for name, tensor in flat_state(model, optimizer).items()} == before
    else:
        tally.count("loaded")
        restored = flat_state(model, optimizer)
        assert {name: bits(tensor) for name, tensor in restored.items()} == {name: bits(checkpoint.read(name)) for name in checkpoint.tensor_names}


def _fuzz_values(directory: Path, watch: Watch, *, num_inputs: int, derandomize: bool) -> None:
    document = json.loads((directory.parent.parent / "original" / "manifest.json").read_bytes())
    del document["checksum"]
    tally = Tally()

    @given(text=mutated_manifest(document))
    def check(text: str) -> None:
        _try(seal(text), directory, watch, tally, is_sealed=True)

    fuzz(check, num_inputs=num_inputs, derandomize=derandomize)()
    tally.check("values of a manifest", at_least=num_inputs, among={"loaded", "CheckpointCorruptError"})


def _fuzz_bytes(directory: Path, watch: Watch, *, num_inputs: int, derandomize: bool) -> None:
    original = (directory.parent.parent / "original" / "manifest.json").read_bytes()
    tally = Tally()

    @given(content=mutated_bytes(original), is_sealed=st.booleans())
    def check(content: bytes, is_sealed: bool) -> None:
        if is_sealed:
            content = seal(content[:-31].decode("utf-8", "surrogateescape").encode("utf-8", "replace").decode())
        _try(content, directory, watch, tally, is_sealed=is_sealed)

    fuzz(check, num_inputs=num_inputs, derandomize=derandomize)()
    tally.check("bytes of a manifest", at_least=num_inputs, among={"loaded", "CheckpointCorruptError"})


def test_values_of_a_manifest(good: Path, watch: Watch) -> None:
    _fuzz_values(good, watch, num_inputs=150, derandomize=True)


def test_bytes_of_a_manifest(good: Path, watch: Watch) -> None:
    _fuzz_bytes(good, watch, num_inputs=150, derandomize=True)


@pytest.mark.full
def test_many_values_of_a_manifest(good: Path, watch: Watch) -> None:
    _fuzz_values(good, watch, num_inputs=10_000, derandomize=False)


@pytest.mark.full
def test_many_bytes_of_a_manifest(good: Path, watch: Watch) -> None:
    _fuzz_bytes(good, watch, num_inputs=10_000, derandomize=False)
