"""Worker processes: the same shards as one process makes, errors of workers, and no worker that outlives its parent."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from phase8.data import shard_pool
from phase8.data.documents import cut_shards
from phase8.data.input_files import find_sources
from phase8.data.shard_pool import make_shards
from phase8.data.shards import DocumentRules, Shard, ShardCounts
from phase8.data.tokenizer_file import tokenizer_digest
from phase8.data.tokenizer_training import train_sentencepiece
from phase8.errors import DataError

ROOT = Path(__file__).parents[2]


def make_inputs(directory: Path) -> list[Shard]:
    inputs = directory / "inputs"
    inputs.mkdir()
    texts = [f"document {i} with the number {i * i}\n" * 20 for i in range(12)]
    for i, text in enumerate(texts):
        (inputs / f"{i:02d}.txt").write_text(text)
    tokenizer = train_sentencepiece(texts, directory / "t.model", vocab_size=300)
    cut, digest = cut_shards(find_sources([inputs])[0], 1000), tokenizer_digest(tokenizer)
    assert len(cut) >= 6
    return [
        Shard(directory=directory / "work" / f"shard-{i}", spans=spans, tokenizer=tokenizer, tokenizer_sha256=digest, rules=DocumentRules())
        for i, spans in enumerate(cut)
    ]


def test_workers_make_the_same_shards_and_report_each(tmp_path: Path):
    shards = make_inputs(tmp_path)
    alone: dict[Path, ShardCounts] = {}
    make_shards(shards, num_workers=1, on_done=lambda shard, counts: alone.__setitem__(shard.directory, counts))
    content = {path: path.read_bytes() for path in (tmp_path / "work").rglob("*.*")}
    (tmp_path / "work").rename(tmp_path / "old")
    together: dict[Path, ShardCounts] = {}
    make_shards(shards, num_workers=2, on_done=lambda shard, counts: together.__setitem__(shard.directory, counts))
    assert alone == together
    assert len(alone) == len(shards)
    assert content == {path: path.read_bytes() for path in (tmp_path / "work").rglob("*.*")}


@pytest.mark.parametrize("num_workers", [1, 2])
def test_progress_in_bytes_goes_on_inside_shards_and_ends_at_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int):
    shards = make_inputs(tmp_path)
    lines = json.dumps({"text": "some words that take a while to encode\n" * 20}) + "\n"
    for i in range(3):
        (tmp_path / f"{i}.jsonl").write_text(lines * 200)
    spans = [cut for i in range(3) for cut in cut_shards(find_sources([tmp_path / f"{i}.jsonl"])[0], 1 << 30)]
    shards = [dataclasses.replace(shards[i], spans=spans[i]) for i in range(3)]
    monkeypatch.setattr(shard_pool, "SECONDS_BETWEEN_REPORTS", 0.001)
    seen: list[int] = []
    make_shards(shards, num_workers=num_workers, on_done=lambda *_: None, on_bytes=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == sum(shard.num_bytes for shard in shards)
    assert len(set(seen)) > 20


def test_the_error_of_a_worker_arrives_and_stops_the_others(tmp_path: Path):
    shards = make_inputs(tmp_path)
    Path(shards[0].spans[0].source.path).write_bytes(b"\xff")
    done: list[Shard] = []
    with pytest.raises(DataError, match=r"00\.txt is not UTF-8"):
        make_shards(shards, num_workers=2, on_done=lambda shard, counts: done.append(shard))
    assert shards[0] not in done


def is_alive(process_id: int) -> bool:
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


KILLED_PARENT = """
import multiprocessing, os, pickle, signal, sys
from pathlib import Path
from phase8.data.shard_pool import make_shards

directory = Path(sys.argv[1])

def on_done(shard, counts):
    workers = [process.pid for process in multiprocessing.active_children()]
    if sys.argv[2] == "worker":
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
    else:
        (directory / "workers").write_text(" ".join(map(str, workers)))
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    make_shards(pickle.loads((directory / "shards").read_bytes()), num_workers=2, on_done=on_done)
"""


def run_and_kill(directory: Path, whom: str) -> tuple[int, str]:
    """Exit code and error output of a process in which `whom` is killed after the first shard."""
    script = directory / "script.py"
    script.write_text(KILLED_PARENT)
    (directory / "shards").write_bytes(pickle.dumps(make_inputs(directory)))
    command = [sys.executable, str(script), str(directory), whom]
    with (directory / "stderr").open("wb") as stderr:  # a pipe would stay open as long as any worker lives
        exit_code = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=stderr).returncode
    return exit_code, (directory / "stderr").read_text()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads process states from /proc")
def test_workers_end_when_their_parent_is_killed(tmp_path: Path):
    assert run_and_kill(tmp_path, "parent")[0] == -signal.SIGKILL
    workers = [int(word) for word in (tmp_path / "workers").read_text().split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 20
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.01)
    survivors = [worker for worker in workers if is_alive(worker)]
    for worker in survivors:
        os.kill(worker, signal.SIGKILL)
    assert survivors == []


def test_a_killed_worker_is_reported(tmp_path: Path):
    exit_code, stderr = run_and_kill(tmp_path, "worker")
    assert exit_code == 1
    assert "DataError: a worker process was killed" in stderr
