"""What an interrupted reshard call left, damaged: the next one makes the very same checkpoint, or says in one sentence why it cannot.

Every run of the tests tries eighty inputs, always the same. Three thousand new ones (minutes):

    python -m pytest -m full -s tests/checkpoint/test_fuzz_rewrite.py
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phase8.checkpoint.load import Checkpoint, open_checkpoint
from phase8.checkpoint.reshard.compare import compare_checkpoints
from phase8.checkpoint.reshard.reshard import reshard
from phase8.division import DividedShape
from phase8.errors import Phase8Error
from phase8.optim.state import adamw_state
from phase8.topology import Topology
from tests.checkpoint.fuzzing import Tally, Watch, fuzz, mutated_bytes, mutated_json
from tests.checkpoint.sample_checkpoint import write_checkpoint

PARAMETERS = {
    "embedding.weight": DividedShape((6, 4), {"tp": 0}), "norm.weight": DividedShape((4,)), "mask": DividedShape((5,)), "empty": DividedShape((0, 3))
}  # fmt: skip


class Stopped(Exception):
    """Instead of a kill."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`checkpoints/` with the original, `left/` with what an interrupted call left of its work, `outside` with what nobody may touch."""
    place = tmp_path_factory.mktemp("fuzz")
    source = open_checkpoint(write_checkpoint(place / "checkpoints", 2, seed=2))
    (place / "outside").write_bytes(b"precious")

    def stop(stage: str, completed: int, total: int) -> None:
        if stage == "verifying":
            raise Stopped

    with pytest.raises(Stopped):
        _reshard(source, place, stop)
    (place / "out" / ".rewriting-d").rename(place / "left")
    _reshard(source, place, lambda *_: None)
    return place


def _reshard(source: Checkpoint, place: Path, on_progress) -> Checkpoint:
    topology = Topology(tensor_parallel_size=2, data_parallel_size=2)
    return reshard(source, place / "out" / "d", stages=[PARAMETERS], topology=topology, declare=adamw_state, on_progress=on_progress)


def _link_outside(path: Path, place: Path) -> None:
    """A file or directory of the work becomes a link that leads out of it."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(place / "outside")


def _fuzz(place: Path, watch: Watch, *, num_inputs: int, derandomize: bool) -> None:
    tally, source = Tally(), open_checkpoint(place / "checkpoints" / "step-0000000002")
    records = sorted(path.relative_to(place / "left") for path in (place / "left" / "written").iterdir())
    files = sorted(path.relative_to(place / "left") for path in (place / "left").rglob("*"))
    contents = {path: (place / "left" / path).read_bytes() for path in files if (place / "left" / path).is_file()}

    @given(data=st.data(), kind=st.sampled_from(["record", "record", "bytes", "bytes", "remove", "link", "pipe", "add"]))
    def check(data: st.DataObject, kind: str) -> None:
        shutil.rmtree(place / "out")
        work = place / "out" / ".rewriting-d"
        shutil.copytree(place / "left", work)
        path = data.draw(st.sampled_from(records if kind == "record" else files if kind in ("link", "remove") else sorted(contents)))
        if kind == "record":
            (work / path).write_text(data.draw(mutated_json(json.loads(contents[path]), "size_bytes", "checksums")))
        elif kind == "bytes":
            (work / path).write_bytes(data.draw(mutated_bytes(contents[path])))
        elif kind == "link":
            _link_outside(work / path, place)
        elif kind == "add":
            added = (work / path).with_name(data.draw(st.sampled_from(["x", "manifest.json", "tokenizer.model", "job"])))
            added.unlink(missing_ok=True)
            added.symlink_to(place / "outside")
        else:
            shutil.rmtree(work / path) if (work / path).is_dir() else (work / path).unlink()
            if kind == "pipe":
                os.mkfifo(work / path)
        try:
            with watch.over(source.path, may_write=place / "out"):
                copy = _reshard(source, place, lambda *_: None)
        except Phase8Error as error:
            tally.refused(error)
            assert not (place / "out" / "d").exists()
        else:
            tally.count("finished")
            copy.verify()
            assert list(compare_checkpoints(source, copy)) == [] and (copy.metadata, copy.step) == (source.metadata, source.step)
            assert not any(path.is_symlink() for path in (place / "out" / "d", *(place / "out" / "d").iterdir()))
        assert (place / "outside").read_bytes() == b"precious"

    fuzz(check, num_inputs=num_inputs, derandomize=derandomize)()
    tally.check("work of the reshard tool", at_least=num_inputs, among={"finished"})


def test_work_of_the_reshard_tool(place: Path) -> None:
    _fuzz(place, Watch(), num_inputs=80, derandomize=True)


@pytest.mark.full
def test_much_work_of_the_reshard_tool(place: Path) -> None:
    _fuzz(place, Watch(), num_inputs=3000, derandomize=False)


def _write_nested_record(work: Path) -> None:
    next(iter(sorted((work / "written").iterdir()))).write_text("[" * 100_000)


def _write_record_of_a_float(work: Path) -> None:
    path = next(iter(sorted((work / "written").iterdir())))
    record = json.loads(path.read_bytes())
    path.write_text(json.dumps(record | {"size_bytes": float(record["size_bytes"])}))


def _put_a_pipe(work: Path) -> None:
    path = next(iter(sorted((work / "written").iterdir())))
    path.unlink()
    os.mkfifo(path)


def _lead_content_outside(work: Path) -> None:
    shutil.move(work / "content", work.parent / "elsewhere")
    (work / "content").symlink_to(work.parent / "elsewhere")


def _lead_the_manifest_outside(work: Path) -> None:
    (work / "written" / "manifest.json.json").write_text("{}")
    (work / "content" / "manifest.json").unlink()
    (work / "content" / "manifest.json").symlink_to(work.parent.parent / "outside")


@pytest.mark.parametrize(
    "damage",
    [
        lambda work: (work / "job").write_bytes(b"\xff" * 64),
        _write_nested_record,
        _write_record_of_a_float,
        _put_a_pipe,
        _lead_content_outside,
        _lead_the_manifest_outside,
    ],
    ids=["job", "nested", "float", "pipe", "content", "manifest"],
)
def test_work_that_was_tampered_with_is_done_again(damage, place: Path) -> None:
    """Each of these was an error of another kind, a wait without end, or a write outside."""
    source = open_checkpoint(place / "checkpoints" / "step-0000000002")
    shutil.rmtree(place / "out")
    work = Path(shutil.copytree(place / "left", place / "out" / ".rewriting-d"))
    damage(work)
    copy = _reshard(source, place, lambda *_: None)
    assert list(compare_checkpoints(source, copy)) == [] and not copy.path.is_symlink()
    assert (place / "outside").read_bytes() == b"precious"
    assert (copy.path / "manifest.json").is_file() and not (copy.path / "manifest.json").is_symlink()
