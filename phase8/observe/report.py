"""`report/`: the curves of a run as a picture and as one self-contained page, drawn from its `metrics.jsonl` alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from phase8.durable import replace_file, storage_errors
from phase8.errors import ConfigError
from phase8.formatting import format_bytes, format_count, format_ratio, format_seconds
from phase8.observe.curves import Chart, Curve, Mark, Span, limits_from_zero
from phase8.observe.history import History, Places, Series, last_finite, loss_limits, median, smooth
from phase8.observe.metrics import read_metrics
from phase8.observe.page import Charts, Fold, Overview, Tile, card, facts_table, page, samples, table
from phase8.observe.routing import RoutingHistory
from phase8.observe.routing_chart import EVEN, FEWER, MORE, draw_load
from phase8.observe.run_events import EVALUATIONS_CHANGED, RunEvents
from phase8.paths import real_path
from phase8.terminal import ESCAPED

_MAX_EVENTS = 40
_MOST_SMALL = 6  # charts beside the losses on the first screen
format_loss = "{:.3f}".format
_format_rate = "{:.3g}".format
_format_percent = "{:.3g} %".format


class RecordedRun(NamedTuple):
    """A run as its metrics describe it.

    Args:
        name: Name of its directory.
        history: Its figures.
        events: Its events.
    """

    name: str
    history: History
    events: RunEvents


def read_run(directory: Path, *, say: Callable[[str], None] | None = None) -> RecordedRun:
    """Reads the metrics of a run.

    Args:
        directory: The run directory.
        say: Shows a sentence about lines that are not metrics.

    Raises:
        StorageError: The metrics cannot be read.
    """
    records = read_metrics(directory / "metrics.jsonl", say=say)
    return RecordedRun(real_path(directory).name, History.from_records(records), RunEvents.from_records(records))


def require_figures(directory: Path) -> None:
    """Refuses a run of which there is nothing to draw yet.

    Args:
        directory: The run directory.

    Raises:
        ConfigError: Its metrics hold no step and no evaluation.
        StorageError: The metrics cannot be read.
    """
    history = read_run(directory).history
    if not history.steps.size and not history.validation_steps.size:
        raise ConfigError(f"the metrics.jsonl of {directory} holds no step and no evaluation; let the run take a step, or give another run.")


def write_report(directory: Path, *, say: Callable[[str], None] | None = None) -> Path:
    """Draws `report/loss.png` and `report/index.html` of a run, which may still be training.

    Args:
        directory: The run directory.
        say: Shows a sentence about lines that are not metrics.

    Returns:
        The page.

    Raises:
        StorageError: The metrics cannot be read or the report cannot be written.
    """
    from phase8.observe.charts import loss_png  # late: of all ranks one draws, at the end, and matplotlib takes a third of a second

    run = read_run(directory, say=say)
    content = run_page(run).encode(errors=ESCAPED)
    report_directory = directory / "report"
    with storage_errors(report_directory):
        report_directory.mkdir(exist_ok=True)
    replace_file(report_directory / "loss.png", loss_png(run.history, title=run.name, reference_losses=run.events.reference_losses))
    replace_file(report_directory / "index.html", content)
    return report_directory / "index.html"


def run_page(run: RecordedRun) -> str:
    """The page of a run."""
    history, events = run.history, run.events
    charts = Charts(Span.of([history.places]), _marks(history, events))
    losses, *others = _chart_cards(run, charts)
    overview = Overview([losses], others[:_MOST_SMALL], [*_text_cards(run)])
    facts = [card("Run", facts_table(events.facts))] if events.facts else []
    folds = [Fold("More charts", others[_MOST_SMALL:]), Fold("The run as its banner described it", facts)]
    return page(run.name, [_progress(history), events.origin], tiles=headline(history, events), overview=overview, folds=folds, charts=charts)


def headline(history: History, events: RunEvents) -> list[Tile]:
    """The main figures of a run; a figure that was not measured is a dash."""
    total_seconds, planned = float(np.sum(history.step_seconds)), events.planned_memory_bytes
    waiting = _or_dash(float(np.sum(history.data_wait_seconds)) / total_seconds if total_seconds > 0 else None, format_ratio)
    mfu = median(history.mfu)
    return [
        Tile("Training loss", _or_dash(last_finite(smooth(history.loss)), format_loss), "nats per token, smoothed"),
        _validation_tile(history, events),
        Tile("Tokens", _or_dash(last_finite(history.tokens), format_count), f"up to step {int(history.steps[-1]):,}" if history.steps.size else ""),
        Tile("Time in steps", format_seconds(total_seconds), "without evaluations and saves" if mfu is None else f"{waiting} waiting for data"),
        Tile("Throughput", _or_dash(median(history.tokens_per_second), lambda rate: f"{format_count(rate)} tok/s"), "median"),
        Tile("Waiting for data", waiting, "of the time in steps") if mfu is None else Tile("MFU", format_ratio(mfu), "median"),
        Tile(
            "Peak memory",
            _or_dash(last_finite(history.peak_memory_bytes), format_bytes),
            "" if planned is None else f"planned {format_bytes(planned)}",
        ),
        Tile("Skipped steps", f"{len(history.skipped_steps):,}", "not finite, or a spike", is_warning=bool(history.skipped_steps)),
    ]


def _validation_tile(history: History, events: RunEvents) -> Tile:
    """The best of the evaluations that compare with the latest ones."""
    changed_at = max(events.steps.get(EVALUATIONS_CHANGED, (-1,)))
    comparable = np.where(history.validation_steps > changed_at, history.validation_loss, np.nan)
    since = "" if changed_at < 0 else f", of those after step {changed_at:,}"
    if not np.isfinite(comparable).any():
        return Tile("Best validation loss", "–", f"no evaluation{since}")
    best = int(np.nanargmin(comparable))
    loss = float(comparable[best])
    note = f"step {int(history.validation_steps[best]):,}{since}"
    for name, reference in list(events.reference_losses.items())[:1]:
        note += f", {abs(reference - loss):.2f} {'below' if loss < reference else 'above'} {name}"
    return Tile("Best validation loss", format_loss(loss), note)


def _or_dash(value: float | None, format_value: Callable[[float], str]) -> str:
    return "–" if value is None else format_value(value)


def _progress(history: History) -> str:
    if not history.steps.size:
        return "No training step was recorded."
    return f"After step {int(history.steps[-1]):,} and {format_count(history.tokens[-1])} tokens"


def _marks(history: History, events: RunEvents) -> list[Mark]:
    """Restarts after the first step, rollbacks and skipped steps."""
    restarts = [step for step in events.steps.get("start", ()) if step > 0]
    kinds = {"restart": restarts, "rollback": events.steps.get("rollback", ()), "skipped": history.skipped_steps}
    return [Mark(kind, np.array(steps, dtype=np.float64)) for kind, steps in kinds.items()]


def _chart_cards(run: RecordedRun, charts: Charts) -> Iterator[str]:
    """Cards with charts, the most important first."""
    history, events, places = run.history, run.events, run.history.places
    series = partial(_series, places=places)
    at_evaluations = places.at(history.validation_steps)
    validation = Curve("validation", "c1", at_evaluations, history.validation_loss, "points")
    yield charts.card(loss_chart([Curve("train", "c0", places, history.loss, "noisy"), validation], history, events.reference_losses))
    yield charts.card(series("Throughput", "tokens per second", history.tokens_per_second, format_count))
    if np.isfinite(history.mfu).any():
        yield charts.card(series("MFU", "per cent", 100 * history.mfu, _format_percent))
    yield charts.card(memory_chart([Curve("peak", "c0", places, history.peak_memory_bytes)], events.planned_memory_bytes))
    yield charts.card(series("Gradient norm", "before clipping", history.grad_norm, _format_rate))
    yield charts.card(series("Learning rate", "", history.learning_rate, _format_rate, style="line"))
    if history.routing is not None:
        yield _load_card(history.routing, charts, places.at(history.routing.steps))
    if history.validation_sources:
        curves = [Curve(name, f"c{n % 8}", at_evaluations, losses, "points") for n, (name, losses) in enumerate(history.validation_sources.items())]
        limits = loss_limits(np.concatenate([curve.values for curve in curves]), np.array([]), {})
        yield charts.card(Chart("Validation loss by source", "nats per token", curves, limits, format_loss))
    # A step of zero duration did not wait.
    waiting = 100 * history.data_wait_seconds / np.maximum(history.step_seconds, 1e-9)
    yield charts.card(series("Waiting for data", "per cent of the step", waiting, _format_percent))
    for name, losses in history.auxiliary_losses.items():
        yield charts.card(series(f"Loss {name}", "per valid target", losses, _format_rate))
    if history.routing is not None:
        yield from _routing_cards(history.routing, charts, places.at(history.routing.steps))


def loss_chart(curves: Sequence[Curve], history: History, reference_losses: Mapping[str, float]) -> Chart:
    """The chart of losses, with limits for the losses of a history."""
    limits = loss_limits(history.loss, history.validation_loss, reference_losses)
    return Chart("Loss", "nats per token", curves, limits, format_loss, references=reference_losses, is_wide=True)


def memory_chart(curves: Sequence[Curve], planned: float | None) -> Chart:
    """The chart of peak memory in bytes, with what was planned."""
    values = [*(curve.values for curve in curves), np.array([] if planned is None else [planned])]
    unit, name = (2**30, "GiB") if limits_from_zero(*values)[1] >= 2**30 else (2**20, "MiB")
    scaled = [replace(curve, values=curve.values / unit) for curve in curves]
    references = {} if planned is None else {"planned": planned / unit}
    limits = limits_from_zero(*(each / unit for each in values))
    return Chart("Peak memory", f"{name}, first rank", scaled, limits, lambda value: f"{value:.3g} {name}", references=references)


def _series(heading: str, unit: str, values: Series, format_value: Callable[[float], str], *, places: Places, style: str = "noisy") -> Chart:
    return Chart(heading, unit, [Curve("", "c0", places, values, style)], limits_from_zero(values), format_value)


def _load_card(routing: RoutingHistory, charts: Charts, places: Places) -> str:
    """The load of every expert."""
    busiest = Curve("busiest expert", "c1", places, _busiest(routing))
    chart = Chart("Load of experts", "in even shares of the choices", [busiest], (0, 1), "{:.2f}×".format)
    keys = [f'<span class="key" style="--key:{colour}">{name}</span>' for colour, name in ((FEWER, "none"), (EVEN, "even"), (MORE, "2×"))]
    keys.append(f'<span class="read">busiest <b>{chart.format_value(float(busiest.values[-1]))}</b></span>')
    return charts.drawn(draw_load(routing, places, charts.span), keys, chart)


def _routing_cards(routing: RoutingHistory, charts: Charts, places: Places) -> Iterator[str]:
    """What is dropped, how sure routers are, and how uneven the load is, as means over the layers."""
    series = partial(_series, places=places)
    with np.errstate(all="ignore"):
        yield charts.card(series("Dropped choices", "per cent, mean of the layers", 100 * np.nanmean(routing.dropped, axis=1), _format_percent))
        yield charts.card(series("Router entropy", "nats, mean of the layers", np.nanmean(routing.entropy, axis=1), _format_rate))
        if not np.isnan(routing.imbalance).all():  # records of earlier releases have none
            unit = "what the balance loss weighs, 1: balanced, mean of the layers"
            yield charts.card(series("Imbalance of experts", unit, np.nanmean(routing.imbalance, axis=1), _format_rate))


def _busiest(routing: RoutingHistory) -> Series:
    """Share of the busiest expert of all layers at each step, as a multiple of an even share."""
    return routing.load.shape[2] * np.nanmax(routing.load, axis=(1, 2))


def _text_cards(run: RecordedRun) -> Iterator[str]:
    history, events = run.history, run.events
    if events.rows:
        rows = [(f"{row.step:,}", row.kind, row.text) for row in events.rows[-_MAX_EVENTS:][::-1]]
        left_out = len(events.rows) - len(rows)
        yield card("Events", table(("step", "event", ""), rows), remark=f"the last {len(rows)}, {left_out} more" if left_out else "")
    names = dict.fromkeys([*events.epochs, *history.validation_sources])
    if names:
        rows = [(name, *_source_row(run, name)) for name in names]
        columns = ("source", "epochs", "loss", *["sequences"] * bool(history.validation_sequences))
        yield card("Data", table(columns, [row[: len(columns)] for row in rows]), remark="epochs at the last save, loss of the last evaluation")
    if events.settings:
        chosen = {name: value for name, value in events.settings.items() if name != "reason"}
        yield card("Settings chosen", facts_table(chosen), remark=events.settings.get("reason", ""))
    if events.samples:
        yield card("Samples", samples(events.samples))


def _source_row(run: RecordedRun, name: str) -> tuple[str, str, str]:
    """Epochs, and last validation loss and its number of sequences, of a source; a single source has the loss of the whole."""
    history, epochs = run.history, run.events.epochs.get(name)
    losses = history.validation_sources.get(name, np.array([]) if history.validation_sources else history.validation_loss)
    loss = float(losses[-1]) if losses.size and np.isfinite(losses[-1]) else None
    count = history.validation_sequences.get(name)
    return _or_dash(epochs, "{:.3g}".format), _or_dash(loss, "{:.4f}".format), _or_dash(count, "{:,.0f}".format)
