"""Metadata that no run recorded, under a right checksum, through everything that reads them: resume, generate, reshard, inspect.

What is refused is refused in one sentence, soon, with exit code 4, and changes nothing; what is accepted works. Every run of the tests tries a
few dozen inputs, always the same. Two thousand new ones (minutes):

    python -m pytest -m full -s tests/checkpoint/test_fuzz_metadata.py
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from phase8.checkpoint.load import open_checkpoint
from phase8.errors import CheckpointError
from phase8.generate.decode import Decoder
from phase8.generate.restore import restore_model
from phase8.train.build import Run
from phase8.train.resume import Position, restore_run
from tests.checkpoint.forged_run import FORGERIES, write_run
from tests.checkpoint.fuzzing import LONGEST_MESSAGE, Tally, Watch, fuzz, mutated_json, seal
from tests.tools.doors import load_door
from tests.train.tiny_run import prepare

MOST_SECONDS = 20.0  # of a core that others share
CPU = torch.device("cpu")
NAMES = ("config", "model", "position", "block", "transformer", "d_model", "lorentz", "tokenizer.model", "samples_consumed", "compile.enabled")


class Readers:
    """Everything that reads the checkpoint of a tiny run."""

    def __init__(self, directory: Path):
        self.checkpoint = write_run(directory)
        self.manifest = json.loads((self.checkpoint / "manifest.json").read_bytes())
        del self.manifest["checksum"]
        self.out = directory / "out"
        self.run: Run = prepare(directory / "tiny.yaml", "run.name=other", console=Console(quiet=True))
        self.reshard, self.inspect = load_door("reshard_checkpoint"), load_door("inspect_checkpoint")
        self.tally, self.watch = Tally(), Watch()
        cell_len("☃")  # loads a table
        for read in (self._resume, self._generate, self._reshard, self._inspect):
            read()  # imports what is imported when it is needed, before anything is watched

    def read(self, metadata: str) -> None:
        """Forges the metadata, and reads the checkpoint in every way."""
        document = json.dumps(self.manifest | {"metadata": "~metadata~"}).replace('"~metadata~"', metadata)
        (self.checkpoint / "manifest.json").write_bytes(seal(document))
        for read in (self._resume, self._generate, self._reshard, self._inspect):
            shutil.rmtree(self.out, ignore_errors=True)
            self.out.mkdir()
            begin = time.thread_time()
            try:
                with self.watch.over(self.checkpoint, may_write=self.out):
                    read()
            except CheckpointError as error:
                self.tally.refused(error)
                assert list(self.out.iterdir()) == []
            else:
                self.tally.count(read.__name__)
            assert time.thread_time() - begin < MOST_SECONDS

    def _state(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.run.engine.state().items()} | {"random": torch.get_rng_state()}

    def _resume(self) -> None:
        before = self._state()
        try:
            found, _ = restore_run(
                open_checkpoint(self.checkpoint),
                self.run.config,
                data=self.run.data,
                attachments=self.run.attachments,
                engine=self.run.engine,
            )
        except CheckpointError:
            after = self._state()
            assert before.keys() == after.keys() and all(torch.equal(after[name], tensor) for name, tensor in before.items())
            raise
        types = {name: type(value) for name, value in vars(found).items()}
        assert types | {"rolled_back_to": int} == {name: type(value) for name, value in vars(Position(rolled_back_to=0)).items()}
        assert found.step == self.manifest["step"] <= found.samples_consumed
        self.run.data.train[found.samples_consumed]

    def _generate(self) -> None:
        model, _, _ = restore_model(self.checkpoint, device=CPU)
        decoder = Decoder(model)
        for tokens in ([[1, 2, 3]], [[4]]):
            assert decoder.feed(torch.tensor(tokens)).shape == (1, 61)

    def _reshard(self) -> None:
        self._call(self.reshard, str(self.checkpoint), str(self.out / "copy"), "--tensor-parallel-size", "2")
        open_checkpoint(self.out / "copy").verify()

    def _inspect(self) -> None:
        said = self._call(self.inspect, str(self.checkpoint))
        assert "\x1b" not in said and len(said) < 100_000
        json.loads(self._call(self.inspect, str(self.checkpoint), "--json"))

    def _call(self, door: Any, *arguments: str) -> str:
        """What a door says, with exit code 0.

        Raises:
            CheckpointError: It says what is wrong, with exit code 4.
        """
        output, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            code = door.main(arguments)
        if code == 4:
            sentence = next(line for line in errors.getvalue().splitlines() if line.startswith("error: "))
            raise CheckpointError(sentence[:LONGEST_MESSAGE])
        assert code == 0, (code, errors.getvalue())
        return output.getvalue()


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> Readers:
    return Readers(tmp_path_factory.mktemp("fuzz"))


def _at(metadata: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    edited = json.loads(json.dumps(metadata))
    holder: Any = edited
    *parents, last = path.split(".")
    for name in parents:
        holder = holder[int(name)] if isinstance(holder, list) else holder[name]
    holder[last] = value
    return edited


def _fuzz(readers: Readers, *, num_inputs: int, derandomize: bool) -> None:
    metadata = readers.manifest["metadata"]
    readers.tally = Tally()
    sections = [metadata["config"]["model"], metadata["position"], metadata["data_fingerprint"], metadata["config"], metadata]
    paths = ["config.model", "position", "data_fingerprint", "config", None]

    @given(data=st.data(), number=st.integers(0, len(sections) - 1))
    def check(data: st.DataObject, number: int) -> None:
        text, path = data.draw(mutated_json(sections[number], *NAMES)), paths[number]
        readers.read(text if path is None else json.dumps(_at(metadata, path, "~section~")).replace('"~section~"', text))

    fuzz(check, num_inputs=num_inputs, derandomize=derandomize)()
    outcomes = {"_resume", "_generate", "_reshard", "_inspect", "CheckpointCorruptError"}
    readers.tally.check("metadata of a run", at_least=4 * num_inputs, among=outcomes)


def test_metadata_of_a_run(readers: Readers) -> None:
    _fuzz(readers, num_inputs=20, derandomize=True)


@pytest.mark.full
def test_much_metadata_of_a_run(readers: Readers) -> None:
    _fuzz(readers, num_inputs=2000, derandomize=False)


@pytest.mark.parametrize("path", ["config", "config.model.d_model", "config.model.num_layers", "position.step", "data_fingerprint"])
def test_every_reader_refuses_soon(path: str, readers: Readers) -> None:
    readers.tally = Tally()
    values = [value for other, value, _ in FORGERIES if other == path and value is not None]
    for value in values:
        readers.read(json.dumps(_at(readers.manifest["metadata"], path, value)))
    assert readers.tally.outcomes["_inspect"] == len(values) and readers.tally.outcomes.keys() & {"_generate", "_reshard", "_resume"} == set()
