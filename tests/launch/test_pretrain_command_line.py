import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from phase8.config.describe import iterate_keys
from phase8.processes.bootstrap import World

ROOT = Path(__file__).parents[2]
DOOR = ROOT / "launch" / "pretrain.py"
# It takes some 400 MB, mostly torch; but what is measured begins with the memory of this process, from which it is forked. The weights of
# 10B parameters would take 40 GB.
MAX_DRY_RUN_BYTES = 4 * 2**30


def start(*arguments: str, directory: Path) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(DOOR), *arguments]
    return subprocess.Popen(command, cwd=directory, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(*arguments: str, directory: Path) -> tuple[int, str, str]:
    process = start(*arguments, directory=directory)
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


@pytest.fixture
def door():
    specification = importlib.util.spec_from_file_location("door_pretrain", DOOR)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def call(door, monkeypatch, capsys, tmp_path):
    """The command in this process: exit code, output and errors."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(DOOR), *arguments])
        code = door.main()
        return code, *capsys.readouterr()

    return call


def test_every_problem_is_one_line_and_nothing_is_written(tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("model: {d_modle: 3, num_heads: many}\n", encoding="utf-8")
    code, output, errors = run("--config", "mine.yaml", "--set", "train.num_steps=0", "seed=1", directory=tmp_path)
    assert (code, output) == (2, "")
    assert sorted(errors.splitlines()) == [
        "error: --set 'seed=1': unknown key seed; did you mean train.seed?",
        "error: --set 'train.num_steps=0': train.num_steps is 0, but a whole number at least 1 is needed.",
        "error: mine.yaml: model.num_heads is 'many', but a whole number at least 1 is needed.",
        "error: mine.yaml: unknown key model.d_modle; did you mean model.d_model?",
    ]
    assert list(tmp_path.iterdir()) == [config]


def test_an_unknown_option_exits_with_2(tmp_path):
    code, output, errors = run("--confg", "mine.yaml", directory=tmp_path)
    assert (code, output) == (2, "")
    assert "unrecognized arguments: --confg mine.yaml" in errors and "Traceback" not in errors


def test_help_lists_every_key(tmp_path):
    code, output, errors = run("--help", directory=tmp_path)
    assert (code, errors) == (0, "")
    assert [name for name, _ in iterate_keys() if f"  {name} = " not in output] == []
    assert all(option in output for option in ("--config", "--set", "--device", "--resume", "--dry-run", "--world-size"))


def test_the_10b_config_is_planned_without_allocating_it(tmp_path):
    process = start("--config", str(ROOT / "configs" / "phase8_10b_ultra.yaml"), "--dry-run", directory=tmp_path)
    output, errors = process.stdout.read(), process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert (process.returncode, errors) == (0, "")
    lines = {line.split("  ")[1]: line for line in output.splitlines()[1:]}
    of_model = ["model", "parameters", "FLOPs/token", "optimizer"]
    assert list(lines) == ["settings", "topology", "batch", "run", *of_model, "planned memory per rank", "predicted speed"]
    assert "9.91B" in lines["parameters"] and "GiB: weights" in lines["planned memory per rank"]
    unit = 1 if sys.platform == "darwin" else 1024
    assert usage.ru_maxrss * unit < MAX_DRY_RUN_BYTES
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_for_eight_processes_says_what_is_wrong(call, tmp_path):
    code, output, errors = call("--dry-run", "--world-size", "8", "--set", "train.global_batch_size=6")
    assert code == 2
    assert output.startswith("dry run: quickstart, world size 8\n") and "pp 1 x dp 8 x cp 1 x tp 1 = 8 ranks" in output
    assert errors == "error: train.global_batch_size 6 is not a multiple of the data-parallel size 8; use 8, for example.\n"
    assert list(tmp_path.iterdir()) == []


def test_rules_across_keys_are_checked_before_anything_is_written(call, tmp_path):
    code, output, errors = call("--device", "cpu", "--set", "model.num_heads=5", "--set", "zero.engine=deepspeed", "train.stop_at_step=9999")
    assert (code, output) == (2, "")
    assert errors.splitlines() == [
        "error: model.num_heads 5 does not divide model.d_model 192; choose a divisor or set model.head_size.",
        "error: train.stop_at_step 9999 is after train.num_steps 900; leave it null or make it smaller.",
        "error: zero.engine is deepspeed, but zero.stage is 0, and DeepSpeed divides from stage 1 on; choose a stage, or set zero.engine to fsdp.",
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_missing_config_file(call):
    code, _, errors = call("--config", "missing.yaml")
    assert code == 2
    assert errors.startswith("error: Config file missing.yaml does not exist; give a YAML file with --config, or one that comes with phase8: ")
    assert errors.endswith(", quickstart.\n") and errors.count("\n") == 1


def test_a_world_of_no_process_is_refused(call):
    assert call("--dry-run", "--world-size", "0") == (2, "", "error: --world-size is 0, but at least 1 is needed.\n")


def test_a_dry_run_of_what_fits_nowhere_ends_as_the_run_would(call):
    code, output, errors = call("--config", "configs/phase8_1b.yaml", "--dry-run", "--set", "train.device_memory_gib=2")
    assert code == 9 and "nothing fits into 2 GiB" in output
    assert errors.startswith("error: no settings fit into the 2 GiB that train.device_memory_gib 2 leaves on ")


def test_a_world_size_without_dry_run_is_refused(call):
    code, _, errors = call("--world-size", "8")
    assert (code, errors) == (2, "error: --world-size 8 is for --dry-run: a run has the processes that were started; leave it out.\n")


def test_half_of_what_torchrun_sets_is_refused(call, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, errors = call()
    assert code == 2 and errors.startswith("error: WORLD_SIZE is set, but RANK, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT are not;")


def test_a_home_is_expanded_and_an_undefined_variable_refused(call, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("UNSET_HERE", raising=False)
    (tmp_path / "mine.yaml").write_text("run: {name: mine}")
    code, output, errors = call("--config=~/mine.yaml", "--dry-run", "--set", "data.train=~/none", "train.compile.enabled=false")
    assert (code, errors) == (0, "") and output.startswith("dry run: mine,")
    code, _, errors = call("--set", "run.output_dir=$UNSET_HERE/runs", "data.train=[{path: ~/a, weight: 1}, {path: b}]")
    assert code == 2 and errors.splitlines() == [
        "error: --set 'run.output_dir=$UNSET_HERE/runs': run.output_dir: the path '$UNSET_HERE/runs' uses the variable UNSET_HERE, which is "
        "not set; set it, or write the path out.",
        "error: --set 'data.train=[{path: ~/a, weight: 1}, {path: b}]': data.train: entry 2 is {'path': 'b'}, which has no weight; give every "
        "entry its path and weight.",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize("option", ["--config", "--resume"])
def test_an_option_with_an_undefined_variable_is_named(call, monkeypatch, capsys, option):
    monkeypatch.delenv("UNSET_HERE", raising=False)
    with pytest.raises(SystemExit) as caught:
        call(option, "${UNSET_HERE}/x")
    assert caught.value.code == 2
    assert f"error: argument {option}: the path '${{UNSET_HERE}}/x' uses the variable UNSET_HERE, which is not set;" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--dry"], ["--dev", "cpu", "--dry-run"]])
def test_options_are_not_abbreviated(call, arguments):
    with pytest.raises(SystemExit) as caught:
        call(*arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["--config", "a.yaml"], "--config a.yaml"),
        (["--resume", "none", "--config", "a.yaml"], "--config a.yaml"),
        (["--config", "a.yaml", "--resume=runs/x/checkpoints/step-0000000010"], "--config a.yaml"),
        (["--set", "observe.sample_prompt=def main(", "run.name=x"], "--set 'observe.sample_prompt=def main(' run.name=x"),
    ],
)
def test_the_resume_command_goes_on_from_the_newest_checkpoint(door, monkeypatch, arguments, command):
    monkeypatch.setattr(sys, "argv", ["launch/pretrain.py", *arguments])
    assert door._resume_command(World()) == f"{sys.executable} launch/pretrain.py {command}"


@pytest.mark.parametrize(
    ("world", "launcher", "end"),
    [
        (World(world_size=2, local_world_size=2, launcher="torchrun"), "-m torch.distributed.run --nproc_per_node=2 ", ""),
        (World(world_size=16, local_world_size=8, launcher="torchrun"), "", "  # started as before, in 16 processes"),
        (World(world_size=2, local_world_size=2, launcher="mpirun"), "", "  # started as before, in 2 processes"),
    ],
)
def test_the_resume_command_starts_as_many_ranks(door, monkeypatch, world, launcher, end):
    monkeypatch.setattr(sys, "argv", ["launch/pretrain.py", "--set", "run.name=x"])
    assert door._resume_command(world) == f"{sys.executable} {launcher}launch/pretrain.py --set run.name=x{end}"
