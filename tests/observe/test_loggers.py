"""Loggers beside metrics.jsonl, with the real packages: wandb offline and trackio's local data base."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from phase8.config.schema import ObserveSection
from phase8.config.validate import find_problems
from phase8.errors import ConfigError
from phase8.observe import loggers
from phase8.observe.loggers import LenientLogger, open_loggers, require_packages
from phase8.observe.metrics import MetricsWriter, SourceLoss, read_metrics
from tests.train.tiny_run import prepare, tiny_config, train_tiny

CONFIG = {"model": {"d_model": 8}, "data": {"train": [{"path": "a", "weight": 1}]}}


def train_some(directory, make_step, section, *, first, last):
    """Records steps, one evaluation with two sources after them, as a run that continues after step `first` - 1; returns what was said."""
    said = []
    with (
        open_loggers(section, directory, name="quick", config=CONFIG, say=said.append) as opened,
        MetricsWriter(directory, resume_step=first - 1, loggers=opened, say=said.append) as writer,
    ):
        for step in range(first, last + 1):
            writer.log_step(make_step(step, loss=float(step), mfu=None))
        sources = [SourceLoss(name=name, weight=1, loss=loss, num_tokens=8, num_sequences=1) for name, loss in (("a", 2.0), ("b", float("nan")))]
        writer.log_evaluation(last, validation_loss=2.5, validation_tokens=16, sources=sources)
        writer.log_event(last, "checkpoint")
    return said


def blocks_of(path: Path) -> Iterator[bytes]:
    """The records of a file of wandb: those of a LevelDB log, after a header of seven bytes."""
    content, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


def wandb_records(directory, *, num_parts):
    """Ids of the runs, their configs and their history, of every part that was written offline; waits until wandb's process has written it."""
    from wandb.proto.wandb_internal_pb2 import Record

    def read():
        paths = sorted(directory.glob("wandb/offline-run-*/run-*.wandb"))
        return [[Record.FromString(block) for block in blocks_of(path)] for path in paths]

    deadline, parts = time.monotonic() + 30, []
    while [part[-1].WhichOneof("record_type") for part in parts if part] != num_parts * ["exit"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
        parts = read()
    ids, configs, history = [], [], []
    for part in parts:
        for record in part:
            if record.WhichOneof("record_type") == "run":
                ids.append(record.run.run_id)
                configs.append({item.key: json.loads(item.value_json) for item in record.run.config.update})
            if record.WhichOneof("record_type") == "history":
                items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                history.append({key: value for key, value in items.items() if not key.startswith("_")})
    return ids, configs, history


def test_wandb_gets_every_step_and_a_resumed_run_goes_on_in_the_same_run(tmp_path, make_step):
    section = ObserveSection(tensorboard=False, wandb="offline", project="mine")
    assert train_some(tmp_path, make_step, section, first=1, last=4) == []
    time.sleep(1.1 - time.time() % 1)  # wandb names a part by the second
    assert train_some(tmp_path, make_step, section, first=3, last=5) == []
    ids, configs, history = wandb_records(tmp_path, num_parts=2)
    assert len(set(ids)) == 1 and json.loads((tmp_path / "logger.json").read_text()) == {"id": ids[0]}
    assert all(config.items() >= CONFIG.items() for config in configs)
    steps = [(row["step"], row["loss/train"]) for row in history if "loss/train" in row]
    assert steps == [(step, float(step)) for step in (1, 2, 3, 4, 3, 4, 5)]  # none is refused because it is not above the last
    evaluations = [row for row in history if "loss/validation" in row]
    assert evaluations == [{"step": step, "loss/validation": 2.5, "loss/validation/a": 2.0} for step in (4, 5)]
    assert history[0]["optimizer/learning_rate"] == 3e-4 and history[0]["progress/tokens"] == 8192 and "speed/mfu" not in history[0]


def test_trackio_gets_every_step_and_a_resumed_run_goes_on_in_the_same_run(tmp_path, make_step, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported, which this test does first
    pytest.importorskip("trackio", reason="the extra test brings it")
    from trackio.sqlite_storage import SQLiteStorage

    section = ObserveSection(tensorboard=False, trackio=True, project="mine")
    assert train_some(tmp_path / "run", make_step, section, first=1, last=4) == []
    assert train_some(tmp_path / "run", make_step, section, first=3, last=5) == []
    (name,) = SQLiteStorage.get_runs("mine")
    assert name == f"quick-{json.loads((tmp_path / 'run' / 'logger.json').read_text())['id']}"
    rows = [(row["step"], row["loss/train"]) for row in SQLiteStorage.get_logs("mine", name) if "loss/train" in row]
    assert sorted(rows) == [(step, float(step)) for step in (1, 2, 3, 3, 4, 4, 5)]


def test_the_death_of_wandbs_process_is_said_once_and_training_goes_on(tmp_path):
    program = (
        "import sys, pathlib, psutil\n"
        "from phase8.config.schema import ObserveSection\n"
        "from phase8.observe.loggers import open_loggers\n"
        "from phase8.observe.metrics import MetricsWriter\n"
        "directory, said = pathlib.Path(sys.argv[1]), []\n"
        "section = ObserveSection(tensorboard=False, wandb='offline')\n"
        "with open_loggers(section, directory, name='x', config={}, say=said.append) as opened:\n"
        "    writer = MetricsWriter(directory, resume_step=0, loggers=opened)\n"
        "    writer.log_evaluation(1, validation_loss=1.0, validation_tokens=1)\n"
        "    children = psutil.Process().children(recursive=True)\n"
        "    [child.kill() for child in children]\n"
        "    psutil.wait_procs(children)\n"
        "    for step in range(2, 200): writer.log_evaluation(step, validation_loss=1.0, validation_tokens=1)\n"
        "assert children\n"
        "print(said)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}  # of this process
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    (sentence,) = eval(done.stdout)
    assert "wandb loses figures, training goes on: " in sentence
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 200))


def test_a_run_that_goes_on_keeps_its_id_and_one_that_is_begun_anew_gets_another(tiny, tmp_path):
    """That only the first rank opens loggers is tested in tests/launch/test_torchrun.py."""
    metrics = tmp_path / "out" / "run.prom"
    first = train_tiny(tiny, "train.stop_at_step=5", f"observe.openmetrics={metrics}")
    assert 'phase8_step{run="tiny"} 5' in metrics.read_text() and not (first.directory.path / "logger.json").exists()
    chosen = loggers._run_id(first.directory.path)
    train_tiny(tiny, "train.num_steps=10", f"observe.openmetrics={metrics}")
    assert 'phase8_step{run="tiny"} 10' in metrics.read_text() and loggers._run_id(first.directory.path) == chosen
    anew = train_tiny(tiny, "train.stop_at_step=1", resume="none")
    assert loggers._run_id(anew.directory.path) != chosen == loggers._run_id(anew.directory.path.with_name("tiny.1"))


@pytest.mark.parametrize("content", ["", "[]", '{"id": 7}', '{"id": "../x"}', "\udcff"])
def test_a_damaged_id_is_replaced(tmp_path, content):
    (tmp_path / "logger.json").write_bytes(content.encode(errors="surrogateescape"))
    chosen = loggers._run_id(tmp_path)
    assert len(chosen) == 8 and chosen.isalnum() and loggers._run_id(tmp_path) == chosen


@pytest.mark.parametrize(("name", "value", "off"), [("wandb", "offline", "none"), ("trackio", "true", "false")])
def test_a_missing_package_is_one_sentence_before_anything_is_written(tiny, tmp_path, monkeypatch, name, value, off):
    monkeypatch.setattr(loggers, "find_spec", lambda module: None)
    sentence = f"observe.{name} is {value}, but the package {name} is not installed; pip install 'phase8[{name}]', or set the key to {off}."
    with pytest.raises(ConfigError) as caught:
        prepare(tiny, f"observe.{name}={value}")
    assert str(caught.value) == sentence and not (tmp_path / "runs").exists()
    require_packages(ObserveSection())


def test_all_missing_packages_are_named_together(monkeypatch):
    monkeypatch.setattr(loggers, "find_spec", lambda module: None)
    with pytest.raises(ConfigError) as caught:
        require_packages(ObserveSection(wandb="online", trackio=True))
    assert len(caught.value.problems) == 2


class Failing:
    """A logger of which every call fails."""

    def begin(self, resume_step):
        pass

    def log(self, record):
        raise RuntimeError(f"no room\nfor {record}")

    def close(self):
        raise OSError(5, "gone")


def test_a_logger_that_fails_is_reported_once_and_reaches_no_one(tmp_path, make_step):
    said = []
    logger = LenientLogger("it", Failing(), said.append)
    with MetricsWriter(tmp_path, resume_step=0, loggers=[logger]) as writer:
        for step in (1, 2, 3):
            writer.log_step(make_step(step))
    logger.close()
    assert said == ["step 1: it loses figures, training goes on: RuntimeError: no room"]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


def test_a_logger_that_cannot_be_opened_leaves_the_others(tmp_path, make_step):
    (tmp_path / "file").write_text("")
    said = []
    section = ObserveSection(openmetrics=str(tmp_path / "file" / "x.prom"))
    with (
        open_loggers(section, tmp_path, name="x", config={}, say=said.append) as opened,
        MetricsWriter(tmp_path, resume_step=0, loggers=opened, say=said.append) as writer,
    ):
        writer.log_step(make_step(1))
        writer.log_step(make_step(2))
    assert len(said) == 1 and said[0].startswith("step 1: the OpenMetrics file loses figures, training goes on: cannot write ")
    assert any((tmp_path / "tensorboard").iterdir())


def test_keys_that_no_reader_would_find_are_refused(tiny):
    config = tiny_config(tiny, "observe.openmetrics=/x/phase8.txt", "observe.project=team/mine")
    assert find_problems(config) == [
        "observe.openmetrics is /x/phase8.txt, but Prometheus' node exporter reads files named *.prom only; add the suffix.",
        "observe.project is team/mine, but a project's name has no slash; name the team in observe.wandb_entity.",
    ]
