"""The pieces of a report page: cards, tables, charts with what a pointer reads off them, and the page around them.

A page is one screen: headline figures, charts and texts that share the height of the window; narrow screens stack them. What goes further is
folded below.

Every text from outside (names, paths, prompts, samples) is escaped here, in `escape` or in the JSON for the page's script; content that a
function takes as HTML says so. The page is one file and its policy allows no request.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from string import Template
from typing import NamedTuple

import numpy as np

from phase8.observe.curves import AXES, Chart, Curve, Mark, Span, draw, readings

_PAGE = Path(__file__).with_name("report.html")
_SMALL_IN_TWO_COLUMNS = 4
_LONGEST_WORD = 24  # characters; a cell of a table with more of them, or with several words, may be broken anywhere but in its numbers
_NUMBER = re.compile(r"(?<![^\s(])\d[\d.,:+-]*\d")  # dates and times, too; what is a part of a path or name is no number
_MARKS = {"restart": "restart", "rollback": "rollback", "skipped": "skipped step"}


class Tile(NamedTuple):
    """A headline figure: its name, its value and a remark."""

    name: str
    value: str
    note: str = ""
    is_warning: bool = False


class Overview(NamedTuple):
    """The first screen: cards as HTML.

    Args:
        large: The main charts, one above the other.
        small: Charts beside them, in two rows.
        texts: Cards with texts and tables, below in one row.
    """

    large: Sequence[str]
    small: Sequence[str]
    texts: Sequence[str]


class Fold(NamedTuple):
    """Cards below the first screen, which their heading opens.

    Args:
        heading: What they are.
        cards: The cards, as HTML; without any the fold is left out.
    """

    heading: str
    cards: Sequence[str]


class Charts:
    """Charts of a page, which collects what a pointer reads off them.

    Args:
        span: What their horizontal axes show.
        marks: Marks on each of them.
    """

    def __init__(self, span: Span, marks: Sequence[Mark] = ()):
        self.span, self._marks = span, marks
        self._readings: list[list[dict[str, object]]] = []

    def card(self, chart: Chart) -> str:
        """A card with a chart; what its values are at the pointer, and at the end without one, stands in the heading."""
        chart = replace(chart, curves=[curve for curve in chart.curves if curve.values.size])
        keys = [_key(curve, self._last(curve, chart)) for curve in chart.curves]
        marks = [mark for mark in self._marks if mark.steps.size] if chart.is_wide else []
        keys += [f'<span class="mark-key {escape(mark.kind)}">{_MARKS[mark.kind]}</span>' for mark in marks]
        return self.drawn(draw(chart, self.span, self._marks), keys, chart)

    def drawn(self, drawing: str, keys: Sequence[str], chart: Chart) -> str:
        """A card with a drawing (HTML), whose pointer reads off the curves of a chart."""
        self._readings.append([readings(curve, chart.format_value) for curve in chart.curves])
        number = len(self._readings) - 1
        head = f'{_heading(chart.heading, chart.unit)}<p class="keys"><b class="at"></b>{"".join(keys)}</p>'
        return f'<section class="card chart" data-chart="{number}">\n<div class="head">{head}</div>\n{drawing}\n</section>'

    @property
    def data(self) -> str:
        """What pointers read off, as JSON that may stand in a script element."""
        data = {"largest": {axis: self.span.largest[axis] for axis in AXES}, "charts": self._readings}
        text = json.dumps(data, separators=(",", ":"))
        return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")

    @staticmethod
    def _last(curve: Curve, chart: Chart) -> str:
        finite = curve.values[np.isfinite(curve.values)]
        return chart.format_value(float(finite[-1])) if finite.size else "–"


def page(title: str, subtitle: Iterable[str], *, tiles: Sequence[Tile], overview: Overview, folds: Iterable[Fold], charts: Charts) -> str:
    """The whole page.

    Args:
        title: Heading.
        subtitle: Lines beside it; an empty one is left out.
        tiles: Headline figures.
        overview: The first screen.
        folds: What is below.
        charts: The charts among the cards.
    """
    return Template(_PAGE.read_text(encoding="utf-8")).substitute(
        title=escape(title),
        subtitle="".join(f'<p title="{escape(line)}">{_text(line)}</p>' for line in subtitle if line),
        tiles=f'<section class="card tiles" aria-label="Headline figures">{"".join(map(_tile, tiles))}</section>' if tiles else "",
        overview=_overview(overview),
        folds="\n".join(_fold(fold) for fold in folds if fold.cards),
        data=charts.data,
    )


def card(heading: str, content: str, *, remark: str = "") -> str:
    """A card with a text or a table; its content is HTML."""
    return f'<section class="card text">\n{_heading(heading, remark)}\n<div>{content}</div>\n</section>'


def facts_table(facts: Mapping[str, str]) -> str:
    """A table of names and values, as HTML."""
    rows = "\n".join(f'<tr><th scope="row">{_breakable(name)}</th><td>{_text(value)}</td></tr>' for name, value in facts.items())
    return f'<table class="facts">\n{rows}\n</table>'


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, colours: Sequence[str] = ()) -> str:
    """A table with a head, as HTML; it scrolls where the page is narrower.

    Args:
        columns: Headings.
        rows: Texts of the rows.
        colours: Names of the colours with which rows are marked, without `--`.
    """
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    marks = [f'<i class="swatch" style="background:var(--{colour})"></i>' for colour in colours]
    cells = [[_cell(text) for text in row] for row in rows]
    for mark, row in zip(marks, cells, strict=False):
        row[0] = row[0].replace(">", f">{mark}", 1)
    body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in cells)
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def samples(texts: Mapping[int, str]) -> str:
    """Texts by step as HTML, the newest open."""
    newest = max(texts)
    return "\n".join(
        f"<details{' open' if step == newest else ''}><summary>step {step:,}</summary><pre>{escape(text)}</pre></details>"
        for step, text in sorted(texts.items(), reverse=True)
    )


def _overview(overview: Overview) -> str:
    parts = (f'<div class="{name}">\n{"".join(cards)}\n</div>' for name, cards in overview._asdict().items() if cards)
    is_narrow = len(overview.small) <= _SMALL_IN_TWO_COLUMNS
    return f'<div class="overview{" narrow" if is_narrow else ""}">\n{"".join(parts)}\n</div>'


def _fold(fold: Fold) -> str:
    return f'<details class="fold"><summary>{escape(fold.heading)}</summary><div class="more">\n{"".join(fold.cards)}\n</div></details>'


def _heading(text: str, remark: str) -> str:
    """A heading as HTML; where there is no room for the remark, it is cut off, and shown in whole by a pointer that rests on it."""
    return f'<h2 title="{escape(remark)}">{escape(text)} <small>{escape(remark)}</small></h2>'


def _text(text: str) -> str:
    """A text as HTML that is not broken within its numbers."""
    return _NUMBER.sub(r'<span class="number">\g<0></span>', escape(text))


def _cell(text: str) -> str:
    """A cell of a table, as HTML."""
    is_word = len(text) <= _LONGEST_WORD and not re.search(r"\s", text)
    return f"<td>{escape(text)}</td>" if is_word else f'<td class="words">{_text(text)}</td>'


def _breakable(name: str) -> str:
    """A name as HTML, which may be broken after its dots and underscores."""
    return escape(name).replace("_", "_<wbr>").replace(".", ".<wbr>")


def _key(curve: Curve, value: str) -> str:
    if not curve.label:
        return f'<span class="read"><b>{escape(value)}</b></span>'
    return f'<span class="key" style="--key:var(--{curve.colour})">{escape(curve.label)} <b>{escape(value)}</b></span>'


def _tile(tile: Tile) -> str:
    return (
        f'<div class="tile{" warning" if tile.is_warning else ""}"><div class="name">{escape(tile.name)}</div>'
        f'<div class="value">{escape(tile.value)}</div><div class="note">{escape(tile.note)}</div></div>'
    )
