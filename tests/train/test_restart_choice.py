"""What `--resume` means to a group that torchrun has started again."""

import pytest

from phase8.errors import StorageError
from phase8.processes.bootstrap import World
from phase8.train.restart import record_agents, resume_after_restart
from phase8.train.run_directory import RunDirectory

ASKED = ("auto", "none", "elsewhere/step-0000000007")


@pytest.fixture
def directory(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.create()
    return directory


def save(directory):
    (directory.checkpoints / "step-0000000003").mkdir()


def choices(directory, *agents):
    return tuple(resume_after_restart(asked, directory, agents=agents) for asked in ASKED)


def test_a_launch_does_what_was_asked_whatever_an_earlier_one_has_recorded(directory):
    save(directory)
    assert choices(directory, "a") == choices(directory) == ASKED
    record_agents(directory, agents={"b", "c"})
    assert choices(directory, "a") == choices(directory) == ASKED


def test_a_restart_goes_on_from_what_the_run_has_saved(directory):
    record_agents(directory, agents={"a", "b"})
    assert choices(directory, "b") == ("auto", "auto", ASKED[2])  # nothing was saved: the beginning is still elsewhere
    save(directory)
    assert choices(directory, "c", "b") == ("auto", "auto", "auto")


def test_agents_that_come_later_are_known_too(directory):
    save(directory)
    record_agents(directory, agents={"a"})
    record_agents(directory, agents={"a", "b"})
    assert choices(directory, "b") == choices(directory, "a") == ("auto", "auto", "auto")


def test_a_run_that_was_set_aside_takes_its_record_with_it(directory):
    record_agents(directory, agents={"a"})
    directory.set_aside()
    assert choices(directory, "a") == ASKED


def test_one_process_without_a_launcher_records_nothing(directory):
    record_agents(directory, agents=set())
    assert not (directory.path / "launchers.json").exists()


@pytest.mark.parametrize("content", ["", "{", '{"a": 1}', "[1]"])
def test_a_damaged_record_is_one_sentence(directory, content):
    (directory.path / "launchers.json").write_text(content)
    with pytest.raises(StorageError, match=r"launchers\.json is not the list of names that a run records; delete it"):
        choices(directory, "a")


@pytest.mark.parametrize(
    ("launcher", "error_file", "agent"),
    [
        ("torchrun", "/tmp/torchelastic_x/job_q1w2/attempt_0/1/error.json", "job_q1w2"),
        ("torchrun", "/tmp/torchelastic_x/job_q1w2/attempt_3/0/error.json", "job_q1w2"),
        ("torchrun", "/tmp/torchelastic_x/job_q1w2/0/error.json", None),  # a layout of directories that is not known
        ("torchrun", None, None),
        ("environment", "/tmp/torchelastic_x/job_q1w2/attempt_0/1/error.json", None),
    ],
)
def test_the_name_of_an_agent(launcher, error_file, agent):
    assert World(launcher=launcher, error_file=error_file).agent == agent
