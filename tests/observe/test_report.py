from __future__ import annotations

import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
from matplotlib.image import imread

from phase8.errors import StorageError
from phase8.observe.history import History
from phase8.observe.metrics import MetricsWriter, SourceLoss, read_metrics
from phase8.observe.report import headline, write_report

FACTS = [("device", "CPU <2 cores>"), ("batch", "16 × 512")]


class Page(HTMLParser):
    """Collects the tags, attributes and text of a page."""

    def __init__(self, source: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def report(directory, **changes) -> tuple[Page, np.ndarray]:
    arguments = {"title": "quick <i> & start", "facts": FACTS, "reference_losses": {"unigram entropy": 6.71}}
    page = write_report(directory, **{**arguments, **changes})
    assert page == directory / "report" / "index.html"
    return Page(page.read_text(encoding="utf-8")), imread(BytesIO((directory / "report" / "loss.png").read_bytes()))


@pytest.fixture
def trained(tmp_path, make_step, make_skipped):
    with MetricsWriter(tmp_path, resume_step=0) as writer:
        for step in range(1, 61):
            writer.log_step(make_skipped(step) if step == 30 else make_step(step))
            if step % 20 == 0:
                writer.log_evaluation(step, validation_loss=9.0 / step**0.3 + 0.1, validation_tokens=1024)
    return tmp_path


def test_the_headline_sums_up_the_run(trained):
    tiles = {tile.name: tile for tile in headline(History.from_records(read_metrics(trained / "metrics.jsonl")), {"unigram entropy": 6.71})}
    best = 9.0 / 60**0.3 + 0.1
    assert float(tiles["Training loss"].value) == pytest.approx(9.0 / 60**0.3, abs=0.03)
    assert tiles["Best validation loss"].value == f"{best:.3f}"
    assert tiles["Best validation loss"].note == f"step 60, {6.71 - best:.2f} below unigram entropy"
    assert (tiles["Tokens"].value, tiles["Tokens"].note) == ("492k", "up to step 60")
    assert (tiles["Time in steps"].value, tiles["Time in steps"].note) == ("10.2 s", "1.0 % waiting for data")
    assert (tiles["Throughput"].value, tiles["MFU"].value, tiles["Peak memory"].value) == ("48.1k tok/s", "41.2 %", "3 GiB")
    assert (tiles["Skipped steps"].value, tiles["Skipped steps"].is_warning) == ("1", True)


def test_the_page_holds_figures_charts_facts_and_sample(trained):
    page, _ = report(trained, sample="def f(x):\n    return x < 1 & <b>")
    assert page.tags.count("svg") == 6
    for expected in ("quick <i> & start", "CPU <2 cores>", "16 × 512", "unigram entropy 6.71", "def f(x):\n    return x < 1 & <b>"):
        assert expected in page.text
    assert not {"b", "i"} & set(page.tags)


def test_the_page_asks_nothing_of_the_network(trained):
    source = write_report(trained, title="x", facts=FACTS, reference_losses={}).read_text(encoding="utf-8")
    page = Page(source)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(page.tags)
    assert all(value.startswith("#") for name, value in page.attributes if name in ("src", "href", "xlink:href") and value)
    assert re.search(r"https?://|//[a-z]|@import|url\((?!#)", source) is None


def test_ids_in_the_page_are_unique(trained):
    page, _ = report(trained)
    ids = [value for name, value in page.attributes if name == "id"]
    assert ids and len(ids) == len(set(ids))


def test_the_page_serves_dark_mode_and_phones(trained):
    source = write_report(trained, title="x", facts=FACTS, reference_losses={}).read_text(encoding="utf-8")
    used = set(re.findall(r"var\((--chart-[a-z]+)\)", source.split("</style>")[1]))
    assert used and all(f"{name}:" in source.split("</style>")[0] for name in used)
    assert "prefers-color-scheme: dark" in source and 'name="viewport"' in source


def has_colour(picture: np.ndarray, rgb: tuple[int, int, int]) -> bool:
    return bool((np.abs(picture[..., :3] * 255 - np.array(rgb)).max(axis=-1) < 3).sum() > 50)


def test_the_picture_shows_training_and_validation(trained):
    _, picture = report(trained)
    assert picture.shape == (900, 1600, 4)
    assert has_colour(picture, (0x2F, 0x6B, 0xDE)) and has_colour(picture, (0xD9, 0x73, 0x0D))


def test_one_line_of_metrics_is_enough(tmp_path, make_step):
    with MetricsWriter(tmp_path, resume_step=0) as writer:
        writer.log_step(make_step(1, loss=5.5))
    page, picture = report(tmp_path)
    assert "5.500" in page.text and "no evaluation" in page.text and "Sample" not in page.text
    assert has_colour(picture, (0x2F, 0x6B, 0xDE)) and not has_colour(picture, (0xD9, 0x73, 0x0D))


def test_a_run_of_skipped_steps_only_says_so(tmp_path, make_skipped):
    with MetricsWriter(tmp_path, resume_step=0) as writer:
        for step in (1, 2, 3):
            writer.log_step(make_skipped(step))
    page, _ = report(tmp_path)
    assert "no finite value was recorded" in page.text
    tiles = {tile.name: tile.value for tile in headline(History.from_records(read_metrics(tmp_path / "metrics.jsonl")), {})}
    assert (tiles["Training loss"], tiles["Skipped steps"]) == ("–", "3")


def test_an_empty_record_and_no_facts_still_make_a_page(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    page, _ = report(tmp_path, facts=[], reference_losses={})
    assert "No training step was recorded." in page.text


def test_evaluations_alone_make_a_page(tmp_path):
    with MetricsWriter(tmp_path, resume_step=0) as writer:
        writer.log_evaluation(0, validation_loss=9.5, validation_tokens=8)
    page, _ = report(tmp_path)
    assert "step 0, 2.79 above unigram entropy" in page.text


def test_the_sources_of_the_last_evaluation_are_listed(tmp_path):
    few, many = (SourceLoss(name=name, weight=1, loss=loss, num_tokens=64, num_sequences=1) for name, loss in (("few", 6.25), ("many", math.inf)))
    with MetricsWriter(tmp_path, resume_step=0) as writer:
        writer.log_evaluation(1, validation_loss=9.0, validation_tokens=128, sources=[many, few])
        writer.log_evaluation(2, validation_loss=8.0, validation_tokens=128, sources=[few, many])
    page, _ = report(tmp_path)
    assert "Validation loss by source" in page.text and "6.2500 on 1 sequences" in page.text and "nan on 1 sequences" in page.text


def test_a_failed_write_keeps_the_old_report(trained, monkeypatch):
    page = write_report(trained, title="first", facts=FACTS, reference_losses={})
    before = page.read_bytes()

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(StorageError, match=r"loss\.png: No space left on device"):
        write_report(trained, title="second", facts=FACTS, reference_losses={})
    assert page.read_bytes() == before
    assert sorted(entry.name for entry in page.parent.iterdir()) == ["index.html", "loss.png"]


def test_a_foreign_line_is_named_and_the_report_drawn_without_it(trained):
    with (trained / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 2.0}\n')
    said = []
    page, _ = report(trained, say=said.append)
    assert "After step 60" in page.text and len(said) == 1 and "line 64 is no record of this run" in said[0]


def test_a_byte_that_is_not_utf_8_is_escaped(trained):
    page, _ = report(trained, facts=[("data", "runs\udcff")], sample="\udcff")
    assert "runs\\udcff" in page.text


def test_without_metrics_there_is_nothing_to_report(tmp_path):
    with pytest.raises(StorageError, match=r"cannot read .*metrics\.jsonl"):
        report(tmp_path)


def test_the_report_does_not_touch_pyplot(trained):
    program = (
        "import sys, pathlib\n"
        "from phase8.observe.report import write_report\n"
        "write_report(pathlib.Path(sys.argv[1]), title='x', facts=[], reference_losses={})\n"
        "sys.exit('matplotlib.pyplot' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, str(trained)]).returncode == 0
