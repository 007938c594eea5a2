"""Python's garbage in processes that train again and again."""

import gc
from types import SimpleNamespace

from phase8.train import garbage


def leave_frozen():
    """What exists stays frozen, and runs of this process collect nothing; all else about them is as in a process of their own.

    At its first steps a run looks through all that is not frozen, and at its end it thaws what was: in a process with thousands of tests that took
    more time than the run itself. tests/train/test_garbage.py has runs that collect.
    """
    gc.freeze()
    garbage.gc = SimpleNamespace(
        isenabled=gc.isenabled, disable=gc.disable, enable=gc.enable, collect=_nothing, freeze=_nothing, unfreeze=_nothing
    )  # fmt: skip


def _nothing(*_):
    pass
