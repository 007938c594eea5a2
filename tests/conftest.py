import gc
import os
import sys
from pathlib import Path

import pytest
import torch

from tests import garbage
from tests.train import tiny_run

# Tiny tensors: a second thread costs more than it brings, and tests share the cores. The same for the processes that tests start.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Without a GPU Triton interprets kernels. It reads the variable when a kernel is decorated, those of its own library included, and other libraries
# (transformers) import it while tests are collected; it reads it again when a kernel is launched. torch.compile uses no Triton on a CPU.
if not torch.cuda.is_available():
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError("triton was imported before tests/conftest.py could set TRITON_INTERPRET: import kernels inside functions.")
    os.environ["TRITON_INTERPRET"] = "1"

# Until tests are collected: all that is made meanwhile stays, and looks for garbage among it would take most of the time.
gc.disable()


@pytest.fixture(scope="session")
def _tiny_data(tmp_path_factory):
    return tiny_run.write_config(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def tiny(_tiny_data, tmp_path):
    """Config file of a tiny run whose output goes to a directory of this test; the data are shared."""
    path = tmp_path / "tiny.yaml"
    path.write_text(_tiny_data.read_text().replace(f"{_tiny_data.parent}/runs", f"{tmp_path}/runs"))
    return path


# Folders whose tests start processes that wait for each other: of each kind one test at a time. Those of the pool stay, and jobs take a second;
# those of launchers begin with their imports, and much of their time nothing moves, until a time-out.
OF_SEVERAL_PROCESSES = {"parallel": "processes of the pool", **dict.fromkeys(("chaos", "launch", "processes"), "processes of launchers")}
# Files of these folders whose tests start one process at most: they may run beside the others.
OF_ONE_PROCESS = ("test_bootstrap.py", "test_exit_codes.py", "test_pretrain_command_line.py", "test_slurm.py")


def processes_of(file):
    """The kind of processes that the tests of a file start; None: one at most."""
    return None if Path(file).name in OF_ONE_PROCESS else OF_SEVERAL_PROCESSES.get(Path(file).parent.name)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Under xdist a file goes to one worker, and so do all tests of several processes of a kind.

    With a GPU every other test goes by itself: those of one file compile for minutes.
    """
    from xdist.scheduler import LoadScopeScheduling

    config.option.loadscopereorder = False  # as they are collected: see below

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::")[0]
            return processes_of(file) or (nodeid if torch.cuda.is_available() else file)

    return ByFile(config, log)


def pytest_collection_finish():
    gc.freeze() if torch.cuda.is_available() else garbage.leave_frozen()
    gc.enable()


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: processes_of(item.path) is None)  # what takes longest first, so that no worker is left alone with it
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
