from __future__ import annotations

import io

from rich.console import Console

from phase8.observe.banner import print_banner

FACTS = [("device", "CPU, bf16"), ("attention", "reference [no GPU]\nwindow 256"), ("planned memory", "1.2 GiB")]


def printed(*, terminal: bool, width: int = 80) -> str:
    buffer = io.StringIO()
    print_banner("phase8 [quickstart]", FACTS, Console(file=buffer, force_terminal=terminal, color_system=None, width=width))
    return buffer.getvalue()


def test_in_a_log_the_facts_are_aligned_plain_lines():
    assert printed(terminal=False) == (
        "phase8 [quickstart]\n"
        "  device          CPU, bf16\n"
        "  attention       reference [no GPU]\n"
        "                  window 256\n"
        "  planned memory  1.2 GiB\n"
    )


def test_a_log_line_is_never_wrapped():
    assert printed(terminal=False, width=10) == printed(terminal=False)


def test_on_a_terminal_the_facts_stand_in_a_panel_with_brackets_intact():
    lines = printed(terminal=True).splitlines()
    assert "phase8 [quickstart]" in lines[0] and lines[0].startswith("╭")
    assert "│ attention       reference [no GPU] │" in lines
    assert len({len(line) for line in lines}) == 1


def test_on_a_narrow_terminal_the_panel_still_fits():
    lines = printed(terminal=True, width=32).splitlines()
    assert max(len(line) for line in lines) <= 32
