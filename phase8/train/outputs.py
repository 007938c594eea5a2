"""Refuses an `--output` that would replace what it is made from or what training wrote, or lie in a checkpoint; an earlier result may be replaced."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from phase8.checkpoint.step_directories import MANIFEST_NAME, WEIGHTS_CONFIG_NAME
from phase8.data.input_files import is_read
from phase8.durable import is_regular_or_free
from phase8.errors import ConfigError
from phase8.paths import real_path
from phase8.train.run_directory import RunDirectory

_WEIGHTS = "*.safetensors"
# Other files of a model's directory.
_OF_A_MODEL = (
    WEIGHTS_CONFIG_NAME, "model.safetensors.index.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
)  # fmt: skip
_OF_A_PAIR = ("", ".bin", ".idx", ".meta.json")
_OF_A_RUN = ("metrics.jsonl", "config.yaml", "launchers.json", "checkpoints", "superseded")
# Directories of a run in which a new file is in nobody's way.
_SHARED = ("tensorboard", "profile", "hang", "wandb")


def require_own_output(output: Path | None, *, inputs: Iterable[Path] = (), pairs: Iterable[Path] = ()) -> None:
    """Refuses an output that is an input or a file that training wrote.

    Args:
        output: The value of `--output`, a file or a directory; None: there is none.
        inputs: Files that are read; of a directory, its files with texts.
        pairs: Prefixes of `.bin/.idx` pairs that are read, or patterns of them.

    Raises:
        ConfigError: It is such a file, or no file at all.
    """
    if output is None:
        return
    if not is_regular_or_free(output):
        raise ConfigError(
            f"--output is {output}, a device, a pipe or a socket, whose place a file would take; give a file, and have standard output redirected"
        )
    place = real_path(output)
    for path in (*inputs, *_files_of(pairs)):
        if place == real_path(path) or (os.path.isfile(place) and _is_in(place, path)):
            raise ConfigError(f"--output is {output}, which is read as an input and would be replaced; give another file.")
    if (owner := _owner(place)) is not None:
        raise ConfigError(f"--output is {output}, which belongs to {owner}; give another file.")


def _files_of(pairs: Iterable[Path]) -> Iterator[Path]:
    for prefix in pairs:
        for name in (str(prefix), str(prefix).removesuffix(".bin").removesuffix(".idx")):
            for ending in _OF_A_PAIR:
                yield Path(f"{name}{ending}")
                yield from map(Path, glob.glob(f"{name}{ending}", recursive=True))


def _is_in(place: Path, path: Path) -> bool:
    """Whether an existing file is an input under another name, or one of the files of an input directory that are read."""
    if os.path.isdir(path):
        return is_read(place) and place.is_relative_to(real_path(path))
    return os.path.exists(path) and os.path.samefile(path, place)


def _owner(place: Path) -> str | None:
    """What the file or directory is a part of, in words; None: it may be written."""
    for directory in (place, place.parent):
        if os.path.lexists(directory / MANIFEST_NAME) and _holds_weights(directory):
            return f"the checkpoint {directory}"
    if _is_of_a_model(place):
        return f"the model {place.parent}"
    for directory in place.parents:
        if _is_run(RunDirectory(directory)):
            part = place.relative_to(directory).parts[0]
            if part in _OF_A_RUN or part.startswith("tokenizer.") or (part in _SHARED and os.path.isfile(place)):
                return f"what training wrote of the run {directory}"
    return None


def _is_of_a_model(place: Path) -> bool:
    """Whether a file exists and is part of weights without a manifest."""
    is_named = place.name in _OF_A_MODEL or place.match(_WEIGHTS)
    return is_named and os.path.isfile(place) and os.path.lexists(place.parent / WEIGHTS_CONFIG_NAME) and _holds_weights(place.parent)


def _holds_weights(directory: Path) -> bool:
    return bool(glob.glob(os.path.join(glob.escape(str(directory)), _WEIGHTS)))  # nothing where it may not be read


def _is_run(directory: RunDirectory) -> bool:
    return os.path.isfile(directory.metrics) or (os.path.isdir(directory.checkpoints) and os.path.isfile(directory.path / "config.yaml"))
