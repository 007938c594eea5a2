from __future__ import annotations

import sys

import pytest


@pytest.fixture(scope="session", autouse=True)
def modules_of_transformers(tmp_path_factory):
    """Where transformers copies the code that it runs: not into the home directory."""
    import transformers.dynamic_module_utils as dynamic

    patch = pytest.MonkeyPatch()
    patch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
    patch.setattr(sys, "path", list(sys.path))
    yield
    patch.undo()
