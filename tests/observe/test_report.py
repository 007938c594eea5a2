from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
from matplotlib.image import imread

from phase8.errors import StorageError
from phase8.observe.history import History
from phase8.observe.metrics import MetricsWriter, SourceLoss, read_metrics
from phase8.observe.report import RecordedRun, headline, run_page, write_report
from phase8.observe.run_events import RunEvents
from tests.observe.test_routing import Layer

HOSTILE = "</script><script>alert(1)</script><img src=x onerror='alert(2)'>\" onload=\"&amp;]]>"
START = {
    "time": "2026-11-29T14:05:07+00:00", "host": "node <7>", "code": "commit abc", "world_size": 4, "planned_memory_bytes": 4 * 2**30,
    "reference_losses": {"unigram entropy": 6.71}, "facts": {"device": "CPU <2 cores>", "batch": "16 × 512"},
}  # fmt: skip


class Page(HTMLParser):
    """Collects the tags, attributes and text of a page."""

    def __init__(self, source: str):
        super().__init__()
        self.source = source
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.scripts: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        if self.cdata_elem == "script":
            self.scripts.append(data)
        else:
            self.text += data

    @property
    def data(self):
        """What pointers read off."""
        return json.loads(self.scripts[0])

    @property
    def parts(self):
        """Headings of the cards in each part of the first screen, and in each fold by its heading."""
        parts = {}
        for part, fold, card in re.findall(r'<div class="(\w+)">|<summary>([^<]*)</summary><div|<h2 [^>]*>(.*?) <small>', self.source):
            if part in ("large", "small", "texts") or fold:
                headings = parts.setdefault(part or fold, [])
            elif card:
                headings.append(card)
        return parts

    @property
    def charts(self):
        """Chart heading -> texts of each curve."""
        headings = re.findall(r'data-chart="(\d+)">\n<div class="head"><h2 title="[^"]*">(.*?) <small>', self.source)
        return {heading: [curve["text"] for curve in self.data["charts"][int(number)]] for number, heading in headings}


def report(directory) -> tuple[Page, np.ndarray]:
    page = write_report(directory)
    assert page == directory / "report" / "index.html"
    return Page(page.read_text(encoding="utf-8")), imread(BytesIO((directory / "report" / "loss.png").read_bytes()))


def tiles_of(directory):
    records = read_metrics(directory / "metrics.jsonl")
    return {tile.name: tile for tile in headline(History.from_records(records), RunEvents.from_records(records))}


@pytest.fixture
def trained(tmp_path, make_step, make_skipped):
    directory = tmp_path / "quick & start"
    with MetricsWriter(directory, resume_step=0) as writer:
        writer.log_event(0, "start", **START)
        for step in range(1, 61):
            writer.log_step(make_skipped(step) if step == 30 else make_step(step))
            if step % 20 == 0:
                writer.log_evaluation(step, validation_loss=9.0 / step**0.3 + 0.1, validation_tokens=1024)
            if step == 40:
                writer.log_event(40, "checkpoint", checkpoint_stall_seconds=0.25, time=START["time"], epochs={"web": 1.25})
                writer.log_event(40, "start", **{**START, "time": "2026-11-30T08:00:00+00:00"})
    return directory


def test_the_headline_sums_up_the_run(trained):
    tiles, best = tiles_of(trained), 9.0 / 60**0.3 + 0.1
    assert float(tiles["Training loss"].value) == pytest.approx(9.0 / 60**0.3, abs=0.03)
    assert tiles["Best validation loss"].value == f"{best:.3f}"
    assert tiles["Best validation loss"].note == f"step 60, {6.71 - best:.2f} below unigram entropy"
    assert (tiles["Tokens"].value, tiles["Tokens"].note) == ("492k", "up to step 60")
    assert (tiles["Time in steps"].value, tiles["Time in steps"].note) == ("10.2 s", "1.0 % waiting for data")
    assert (tiles["Throughput"].value, tiles["MFU"].value) == ("48.1k tok/s", "41.2 %")
    assert (tiles["Peak memory"].value, tiles["Peak memory"].note) == ("3 GiB", "planned 4 GiB")
    assert (tiles["Skipped steps"].value, tiles["Skipped steps"].is_warning) == ("1", True)


def test_the_best_loss_is_one_that_compares_with_the_last(trained, make_step):
    """On other held-out data, or more of them, an earlier evaluation may have been easier."""
    said = "evaluations are on other data"
    with MetricsWriter(trained, resume_step=60) as writer:
        writer.log_event(60, "evaluations_changed", message=said)
    assert (tiles_of(trained)["Best validation loss"].value, tiles_of(trained)["Best validation loss"].note) == (
        "–", "no evaluation, of those after step 60",
    )  # fmt: skip
    with MetricsWriter(trained, resume_step=60) as writer:
        writer.log_step(make_step(61))
        writer.log_evaluation(61, validation_loss=5.5, validation_tokens=1024)
    tile, (page, _) = tiles_of(trained)["Best validation loss"], report(trained)
    assert (tile.value, tile.note) == ("5.500", "step 61, of those after step 60, 1.21 below unigram entropy") and said in page.text


def test_the_page_holds_figures_charts_events_facts_and_samples(trained):
    with MetricsWriter(trained, resume_step=60) as writer:
        writer.log_event(60, "settings", **{"train.recompute": "none", "reason": "by plan"})
        writer.log_event(60, "sample", text="older")
        writer.log_event(61, "sample", text="def f(x):\n    return x < 1 & <b>")
    page, _ = report(trained)
    assert list(page.charts) == ["Loss", "Throughput", "MFU", "Peak memory", "Gradient norm", "Learning rate", "Waiting for data"]
    for expected in (
        "quick & start", "CPU <2 cores>", "16 × 512", "unigram entropy 6.710", "def f(x):\n    return x < 1 & <b>", "planned 4 GiB",
        "started 2026-11-29 14:05:07 UTC, 2 starts, the last 2026-11-30 08:00 UTC on node <7>, commit abc",
        "resumed from step 40 at 2026-11-30 08:00 UTC on node <7> and 3 more ranks",
        "1 saved, the last at 2026-11-29 14:05:07 UTC; training stood still for 250 ms in all", "by plan",
    ):  # fmt: skip
        assert expected in page.text, expected
    assert not {"i", "7"} & set(page.tags) and "<td>web</td><td>1.25</td>" in page.source


def test_one_screen_has_what_matters_and_the_rest_is_folded(trained, make_step):
    routing = {layer: Layer((0.25, 0.75), 0.1, 0.5) for layer in (0, 1)}
    with MetricsWriter(trained, resume_step=60) as writer:
        writer.log_step(make_step(61, routing=routing, auxiliary_losses={"balance": 0.1}))
        writer.log_event(61, "settings", **{"train.recompute": "none", "reason": "by plan"})
        writer.log_event(61, "sample", text="text")
    page, _ = report(trained)
    assert page.parts == {
        "large": ["Loss"],
        "small": ["Throughput", "MFU", "Peak memory", "Gradient norm", "Learning rate", "Load of experts"],
        "texts": ["Events", "Data", "Settings chosen", "Samples"],
        "More charts": ["Waiting for data", "Loss balance", "Dropped choices", "Router entropy", "Imbalance of experts"],
        "The run as its banner described it": ["Run"],
    }
    assert page.source.count('<details class="fold">') == 2 and page.source.count("<details open>") == 1  # the newest sample


def test_what_there_is_takes_the_room_of_what_there_is_not(tmp_path, make_step):
    with MetricsWriter(tmp_path, resume_step=0) as writer:
        writer.log_step(make_step(1, mfu=None))
    page, _ = report(tmp_path)
    assert page.parts == {"large": ["Loss"], "small": ["Throughput", "Peak memory", "Gradient norm", "Learning rate", "Waiting for data"]}
    assert "fold" not in [value for name, value in page.attributes if name == "class"]


def shown_by_a_browser(page, directory, width, height, measure):
    """What a script measures in a window that shows the page."""
    (directory / "measured.html").write_text(page.replace("</body>", f"<script>{measure}</script></body>"), encoding="utf-8")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={directory / 'profile'}", f"--window-size={width},{height}"]
    command = ["chromium", *options, "--dump-dom", (directory / "measured.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    return json.loads(unescape(re.search(r'data-found="([^"]*)"', shown)[1]))


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize(("width", "height"), [(1440, 900), (1280, 720), (500, 800)])
def test_a_browser_shows_it_on_one_screen_and_narrow_ones_scroll_down_only(trained, tmp_path, width, height):
    page = write_report(trained).read_text(encoding="utf-8")
    measure = "const e = document.documentElement; e.dataset.found = JSON.stringify([e.scrollWidth, innerWidth, e.scrollHeight, innerHeight]);"
    page_width, window_width, page_height, window_height = shown_by_a_browser(page, tmp_path, width, height, measure)
    assert page_width <= window_width and (page_height <= window_height) == (width > 1000)


# Numbers that stand in more than one line, and how much wider the page is than its window; a frame is as narrow as it is made, a window is not.
BROKEN_NUMBERS = """
const frame = document.createElement("iframe");
frame.srcdoc = PAGE, frame.style = "border: 0; height: 900px; width: WIDTHpx";
document.body.replaceChildren(frame);
frame.onload = () => {
  const page = frame.contentDocument, texts = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT), broken = [];
  page.querySelectorAll("script").forEach(each => each.remove());
  while (texts.nextNode()) {
    for (const number of texts.currentNode.textContent.matchAll(/\\d[\\d.,:-]*\\d/g)) {
      const range = page.createRange();
      range.setStart(texts.currentNode, number.index);
      range.setEnd(texts.currentNode, number.index + number[0].length);
      const lines = new Set([...range.getClientRects()].map(box => Math.round(box.top)));
      if (lines.size > 1) broken.push(number[0]);
    }
  }
  const { scrollWidth, clientWidth } = page.documentElement;
  document.documentElement.dataset.found = JSON.stringify([broken, scrollWidth - clientWidth]);
};
"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("width", [280, 390, 1000])
def test_no_screen_is_so_narrow_that_a_number_is_broken(trained, tmp_path, make_step, width):
    with MetricsWriter(trained, resume_step=60) as writer:
        writer.log_step(make_step(61, data_wait_seconds=0.17))  # above its chart, at the right
        writer.log_event(61, "settings", **{"train.micro_batch_size": 1_048_576, "reason": "measured"})
        writer.log_event(61, "checkpoint", checkpoint_stall_seconds=0.25, time=START["time"], epochs={"a source of a name that is long": 1.25})
    framed = json.dumps(write_report(trained).read_text(encoding="utf-8")).replace("</", "<\\/")
    measure = BROKEN_NUMBERS.replace("WIDTH", str(width)).replace("PAGE", framed)
    assert shown_by_a_browser("<body></body>", tmp_path, max(width, 500), 900, measure) == [[], 0]


def test_a_pointer_reads_the_values_of_every_curve_on_every_axis(trained):
    page, _ = report(trained)
    train, validation = page.charts["Loss"]
    assert (len(train), train[0], train[29], train[59]) == (60, "9.000", "–", f"{9.0 / 60**0.3:.3f}")
    assert validation == [f"{9.0 / step**0.3 + 0.1:.3f}" for step in (20, 40, 60)]
    curves = page.data["charts"][0]
    assert curves[1]["steps"] == [20, 40, 60] and curves[1]["tokens"] == [8192 * step for step in (20, 40, 60)]
    np.testing.assert_allclose(curves[1]["seconds"], [0.17 * step for step in (20, 40, 60)], rtol=1e-4)
    assert page.charts["Peak memory"][0][0] == "3 GiB" and page.charts["MFU"][0][0] == "41.2 %"


def test_without_a_peak_there_is_no_mfu(tmp_path, make_step):
    with MetricsWriter(tmp_path, resume_step=0) as writer:
        for step in (1, 2):
            writer.log_step(make_step(step, mfu=None))
    page, _ = report(tmp_path)
    assert "MFU" not in page.text and tiles_of(tmp_path)["Waiting for data"].value == "1.0 %"


def test_the_page_asks_nothing_of_the_network(trained):
    page, _ = report(trained)
    assert not {"link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert ("content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'") in page.attributes
    assert all(value.startswith("data:") for name, value in page.attributes if name in ("src", "href", "xlink:href") and value)
    assert re.search(r"https?://|//[a-z]|@import|url\(|fetch|XMLHttp|innerHTML|\beval\(", page.source) is None


def test_names_texts_and_sources_from_outside_are_never_markup(tmp_path, make_step):
    """Whatever a metrics file says, or a directory is called: the page has the tags of a harmless one."""

    def page_of(directory, text):
        sources = [SourceLoss(name=name, weight=1, loss=2.0, num_tokens=8, num_sequences=1) for name in (text, "other")]
        with MetricsWriter(directory, resume_step=0) as writer:
            named = {"host": text, "code": text, "time": text, "reference_losses": {text: 5.0}, "facts": {text: text}}
            writer.log_event(0, "start", **{**START, **named})
            writer.log_step(make_step(1, auxiliary_losses={text: 1.0}))
            writer.log_evaluation(1, validation_loss=2.0, validation_tokens=16, sources=sources)
            writer.log_event(1, text, message=text)
            writer.log_event(1, "rollback", message=text)
            writer.log_event(1, "settings", **{text: text, "reason": text})
            writer.log_event(1, "config_changed", key=text, old=text, new=[text])
            writer.log_event(1, "stragglers", ratio=2.0, slowest_host=text, slowest_rank=text)
            writer.log_event(1, "sample", text=text)
            writer.log_event(1, "checkpoint", time=text, epochs={text: 1.0})
        return report(directory)[0]

    hostile, harmless = page_of(tmp_path / HOSTILE.replace("/", "\u2215"), HOSTILE), page_of(tmp_path / "plain", "plain")
    assert hostile.tags == harmless.tags and {name for name, _ in hostile.attributes} == {name for name, _ in harmless.attributes}
    assert len(hostile.scripts) == 2 and hostile.scripts[1] == harmless.scripts[1] and hostile.text.count(HOSTILE) >= 15


@pytest.mark.parametrize("value", [None, 7, True, "x", [], {"a": []}, {"a": "x", "b": math.inf}], ids=str)
def test_events_of_another_form_still_make_a_page(tmp_path, make_step, value):
    with MetricsWriter(tmp_path, resume_step=0) as writer:
        writer.log_step(make_step(1))
    (step,) = read_metrics(tmp_path / "metrics.jsonl")
    for key in START:
        events = [{"step": 0, "event": "start", **START, key: value}, {"step": 0, "event": "settings", key: value}]
        events += [{"step": 1, "event": kind, key: value} for kind in ("checkpoint", "sample", "stragglers", "rollback", "config_changed", "x")]
        events.append({"step": 1, "event": "checkpoint", "epochs": value, "checkpoint_stall_seconds": value})
        events.append({"step": 1, "event": "sample", "text": value})
        records = [step, *events]
        assert "After step 1" in run_page(RecordedRun("x", History.from_records(records), RunEvents.from_records(records)))


def test_ids_in_the_page_are_unique(trained):
    page, _ = report(trained)
    ids = [value for name, value in page.attributes if name == "id"]
    assert ids and len(ids) == len(set(ids))


def test_the_page_serves_dark_mode_and_phones(trained):
    source = write_report(trained).read_text(encoding="utf-8")
    style, body = source.split("</style>")
    used = set(re.findall(r"var\((--[a-z0-9-]+)\)", source)) - {"--key", "--tokens-left", "--tokens-width"}
    light, dark = style.split("prefers-color-scheme: dark")
    assert {"--c0", "--c1"} <= set(re.findall(r"var\((--[a-z0-9-]+)\)", body))
    for name in used - {"--steps-left", "--steps-width", "--seconds-left", "--seconds-width"}:
        assert f"{name}:" in light and f"{name}:" in dark, name
    assert 'name="viewport"' in source


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
    assert "5.500" in page.text and "no evaluation" in page.text and "Samples" not in page.text
    assert has_colour(picture, (0x2F, 0x6B, 0xDE)) and not has_colour(picture, (0xD9, 0x73, 0x0D))


def test_a_run_of_skipped_steps_only_says_so(tmp_path, make_skipped):
    with MetricsWriter(tmp_path, resume_step=0) as writer:
        for step in (1, 2, 3):
            writer.log_step(make_skipped(step))
    page, _ = report(tmp_path)
    assert "no finite value was recorded" in page.text
    assert (tiles_of(tmp_path)["Training loss"].value, tiles_of(tmp_path)["Skipped steps"].value) == ("–", "3")


def test_an_empty_record_still_makes_a_page(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    assert "No training step was recorded." in report(tmp_path)[0].text


def test_evaluations_alone_make_a_page(tmp_path):
    with MetricsWriter(tmp_path, resume_step=0) as writer:
        writer.log_event(0, "start", **START)
        writer.log_evaluation(0, validation_loss=9.5, validation_tokens=8)
    assert "step 0, 2.79 above unigram entropy" in report(tmp_path)[0].text


def test_the_sources_of_the_evaluations_are_drawn_and_listed(tmp_path):
    few, many = (SourceLoss(name=name, weight=1, loss=loss, num_tokens=64, num_sequences=1) for name, loss in (("few", 6.25), ("many", math.inf)))
    with MetricsWriter(tmp_path, resume_step=0) as writer:
        writer.log_evaluation(1, validation_loss=9.0, validation_tokens=128, sources=[many, few])
        writer.log_evaluation(2, validation_loss=8.0, validation_tokens=128, sources=[few, many])
    page, _ = report(tmp_path)
    assert page.charts["Validation loss by source"] == [["–", "–"], ["6.250", "6.250"]]
    assert "<td>few</td><td>–</td><td>6.2500</td><td>1</td>" in page.source and "<td>many</td><td>–</td><td>–</td><td>1</td>" in page.source


def test_a_failed_write_keeps_the_old_report(trained, monkeypatch):
    page = write_report(trained)
    before = page.read_bytes()

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(StorageError, match=r"loss\.png: No space left on device"):
        write_report(trained)
    assert page.read_bytes() == before
    assert sorted(entry.name for entry in page.parent.iterdir()) == ["index.html", "loss.png"]


def test_a_foreign_line_is_named_and_the_report_drawn_without_it(trained):
    with (trained / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 2.0}\n')
    said = []
    page = Page(write_report(trained, say=said.append).read_text())
    assert "After step 60" in page.text and len(said) == 1 and "line 67 is no record of this run" in said[0]


def test_a_byte_that_is_not_utf_8_is_escaped(tmp_path, make_step):
    with MetricsWriter(tmp_path, resume_step=0) as writer:
        writer.log_event(0, "start", **{**START, "facts": {"data": "runs\udcff"}})
        writer.log_step(make_step(1))
    assert "runs\\udcff" in report(tmp_path)[0].text


def test_without_metrics_there_is_nothing_to_report(tmp_path):
    with pytest.raises(StorageError, match=r"cannot read .*metrics\.jsonl"):
        report(tmp_path)


def test_the_report_does_not_touch_pyplot(trained):
    program = (
        "import sys, pathlib\n"
        "from phase8.observe.report import write_report\n"
        "write_report(pathlib.Path(sys.argv[1]))\n"
        "sys.exit('matplotlib.pyplot' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, str(trained)]).returncode == 0
