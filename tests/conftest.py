from pathlib import Path

import pytest
import torch

from tests.train import tiny_run

# Tiny tensors: a second thread costs more than it brings, and tests share the cores.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def _tiny_data(tmp_path_factory):
    return tiny_run.write_config(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def tiny(_tiny_data, tmp_path):
    """Config file of a tiny run whose output goes to a directory of this test; the data are shared."""
    path = tmp_path / "tiny.yaml"
    path.write_text(_tiny_data.read_text().replace(f"{_tiny_data.parent}/runs", f"{tmp_path}/runs"))
    return path


# Their tests start processes that take all cores and wait for each other: never two of them at a time.
OF_SEVERAL_PROCESSES = ("chaos", "launch", "parallel", "processes")
# Files of these folders whose tests start one process at most: they may run beside the others.
OF_ONE_PROCESS = ("test_bootstrap.py", "test_exit_codes.py", "test_pretrain_command_line.py", "test_slurm.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Under xdist a file goes to one worker, and all tests of several processes to the same one.

    With a GPU every other test goes by itself: those of one file compile for minutes.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::")[0]
            if Path(file).parent.name in OF_SEVERAL_PROCESSES and Path(file).name not in OF_ONE_PROCESS:
                return "several processes"
            return nodeid if torch.cuda.is_available() else file

    return ByFile(config, log)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
