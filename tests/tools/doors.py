"""Tools as modules: what their command line does, in this process."""

import importlib.util
from pathlib import Path

TOOLS = Path(__file__).parents[2] / "tools"


def load_door(name):
    """The module of `tools/<name>.py`; its `main` is the command line."""
    specification = importlib.util.spec_from_file_location(f"door_{name}", TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
