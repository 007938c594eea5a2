"""`report/`: the curves of a run as a picture and as one self-contained page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from string import Template
from typing import NamedTuple

import numpy as np

from phase8.durable import replace_file, storage_errors
from phase8.observe.formatting import format_bytes, format_count, format_ratio, format_seconds
from phase8.observe.history import History, Series, last_finite, median, smooth
from phase8.observe.metrics import read_metrics
from phase8.observe.routing import RoutingHistory
from phase8.terminal import ESCAPED

_PAGE = Path(__file__).with_name("report.html")


class Tile(NamedTuple):
    """A headline figure: its name, its value and a remark."""

    name: str
    value: str
    note: str = ""
    is_warning: bool = False


def write_report(
    directory: Path,
    *,
    title: str,
    facts: Sequence[tuple[str, str]],
    reference_losses: Mapping[str, float],
    sample: str | None = None,
    say: Callable[[str], None] | None = None,
) -> Path:
    """Draw `report/loss.png` and `report/index.html` of a run from its `metrics.jsonl`.

    Args:
        directory: The run directory.
        title: Heading of picture and page.
        facts: Facts about the run, as pairs of name and value.
        reference_losses: Losses to compare with, in nats per token, drawn as dashed lines under their names.
        sample: Text the model wrote, if any.
        say: Shows a sentence about lines that are not metrics.

    Returns:
        The page.

    Raises:
        StorageError: When the metrics cannot be read or the report cannot be written.
    """
    from phase8.observe.charts import loss_png  # late: of all ranks one draws, at the end, and matplotlib takes a third of a second

    history = History.from_records(read_metrics(directory / "metrics.jsonl", say=say))
    page = Template(_PAGE.read_text(encoding="utf-8")).substitute(
        title=escape(title),
        subtitle=escape(_subtitle(history)),
        tiles="\n".join(_tile_html(tile) for tile in headline(history, reference_losses)),
        charts="\n".join(_chart_cards(history, reference_losses)),
        sample="" if sample is None else _card("Sample", f"<pre>{escape(sample)}</pre>"),
        facts=_sources_card(history) + (_card("Run", _facts_table(facts)) if facts else ""),
    )
    report_directory = directory / "report"
    with storage_errors(report_directory):
        report_directory.mkdir(exist_ok=True)
    replace_file(report_directory / "loss.png", loss_png(history, title=title, reference_losses=reference_losses))
    replace_file(report_directory / "index.html", page.encode(errors=ESCAPED))
    return report_directory / "index.html"


def headline(history: History, reference_losses: Mapping[str, float]) -> list[Tile]:
    """The main figures of a run; a figure that was not measured is a dash."""
    total_seconds = float(np.sum(history.step_seconds))
    waiting = f"{format_ratio(float(np.sum(history.data_wait_seconds)) / total_seconds)} waiting for data" if total_seconds > 0 else ""
    mfu = median(history.mfu)
    return [
        Tile("Training loss", _or_dash(last_finite(smooth(history.loss)), "{:.3f}".format), "nats per token, smoothed"),
        _validation_tile(history, reference_losses),
        Tile("Tokens", _or_dash(last_finite(history.tokens), format_count), f"up to step {int(history.steps[-1]):,}" if history.steps.size else ""),
        Tile("Time in steps", format_seconds(total_seconds), waiting),
        Tile("Throughput", _or_dash(median(history.tokens_per_second), lambda rate: f"{format_count(rate)} tok/s"), "median"),
        Tile("MFU", _or_dash(mfu, format_ratio), "median" if mfu is not None else "peak FLOP/s of the device unknown"),
        Tile("Peak memory", _or_dash(last_finite(history.peak_memory_bytes), format_bytes)),
        Tile("Skipped steps", f"{history.num_skipped:,}", "loss or gradient not finite", is_warning=history.num_skipped > 0),
    ]


def _validation_tile(history: History, reference_losses: Mapping[str, float]) -> Tile:
    if not np.isfinite(history.validation_loss).any():
        return Tile("Best validation loss", "–", "no evaluation")
    best = int(np.nanargmin(history.validation_loss))
    loss = float(history.validation_loss[best])
    note = f"step {int(history.validation_steps[best]):,}"
    for name, reference in list(reference_losses.items())[:1]:
        note += f", {abs(reference - loss):.2f} {'below' if loss < reference else 'above'} {name}"
    return Tile("Best validation loss", f"{loss:.3f}", note)


def _or_dash(value: float | None, format_value: Callable[[float], str]) -> str:
    return "–" if value is None else format_value(value)


def _subtitle(history: History) -> str:
    if not history.steps.size:
        return "No training step was recorded."
    return f"After step {int(history.steps[-1]):,} and {format_count(history.tokens[-1])} tokens"


def _chart_cards(history: History, reference_losses: Mapping[str, float]) -> Iterator[str]:
    """The loss chart over the whole width, in a light and a dark version, and the smaller charts in pairs."""
    from phase8.observe.charts import draw_loss, render_svg

    draw = partial(draw_loss, history=history, reference_losses=reference_losses)
    legend = '<span class="key train">train</span>' + '<span class="key validation">validation</span>' * bool(history.validation_loss.size)
    yield _card(
        "Loss",
        f'<figure class="wide-screen">{render_svg(draw, name="loss", width=1000, height=420)}</figure>'
        f'<figure class="narrow-screen">{render_svg(draw, name="loss-narrow", width=360, height=300)}</figure>',
        remark=legend,
    )
    # A step of zero duration did not wait.
    waiting_percent = 100 * history.data_wait_seconds / np.maximum(history.step_seconds, 1e-9)
    yield _series_card("Throughput", "tokens per second", history.steps, history.tokens_per_second)
    yield _series_card("Waiting for data", "per cent of the step", history.steps, waiting_percent)
    yield _series_card("Gradient norm", "before clipping", history.steps, history.grad_norm)
    yield _series_card("Learning rate", "", history.steps, history.learning_rate, is_noisy=False)
    if history.routing is not None:
        yield from _routing_cards(history.routing)


def _routing_cards(routing: RoutingHistory) -> Iterator[str]:
    """The load of every expert, what is dropped, and how sure routers are, as means over the layers."""
    from phase8.observe.charts import render_svg
    from phase8.observe.routing_chart import draw_load

    svg = render_svg(partial(draw_load, history=routing), name="load", width=1000, height=420)
    remark = '<span><span style="color: #2f6bde">■</span> none, <span style="color: #b9bec6">■</span> an even share, '
    remark += '<span style="color: #d9730d">■</span> twice that or more</span>'
    yield _card("Load of experts", f"<figure>{svg}</figure>", remark=remark)
    yield _series_card("Dropped choices", "per cent, mean of the layers", routing.steps, 100 * np.nanmean(routing.dropped, axis=1))
    yield _series_card("Router entropy", "nats, mean of the layers", routing.steps, np.nanmean(routing.entropy, axis=1))


def _series_card(heading: str, unit: str, steps: Series, values: Series, *, is_noisy: bool = True) -> str:
    from phase8.observe.charts import draw_series, render_svg

    draw = partial(draw_series, steps=steps, values=values, is_noisy=is_noisy)
    svg = render_svg(draw, name=heading, width=420, height=225)
    return _card(heading, f"<figure>{svg}</figure>", remark=f"<span>{unit}</span>", is_wide=False)


def _card(heading: str, content: str, *, remark: str = "", is_wide: bool = True) -> str:
    """A section of the page; content and remark are HTML."""
    return f'<section class="card{" wide" if is_wide else ""}">\n<h2>{escape(heading)}{remark}</h2>\n{content}\n</section>'


def _sources_card(history: History) -> str:
    """The last evaluation by source; empty with a single source."""
    sources = history.last_validation_sources
    rows = [(name, f"{loss:.4f} on {num_sequences:,} sequences") for name, (loss, num_sequences) in sources.items()]
    return _card("Validation loss by source", _facts_table(rows), remark="<span>last evaluation</span>") if rows else ""


def _tile_html(tile: Tile) -> str:
    return (
        f'<div class="tile{" warning" if tile.is_warning else ""}"><div class="name">{escape(tile.name)}</div>'
        f'<div class="value">{escape(tile.value)}</div><div class="note">{escape(tile.note)}</div></div>'
    )


def _facts_table(facts: Sequence[tuple[str, str]]) -> str:
    rows = "\n".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in facts)
    return f"<table>\n{rows}\n</table>"
