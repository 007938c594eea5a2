"""launch/pretrain.py that takes a host for lost after 15 s of silence, so that tests need not wait for two minutes."""

import functools
import runpy

from phase8.processes import watch
from tests.processes.launched import ROOT

if __name__ == "__main__":
    watch.Limits = functools.partial(watch.Limits, heartbeat_seconds=15.0)
    runpy.run_path(str(ROOT / "launch" / "pretrain.py"), run_name="__main__")
