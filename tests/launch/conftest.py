import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "processes")]

import launched  # noqa: E402
from launched_training import LaunchedTraining  # noqa: E402


@pytest.fixture(scope="session")
def training(tmp_path_factory):
    """Runs of launch/pretrain.py that share a config and its data."""
    return LaunchedTraining(tmp_path_factory.mktemp("launched"))


@pytest.fixture(scope="session")
def alone(training):
    """The run of one plain process, to its end."""
    code, _, errors = launched.run(training.plain("alone"))
    assert code == 0, errors
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
