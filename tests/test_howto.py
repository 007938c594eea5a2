"""The pages of docs/howto do what they say.

Every run has a valid config for its processes. What needs no GPU runs in this process, in the order of the page, with few steps of short
sequences, on a text of some pages, and several ranks as one; with -m full as it is written.
"""

import math
import os
import re
import shutil
import subprocess
import sys

import pytest

from phase8.config.load import load_config
from tests.documented_commands import ROOT, TRAIN, blocks_of, check_options, commands_of, config_of, run_door, settings_of
from tests.processes.launched import environment

PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs/howto").glob("*.md"))}
COMMANDS = [pytest.param(page, command, id=f"{page}: {command}") for page, text in PAGES.items() for command in commands_of(text)]
ON_PAGES = {page: [command for command in commands_of(text) if command.door is not None and not command.needs_gpus] for page, text in PAGES.items()}
BY_OTHERS = {"install"}  # what runs of it runs in tests/test_wheel.py
SLOW = ("suggest", "check")  # of tools/plan.py, which has tests of its own
LEAVES_TRACES = {"zero.engine=deepspeed", "zero.offload_params=cpu"}  # in a process: loggers, its environment, a process group

CACHE = ".cache/phase8/stdlib-of-tests"
FEW_STEPS = (
    "train.tuning=off", "model.sequence_length=64", "optim.warmup_steps=0", "train.evaluate_every_n_steps=0", "checkpoint.every_n_steps=2",
    "observe.tensorboard=false", "observe.report=false", "observe.sample_prompt=null", "observe.sample_at_evaluations=false",
    "parallel.tensor_parallel_size=1", "parallel.context_parallel_size=1", "parallel.expert_parallel_size=1",
)  # fmt: skip
INSTEAD = {"tools/generate.py": ["--max-tokens", "4"], "tools/evaluate.py": ["--sequences", "2", "--length", "128"]}
STEPS_FOR_ONE = 100
PROGRAMS = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone"]}


def write_configs(text, directory):
    """The files that a page asks to be saved: configs that begin with their name, and texts behind theirs."""
    for block in blocks_of(text, "yaml"):
        (directory / re.match(r"# (\S+\.yaml)\n", block)[1]).write_text(block)
    for name, block in re.findall(r"`(\S+)`:\n```text\n(.*?)```", text, re.S):
        (directory / name).write_text(block)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Some text instead of that of the pages, and pairs of it instead of the embedded corpus."""
    directory = tmp_path_factory.mktemp("text")
    for folder, pattern in (("docs", "*.md"), ("phase8/config", "*.py")):
        (directory / folder).mkdir(parents=True)
        for path in (ROOT / folder).glob(pattern):
            shutil.copy(path, directory / folder)
    for i in range(100):  # a hash of each text decides whether it is held out: of these some always are, whatever the pages and the files say
        (directory / "docs" / f"note_{i}.md").write_text(f"Note {i} of the tests stands for text that never changes.\n" * 30)
    (directory / CACHE).mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        (command,) = (command for command in ON_PAGES["own_text"] if command.door == "tools/prepare_data.py")
        assert run_door(command, patch, [*command.arguments, "--output-prefix", "of_tests"]) == 0
    for split in ("train", "validation"):
        for suffix in (".bin", ".idx"):
            (directory / f"of_tests_{split}_text_document{suffix}").rename(directory / CACHE / f"{split}{suffix}")
    (directory / "of_tests_text_tokenizer.model").rename(directory / CACHE / "tokenizer.model")
    return directory


def shortened(command):
    """The arguments of a command with less to do."""
    if command.door != TRAIN:
        return [*command.arguments, *INSTEAD.get(command.door, [])]
    if "--dry-run" in command.words:
        return [*command.arguments, "--set", "train.tuning=off", "train.compile.enabled=false"]
    config = config_of(command)
    settings = [*FEW_STEPS, f"train.num_steps={math.ceil(config.train.num_steps / STEPS_FOR_ONE)}"]
    if config.train.stop_at_step is not None:
        settings.append(f"train.stop_at_step={config.train.stop_at_step // STEPS_FOR_ONE}")
    if config.data.train is None:
        settings += [f"data.train={CACHE}/train", f"data.validation={CACHE}/validation", f"data.tokenizer={CACHE}/tokenizer.model"]
    return [*command.arguments, "--set", *settings]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_short_and_its_links_lead_to_files(page):
    assert len(PAGES[page].splitlines()) <= 60
    links = re.findall(r"\]\(([^)]+)\)", PAGES[page])
    assert links and [link for link in links if not (ROOT / "docs/howto" / link).exists()] == []
    assert f"docs/howto/{page}.md" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_every_command_has_a_door_options_and_settings_that_exist(page, command, monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    write_configs(PAGES[page], tmp_path)
    if command.door is None:
        assert command.words[:3] == ("python", "-m", "pip")
        return
    assert (ROOT / command.door).is_file()
    check_options(command, monkeypatch, capfd)
    if command.door == TRAIN:
        config_of(command)
    elif "--config" in command.words:
        load_config(command.arguments[command.arguments.index("--config") + 1], settings_of(command))


@pytest.mark.parametrize("page", sorted(PAGES.keys() - BY_OTHERS))
def test_a_page_runs_in_its_order(page, text, monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "2000")  # set by the door, and by this taken back
    write_configs(PAGES[page], tmp_path)
    for path in text.iterdir():
        os.symlink(path, tmp_path / path.name)
    for command in ON_PAGES[page]:
        if command.arguments[0] in SLOW:
            continue
        if LEAVES_TRACES & set(command.words):
            done = subprocess.run([sys.executable, ROOT / command.door, *shortened(command)], env=environment(), capture_output=True, text=True)
            assert done.returncode == 0, f"{command}\n{done.stderr}"
        else:
            assert run_door(command, monkeypatch, shortened(command)) == 0, f"{command}\n{capfd.readouterr().err}"


@pytest.mark.full
@pytest.mark.parametrize("page", sorted(PAGES.keys() - BY_OTHERS))
def test_a_page_runs_as_it_is_written(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_configs(PAGES[page], tmp_path)
    for folder in ("launch", "tools", "configs", "docs", "phase8"):
        os.symlink(ROOT / folder, tmp_path / folder)
    for command in ON_PAGES[page]:
        done = subprocess.run([*PROGRAMS[command.words[0]], *command.words[1:]], cwd=tmp_path, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
