"""A page that compares runs: their curves in one chart each, their headline figures, and the config keys in which they differ."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from phase8.config.yaml_text import read_yaml
from phase8.durable import replace_file
from phase8.formatting import format_count
from phase8.observe.curves import Chart, Curve, Span, limits_from_zero
from phase8.observe.history import Series, loss_limits, smooth
from phase8.observe.page import Charts, Fold, Overview, card, page, table
from phase8.observe.report import RecordedRun, format_loss, headline, memory_chart, read_run
from phase8.observe.run_events import in_words
from phase8.terminal import ESCAPED

_COLOURS = 8  # of the page
_MAX_BYTES = 1 << 20


def write_comparison(directories: Sequence[Path], output: Path, *, say: Callable[[str], None] | None = None) -> None:
    """Writes the page that compares runs.

    Args:
        directories: Two or more run directories.
        output: The page, which is replaced if it exists.
        say: Shows a sentence about what a run lacks.

    Raises:
        StorageError: The metrics of a run cannot be read, or the page cannot be written.
    """
    runs = [read_run(directory, say=say) for directory in directories]
    names = _unique([run.name for run in runs])
    content = _comparison_page([run._replace(name=name) for run, name in zip(runs, names, strict=True)], [_config(each) for each in directories])
    replace_file(output, content.encode(errors=ESCAPED))


def _comparison_page(runs: Sequence[RecordedRun], configs: Sequence[Mapping[str, str]]) -> str:
    charts = Charts(Span.of([run.history.places for run in runs]))
    names, colours = [run.name for run in runs], [f"c{number % _COLOURS}" for number in range(len(runs))]
    figures = [{tile.name: tile for tile in headline(run.history, run.events)} for run in runs]
    columns = list(dict.fromkeys(name for tiles in figures for name in tiles))
    rows = [[name, *(tiles[column].value if column in tiles else "–" for column in columns)] for name, tiles in zip(names, figures, strict=True)]
    training, validation, *small = _chart_cards(runs, colours, charts)
    texts = [card("Runs", table(["run", *columns], rows, colours=colours))]
    different = _differences(configs)
    if different:
        texts.append(card("Config keys that differ", table(["key", *names], different)))
    origins = [[run.name, run.events.origin] for run in runs if run.events.origin]
    origin = [card("Origin", table(["run", "started"], origins))] if origins else []
    overview = Overview([training, validation], small, texts)
    return page(", ".join(names), [f"{len(runs)} runs compared"], tiles=[], overview=overview, folds=[Fold("When they began", origin)], charts=charts)


def _chart_cards(runs: Sequence[RecordedRun], colours: Sequence[str], charts: Charts) -> Iterator[str]:
    def curves(values_of: Callable[[RecordedRun], Series]) -> list[Curve]:
        return [Curve(run.name, colour, run.history.places, values_of(run)) for run, colour in zip(runs, colours, strict=True)]

    def series(heading: str, unit: str, values_of: Callable[[RecordedRun], Series], format_value: Callable[[float], str]) -> str:
        found = curves(values_of)
        return charts.card(Chart(heading, unit, found, limits_from_zero(*(curve.values for curve in found)), format_value))

    losses = curves(lambda run: smooth(run.history.loss))
    limits = [loss_limits(run.history.loss, run.history.validation_loss, {}) for run in runs]
    ends = min(low for low, _ in limits), max(high for _, high in limits)
    yield charts.card(Chart("Training loss", "nats per token, smoothed", losses, ends, format_loss, is_wide=True))
    validation = [
        Curve(run.name, colour, run.history.places.at(run.history.validation_steps), run.history.validation_loss, "points")
        for run, colour in zip(runs, colours, strict=True)
    ]
    yield charts.card(Chart("Validation loss", "nats per token", validation, ends, format_loss, is_wide=True))
    yield series("Throughput", "tokens per second, smoothed", lambda run: smooth(run.history.tokens_per_second), format_count)
    if any(np.isfinite(run.history.mfu).any() for run in runs):
        yield series("MFU", "per cent, smoothed", lambda run: 100 * smooth(run.history.mfu), "{:.3g} %".format)
    yield charts.card(memory_chart(curves(lambda run: run.history.peak_memory_bytes), None))
    yield series("Gradient norm", "smoothed", lambda run: smooth(run.history.grad_norm), "{:.3g}".format)
    yield series("Learning rate", "", lambda run: run.history.learning_rate, "{:.3g}".format)


def _differences(configs: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """Keys and the value of each run, where not all are the same; what a run lacks is a dash. Without all configs there is nothing to compare."""
    if not all(configs):
        return []
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = [[key, *(config.get(key, "–") for config in configs)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _config(directory: Path) -> dict[str, str]:
    """The values of a run's `config.yaml` by dotted key, as text; empty if it cannot be read."""
    try:
        text = (directory / "config.yaml").read_bytes()
        tree = read_yaml(text.decode()) if len(text) <= _MAX_BYTES else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return dict(_flat(tree, "")) if isinstance(tree, dict) else {}


def _flat(tree: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", in_words(value if isinstance(value, str) else json.dumps(value, default=str))


def _unique(names: Sequence[str]) -> list[str]:
    """The names, numbered where two runs share one."""
    return [f"{name} ({names[: place + 1].count(name)})" if names.count(name) > 1 else name for place, name in enumerate(names)]
