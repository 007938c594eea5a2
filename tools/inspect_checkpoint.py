"""Lists, verifies and compares checkpoints.

    python tools/inspect_checkpoint.py runs/quickstart                          what is in the newest checkpoint of a run
    python tools/inspect_checkpoint.py DIR --verify                             compare every byte with its checksum
    python tools/inspect_checkpoint.py DIR --diff OTHER                         max abs difference of every tensor that differs

Exit codes: 0 done (with --diff: no tensor differs), 1 with --diff: some differ, as diff(1) does; 2 command line; 4 damaged or
missing checkpoint; 141 whoever read the output has gone.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

import phase8.early_interrupt  # noqa: F401  # first: later imports take time
from phase8.checkpoint.load import Checkpoint, find_checkpoint, is_saved_run, open_checkpoint
from phase8.checkpoint.model_source import open_model
from phase8.checkpoint.quantization import quantization_of
from phase8.checkpoint.reshard.compare import TensorDifference, compare_checkpoints
from phase8.checkpoint.run_metadata import run_metadata
from phase8.checkpoint.step_directories import holds_weights_only
from phase8.checkpoint.untrusted import shortened
from phase8.checkpoint.weight_files import WeightFiles
from phase8.config.arguments import path_argument
from phase8.errors import CheckpointError
from phase8.terminal import make_console, output_is_the_product, run_door

EXIT_DIFFERENT = 1
_MAX_SUMMARY_CHARACTERS = 2000  # longer metadata, such as the random state, are only in --json
_MAX_SUMMARY_ROWS = 100
_PLAIN_WIDTH = 160  # columns of tables written to a file or a pipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    return run_door(lambda: _inspect(arguments))


def _inspect(arguments: Sequence[str] | None) -> int:
    options = _parser().parse_args(arguments)
    with output_is_the_product():
        checkpoint = _open(options.checkpoint)
        if options.verify:
            checkpoint.verify()
        if options.diff is None:
            _show_checkpoint(checkpoint, as_json=options.json, verified=options.verify)
            return 0
        other = _open(options.diff)
        if options.verify:
            other.verify()
        return _show_differences(checkpoint, other, as_json=options.json)


def _open(path: Path) -> Checkpoint:
    """The checkpoint that a path stands for, or quantised weights; other weights alone are refused with what can be inspected instead."""
    if not holds_weights_only(path) or is_saved_run(path):
        return open_checkpoint(find_checkpoint(path))
    weights = open_model(path)
    if quantization_of(weights) is not None:
        return weights
    raise CheckpointError(
        f"{path} holds weights alone (consolidated, or a model of Hugging Face's form), but only checkpoints of training and quantised weights are "
        f"inspected; give the checkpoint that they are from or one that tools/reshard_checkpoint.py {path} DST makes of them"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = "a checkpoint, a checkpoints directory or a run directory (its newest), or quantised weights"
    parser.add_argument("checkpoint", type=path_argument, metavar="DIR", help=what)
    parser.add_argument("--verify", action="store_true", help="compare every byte with its checksum")
    parser.add_argument("--diff", type=path_argument, metavar="OTHER", help="compare the tensors with those of another checkpoint")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    return parser


def _show_checkpoint(checkpoint: Checkpoint, *, as_json: bool, verified: bool) -> None:
    entries = checkpoint.manifest.tensors
    total_bytes = sum(entry.size_bytes for entry in entries.values())
    if as_json:
        tensors = [
            {"name": name, "dtype": entry.dtype, "shape": entry.shape, "bytes": entry.size_bytes, "num_slices": len(entry.slices)}
            for name, entry in entries.items()
        ]
        summary = {"path": str(checkpoint.path), "step": checkpoint.step, "verified": verified, "total_bytes": total_bytes}
        summary |= {"problem": _problem(checkpoint), "metadata": checkpoint.metadata}
        print(json.dumps(summary | {"attachments": _attachments(checkpoint), "tensors": tensors}, indent=1))
        return
    console = _console()
    console.print(_summary_table(checkpoint, total_bytes=total_bytes, verified=verified))
    table = Table("tensor", "dtype", "shape", "bytes", title=f"{len(entries)} tensors", title_justify="left")
    for column in table.columns[2:]:
        column.justify = "right"
    for name, entry in entries.items():
        table.add_row(Text(name), entry.dtype, " x ".join(map(str, entry.shape)) or "scalar", f"{entry.size_bytes:,}")
    console.print(table)


def _summary_table(checkpoint: Checkpoint, *, total_bytes: int, verified: bool) -> Table:
    """Step, size and the metadata that are short enough to read: position, versions, the sections of the config."""
    table = Table(show_header=False, title=Text(str(checkpoint.path)), title_justify="left")
    if isinstance(checkpoint, WeightFiles):
        table.add_row("checksums", "none, as weights alone have no manifest; " + ("every byte was read" if verified else "--verify reads every byte"))
    else:
        table.add_row("step", f"{checkpoint.step:,}")
        table.add_row("checksums", "all verified" if verified else "manifest verified; --verify checks every byte")
    table.add_row("size", f"{total_bytes:,} bytes in {len(checkpoint.manifest.files)} tensor files")
    table.add_row("attachments", shortened(", ".join(_attachments(checkpoint))) or "none")
    if (problem := _problem(checkpoint)) is not None:
        table.add_row("problem", Text(_printable(problem)))
    metadata = checkpoint.metadata
    config = metadata["config"] if isinstance(metadata.get("config"), dict) else {}
    rows = [(f"config.{section}", content) for section, content in config.items()] + [item for item in metadata.items() if item[1] is not config]
    for key, value in rows[:_MAX_SUMMARY_ROWS]:
        if len(text := _one_line(value)) <= _MAX_SUMMARY_CHARACTERS:
            table.add_row(Text(_printable(shortened(key))), Text(text))
    if len(rows) > _MAX_SUMMARY_ROWS:
        table.add_row("...", f"{len(rows) - _MAX_SUMMARY_ROWS} more, which --json shows")
    return table


def _problem(checkpoint: Checkpoint) -> str | None:
    """Why no run can resume from the metadata, if they are those of a training run at all; None: one can."""
    if checkpoint.metadata.get("config") is None:
        return None
    try:
        run_metadata(checkpoint)
    except CheckpointError as error:
        return str(error)
    return None


def _one_line(content: Any) -> str:
    if not isinstance(content, dict):
        return _printable(content if isinstance(content, str) else json.dumps(content))
    fields = {key: f"({_one_line(value)})" if isinstance(value, dict) else _one_line(value) for key, value in content.items()}
    return "  ".join(f"{_printable(key)}={text}" for key, text in fields.items())


def _printable(text: str) -> str:
    """Text from a file, without characters that control a terminal."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def _attachments(checkpoint: Checkpoint) -> dict[str, int]:
    return {name: entry.size_bytes for name, entry in checkpoint.manifest.attachments.items()}


def _show_differences(first: Checkpoint, second: Checkpoint, *, as_json: bool) -> int:
    differences = list(compare_checkpoints(first, second))
    if as_json:
        rows = [
            {"name": row.name, "kind": row.kind, "detail": row.detail, "max_abs_difference": _json_number(row.max_abs_difference)}
            for row in differences
        ]
        print(json.dumps({"first": str(first.path), "second": str(second.path), "differences": rows}, indent=1))
    elif not differences:
        print(f"{first.path} and {second.path}: all {len(first.tensor_names)} tensors are equal, bit for bit")
    else:
        print(f"{first.path} (first) and {second.path} (second): {len(differences)} tensors differ")
        _console().print(_difference_table(differences))
    return EXIT_DIFFERENT if differences else 0


def _difference_table(differences: list[TensorDifference]) -> Table:
    table = Table("tensor", "difference", "max abs difference")
    for row in differences:
        largest = "" if row.max_abs_difference is None else f"{row.max_abs_difference:.6g}"
        table.add_row(Text(row.name), Text(f"{row.kind.replace('_', ' ')} {row.detail}"), largest)
    return table


def _json_number(value: float | None) -> float | str | None:
    """A number for JSON, which has no NaN or infinity: these become strings."""
    return value if value is None or math.isfinite(value) else str(value)


def _console() -> Console:
    console = make_console(highlight=False)
    return console if console.is_terminal else make_console(highlight=False, width=_PLAIN_WIDTH)


if __name__ == "__main__":
    sys.exit(main())
