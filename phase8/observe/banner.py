"""The start-up banner: what is about to run, on what, and why."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text


def print_banner(title: str, facts: Sequence[tuple[str, str]], console: Console) -> None:
    """Print a title and a list of facts: a panel on a terminal, aligned plain lines in a log.

    Args:
        title: One line.
        facts: Pairs of name and value. A value may have several lines.
        console: Where to print.
    """
    if console.is_terminal:
        console.print(_panel(title, facts))
        return
    console.out(title, highlight=False)
    width = max((len(name) for name, _ in facts), default=0)
    for name, value in facts:
        for number, line in enumerate(value.splitlines() or [""]):
            console.out(f"  {name if number == 0 else '':<{width}}  {line}".rstrip(), highlight=False)


def print_line(text: str, console: Console) -> None:
    """Print text as it is: brackets are no markup, and a long line, a command to copy for example, is not broken."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _panel(title: str, facts: Sequence[tuple[str, str]]) -> Panel:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="cyan", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in facts:
        # Text, not str: brackets in a path or a reason are not markup.
        grid.add_row(Text(name), Text(value))
    return Panel(grid, title=Text(title, style="bold"), title_align="left", border_style="bright_black", padding=(0, 1), expand=False)
