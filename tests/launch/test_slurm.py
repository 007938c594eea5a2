"""launch/slurm.sbatch as Slurm runs it on one node, with stand-ins for the commands of Slurm."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do shift; done
SLURM_NODEID=0 exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
echo "$*" >> scontrol.txt
[ "$1" = show ] && echo localhost
exit 0
"""
# Matches only the ranks of this test: others may be running.
PKILL = """#!/usr/bin/env bash
echo "$*" >> pkill.txt
xargs -r kill -TERM < ranks.txt
"""
PRETRAIN = """
import os, signal, sys, time
print("arguments", sys.argv[1:], "rank", os.environ["RANK"], os.environ["WORLD_SIZE"], flush=True)
if "wait" in sys.argv:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with open("ranks.txt", "a") as file:
        print(os.getpid(), file=file, flush=True)
    time.sleep(60)
sys.exit(2 if "fail" in sys.argv else 0)
"""


@pytest.fixture
def start(tmp_path):
    """Starts the job in a directory of its own; the process."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "pkill": PKILL}.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "pretrain.py").write_text(PRETRAIN)
    slurm = {"SUBMIT_DIR": str(tmp_path), "JOB_NODELIST": "localhost", "JOB_ID": str(os.getpid()), "JOB_NAME": "phase8", "JOB_NUM_NODES": "1"}
    variables = {f"SLURM_{name}": value for name, value in {**slurm, "GPUS_ON_NODE": "2"}.items()}
    environment = {**os.environ, **variables, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}

    def start(*arguments):
        command = ["bash", str(ROOT / "launch" / "slurm.sbatch"), *arguments]
        return subprocess.Popen(command, env=environment, cwd="/", text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    return start


def requeued(directory):
    return "requeue" in (directory / "scontrol.txt").read_text()


def test_ranks_get_the_arguments_and_a_log_each(start, tmp_path):
    process = start("--config", "a b.yaml")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert [line for line in output.splitlines() if "rank" in line] == ["[default0]:arguments ['--config', 'a b.yaml'] rank 0 2"]
    (log,) = tmp_path.glob("logs/phase8-*/attempt-0/node-0/**/1/stdout.log")
    assert log.read_text() == "arguments ['--config', 'a b.yaml'] rank 1 2\n" and not requeued(tmp_path)


def test_a_failure_is_the_exit_code_of_the_job(start, tmp_path):
    process = start("fail")
    process.communicate(timeout=60)
    assert process.returncode == 1 and not requeued(tmp_path)


def test_the_warning_of_slurm_stops_the_ranks_and_the_job_is_requeued(start, tmp_path):
    process = start("wait")
    ranks = tmp_path / "ranks.txt"
    deadline = time.monotonic() + 60
    while not (ranks.exists() and ranks.read_text().count("\n") == 2) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and requeued(tmp_path), errors
    assert (tmp_path / "pkill.txt").read_text() == "-TERM -f -- -u launch/pretrain.py\n"
    assert "Sending process" not in errors and "SIGKILL" not in errors
