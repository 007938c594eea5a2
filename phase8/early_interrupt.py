"""Ctrl-C while a door is still being imported: one sentence and exit code 130, where Python would show a traceback.

A door imports this module before all others of phase8, since nothing can catch what their imports raise. Whoever catches `KeyboardInterrupt`, as
`phase8.terminal.run_door` does, never comes here.
"""

from __future__ import annotations

import os
import sys
from types import TracebackType

from phase8.terminal import EXIT_INTERRUPTED, warn


def _tell_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Python's hook for errors that nobody catches. It ends the process here, since Python would end it by the signal itself."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    warn("interrupted")
    os._exit(EXIT_INTERRUPTED)


sys.excepthook = _tell_uncaught
