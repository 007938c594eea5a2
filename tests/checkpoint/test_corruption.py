"""A run and its damaged checkpoints: each damage is named, the checkpoint before it is used where nobody asked for this one, and nothing that is
there is executed or changed."""

from __future__ import annotations

import io
import json
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from phase8.checkpoint.checksum import checksum_of
from phase8.checkpoint.load import newest_good_checkpoint, open_checkpoint
from phase8.data.tokenizer_training import train_sentencepiece
from phase8.errors import CheckpointCorruptError, CheckpointError, CheckpointMismatchError
from tests.checkpoint.fuzzing import seal
from tests.checkpoint.sample_checkpoint import bits, write_checkpoint
from tests.train.tiny_run import prepare, train_tiny

MANIFEST, MODEL, OPTIMIZER, TOKENIZER = "manifest.json", "model-00000.safetensors", "optimizer-00000.safetensors", "tokenizer.model"
FILES = (MANIFEST, MODEL, OPTIMIZER, TOKENIZER)


@dataclass(frozen=True)
class Trained:
    """Runs that stopped at step 10 and have checkpoints of steps 5 and 10: one, and one with another learning rate.

    Args:
        config: File of the config.
        settings: Overrides of it.
        run: Directory of the run.
        other: Directory of the other run.
    """

    config: Path
    settings: tuple[str, ...]
    run: Path
    other: Path


class Explosive:
    """Unpickling this is noticed."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (Path("exploded"),)


@pytest.fixture(scope="module")
def trained(_tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    place = tmp_path_factory.mktemp("corruption")
    tokenizer = train_sentencepiece(["some words\n"] * 20, place / "t.model", vocab_size=270)
    settings = (f"data.tokenizer={tokenizer}", "model.vocab_size=300", "train.stop_at_step=10")
    runs = {}
    for name, rate in (("run", 1e-2), ("other", 2e-2)):
        run = train_tiny(_tiny_data, f"run.output_dir={place}", f"run.name={name}", f"optim.learning_rate={rate}", *settings)
        runs[name] = run.directory.path
        assert sorted(path.name for path in run.directory.checkpoints.iterdir()) == ["step-0000000005", "step-0000000010"]
    return Trained(_tiny_data, settings, runs["run"], runs["other"])


@pytest.fixture
def run(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run, in a directory of its own."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(trained.run, tmp_path / "runs" / "run"))


def resume(trained: Trained, run: Path, choice: str = "auto") -> tuple[int, dict[str, bytes], str]:
    """Step, weights and optimizer of the run that goes on, and what it says."""
    console = Console(file=io.StringIO(), width=2000)
    found = prepare(trained.config, f"run.output_dir={run.parent}", "run.name=run", *trained.settings, resume=choice, console=console)
    found.lock.close()
    tensors = found.engine.state()
    return found.position.step, {name: bits(tensor) for name, tensor in tensors.items()}, console.file.getvalue()


def tree(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def flip(file: str, at: int) -> Callable[[Path, Trained], None]:
    def damage(checkpoint: Path, trained: Trained) -> None:
        data = bytearray((checkpoint / file).read_bytes())
        data[at] ^= 16
        (checkpoint / file).write_bytes(data)

    return damage


def truncate(file: str) -> Callable[[Path, Trained], None]:
    return lambda checkpoint, trained: (checkpoint / file).write_bytes((checkpoint / file).read_bytes()[:-9])


def delete(file: str) -> Callable[[Path, Trained], None]:
    return lambda checkpoint, trained: (checkpoint / file).unlink()


def swap(first: str, second: str) -> Callable[[Path, Trained], None]:
    def damage(checkpoint: Path, trained: Trained) -> None:
        a, b = (checkpoint / first).read_bytes(), (checkpoint / second).read_bytes()
        (checkpoint / first).write_bytes(b)
        (checkpoint / second).write_bytes(a)

    return damage


def of_another_run(file: str) -> Callable[[Path, Trained], None]:
    return lambda checkpoint, trained: shutil.copy(trained.other / "checkpoints" / checkpoint.name / file, checkpoint / file)


def of_another_step(file: str) -> Callable[[Path, Trained], None]:
    return lambda checkpoint, trained: shutil.copy(checkpoint.with_name("step-0000000005") / file, checkpoint / file)


def change(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path, Trained], None]:
    def damage(checkpoint: Path, trained: Trained) -> None:
        document = json.loads((checkpoint / MANIFEST).read_bytes())
        del document["checksum"]
        edit(document)
        (checkpoint / MANIFEST).write_bytes(seal(json.dumps(document)))

    return damage


def disguise(file: str, kind: str, *, is_vouched: bool) -> Callable[[Path, Trained], None]:
    """A pickle under the name of a file, of which the manifest may say that it belongs there."""

    def damage(checkpoint: Path, trained: Trained) -> None:
        if kind == "pickle":
            (checkpoint / file).write_bytes(pickle.dumps(Explosive()))
        else:
            torch.save({"weight": Explosive()}, checkpoint / file, _use_new_zipfile_serialization=kind == "torch.save")
        if is_vouched:
            content = (checkpoint / file).read_bytes()
            entry = {"size_bytes": len(content), "header_checksum": checksum_of(content)}
            change(lambda document: document["files"].update({file: entry}))(checkpoint, trained)

    return damage


def disguise_as_new_file(checkpoint: Path, trained: Trained) -> None:
    """A tensor's slice points to a pickle that nothing else has to do with."""
    torch.save({"weight": Explosive()}, checkpoint / "extra.safetensors")
    content = (checkpoint / "extra.safetensors").read_bytes()

    def edit(document: dict[str, Any]) -> None:
        document["files"]["extra.safetensors"] = {"size_bytes": len(content), "header_checksum": checksum_of(content)}
        next(iter(document["tensors"].values()))["slices"][0]["file"] = "extra.safetensors"

    change(edit)(checkpoint, trained)


def give_another_checksum(document: dict[str, Any]) -> None:
    document["tensors"]["model.head.weight"]["slices"][0]["checksum"] = "crc32:00000000"


DAMAGES: dict[str, tuple[Callable[[Path, Trained], Any], str]] = {
    "flipped manifest": (flip(MANIFEST, 200), "its bytes have checksum"),
    "flipped checksum of the manifest": (flip(MANIFEST, -8), "checksum"),
    "flipped length of a header": (flip(MODEL, 0), f"{MODEL}: its header does not have the checksum"),
    "flipped high byte of that length": (flip(MODEL, 7), f"{MODEL} is not a safetensors file"),
    "flipped header": (flip(OPTIMIZER, 30), f"{OPTIMIZER}: its header does not have the checksum"),
    "flipped weight": (flip(MODEL, -50), f"{MODEL} is altered: tensor 'model."),
    "flipped moment": (flip(OPTIMIZER, -50), f"{OPTIMIZER} is altered: tensor 'optimizer."),
    "flipped tokenizer": (flip(TOKENIZER, 100), f"{TOKENIZER} is altered"),
    **{f"truncated {file}": (truncate(file), file) for file in FILES},
    **{f"deleted {file}": (delete(file), file) for file in FILES},
    "swapped files": (swap(MODEL, OPTIMIZER), "bytes, its manifest says"),
    "manifest of another step": (of_another_step(MANIFEST), "is the manifest of step 5"),
    "weights of another step": (of_another_step(MODEL), f"{MODEL} is altered"),
    "moments of another run": (of_another_run(OPTIMIZER), f"{OPTIMIZER} is altered"),
    "manifest of another run": (of_another_run(MANIFEST), "is altered"),
    "other format": (change(lambda document: document.update(format="other")), "format is 'other'"),
    "tensor left out": (change(lambda document: document["tensors"].popitem()), "lacks optimizer."),
    "checksum of another tensor": (change(give_another_checksum), f"{MODEL} is altered: tensor 'model.head.weight'"),
    "file outside": (change(lambda document: document["attachments"].update({"../x": document["attachments"][TOKENIZER]})), "attachments"),
    **{
        f"{kind} as {file}, vouched for: {vouched}": (disguise(file, kind, is_vouched=vouched), file)
        for kind in ("pickle", "torch.save", "old torch.save")
        for file, vouched in ((MODEL, False), (OPTIMIZER, True), (TOKENIZER, False))
    },
    "pickle in a new file": (disguise_as_new_file, "extra.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(name: str, trained: Trained, run: Path):
    damage, message = DAMAGES[name]
    newest = run / "checkpoints" / "step-0000000010"
    damage(newest, trained)
    before = tree(run)
    with pytest.raises(CheckpointError) as caught:
        resume(trained, run, str(newest))
    assert re.search(re.escape(message), str(caught.value)) and str(caught.value).isprintable()
    assert str(newest) in str(caught.value) and not isinstance(caught.value, CheckpointMismatchError)
    assert tree(run) == before
    step, tensors, said = resume(trained, run)
    older = open_checkpoint(trained.run / "checkpoints" / "step-0000000005")
    assert step == 5 and tensors == {tensor: bits(older.read(tensor)) for tensor in older.tensor_names}
    assert "step-0000000010 is damaged and passed over" in said and message in said
    assert {name: data for name, data in tree(run).items() if name.startswith("checkpoints")} == {
        name: data for name, data in before.items() if name.startswith("checkpoints")
    }
    assert not Path("exploded").exists()


def test_nothing_is_started_or_overwritten_when_all_are_damaged(trained: Trained, run: Path):
    for path in (run / "checkpoints").iterdir():
        flip(MODEL, -1)(path, trained)
    before = tree(run)
    with pytest.raises(CheckpointCorruptError, match="all 2 checkpoints"):
        resume(trained, run)
    assert tree(run) == before


@pytest.mark.parametrize("choice", ["auto", "named"])
def test_a_good_checkpoint_of_another_run_is_no_damage_and_not_passed_over(choice: str, trained: Trained, run: Path):
    newest = run / "checkpoints" / "step-0000000010"
    change(lambda document: document["metadata"]["config"]["train"].update(seed=2))(newest, trained)
    before = tree(run)
    with pytest.raises(CheckpointMismatchError, match=r"train\.seed was 2 and is 1234"):
        resume(trained, run, "auto" if choice == "auto" else str(newest))
    assert tree(run) == before


LATER = {
    "format": (lambda document: document.update(format_version=99), "format_version 99 is newer"),
    "model": (lambda document: document["metadata"]["config"]["model"].update(of_tomorrow=1), r"unknown key model\.of_tomorrow"),
    "position": (lambda document: document["metadata"]["position"].update(of_tomorrow=1), r"unknown key position\.of_tomorrow"),
}


@pytest.mark.parametrize("name", LATER)
def test_a_checkpoint_of_a_later_release_is_not_passed_over(name: str, trained: Trained, run: Path):
    """An older one in its place would have its steps taken again, and their saves would replace it."""
    edit, message = LATER[name]
    change(edit)(run / "checkpoints" / "step-0000000010", trained)
    before = tree(run)
    with pytest.raises(CheckpointMismatchError, match=message):
        resume(trained, run)
    assert tree(run) == before


SHARDS = tuple(f"{group}-rank{rank:05d}-00000.safetensors" for group in ("model", "optimizer") for rank in (0, 1))
SINGLY = [damage(shard) for damage in (delete, truncate, of_another_step) for shard in SHARDS]


@pytest.mark.parametrize("damage", [*SINGLY, swap(*SHARDS[:2]), swap(*SHARDS[2:])])
def test_one_rank_s_shard_lost_or_wrong_is_found(damage: Callable, trained: Trained, tmp_path: Path):
    write_checkpoint(tmp_path, 5, seed=5)
    newest = write_checkpoint(tmp_path, 10, seed=10)
    damage(newest, trained)
    with pytest.raises(CheckpointCorruptError, match=r"rank0000\d"):
        open_checkpoint(newest).verify()
    found = newest_good_checkpoint(tmp_path, on_damaged=lambda path, error: None)
    assert found is not None and found.step == 5


def test_two_shards_alike_but_for_their_numbers_are_told_apart(tmp_path: Path, trained: Trained):
    """Same header, same length: only the checksums of the data are left."""
    newest = write_checkpoint(tmp_path, 10, seed=10)
    contents = {name: (newest / name).read_bytes() for name in SHARDS[:2]}
    alike = contents[SHARDS[1]].replace(b"@3,0", b"@0,0")
    header_bytes = 8 + int.from_bytes(alike[:8], "little")
    (newest / "other.safetensors").write_bytes(alike)
    (newest / "alike.safetensors").write_bytes(alike[:header_bytes] + bytes(reversed(alike[header_bytes:])))

    def edit(document: dict[str, Any]) -> None:
        entry = document["tensors"]["model.embedding.weight"]
        for part, name in zip(entry["slices"], ("alike.safetensors", "other.safetensors"), strict=True):
            data = (newest / name).read_bytes()
            document["files"][name] = {"size_bytes": len(data), "header_checksum": checksum_of(data[:header_bytes])}
            part.update(file=name, key="embedding.weight@0,0", checksum=checksum_of(data[header_bytes:]))
        document["tensors"] = {"model.embedding.weight": entry}
        document["files"] = {name: document["files"][name] for name in ("alike.safetensors", "other.safetensors")}

    change(edit)(newest, trained)
    for name in SHARDS:
        (newest / name).unlink()
    open_checkpoint(newest).verify()
    swap("alike.safetensors", "other.safetensors")(newest, trained)
    with pytest.raises(CheckpointCorruptError, match="is altered"):
        open_checkpoint(newest).read("model.embedding.weight")
