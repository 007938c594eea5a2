"""The places of a machine where texts of each kind are found."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from phase8.data.collect.documents import is_wanted

KINDS = ("python", "c", "prose")
_SKIPPED_DIRECTORIES = {"__pycache__", "node_modules"}


class FoundFile(NamedTuple):
    """A file and its size as stored."""

    path: str
    num_bytes: int


def default_roots(kind: str) -> list[Path]:
    """The directories that exist here among those where texts of a kind are usually found."""
    installed = sysconfig.get_paths()
    packages = [installed[name] for name in ("stdlib", "purelib", "platlib")]
    packages += ["/usr/lib/python3", *map(str, sorted(Path("/usr/local/lib").glob("python3*")))]
    include = ["/usr/include", "/usr/local/include", "/usr/local/cuda/include", installed["include"]]
    include += map(str, sorted(Path("/usr/lib/gcc").glob("*/*")))
    shared = [f"{prefix}/share/{name}" for prefix in ("/usr", "/usr/local", sys.prefix, sys.base_prefix) for name in ("doc", "man")]
    by_kind = {"python": packages, "c": [*include, *packages], "prose": [*shared, *packages]}
    return [Path(place) for place in dict.fromkeys(by_kind[kind]) if os.path.isdir(place)]


def find_files(kind: str, roots: Iterable[Path]) -> list[FoundFile]:
    """The files of a kind below several directories, in the order of their paths; a file that has several names is found once.

    Links to directories are not followed, and hidden directories are left out.
    """
    found: dict[tuple[int, int], FoundFile] = {}
    for root in roots:
        for directory, subdirectories, names in os.walk(root):
            subdirectories[:] = [name for name in subdirectories if name not in _SKIPPED_DIRECTORIES and not name.startswith(".")]
            for path in (os.path.join(directory, name) for name in names):
                if not is_wanted(kind, path):
                    continue
                try:
                    status = os.stat(path)
                except OSError:  # a link that leads nowhere
                    continue
                file, identity = FoundFile(path, status.st_size), (status.st_dev, status.st_ino)
                found[identity] = min(file, found.get(identity, file))
    return sorted(found.values())
