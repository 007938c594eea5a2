"""Kills tools/reshard_checkpoint.py at random moments, and lets the same command go on."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

from phase8.checkpoint.load import open_checkpoint
from tests.chaos.chaos_launcher import Launcher

TOOL = "tools/reshard_checkpoint.py"
KIND = "reshard tool killed"
LAYOUTS = {
    "tensor-2-shards-2": ("--tensor-parallel-size", "2", "--shards", "2"),
    "stages-2-tensor-2": ("--pipeline-parallel-size", "2", "--tensor-parallel-size", "2"),
    "consolidated": ("--format", "consolidated"),
}


class ReshardChaos:
    """Rewrites of one checkpoint.

    Args:
        directory: Where they go.
        launcher: Starts the tool.
        source: The checkpoint.
        generator: Of all that is random.
    """

    def __init__(self, directory: Path, launcher: Launcher, source: Path, generator: random.Random):
        self._directory, self._launcher, self._source, self._generator = directory, launcher, source, generator
        self._undisturbed: dict[str, float] = {}  # layout -> seconds
        self._original, self._count = _content(source), 0

    def disturbed_rewrite(self, layout: str, *, max_faults: int) -> Iterator[dict]:
        """Rewrites in spite of faults, and compares with the undisturbed rewrite.

        Args:
            layout: A key of LAYOUTS.
            max_faults: Faults before the tool is left alone.

        Yields:
            A record of each fault, and of the rewrite at the end.
        """
        expected = self._expected(layout)
        self._count += 1
        destination = self._directory / f"rewritten-{self._count}"
        faults, group = 0, self._start(layout, destination)
        while faults < max_faults:
            time.sleep(self._generator.uniform(0, self._undisturbed[layout]))
            if not group.is_running:
                break
            group.kill([0])
            (code,) = group.end()
            if code == 0:  # it was faster
                break
            faults += 1
            work = destination.with_name(f".rewriting-{destination.name}")
            record = {"code": code, "files_kept": len(list(work.glob("written/*"))), "was_there": destination.exists()}
            self._assert_nothing_is_damaged(destination, expected)
            yield {"record": "fault", "kind": KIND, "topology": layout, "run": destination.name, "moment": "rewriting", **record}
            if not destination.exists():
                group = self._start(layout, destination)
        if not destination.exists():
            assert group.end() == [0], group.output
        self._assert_nothing_is_damaged(destination, expected)
        assert destination.exists()
        yield {"record": "run", "kind": KIND, "topology": layout, "run": destination.name, "faults": faults, "bit_equal": True}

    def _start(self, layout: str, destination: Path):
        return self._launcher.start(TOOL, [self._source, destination, *LAYOUTS[layout]])

    def _expected(self, layout: str) -> Path:
        destination = self._directory / f"undisturbed-{list(LAYOUTS).index(layout)}"
        if layout not in self._undisturbed:
            begin = time.monotonic()
            group = self._start(layout, destination)
            assert group.end() == [0], group.output
            self._undisturbed[layout] = time.monotonic() - begin
        return destination

    def _assert_nothing_is_damaged(self, destination: Path, expected: Path) -> None:
        assert _content(self._source) == self._original
        open_checkpoint(self._source).verify()
        if destination.exists():
            assert _content(destination) == _content(expected)


def _content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}
