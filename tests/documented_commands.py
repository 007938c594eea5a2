"""Commands of README and of the pages in docs: what they are, and whether their doors, arguments and settings exist."""

import argparse
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
DOOR = re.compile(r"(launch|tools|tests)(/\w+)+\.py$")
PROGRAM = re.compile(r"(\w+=\S+ )*(python3?|torchrun|mpirun|srun|sbatch|pip|bash|source|lm_eval|phase8-\w+|\./\w+/\w+\.\w+)( |$)")

# What stands for something in a page, and an example of it.
STANDS_FOR = {
    "configs/X.yaml": "configs/phase8_1b.yaml",
    "my.yaml": "configs/phase8_7b_3d.yaml",
    "LAYOUT": "one",
    "train.recompute=R": "train.recompute=full",
    "model.num_layers=L": "model.num_layers=24",
    "train.compile.backend=NAME": "train.compile.backend=eager",
    "train.compile.backend=neuron": "train.compile.backend=eager",
    "DIR": "runs/quickstart",
}


@dataclass(frozen=True)
class Command:
    """A line of a page.

    Args:
        words: Its words, without variables of the environment before them.
        comment: What stands behind it.
    """

    words: tuple[str, ...]
    comment: str = ""

    def __str__(self):
        return shlex.join(self.words)

    @property
    def needs_gpus(self):
        return re.search(r"\bon .*GPU", self.comment) is not None

    @property
    def num_processes(self):
        """How many torchrun or mpirun starts on all hosts, at most, or a dry run plans for."""
        options = dict(word.removeprefix("--").split("=") for word in self.words if re.match(r"--n(nodes|proc_per_node)=[\d:]+$", word))
        hosts = int(options.get("nnodes", "1").rpartition(":")[2])
        return int(options.get("nproc_per_node", 1)) * hosts * int(self._behind("--world-size")) * int(self._behind("-np"))

    def _behind(self, option):
        return self.words[self.words.index(option) + 1] if option in self.words else "1"

    @property
    def door(self):
        """The file that runs, relative to the repository; None: no door."""
        if INSTALLED & set(self.words):
            return TRAIN
        return next((word for word in self.words if DOOR.match(word)), None)

    @property
    def arguments(self):
        """What the door is given, with examples for what stands for something."""
        behind = self.words[next(n for n, word in enumerate(self.words) if word in {self.door, *INSTALLED}) + 1 :]
        return [STANDS_FOR.get(word, word) for word in behind]


def blocks_of(text):
    """Language and content of each block of a page, in their order."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M)


def commands_of(text):
    """All commands of a page, in their order."""
    lines = [line for language, block in blocks_of(text) if language == "bash" for line in block.replace("\\\n", " ").splitlines()]
    pairs = [line.partition(" #")[::2] for line in lines if line.strip()]
    return [Command(tuple(shlex.split(re.sub(r"^(\w+=\S+ )+", "", command))), comment.strip()) for command, comment in pairs]


def commands_elsewhere(text):
    """Lines of blocks that are not of the language bash, which yet begin as commands do."""
    return [line for language, block in blocks_of(text) if language != "bash" for line in block.splitlines() if PROGRAM.match(line)]


def commands_in_sentences(text):
    """Commands within lines of a page, some without what they need."""
    found = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M))
    commands = [Command(tuple(words)) for words in (re.sub(r"[\[\]]", "", each).split() for each in found) if any(map(DOOR.match, words[:4]))]
    return [command for command in commands if command.arguments]


def run_door(command, monkeypatch, arguments):
    """Runs a command's door in this process with other arguments, and returns its exit code."""
    monkeypatch.setattr(sys, "argv", [command.door, *arguments])
    monkeypatch.syspath_prepend(str((ROOT / command.door).parent))  # as Python does for a script
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


def check_arguments(command, monkeypatch):
    """Asserts that the door's parser takes the arguments; the door gets no further."""
    parse, parsed = argparse.ArgumentParser.parse_args, []

    def parse_and_stop(parser, *arguments):
        parsed.append(parse(parser, *arguments))
        raise SystemExit(0)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        assert run_door(command, patch, command.arguments) == 0 and len(parsed) == 1


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
