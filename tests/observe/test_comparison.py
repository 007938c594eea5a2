from __future__ import annotations

import pytest
import yaml

from phase8.errors import StorageError
from phase8.observe.comparison import write_comparison
from phase8.observe.metrics import MetricsWriter
from tests.observe.test_report import HOSTILE, START, Page


def write_run(directory, make_step, *, num_steps, config=None):
    with MetricsWriter(directory, resume_step=0) as writer:
        writer.log_event(0, "start", **START)
        for step in range(1, num_steps + 1):
            writer.log_step(make_step(step, mfu=None))
        writer.log_evaluation(num_steps, validation_loss=float(num_steps), validation_tokens=8)
    if config is not None:
        (directory / "config.yaml").write_text(yaml.safe_dump(config))
    return directory


def compared(tmp_path, *directories):
    write_comparison(directories, tmp_path / "page.html")
    return Page((tmp_path / "page.html").read_text())


def test_runs_share_charts_and_only_keys_that_differ_are_listed(tmp_path, make_step):
    first = write_run(tmp_path / "a", make_step, num_steps=4, config={"optim": {"learning_rate": 1e-3, "name": "adamw"}, "only": {"here": [1]}})
    second = write_run(tmp_path / "b", make_step, num_steps=8, config={"optim": {"learning_rate": 2e-3, "name": "adamw"}})
    page = compared(tmp_path, first, second)
    assert list(page.charts) == ["Training loss", "Validation loss", "Throughput", "Peak memory", "Gradient norm", "Learning rate"]
    assert page.charts["Validation loss"] == [["4.000"], ["8.000"]] and [len(curve) for curve in page.charts["Throughput"]] == [4, 8]
    assert page.data["largest"]["steps"] == pytest.approx(8 * 1.012)
    assert "<td>optim.learning_rate</td><td>0.001</td><td>0.002</td>" in page.source and "<td>only.here</td><td>[1]</td><td>–</td>" in page.source
    assert "optim.name" not in page.source
    for text in ("2 runs compared", "32.8k", "65.5k", "started 2026-11-29 14:05:07 UTC on node <7>, commit abc"):
        assert text in page.text


@pytest.mark.parametrize("config", [None, "[1", "a: !x 1", "- 1", "\x00"])
def test_a_run_without_a_readable_config_is_compared_by_its_curves(tmp_path, make_step, config):
    first, second = (write_run(tmp_path / name, make_step, num_steps=2, config={"a": 1}) for name in "ab")
    (second / "config.yaml").unlink() if config is None else (second / "config.yaml").write_text(config)
    assert "Config keys" not in compared(tmp_path, first, second).text


def test_runs_of_one_name_are_numbered_and_names_are_no_markup(tmp_path, make_step):
    name = HOSTILE.replace("/", "\u2215")
    runs = [write_run(tmp_path / place / name, make_step, num_steps=2, config={HOSTILE: place}) for place in "ab"]
    plain = [write_run(tmp_path / place / "plain", make_step, num_steps=2, config={"plain": place}) for place in "ab"]
    page = compared(tmp_path, *runs)
    assert f"{name} (1)" in page.text and f"{name} (2)" in page.text
    assert page.tags == compared(tmp_path, *plain).tags and len(page.scripts) == 2


def test_a_run_without_metrics_is_named(tmp_path, make_step):
    first = write_run(tmp_path / "a", make_step, num_steps=2)
    with pytest.raises(StorageError, match=r"cannot read .*/b/metrics.jsonl"):
        compared(tmp_path, first, tmp_path / "b")
    assert not (tmp_path / "page.html").exists()
