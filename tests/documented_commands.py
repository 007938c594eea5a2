"""Commands of README and of the pages in docs/howto: what they are, and whether their doors, options and settings exist."""

import re
import runpy
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from phase8.config.load import load_config
from phase8.config.schema import RunConfig
from phase8.config.validate import validate

ROOT = Path(__file__).parents[1]
TRAIN = "launch/pretrain.py"
WITH_SUBCOMMANDS = ("tools/plan.py", "tools/benchmark.py", "tools/recall.py")
INSTALLED = {"phase8-pretrain", "phase8.doors.launch.pretrain"}  # names of TRAIN where the wheel is installed


@dataclass(frozen=True)
class Command:
    """A line of a page.

    Args:
        words: Its words.
        comment: What stands behind it.
    """

    words: tuple[str, ...]
    comment: str

    def __str__(self):
        return shlex.join(self.words)

    @property
    def needs_gpus(self):
        return re.search(r"\bon .*GPU", self.comment) is not None

    @property
    def num_processes(self):
        """How many torchrun starts on all hosts, or a dry run plans for."""
        options = dict(word.removeprefix("--").split("=") for word in self.words if re.match(r"--n(nodes|proc_per_node)=\d+$", word))
        planned = self.words[self.words.index("--world-size") + 1] if "--world-size" in self.words else 1
        return int(options.get("nproc_per_node", 1)) * int(options.get("nnodes", 1)) * int(planned)

    @property
    def door(self):
        """The file that runs, relative to the repository; None: no door."""
        if INSTALLED & set(self.words):
            return TRAIN
        return next((word for word in self.words if re.match(r"(launch|tools)/\w+\.py$", word)), None)

    @property
    def arguments(self):
        """What the door is given."""
        return [*self.words[next(n for n, word in enumerate(self.words) if word in {self.door, *INSTALLED}) + 1 :]]


def blocks_of(text, language):
    """Contents of the blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def commands_of(text):
    """All commands of a page, in their order."""
    lines = [line for block in blocks_of(text, "bash") for line in block.replace("\\\n", " ").splitlines()]
    pairs = [line.partition(" #")[::2] for line in lines]
    return [Command(tuple(shlex.split(command)), comment.strip()) for command, comment in pairs]


def run_door(command, monkeypatch, arguments):
    """Runs a command's door in this process with other arguments, and returns its exit code."""
    monkeypatch.setattr(sys, "argv", [command.door, *arguments])
    try:
        runpy.run_path(str(ROOT / command.door), run_name="__main__")
    except SystemExit as end:
        return end.code
    raise AssertionError(f"{command.door} has not exited")


def check_options(command, monkeypatch, capfd):
    """Asserts that the door has every option, by its help."""
    subcommand = command.arguments[:1] if command.door in WITH_SUBCOMMANDS else []
    assert run_door(command, monkeypatch, [*subcommand, "--help"]) == 0
    shown = capfd.readouterr().out
    assert [word for word in command.arguments if word.startswith("--") and word.split("=")[0] not in shown] == []


def settings_of(command):
    """What stands behind --set."""
    words = command.arguments
    if "--set" not in words:
        return []
    behind = words[words.index("--set") + 1 :]
    return behind[: next((n for n, word in enumerate(behind) if word.startswith("--")), len(behind))]


def config_of(command) -> RunConfig:
    """The config of a run, valid on as many processes as it has; files are looked for in the current directory, then in the repository.

    Raises:
        ConfigError: It is not.
    """
    words = command.arguments
    config = load_config(words[words.index("--config") + 1] if "--config" in words else "quickstart", settings_of(command))
    validate(config, world_size=command.num_processes)
    return config
