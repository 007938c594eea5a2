"""What the wheel installs trains without the repository."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("phase8", "launch", "tools", "configs", "setup.py", "pyproject.toml", "README.md", "LICENSE")
SMALL = (
    "train.stop_at_step=3", "train.evaluate_every_n_steps=0", "model.vocab_size=512", "model.d_model=32", "model.num_layers=1",
    "model.num_heads=2", "observe.tensorboard=false", "observe.report=false", "observe.sample_at_evaluations=false",
    "observe.sample_prompt=null",
)  # fmt: skip


class Installed:
    """An installed wheel: its commands and modules, run from a directory that was empty at first, the repository nowhere on the path."""

    def __init__(self, site, directory):
        self.site, self.directory = site, directory

    def run(self, command, *arguments):
        environment = {**os.environ, "PYTHONPATH": str(self.site), "OMP_NUM_THREADS": "1"}
        return subprocess.run([*command, *arguments], cwd=self.directory, env=environment, capture_output=True, text=True, timeout=240)

    def command(self, name, *arguments):
        return self.run([self.site / "bin" / f"phase8-{name}"], *arguments)


def build(kind, sources, directory):
    """What pip asks setuptools for, without a network: a wheel, or an editable one."""
    command = [sys.executable, "-c", f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])", directory]
    subprocess.run(command, cwd=sources, check=True, capture_output=True, text=True)
    (wheel,) = directory.glob("*.whl")
    return wheel


def install(wheel, site):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*pip, "--target", site, wheel], cwd=wheel.parent, check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A copy of what is built: a build leaves files beside it."""
    sources = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, sources / name)
    return sources


@pytest.fixture(scope="module")
def installed(sources, tmp_path_factory):
    directory = tmp_path_factory.mktemp("wheel")
    install(build("wheel", sources, directory), directory / "site")
    (directory / "empty").mkdir()
    return Installed(directory / "site", directory / "empty")


def test_every_door_has_a_command_but_those_that_torchrun_starts(installed):
    doors = {path.stem for folder in ("launch", "tools") for path in (ROOT / folder).glob("*.py")}
    entry_points = next(installed.site.glob("*.dist-info/entry_points.txt")).read_text().splitlines()
    commands = dict(line.split(" = ") for line in entry_points if " = " in line)
    paths = {name: target.removesuffix(":main").removeprefix("phase8.doors.").replace(".", "/") for name, target in commands.items()}
    page = (ROOT / "docs/howto/install.md").read_text(encoding="utf-8")
    assert [name for name, path in paths.items() if f"| `{name}` | `{path}.py` |" not in page] == []
    modules = {path.rpartition("/")[2] for path in paths.values()}
    assert doors - modules == {"__init__", "benchmark_rank", "benchmark_checkpoint"} and modules <= doors
    assert {path.name for path in (installed.site / "bin").iterdir()} == set(commands)
    folder = installed.site / "phase8" / "doors"
    assert {path.stem for path in (folder / "launch").glob("*.py")} | {path.stem for path in (folder / "tools").glob("*.py")} == doors
    assert {path.name for path in (folder / "configs").iterdir()} == {path.name for path in (ROOT / "configs").iterdir()}


def test_commands_of_an_editable_installation_find_their_doors(sources, tmp_path):
    install(build("editable", sources, tmp_path), tmp_path / "site")
    find = "import importlib.util, site, sys; site.addsitedir(sys.argv[1]); print(importlib.util.find_spec('phase8.doors.launch.pretrain').origin)"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", find, tmp_path / "site"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == str(sources / "launch/pretrain.py"), done.stderr


def test_a_command_shows_its_help(installed):
    done = installed.command("pretrain", "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: phase8-pretrain "), done.stderr


@pytest.mark.parametrize("name, world_size", [("phase8_small", 8), pytest.param("configs/phase8_7b_3d.yaml", 32, marks=pytest.mark.full)])
def test_a_config_comes_with_it(installed, name, world_size):
    done = installed.command("pretrain", "--dry-run", "--config", name, "--world-size", str(world_size), "--set", "train.tuning=off")
    assert done.returncode == 0 and done.stdout.startswith(f"dry run: {Path(name).stem}, world size {world_size}\n"), done.stderr


@pytest.mark.full
def test_a_run_trains_on_the_embedded_corpus(installed):
    done = installed.command("pretrain", "--device", "cpu", "--set", "run.name=one", *SMALL)
    assert done.returncode == 0 and "step 3/3" in done.stdout, done.stderr
    assert (installed.directory / "runs/one/checkpoints/step-0000000003").is_dir()


@pytest.mark.full
@pytest.mark.parametrize("program", [("-m", "phase8.doors.launch.pretrain"), ("--no-python", "phase8-pretrain")], ids=["module", "command"])
def test_several_processes_train(installed, program, monkeypatch):
    monkeypatch.setenv("PATH", f"{installed.site / 'bin'}{os.pathsep}{os.environ['PATH']}")
    name = f"two{len(program[0])}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *program, "--device", "cpu"]
    done = installed.run(torchrun, "--set", f"run.name={name}", "zero.stage=3", *SMALL)
    assert done.returncode == 0 and "ZeRO stage 3" in done.stdout, done.stderr
    assert (installed.directory / f"runs/{name}/checkpoints/step-0000000003").is_dir()


@pytest.mark.full
def test_tools_that_start_processes_start_their_own(installed):
    texts = installed.directory / "texts"
    texts.mkdir()
    for number in range(200):
        (texts / f"{number}.md").write_text("\n".join(f"Line {line} of text {number}, long enough to be collected." for line in range(20)))
    done = installed.command("collect", "prose", "--roots", "texts", "--output", "data", "--prepare", "--vocab-size", "300", "--workers", "1")
    assert done.returncode == 0 and (installed.directory / "data/prose_train_text_document.bin").exists(), done.stderr
    settings = [setting for setting in SMALL if "tensorboard" not in setting]
    done = installed.command("benchmark", "parallel", "--config", "quickstart", "--layouts", "one", "dp2-zero3", "--iterations", "1",
                             "--sequences-per-rank", "1", "--device", "cpu", "--json", "--set", *settings)  # fmt: skip
    assert done.returncode == 0 and '"reason": null' in done.stdout, done.stdout + done.stderr
