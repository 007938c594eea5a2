"""README and the pages in docs do what they say: every command of theirs runs here, or is listed with the reason why it does not.

Every run has a valid config for its processes. The commands of a page run in this process, in their order, with few steps of short sequences, on a
text of some pages, and several ranks as one; a model for GPUs is planned instead of trained. With -m full the pages of docs/howto run as they are
written, but for what needs GPUs.
"""

import gzip
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from phase8.config.load import load_config
from tests.documented_commands import (
    ROOT,
    TRAIN,
    Command,
    blocks_of,
    check_arguments,
    check_options,
    commands_elsewhere,
    commands_in_sentences,
    commands_of,
    config_of,
    run_door,
    settings_of,
)
from tests.processes.launched import environment

PATHS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs/howto").glob("*.md"))]
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PATHS}
HOWTO = [page for page in PAGES if page.startswith("docs/howto/")]
COMMANDS = [pytest.param(page, command, id=f"{page}: {command}") for page, text in PAGES.items() for command in commands_of(text)]

# Commands that no test here runs, and why. The arguments and the config of each are checked all the same.
NOT_RUN = {
    "source .venv/bin/activate": "It changes the shell that reads it, and ./launch/quickstart.sh above it has made what it wants.",
    "sbatch launch/slurm.sbatch": "It needs Slurm; tests/launch/test_slurm.py runs the script.",
    "pip install -e '.[deepspeed]'": "It changes the environment of these tests; tests/test_wheel.py installs.",
    "python -m pip wheel --no-deps --wheel-dir dist .": "tests/test_wheel.py builds and installs it.",
    "python -m pip install 'dist/phase8-*.whl'": "tests/test_wheel.py builds and installs it.",
    "python tests/chaos/inject_faults.py --faults 50 --output chaos.jsonl": "It takes minutes; tests/chaos/test_chaos.py injects some of the faults.",
    "python tests/parallel/golden.py record before.json": "It takes minutes; tests/parallel/test_golden.py records and compares some cases.",
    "python tests/parallel/golden.py compare before.json": "The same holds for it.",
}
BY_BEGINNING = {
    "torchrun --nproc_per_node=2 --no-python phase8-pretrain ": "It needs the wheel; tests/test_wheel.py runs it.",
    "torchrun --nproc_per_node=2 -m phase8.doors.launch.pretrain ": "It needs the wheel; tests/test_wheel.py runs it.",
    "lm_eval ": "It downloads tasks; tests/tools/test_harness_task.py runs it with one of its own.",
    "python tools/benchmark.py parallel --config configs/phase8_1b.yaml --layouts LAYOUT ": "docs/howto/many_gpus.md runs it with fewer options.",
    "python tools/ablation.py ": "It starts a process for each run; tests/tools/test_ablation.py trains variants of tiny models.",
}


def reason_not_to_run(command):
    """Why a command does not run here; None: it does."""
    return NOT_RUN.get(str(command)) or next((reason for beginning, reason in BY_BEGINNING.items() if str(command).startswith(beginning)), None)


def commands_to_run(page):
    """The commands of a page that run here, in their order; other pages leave out what README has."""
    commands = [command for command in commands_of(PAGES[page]) if reason_not_to_run(command) is None]
    if page == "README.md" or page in HOWTO:
        return commands
    of_readme = set(map(str, commands_of(PAGES["README.md"])))
    return [command for command in commands if str(command) not in of_readme]


CACHE = ".cache/phase8/stdlib-of-tests"
FEW_STEPS = (
    "train.tuning=off", "model.sequence_length=64", "optim.warmup_steps=0", "train.evaluate_every_n_steps=0", "checkpoint.every_n_steps=2",
    "observe.tensorboard=false", "observe.report=false", "observe.sample_prompt=null", "observe.sample_at_evaluations=false",
    "parallel.tensor_parallel_size=1", "parallel.context_parallel_size=1", "parallel.expert_parallel_size=1",
)  # fmt: skip
STEPS_FOR_ONE = 100
UNMEASURED = ("train.tuning=off", "train.compile.enabled=false")
FEW_LAYOUTS = ("model.num_layers=2", "train.global_batch_size=64")
LARGE = 1024  # widths of models that are planned, not trained
QUICKSTART = Command(("python", TRAIN, "--config", "quickstart"))
TINY = (
    "model.num_layers=1", "model.d_model=256", "model.num_heads=2", "model.vocab_size=512", "model.ffn_size=256", "model.sequence_length=64",
    "train.global_batch_size=1", "train.micro_batch_size=1", "train.compile.enabled=false", "data.num_workers=0", "data.pin_memory=false",
    "precision.bf16_layers=0",
)  # fmt: skip
INSTEAD = {
    "tools/generate.py": ["--max-tokens", "4"],
    "tools/evaluate.py": ["--length", "128"],
    "tools/collect_text.py": ["--roots", "docs", "phase8", "--vocab-size", "512", "--validation-fraction", "0.2", "--workers", "1"],
    "tools/benchmark.py": ["--device", "cpu", "--iterations", "1", "--set", *TINY],
    "tools/bench/decode.py": ["--prompt", "8", "--tokens", "8", "--set", "model.num_layers=1"],
}
LESS = {"--data": ["--sequences", "2"], "--stride": ["--stride", "64"], "--layouts": ["--layouts", "one"]}
LEAVES_TRACES = {"zero.engine=deepspeed", "zero.offload_params=cpu"}  # in a process: loggers, its environment, a process group
PROGRAMS = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone"]}
# What a page takes from others.
BEFORE = {
    "README.md": ["python launch/pretrain.py --config configs/moe_small.yaml"],
    "docs/quality.md": [
        "python launch/pretrain.py --config quickstart",
        "python tools/collect_text.py python --output data --prepare",
        "python launch/pretrain.py --config quickstart --set run.name=ablation_30m model.vocab_size=512 data.train=data/python_train_text_document "
        "data.validation=data/python_validation_text_document data.tokenizer=data/python_text_tokenizer.model",
    ],
}


def write_files(page, directory):
    """The files that a page asks to be saved: configs that begin with their name, and texts behind theirs; and texts that it stands for."""
    for language, block in blocks_of(PAGES[page]):
        if language == "yaml" and (name := re.match(r"# (\S+\.yaml)\n", block)):
            (directory / name[1]).write_text(block)
    for name, block in re.findall(r"`(\S+)`:\n```text\n(.*?)```", PAGES[page], re.S):
        (directory / name).write_text(block)
    if "book.txt" in PAGES[page]:
        (directory / "book.txt").write_text("A book of some words.\n" * 20)
        with gzip.open(directory / "articles.jsonl.gz", "wt") as articles:
            articles.write('{"text": "An article of some words."}\n' * 20)
        (directory / "corpus").mkdir()
        shutil.copy(directory / "book.txt", directory / "corpus")


def write_clone(directory):
    """A clone of the repository whose environment is that of these tests: pip and the checks write down that they ran, and do nothing."""
    for name in ("launch", "tools", "configs", "tests", "setup.py"):
        os.symlink(ROOT / name, directory / name)
    programs = directory / ".venv/bin"
    programs.mkdir(parents=True)
    said = f'echo "$(basename "$0") $*" >> {directory}/called.txt'
    (programs / "python").write_text(f'#!/bin/sh\ncase "$*" in "-m "*) {said}; exit 0;; esac\nexec {sys.executable} "$@"\n')
    for name in ("ruff", "mypy", "lint-imports"):
        (programs / name).write_text(f"#!/bin/sh\n{said}\n")
    for path in programs.iterdir():
        path.chmod(0o755)


def calls_of(directory):
    """What was called in a clone since this was asked last, in order."""
    path = directory / "called.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


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
        (command,) = (command for command in commands_of(PAGES["docs/howto/own_text.md"]) if command.door == "tools/prepare_data.py")
        assert run_door(command, patch, [*command.arguments, "--output-prefix", "of_tests"]) == 0
    for split in ("train", "validation"):
        for suffix in (".bin", ".idx"):
            (directory / f"of_tests_{split}_text_document{suffix}").rename(directory / CACHE / f"{split}{suffix}")
    (directory / "of_tests_text_tokenizer.model").rename(directory / CACHE / "tokenizer.model")
    return directory


def shortened(command):
    """The arguments of a command with less to do."""
    if "--help" in command.words:
        return command.arguments
    if command.arguments[0] == "suggest":
        return [*command.arguments, "--set", *FEW_LAYOUTS]
    if command.door != TRAIN:
        less = [word for option, words in LESS.items() if option in command.words for word in words]
        return [*command.arguments, *INSTEAD.get(command.door, []), *less]
    config = config_of(command)
    if "--dry-run" in command.words:
        return [*command.arguments, "--set", *UNMEASURED]
    if config.model.d_model >= LARGE:
        return [*command.arguments, "--dry-run", "--world-size", str(command.num_processes), "--set", *UNMEASURED]
    settings = [*FEW_STEPS, f"train.num_steps={math.ceil(config.train.num_steps / STEPS_FOR_ONE)}"]
    if config.train.stop_at_step is not None:
        settings.append(f"train.stop_at_step={config.train.stop_at_step // STEPS_FOR_ONE}")
    if config.data.train is None:
        settings += [f"data.train={CACHE}/train", f"data.validation={CACHE}/validation", f"data.tokenizer={CACHE}/tokenizer.model"]
    return [*command.arguments, "--device", "cpu", "--set", *settings]


def run(command, monkeypatch, capfd):
    """Runs a command, shortened."""
    if command.door is None:
        arguments = shortened(QUICKSTART)[2:] if str(command) == "./launch/quickstart.sh" else []
        done = subprocess.run([*command.words, *arguments], env=environment(), capture_output=True, text=True)
    elif LEAVES_TRACES & set(command.words) and "--dry-run" not in shortened(command):
        done = subprocess.run([sys.executable, ROOT / command.door, *shortened(command)], env=environment(), capture_output=True, text=True)
    else:
        assert run_door(command, monkeypatch, shortened(command)) in (0, None), f"{command}\n{capfd.readouterr().err}"
        return
    assert done.returncode == 0, f"{command}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]) if not re.match(r"https?:|#", link)]
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []


@pytest.mark.parametrize("page", ["README.md", *HOWTO])
def test_a_page_is_short(page):
    assert len(PAGES[page].splitlines()) <= 60
    assert page == "README.md" or f"({page})" in PAGES["README.md"]


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_every_command_has_a_door_arguments_and_settings_that_exist(page, command, monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    write_files(page, tmp_path)
    if command.door is None:
        assert os.access(ROOT / command.words[0], os.X_OK) or reason_not_to_run(command) is not None
        return
    assert (ROOT / command.door).is_file() and command.words[0] in ("python", "torchrun", "mpirun")
    check_options(command, monkeypatch, capfd)
    if "--help" in command.words:
        return
    check_arguments(command, monkeypatch)
    if command.door == TRAIN:
        config_of(command)
    elif "--config" in command.words:
        load_config(command.arguments[command.arguments.index("--config") + 1], settings_of(command))


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_sentences_have_doors_and_options_that_exist(page, monkeypatch, capfd):
    for command in commands_in_sentences(PAGES[page]):
        assert (ROOT / command.door).is_file(), command
        if not command.door.startswith("tests/"):  # which pytest runs
            check_options(command, monkeypatch, capfd)


def test_every_command_is_in_a_block_of_commands_and_runs_or_has_a_reason():
    assert {page: lines for page, text in PAGES.items() if (lines := commands_elsewhere(text))} == {}
    commands = [command for text in PAGES.values() for command in commands_of(text)]
    assert NOT_RUN.keys() <= {str(command) for command in commands}
    assert all(any(str(command).startswith(beginning) for command in commands) for beginning in BY_BEGINNING)
    for reason in (*NOT_RUN.values(), *BY_BEGINNING.values()):
        assert all((ROOT / path).is_file() for path in re.findall(r"tests/\S+\.py", reason))


@pytest.fixture
def same_products():
    """Doors choose how products of float32 are computed, and end with their process; here other tests follow."""
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


@pytest.mark.usefixtures("same_products")
@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if commands_of(text)])
def test_a_page_runs_in_its_order(page, text, monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "2000")  # set by the door, and by this taken back
    write_files(page, tmp_path)
    for path in text.iterdir():
        os.symlink(path, tmp_path / path.name)
    if page == "README.md":
        write_clone(tmp_path)
    for line in BEFORE.get(page, []):
        run(Command(tuple(line.split())), monkeypatch, capfd)
    for command in commands_to_run(page):
        run(command, monkeypatch, capfd)


def test_the_scripts_set_an_environment_up_once_and_call_every_check(tmp_path):
    write_clone(tmp_path)

    def call(*words):
        return subprocess.run(["bash", *words], cwd=tmp_path, env=environment(), capture_output=True, text=True).returncode, calls_of(tmp_path)

    pip = "python -m pip install --quiet --disable-pip-version-check --no-compile "
    code, calls = call("launch/setup_environment.sh", "test")
    requirements = f"{pip}--no-deps --requirement {tmp_path}/tests/harness_requirements.txt"
    assert code == 0 and calls[1:3] == [f"{pip}torch==2.13.0 --editable {tmp_path}[test]", requirements]
    compiled, tested = "python -m compileall -qq -x checkpoint/released phase8 tests", "python -m pytest -n 4 -m gpu"
    checks = ["ruff check .", "mypy ", "lint-imports ", compiled, tested]
    code, calls = call("tests/run.sh", "-m", "gpu")
    assert (code, sorted(calls)) == (0, sorted(checks))
    for name, expected in (("mypy", checks), ("ruff", checks[:1])):
        program = tmp_path / ".venv/bin" / name
        program.write_text(program.read_text() + "exit 1\n")
        code, calls = call("tests/run.sh", "-m", "gpu")
        assert (code, sorted(calls)) == (1, sorted(expected))


@pytest.mark.full
@pytest.mark.parametrize("page", [page for page in HOWTO if page != "docs/howto/install.md"])
def test_a_page_runs_as_it_is_written(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_files(page, tmp_path)
    for folder in ("launch", "tools", "configs", "docs", "phase8"):
        os.symlink(ROOT / folder, tmp_path / folder)
    for command in commands_of(PAGES[page]):
        if not command.needs_gpus:
            done = subprocess.run([*PROGRAMS[command.words[0]], *command.words[1:]], cwd=tmp_path, env=environment(), capture_output=True, text=True)
            assert done.returncode == 0, f"{command}\n{done.stderr}"
