"""Opens the sources that a config names: suffixes, patterns, and clear errors for missing files."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from phase8.config.schema import DataSource
from phase8.data.indexed import IndexedDataset
from phase8.data.streams import TokenStream
from phase8.errors import DataError
from phase8.paths import real_path

ENDINGS = (".bin", ".idx")


def open_sources(entries: Sequence[DataSource], *, key: str, ignore_sequence_modes: bool) -> list[TokenStream]:
    """Opens each entry of a blend.

    Args:
        entries: Their paths are prefixes of pairs, with or without ending, or patterns (`*`, `?`, `[`) of such prefixes.
        key: Config key that names them, for messages.
        ignore_sequence_modes: Open multimodal pairs as plain text.

    Raises:
        DataError: A file is missing or cannot be used, or a pair is named twice.
        IndexedFormatError: A damaged or foreign pair.
    """
    streams = []
    for entry in entries:
        pairs = [_open_pair(prefix, entry, key=key, ignore_sequence_modes=ignore_sequence_modes) for prefix in _prefixes(entry.path, key)]
        streams.append(TokenStream(_without_ending(entry.path), pairs))
    _check_named_once([pair for stream in streams for pair in stream.pairs], key)
    return streams


def missing_pairs(entries: Sequence[DataSource], *, key: str) -> list[str]:
    """A sentence for each pair of a blend that lacks a file, and each pattern that matches none; the arguments are those of `open_sources`."""
    sentences = []
    for entry in entries:
        try:
            for prefix in _prefixes(entry.path, key):
                _check_files(prefix, key)
        except DataError as error:
            sentences.append(str(error))
    return sentences


def source_names(prefixes: Sequence[str]) -> list[str]:
    """Names of the sources: the last part of each path if these differ, otherwise the paths."""
    names = [Path(prefix).name for prefix in prefixes]
    return names if len(set(names)) == len(names) else list(prefixes)


def pairs_by_pattern_in_both(a: Sequence[TokenStream], b: Sequence[TokenStream]) -> list[str]:
    """Prefixes of pairs that occur in the streams of both sides, on at least one of them through a pattern."""
    sides = [
        {real_path(pair.bin_path): (pair.prefix, stream.prefix != pair.prefix) for stream in streams for pair in stream.pairs}
        for streams in (a, b)
    ]
    return sorted(sides[0][path][0] for path in sides[0].keys() & sides[1].keys() if any(side[path][1] for side in sides))


def _open_pair(prefix: str, entry: DataSource, *, key: str, ignore_sequence_modes: bool) -> IndexedDataset:
    _check_files(prefix, key)
    pair = IndexedDataset(prefix, dialect=entry.dialect)
    if pair.sequence_modes is not None and not ignore_sequence_modes:
        raise DataError(
            f"{key}: {prefix}.idx gives each sequence a mode (multimodal data), which phase8 cannot train on; set data.ignore_sequence_modes "
            "to true to train on all of them as plain text"
        )
    return pair


def _check_named_once(pairs: Sequence[IndexedDataset], key: str) -> None:
    """Refuses files that occur twice, under one name or, through symbolic links, under two."""
    names: dict[Path, str] = {}
    for pair in pairs:
        name = os.path.normpath(pair.prefix)
        first = names.setdefault(real_path(pair.bin_path), name)
        if first is not name:
            twice = f"{name} more than once" if first == name else f"{first} and {name}, which are the same files"
            raise DataError(f"{key} names {twice}; keep one entry and add the weights up")


def _prefixes(path: str, key: str) -> list[str]:
    """The prefixes that a path stands for: its own, or all that a pattern matches, in order."""
    prefix = _without_ending(path)
    if not glob.has_magic(prefix) or "\0" in prefix or _is_named(prefix):
        return [prefix]
    matches = {match[: -len(ending)] for ending in ENDINGS for match in glob.glob(f"{prefix}{ending}", recursive=True)}
    if not matches:
        raise DataError(f"{key}: no .bin/.idx pair matches {prefix}; correct the pattern, or make pairs with tools/prepare_data.py")
    return sorted(matches)


def _without_ending(path: str) -> str:
    """The prefix of a pair, which may be given with a suffix."""
    return path[:-4] if path.endswith(ENDINGS) and not _is_named(path) else path


def _is_named(prefix: str) -> bool:
    """Whether at least one file of a pair has exactly this name."""
    return any(os.path.lexists(f"{prefix}{ending}") for ending in ENDINGS)


def _check_files(prefix: str, key: str) -> None:
    """Refuses a pair that lacks a file, with an error that fits the case."""
    missing = [ending for ending in ENDINGS if not _exists(f"{prefix}{ending}")]
    for path in (f"{prefix}{ending}" for ending in missing):
        if os.path.islink(path):
            raise DataError(f"{key}: {path} is a symbolic link to {os.readlink(path)}, which does not exist; put the file there or correct the link")
    if not missing:
        return
    if missing == [".idx"]:
        raise DataError(
            f"{key}: {prefix}.bin exists, but {prefix}.idx, which says where its documents begin, does not; copy that file too, or, if the .bin "
            f"is raw token ids as nanoGPT and llm.c write them, make a pair of it: tools/prepare_data.py --import-raw {prefix}.bin --dtype uint16 "
            "--eod-id N"
        )
    if missing == [".bin"]:
        raise DataError(f"{key}: {prefix}.idx exists, but {prefix}.bin, which holds the tokens, does not; copy that file too, or make the pair again")
    if os.path.isdir(prefix):
        raise DataError(f"{key}: {prefix} is a directory; name a pair in it without its ending, or all of them with {prefix.rstrip('/')}/*")
    found = f"; {prefix} exists, but is none" if os.path.exists(prefix) else ""
    raise DataError(
        f"{key}: {prefix}.bin and {prefix}.idx must both exist and neither does{found}; give the path of such a pair without its ending, or "
        f"make the pair with tools/prepare_data.py{' (--import-raw for raw token ids)' if found else ''}"
    )


def _exists(path: str) -> bool:
    """False if nothing has this name; errors of access are left to the reader, which names the reason."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError):
        return True
    return True
