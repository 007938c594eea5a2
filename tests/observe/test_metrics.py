from __future__ import annotations

import json
import resource
import subprocess
import sys
from contextlib import contextmanager
from io import FileIO

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from phase8.config.schema import ObserveSection
from phase8.errors import StorageError
from phase8.observe import metrics
from phase8.observe.history import History
from phase8.observe.loggers import open_loggers
from phase8.observe.metrics import MetricsWriter, read_metrics


def reject_constant(name):
    raise AssertionError(f"{name} is not JSON")


def strict_lines(path):
    return [json.loads(line, parse_constant=reject_constant) for line in path.read_text().splitlines()]


@contextmanager
def writer_with_tensorboard(directory, *, resume_step=0, say=print):
    with (
        open_loggers(ObserveSection(), directory, name="x", config={}, say=say) as loggers,
        MetricsWriter(directory, resume_step=resume_step, loggers=loggers, say=say) as writer,
    ):
        yield writer


def steps_of(directory):
    return [record["step"] for record in read_metrics(directory / "metrics.jsonl")]


def test_a_step_is_one_strict_json_object_with_every_documented_key(tmp_path, make_step):
    with MetricsWriter(tmp_path / "runs" / "x", resume_step=0) as writer:
        writer.log_step(make_step(1, loss=8.5, mfu=None))
    assert strict_lines(tmp_path / "runs" / "x" / "metrics.jsonl") == [
        {
            "step": 1,
            "loss": 8.5,
            "learning_rate": 3e-4,
            "grad_norm": 1.25,
            "tokens": 8192,
            "tokens_per_second": 48_100.0,
            "step_seconds": 0.17,
            "data_wait_seconds": 0.0017,
            "mfu": None,
            "peak_memory_bytes": 3 * 2**30,
            "skipped": False,
        }
    ]


def test_auxiliary_losses_are_named_where_there_are_some(tmp_path, make_step):
    with writer_with_tensorboard(tmp_path) as writer:
        writer.log_step(make_step(1, auxiliary_losses={"balance": 0.25, "z": float("nan")}))
        writer.log_step(make_step(2))
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert first["auxiliary_losses"] == {"balance": 0.25, "z": None} and "auxiliary_losses" not in second
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("loss/balance")] == [0.25] and "loss/z" not in events.Tags()["scalars"]


def test_evaluations_and_events_are_lines_of_their_own(tmp_path):
    with MetricsWriter(tmp_path, resume_step=0) as writer:
        writer.log_evaluation(5, validation_loss=4.5, validation_tokens=1024)
        writer.log_event(5, "checkpoint", message="saved", seconds=0.5)
    assert strict_lines(tmp_path / "metrics.jsonl") == [
        {"step": 5, "validation_loss": 4.5, "validation_tokens": 1024},
        {"step": 5, "event": "checkpoint", "message": "saved", "seconds": 0.5},
    ]


def test_what_is_not_finite_is_null(tmp_path, make_step):
    with MetricsWriter(tmp_path, resume_step=0) as writer:
        writer.log_step(make_step(1, loss=None, grad_norm=float("inf"), skipped=True))
        writer.log_evaluation(1, validation_loss=float("nan"), validation_tokens=8)
    step, evaluation = strict_lines(tmp_path / "metrics.jsonl")
    assert (step["loss"], step["grad_norm"], step["skipped"]) == (None, None, True)
    assert evaluation["validation_loss"] is None


def test_a_killed_process_loses_no_finished_line(tmp_path):
    program = (
        "import os, sys, pathlib\n"
        "from phase8.observe.metrics import MetricsWriter\n"
        "writer = MetricsWriter(pathlib.Path(sys.argv[1]), resume_step=0)\n"
        "for step in range(1, 8): writer.log_evaluation(step, validation_loss=1.0, validation_tokens=1)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)]).returncode == -9
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5, 6, 7]


def test_a_resumed_run_has_each_step_once(tmp_path, make_step):
    with MetricsWriter(tmp_path, resume_step=0) as writer:
        for step in range(1, 8):
            writer.log_step(make_step(step))
            writer.log_event(step, "note")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    with MetricsWriter(tmp_path, resume_step=5) as writer:
        for step in (6, 7, 8):
            writer.log_step(make_step(step))
    assert steps_of(tmp_path) == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 7, 8]
    assert len(strict_lines(tmp_path / "metrics.jsonl")) == 13
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_torn_last_line_within_the_kept_steps_is_dropped(tmp_path, make_step):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "event": "a"}\n{"step": 2, "ev')
    with MetricsWriter(tmp_path, resume_step=2) as writer:
        writer.log_step(make_step(3))
    assert steps_of(tmp_path) == [1, 3]
    assert len(strict_lines(tmp_path / "metrics.jsonl")) == 2


def test_a_whole_last_line_without_its_line_break_is_kept(tmp_path, make_step):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "event": "a"}')
    with MetricsWriter(tmp_path, resume_step=1) as writer:
        writer.log_step(make_step(2))
    assert steps_of(tmp_path) == [1, 2]


def test_a_new_run_starts_an_empty_record(tmp_path, make_step):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "validation_loss": 9.7, "validation_tokens": 8}\n{"step": 1, "event": "a"}\n')
    MetricsWriter(tmp_path, resume_step=0).close()
    assert steps_of(tmp_path) == []


def test_a_crash_while_dropping_lines_keeps_the_old_record(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "event": "a"}\n{"step": 2, "event": "a"}\n')

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(StorageError, match="No space left"):
        MetricsWriter(tmp_path, resume_step=1)
    assert steps_of(tmp_path) == [1, 2]


FOREIGN = {
    "sources that are a number": b'{"step": 6, "validation_loss": 2.0, "validation_tokens": 8, "validation_sources": 3}',
    "a source without loss": b'{"step": 6, "validation_loss": 2.0, "validation_tokens": 8, "validation_sources": {"a": {"sequences": 1}}}',
    "not JSON": b"{not json}",
    "nothing": b"",
    "no object": b"[1]",
    "no step": b'{"loss": 1.0}',
    "of another program": b'{"step": 6, "loss": 2.0}',
    "half a line": b'{"step": 6, "lo',
    "a step that is no number": b'{"step": true, "event": "a"}',
    "a step that is no whole number": b'{"step": 6.0, "event": "a"}',
    "a step before the first": b'{"step": -1, "event": "a"}',
    "a step that no array holds": b'{"step": 1%s, "event": "a"}' % (b"0" * 400),
    "a number that Python does not read": b'{"step": 1%s, "event": "a"}' % (b"0" * 9000),
    "an event that is no word": b'{"step": 6, "event": 7}',
    "not a number": b'{"step": 6, "validation_loss": NaN, "validation_tokens": 8}',
    "infinite": b'{"step": 6, "validation_loss": 1e999, "validation_tokens": 8}',
    "an evaluation of nothing": b'{"step": 6, "validation_loss": 2.0}',
    "deeply nested": b"[" * 200_000,
    "not UTF-8": b"\xff\xfe",
}


@pytest.fixture
def recorded(tmp_path, make_step):
    """The record of three steps."""
    with MetricsWriter(tmp_path, resume_step=0) as writer:
        for step in (1, 2, 3):
            writer.log_step(make_step(step))
    return tmp_path / "metrics.jsonl"


def insert_line(path, line, *, number):
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[: number - 1], line, *lines[number - 1 :]]))


@pytest.mark.parametrize("line", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_line_is_named_and_left_out(recorded, line):
    insert_line(recorded, line, number=2)
    said = []
    records = read_metrics(recorded, say=said.append)
    assert [record["step"] for record in records] == [1, 2, 3] and History.from_records(records).steps.tolist() == [1, 2, 3]
    assert said == [f"{recorded}: line 2 is no record of this run; it stays there, and figures and report go without"]


@pytest.mark.parametrize("line", FOREIGN.values(), ids=FOREIGN)
def test_a_resumed_run_keeps_a_foreign_line_where_it_is(recorded, make_step, line):
    insert_line(recorded, line, number=2)
    before, said = recorded.read_bytes().split(b"\n"), []
    with MetricsWriter(recorded.parent, resume_step=2, say=said.append) as writer:
        writer.log_step(make_step(3, loss=9.0))
    assert recorded.read_bytes().split(b"\n")[:3] == before[:3] and steps_of(recorded.parent) == [1, 2, 3]
    assert len(said) == 1 and "line 2 is no record of this run" in said[0]


def test_a_new_run_keeps_foreign_lines_too(recorded):
    insert_line(recorded, b"mine", number=2)
    said = []
    MetricsWriter(recorded.parent, resume_step=0, say=said.append).close()
    assert recorded.read_bytes() == b"mine\n" and len(said) == 1


def test_of_many_foreign_lines_the_first_are_named(recorded):
    with recorded.open("ab") as file:
        file.write(b"a\n" * 1000 + b"and a last one without a line break")
    said = []
    assert len(read_metrics(recorded, say=said.append)) == 3
    assert said == [f"{recorded}: lines 4, 5, 6, 7, 8 and 996 more are no records of this run; they stay there, and figures and report go without"]


def test_an_event_may_have_fields_with_the_names_of_figures(recorded):
    with MetricsWriter(recorded.parent, resume_step=3) as writer:
        writer.log_event(3, "note", loss=1.0, validation_loss=2.0)
    history = History.from_records(read_metrics(recorded))
    assert history.steps.tolist() == [1, 2, 3] and history.validation_loss.size == 0


def test_a_missing_record_is_named(tmp_path):
    with pytest.raises(StorageError, match=r"cannot read .*metrics\.jsonl: No such file"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_full_disk_is_one_sentence_and_leaves_only_whole_lines(tmp_path, make_step):
    writer = MetricsWriter(tmp_path, resume_step=0)
    writer.log_step(make_step(1))
    size = (tmp_path / "metrics.jsonl").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # Room for half a line more: the operating system takes the first half and refuses the second.
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + size // 2, limits[1]))
        with pytest.raises(StorageError, match=r"cannot write .*metrics\.jsonl: File too large; free space"):
            writer.log_step(make_step(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "metrics.jsonl").stat().st_size == size
    writer.log_step(make_step(2))
    writer.close()
    assert [line["step"] for line in strict_lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_directory_that_cannot_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*file/x: .*file is a file, but a directory is needed there"):
        MetricsWriter(tmp_path / "file" / "x", resume_step=0)


def test_tensorboard_shows_each_step_of_a_resumed_run_once(tmp_path, make_step, make_skipped):
    with writer_with_tensorboard(tmp_path) as writer:
        for step in (1, 2, 3, 4):
            writer.log_step(make_step(step, loss=float(step)))
    with writer_with_tensorboard(tmp_path, resume_step=2) as writer:
        writer.log_step(make_step(3, loss=30.0, mfu=None))
        writer.log_step(make_skipped(4))
        writer.log_evaluation(4, validation_loss=4.5, validation_tokens=8)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/train")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert [(event.step, event.value) for event in events.Scalars("loss/validation")] == [(4, 4.5)]
    assert [event.step for event in events.Scalars("speed/mfu")] == [1, 2, 4]
    assert len(steps_of(tmp_path)) == 5


def test_events_that_a_full_disk_refuses_are_lost_alone_and_said_once(tmp_path, make_step, monkeypatch):
    said = []
    with writer_with_tensorboard(tmp_path, say=said.append) as writer:
        writer.log_step(make_step(1))
        (file,) = (tmp_path / "tensorboard").iterdir()
        limits, size = resource.getrlimit(resource.RLIMIT_FSIZE), file.stat().st_size
        monkeypatch.setattr(metrics, "append_whole", lambda file, line: None)  # of the other file
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, limits[1]))  # room for a part of an event
            for step in (2, 3):
                writer.log_step(make_step(step))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert file.stat().st_size == size
        writer.log_step(make_step(4))
    assert said == ["step 2: TensorBoard loses figures, training goes on: OSError: [Errno 27] File too large"]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss/train")] == [1, 4]


def test_a_place_for_events_that_cannot_be_made_does_not_keep_a_run_from_starting(tmp_path, make_step):
    (tmp_path / "tensorboard").write_text("in the way")
    said = []
    with writer_with_tensorboard(tmp_path, say=said.append) as writer:
        writer.log_step(make_step(1))
    assert len(said) == 1 and said[0].startswith("TensorBoard gets nothing of this run: FileExistsError: ")
    assert steps_of(tmp_path) == [1]


def test_a_record_that_cannot_be_closed_hides_no_error_and_makes_none(tmp_path, monkeypatch):
    class Failing(FileIO):
        def close(self):
            super().close()
            raise OSError(28, "No space left on device")

    said = []
    monkeypatch.setattr(metrics, "FileIO", Failing)
    with MetricsWriter(tmp_path, resume_step=0, say=said.append):
        pass
    with pytest.raises(ZeroDivisionError), MetricsWriter(tmp_path, resume_step=0, say=said.append):
        1 / 0  # noqa: B018
    assert said == 2 * [f"{tmp_path} may lack the last metrics: OSError: [Errno 28] No space left on device"]


def test_without_tensorboard_it_is_not_imported(tmp_path):
    program = (
        "import sys, pathlib\n"
        "from phase8.observe.metrics import MetricsWriter\n"
        "MetricsWriter(pathlib.Path(sys.argv[1]), resume_step=0).close()\n"
        "sys.exit('tensorboard' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)]).returncode == 0
    assert not (tmp_path / "tensorboard").exists()
