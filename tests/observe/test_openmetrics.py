"""The file for Prometheus, read by the parsers of its own client."""

from __future__ import annotations

import math
from contextlib import closing

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_prometheus

from phase8.errors import StorageError
from phase8.observe import openmetrics
from phase8.observe.metrics import MetricsWriter, SourceLoss
from phase8.observe.openmetrics import OpenMetricsFile

HOSTILE = 'a "quoted\\name"\nphase8_step{run="x"} 7'


@pytest.fixture
def clock(monkeypatch):
    """Seconds since some moment, which a test turns."""
    now = [100.0]
    monkeypatch.setattr(openmetrics.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(openmetrics.time, "time", lambda: 1e9 + now[0])
    return now


def samples(path, read=read_openmetrics):
    return {(sample.name, *sample.labels.items()): sample.value for family in read(path.read_text()) for sample in family.samples}


def test_the_file_has_every_figure_with_its_type_and_help(tmp_path, make_step, make_skipped, clock):
    path = tmp_path / "phase8.prom"
    file = OpenMetricsFile(path, run="quick")
    with closing(file), MetricsWriter(tmp_path, resume_step=0, loggers=[file]) as writer:
        writer.log_step(make_step(1))
        writer.log_evaluation(1, validation_loss=4.5, validation_tokens=8)
        writer.log_event(1, "checkpoint")
        writer.log_step(make_skipped(2))
        clock[0] += 1
    families = {family.name: family for family in read_openmetrics(path.read_text())}
    assert {name: family.type for name, family in families.items() if family.type != "gauge"} == {
        "phase8_skipped_steps": "counter", "phase8_events": "counter",
    }  # fmt: skip
    assert all(family.documentation for family in families.values()) and path.read_text().endswith("\n# EOF\n")
    run = ("run", "quick")
    found = samples(path)
    assert math.isnan(found.pop(("phase8_loss_nats", run))) and math.isnan(found.pop(("phase8_gradient_norm", run)))
    assert found == {
        ("phase8_step", run): 2, ("phase8_tokens", run): 16384, ("phase8_validation_loss_nats", run): 4.5, ("phase8_learning_rate", run): 3e-4,
        ("phase8_tokens_per_second", run): 48_100, ("phase8_step_seconds", run): 0.17, ("phase8_data_wait_seconds", run): 0.0017,
        ("phase8_mfu_ratio", run): 0.412, ("phase8_peak_memory_bytes", run): 3 * 2**30, ("phase8_skipped_steps_total", run): 1,
        ("phase8_events_total", run, ("event", "checkpoint")): 1, ("phase8_training", run): 0, ("phase8_updated_timestamp_seconds", run): 1e9 + 101,
    }  # fmt: skip
    assert samples(path, read_prometheus).keys() == samples(path).keys()  # the format that the node exporter reads


def test_names_from_outside_stay_labels(tmp_path, clock):
    path = tmp_path / "x.prom"
    source = SourceLoss(name=HOSTILE, weight=1, loss=2.0, num_tokens=8, num_sequences=1)
    other = SourceLoss(name="Stück \udcff", weight=1, loss=float("inf"), num_tokens=8, num_sequences=1)
    file = OpenMetricsFile(path, run="x")
    with closing(file), MetricsWriter(tmp_path, resume_step=0, loggers=[file]) as writer:
        writer.log_evaluation(3, validation_loss=2.0, validation_tokens=8, sources=[source, other])
        writer.log_event(3, HOSTILE)
    for read in (read_openmetrics, read_prometheus):
        found = samples(path, read)
        assert found[("phase8_validation_loss_of_source_nats", ("run", "x"), ("source", HOSTILE))] == 2
        assert math.isnan(found[("phase8_validation_loss_of_source_nats", ("run", "x"), ("source", "Stück \\udcff"))])
        assert found[("phase8_events_total", ("run", "x"), ("event", HOSTILE))] == 1
        assert found[("phase8_step", ("run", "x"))] == 3


def test_it_is_written_at_most_every_few_seconds_and_at_the_end(tmp_path, make_step, clock):
    path = tmp_path / "x.prom"
    file, step = OpenMetricsFile(path, run="x"), ("phase8_step", ("run", "x"))
    seen = []
    for number in range(1, 12):
        file.log({"step": number})
        seen.append(samples(path)[step])
        clock[0] += 1
    assert seen == [1, 1, 1, 1, 1, 6, 6, 6, 6, 6, 11] and samples(path)[("phase8_training", ("run", "x"))] == 1
    file.log({"step": 12})
    file.close()
    assert samples(path)[step] == 12 and samples(path)[("phase8_training", ("run", "x"))] == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.prom"]


def test_a_file_that_cannot_be_replaced_keeps_its_content(tmp_path, clock, monkeypatch):
    path = tmp_path / "x.prom"
    file = OpenMetricsFile(path, run="x")
    file.log({"step": 1})
    before = path.read_text()

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    clock[0] += 10
    with pytest.raises(StorageError, match=r"x\.prom: No space left on device"):
        file.log({"step": 2})
    assert path.read_text() == before
