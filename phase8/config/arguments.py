"""Types of command-line arguments, for argparse."""

from __future__ import annotations

import argparse
from pathlib import Path

from phase8.errors import ConfigError
from phase8.paths import expand_path


def path_argument(text: str) -> Path:
    """Expands a path as a shell would: `--option=~/x` and quoted words reach a program unexpanded."""
    try:
        return Path(expand_path(text))
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def resume_argument(text: str) -> str:
    """`auto`, `none`, or the path of a checkpoint."""
    return text if text in ("auto", "none") else str(path_argument(text))
