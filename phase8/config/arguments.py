"""Types of command-line arguments, and the option that many command lines share, for argparse."""

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
    if not text:
        raise argparse.ArgumentTypeError("it is empty, but auto, none or a checkpoint is needed")
    return text if text in ("auto", "none") else str(path_argument(text))


def require_world_size(number: int) -> None:
    """Refuses a `--world-size` of no process.

    Raises:
        ConfigError: The number is below 1.
    """
    if number < 1:
        raise ConfigError(f"--world-size is {number}, but at least 1 is needed.")


def prefix_argument(text: str) -> Path:
    """The beginning of the paths of files, which ends in a name."""
    if not text or text.endswith(("/", ".")):
        raise argparse.ArgumentTypeError(f"{text!r} ends in no name; add the one with which files begin, such as {text.rstrip('.') or 'data/'}mine")
    return path_argument(text)


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--device`, which `phase8.train.device.select_device` takes."""
    text = "auto: the GPU if there is one, else the CPU; NAME: an accelerator that torch finds, by the type of its devices (default: auto)"
    parser.add_argument("--device", default="auto", metavar="auto|cpu|NAME", help=text)
