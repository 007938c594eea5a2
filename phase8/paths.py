"""Expands paths as users write them: `~` and environment variables, as in a shell."""

from __future__ import annotations

import os
import re
from pathlib import Path

from phase8.errors import ConfigError

_VARIABLE = re.compile(r"\$(?:\{([^}]*)\}|([A-Za-z_][A-Za-z0-9_]*))?")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def expand_path(text: str) -> str:
    """Expands a leading `~` or `~user`, `$VAR` and `${VAR}`. A shell does this for bare words only, and never inside a YAML file.

    Raises:
        ConfigError: A variable is empty or not set, a `$` begins no variable, or a user does not exist.
    """
    expanded = _VARIABLE.sub(lambda match: _value(match, text), text)
    if not expanded.startswith("~"):
        return expanded
    home = os.path.expanduser(expanded)
    if home.startswith("~"):
        raise ConfigError(f"the path {text!r} begins with {expanded.split('/')[0]}, but there is no such user; write ./~... for a name with a ~.")
    return home


def real_path(path: Path) -> Path:
    """A path with every symbolic link resolved: the identity of a file or directory, whether or not it exists yet."""
    return Path(os.path.realpath(path))  # a loop of links raises in Path.resolve; here opening the path reports it


def _value(match: re.Match[str], text: str) -> str:
    if match[0] == "$":
        raise ConfigError(f"the path {text!r} holds a $ that begins neither $NAME nor ${{NAME}}; write the path out: a $ cannot be part of a name.")
    name = match[2] if match[1] is None else match[1]
    if not _IDENTIFIER.fullmatch(name):
        raise ConfigError(f"the path {text!r} holds {match[0]}, which names no variable; write ${{NAME}}.")
    if not os.environ.get(name):
        state = "empty" if name in os.environ else "not set"
        raise ConfigError(f"the path {text!r} uses the variable {name}, which is {state}; set it, or write the path out.")
    return os.environ[name]


def why_unreadable(path: Path, error: OSError) -> str:
    """What a sentence says after "cannot read PATH: "; a symbolic link that leads nowhere is called one, where the system says "no such file"."""
    if isinstance(error, FileNotFoundError):
        for place in (path, *path.parents):
            if place.is_symlink() and not place.exists():
                return f"{'it' if place == path else place} is a symbolic link to {os.readlink(place)}, which does not exist"
    return error.strerror or str(error)
