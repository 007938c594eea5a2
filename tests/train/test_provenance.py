import subprocess

import torch

from phase8.train import provenance
from phase8.train.provenance import code_version
from tests.train.tiny_run import prepare, records, train_tiny


def test_every_start_records_when_where_and_from_which_code_the_run_goes_on(tiny):
    train_tiny(tiny, "train.stop_at_step=5")
    run = train_tiny(tiny, "train.num_steps=10")
    starts = [record for record in records(run) if record.get("event") == "start"]
    assert [start["step"] for start in starts] == [0, 5]
    assert all(start["host"] and start["code"] and start["world_size"] == 1 and start["time"].endswith("+00:00") for start in starts)
    assert starts[-1]["facts"]["device"] == dict(run.facts)["device"] and starts[-1]["planned_memory_bytes"] is None
    saves = [record for record in records(run) if record.get("event") == "checkpoint"]
    assert saves[-1]["epochs"] == run.data.epochs(40) and saves[-1]["time"] >= starts[-1]["time"]


def test_on_a_gpu_the_planned_memory_is_recorded(tiny):
    run = prepare(tiny)
    run.planned_memory_bytes = 7
    assert provenance.start_record(run)["planned_memory_bytes"] == 7 and run.device == torch.device("cpu")


def test_the_code_is_named_by_its_commit_or_its_version(tmp_path):
    assert code_version(tmp_path).startswith(("phase8 ", "unknown"))

    def git(*words):
        identity = ("-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false")
        return subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-q", "-m", "a")
    commit = git("rev-parse", "--short=12", "HEAD")
    assert code_version(tmp_path) == f"commit {commit}"
    (tmp_path / "file").write_text("b")
    assert code_version(tmp_path) == f"commit {commit}-dirty"
    inner = tmp_path / "environment"
    inner.mkdir()
    assert "commit" not in code_version(inner)  # the tree around it is another project's
