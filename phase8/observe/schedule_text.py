"""The timeline of a pipeline schedule as text: a line for each stage, cut into pieces where it is wider than the page.

    stage 0 |-0-1    ===0-2===1  ===2|
    stage 1 |  -0===0-1===1-2===2    |

Forwards are drawn with `-`, backwards with `=` (`+`: the gradient of the weights taken apart), each with its microbatch; blank is idle, and
the width is the duration. With several chunks a letter names the chunk: `==12b` is the backward of microbatch 12 in the second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from string import ascii_lowercase
from typing import NamedTuple

_FILL = {"forward": "-", "backward": "=", "backward_input": "=", "backward_weight": "+"}
_MAX_PIECES = 12


class Box(NamedTuple):
    """An action on the clock.

    Args:
        stage: Stage that computes.
        start: Begin of the action.
        end: End of the action.
        kind: `forward`, `backward`, or its halves `backward_input` and `backward_weight`.
        microbatch: Microbatch of the action.
        chunk: Chunk of the stage.
    """

    stage: int
    start: float
    end: float
    kind: str
    microbatch: int
    chunk: int


def timeline_text(boxes: Sequence[Box], *, width: int = 160) -> str:
    """The timeline, ready to print.

    Args:
        boxes: Boxes of all stages.
        width: Columns of the page. A step that would not fit into twelve lines of this width is drawn smaller, with numbers only where they fit.
    """
    num_stages, makespan = max(box.stage for box in boxes) + 1, max(box.end for box in boxes)
    names = [f"stage {stage:<{len(str(num_stages - 1))}} |" for stage in range(num_stages)]
    page = max(width - len(names[0]) - 1, 10)
    has_chunks = any(box.chunk for box in boxes)
    longest = max(len(_label(box, has_chunks)) for box in boxes)
    scale = min((longest + 1) / min(box.end - box.start for box in boxes), _MAX_PIECES * page / makespan)
    lines = [[" "] * math.ceil(scale * makespan - 1e-6) for _ in range(num_stages)]
    for box in boxes:
        first, end = _column(scale * box.start), _column(scale * box.end)
        label, fill = _label(box, has_chunks), _FILL[box.kind]
        lines[box.stage][first:end] = label.rjust(end - first, fill) if len(label) < end - first else fill * (end - first)
    pieces = [
        "\n".join(f"{name}{''.join(line[first : first + page])}|" for name, line in zip(names, lines, strict=True))
        for first in range(0, len(lines[0]), page)
    ]
    return "\n\n".join(pieces)


def _label(box: Box, has_chunks: bool) -> str:
    if not has_chunks:
        return str(box.microbatch)
    return f"{box.microbatch}{ascii_lowercase[box.chunk] if box.chunk < len(ascii_lowercase) else f'.{box.chunk}'}"


def _column(position: float) -> int:
    # Nearly whole numbers are rounded, so that boxes of equal duration have equal width.
    return math.floor(position + 1e-6)
