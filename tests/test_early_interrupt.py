"""Ctrl-C while the imports of a door run: one sentence, the documented exit code."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOORS = sorted(path for path in [*ROOT.glob("tools/*.py"), ROOT / "launch" / "pretrain.py"] if path.name != "__init__.py")
# Runs a door whose first import of another module of phase8 is interrupted.
INTERRUPTED = """
import os, runpy, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("phase8.") and name not in ("phase8.early_interrupt", "phase8.terminal", "phase8.errors"):
            os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Finder())
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@pytest.mark.parametrize("door", DOORS, ids=[door.stem for door in DOORS])
def test_a_door_that_is_interrupted_while_it_imports_says_so(door):
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, str(door)], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_another_error_has_its_traceback():
    program = "import phase8.early_interrupt; raise ValueError('a bug')"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "Traceback" in done.stderr and done.stderr.endswith("ValueError: a bug\n")
