import pytest

from tests.launch.launched_training import LaunchedTraining
from tests.processes import launched


@pytest.fixture(scope="session")
def training(tmp_path_factory):
    """Runs of launch/pretrain.py that share a config and its data."""
    return LaunchedTraining(tmp_path_factory.mktemp("launched"))


@pytest.fixture(scope="session")
def alone(training):
    """The run of one process, this one, to its end."""
    training.in_this_process("alone")
    assert len(training.figures("alone")) == 24
    return "alone"


@pytest.fixture
def launch():
    """Starts a command; whatever the test does, none of its processes survives it."""
    started = []

    def launch(command, **variables):
        started.append(launched.Launched(command, **variables))
        return started[-1]

    yield launch
    for each in started:
        each.kill()
