"""Collects a text to train on from files that this machine has: no download, and the same machine image gives the same text.

    python tools/collect_text.py python --output data                                # data/python.jsonl, and the command that prepares it
    python tools/collect_text.py c --output data --limit-bytes 600000000 --prepare   # and data/c_train_text_document.bin, ...
    python tools/collect_text.py prose --output data --roots ~/notes /usr/share/doc

| kind | documents | usual places |
|---|---|---|
| `python` | .py files | the standard library and installed packages |
| `c` | C, C++ and CUDA headers and sources | /usr/include, CUDA, headers of installed packages |
| `prose` | .rst, .md, .txt, descriptions of packages, man pages without roff, docstrings of .py files | /usr/share, installed packages |

Each document is written once, without trailing spaces, in the order of a hash of its text: the order mixes all places, and a text of
--limit-bytes is a sample of the whole. Files that are unreadable, binary, not UTF-8, very large, very short, of very long lines or mostly
numbers are left out and counted. A file of another text that is there already, and what was prepared from it, is replaced with --overwrite only.
--prepare runs tools/prepare_data.py on the result: a tokenizer, and 2 % of the documents held out by a hash.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

from rich.progress import TextColumn, TimeElapsedColumn

import phase8.early_interrupt  # noqa: F401  # first: later imports take time
from phase8.config.arguments import path_argument
from phase8.data.collect.collect import Collection, collect
from phase8.data.collect.roots import KINDS, default_roots
from phase8.data.shard_pool import worker_problems
from phase8.errors import ConfigError
from phase8.observe.stage_progress import ProgressDisplay
from phase8.terminal import run_door
from phase8.train.outputs import require_own_output

ROOT = Path(__file__).resolve().parent.parent


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code, see phase8/errors.py."""
    return run_door(lambda: _run(arguments))


def _run(arguments: list[str] | None) -> int:
    parsed = _parser().parse_args(arguments)
    _check(parsed)
    require_own_output(parsed.output)
    roots = parsed.roots or default_roots(parsed.kind)
    with ProgressDisplay(TextColumn("{task.percentage:3.0f} %"), TextColumn("{task.fields[amount]}"), TimeElapsedColumn()) as display:
        collection = collect(
            parsed.kind,
            roots,
            parsed.output,
            limit_bytes=parsed.limit_bytes,
            num_workers=parsed.workers,
            overwrite=parsed.overwrite,
            on_progress=lambda *amounts: display.show(*amounts, in_bytes=True),
        )
    _print(collection)
    command = _command(parsed, collection)
    if not parsed.prepare:
        print(f"prepare it with: {shlex.join(command)}")
        return 0
    sys.stdout.flush()
    return subprocess.run(command, check=False).returncode


def _check(parsed: argparse.Namespace) -> None:
    problems = list(worker_problems(parsed.workers))
    if parsed.limit_bytes is not None and parsed.limit_bytes < 1:
        problems.append(f"--limit-bytes is {parsed.limit_bytes}; it must be at least 1")
    problems += [f"--roots names {root}, which is not a directory; name existing directories" for root in parsed.roots if not root.is_dir()]
    if problems:
        raise ConfigError(problems)


def _print(collection: Collection) -> None:
    print(f"{collection.path}: {collection.num_documents:,} documents, {collection.text_bytes:,} bytes of text from {collection.num_files:,} files")
    print(f"duplicates left out: {collection.num_duplicates:,}")
    if collection.num_beyond_limit:
        print(f"documents beyond --limit-bytes: {collection.num_beyond_limit:,}")
    if collection.skipped:
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in collection.skipped.items())
        print(f"files left out: {sum(collection.skipped.values()):,} ({reasons})")


def _command(parsed: argparse.Namespace, collection: Collection) -> list[str]:
    """The command line that turns the text into tokens."""
    options = ["--output-prefix", parsed.output / parsed.kind, "--train-tokenizer", "--vocab-size", parsed.vocab_size]
    options += ["--validation-fraction", parsed.validation_fraction, "--workers", parsed.workers, *["--overwrite"] * parsed.overwrite]
    return [sys.executable, str(ROOT / "tools" / "prepare_data.py"), collection.path, *map(str, options)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS, help="what to collect")
    parser.add_argument("--output", required=True, type=path_argument, metavar="DIR", help="where the text is written")
    parser.add_argument("--limit-bytes", type=int, metavar="N", help="bytes of text at most (default: everything)")
    parser.add_argument("--roots", nargs="+", default=[], type=path_argument, metavar="DIR", help="where to look (default: the usual places)")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes that read and tokenise (default: one per CPU, %(default)s)"
    )
    parser.add_argument("--prepare", action="store_true", help="run tools/prepare_data.py on the text, instead of printing the command")
    parser.add_argument("--overwrite", action="store_true", help="replace another text that is there, and what was prepared from it")
    parser.add_argument("--vocab-size", type=int, default=8192, metavar="N", help="vocabulary of the tokenizer (default: %(default)s)")
    parser.add_argument("--validation-fraction", type=float, default=0.02, metavar="X", help="share held out (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
