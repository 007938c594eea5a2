import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "benchmark_checkpoint.py"
TINY = ("model.d_model=24", "model.num_heads=4", "model.num_layers=1", "model.vocab_size=61", "model.sequence_length=24")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc_per_node=2")


def run(*words):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, timeout=240)


@pytest.mark.full
def test_saves_and_loads_of_all_three_are_timed_and_nothing_is_left(tmp_path):
    done = run(*TORCHRUN, str(TOOL), "--directory", str(tmp_path), "--rounds", "1", "--set", *TINY)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.split()[:1] == ["0"]]
    assert [row[1] for row in rows] == ["dd", "FileSystemWriter", "phase8"]
    for row in rows:  # round, name, then seconds, "s" and GB/s of the save and of the load, and "warm" without root
        assert row[3] == row[6] == "s" and all(float(row[place]) >= 0 for place in (2, 4, 5, 7)) and row[8:] in ([], ["warm"])
    assert "2 ranks" in done.stdout and list(tmp_path.iterdir()) == []


def test_without_a_launcher_it_says_how_to_start_it(tmp_path):
    done = run(str(TOOL), "--directory", str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "start tools/benchmark_checkpoint.py with torchrun --standalone --nproc_per_node=4." in done.stderr
