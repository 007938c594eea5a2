"""The configs that come with phase8, by name."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


def config_file(path: Path) -> Path:
    """The file that `--config` means: the path itself if it exists, else the config of that name that comes with phase8.

    `phase8_1b`, `phase8_1b.yaml` and `configs/phase8_1b.yaml` are names of one. Any other path is returned as it is.
    """
    if os.path.lexists(path) or path.parent not in (Path("."), Path("configs")) or path.suffix not in ("", ".yaml"):
        return path
    shipped = shipped_configs() / f"{path.stem}.yaml"
    return shipped if os.path.isfile(shipped) else path  # os.path: whatever is wrong with a name, reading it says so


def shipped_configs() -> Path:
    """The directory: `configs/` of a checkout; in an installed package, where setup.py puts it."""
    installed = _PACKAGE / "doors" / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def shipped_names() -> list[str]:
    """Names of the configs."""
    return sorted(path.stem for path in shipped_configs().glob("*.yaml"))
