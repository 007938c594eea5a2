"""Writes a checkpoint with the code of some revision, and what that code says of it; see README.md.

    PYTHONPATH=TREE python write_fixture.py TREE DESTINATION [--processes N] [--set key=value ...]

TREE is the source of the revision. It is used as its users would: its reader and writer of data, its launch/pretrain.py, its reader of checkpoints.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from phase8.checkpoint.load import open_checkpoint
from phase8.data.indexed import IndexedWriter

SAVED_STEP, LAST_STEP = 4, 8
CONFIG = """\
run: {name: tiny, output_dir: runs}
model: {block: phase8, d_model: 16, num_layers: 1, num_heads: 2, vocab_size: 32, sequence_length: 16, ffn_size: 24, local_window_size: 6}
data: {train: data/train, validation: data/validation}
precision: {dtype: fp32}
optim: {learning_rate: 1e-2, warmup_steps: 3}
train: {global_batch_size: 4, micro_batch_size: 2, num_steps: 8, evaluate_every_n_steps: 0}
checkpoint: {every_n_steps: 4}
observe: {tensorboard: false, report: false, log_every_n_steps: 100}
"""


def main() -> None:
    """Trains to step 4, keeps that checkpoint, and trains on to say which losses follow."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tree", type=Path)
    parser.add_argument("destination", type=Path)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--set", nargs="*", default=[])
    arguments = parser.parse_args()
    destination = arguments.destination.resolve()
    destination.mkdir(parents=True)
    (destination / "config.yaml").write_text(CONFIG)
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)  # paths in the config, and so in the checkpoint, are relative
        for name, num_documents, seed in (("train", 40, 0), ("validation", 4, 1)):
            _write_documents(Path("data") / name, num_documents=num_documents, seed=seed)
        checkpoint = Path("runs/tiny/checkpoints") / f"step-{SAVED_STEP:010d}"
        _train(arguments, destination, f"train.stop_at_step={SAVED_STEP}")
        shutil.copytree(checkpoint, destination / checkpoint.name)
        shutil.copytree("data", destination / "data")
        _train(arguments, destination)
        records = [json.loads(line) for line in Path("runs/tiny/metrics.jsonl").read_text().splitlines()]
    stored = open_checkpoint(destination / checkpoint.name)
    expected = {
        "settings": arguments.set,
        "processes": arguments.processes,
        "torch": str(torch.__version__),
        "position": stored.metadata["position"],
        "losses": {record["step"]: record["loss"] for record in records if record.get("loss") is not None},
        "tensors": {name: _described(stored.read(name)) for name in stored.tensor_names},
    }
    (destination / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def _write_documents(prefix: Path, *, num_documents: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    with IndexedWriter(prefix, dtype=np.dtype(np.uint16)) as writer:
        for _ in range(num_documents):
            writer.add_document(np.repeat(generator.integers(0, 32, size=10), generator.integers(1, 4, size=10)))


def _train(arguments: argparse.Namespace, destination: Path, *settings: str) -> None:
    """Runs the door of the revision, under torchrun where there are several processes."""
    door = [str(arguments.tree.resolve() / "launch" / "pretrain.py")]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.processes}"]
    launcher = [sys.executable] if arguments.processes == 1 else [sys.executable, *torchrun]
    options = ["--config", str(destination / "config.yaml"), "--device", "cpu", "--set", *arguments.set, *settings, "run.name=tiny"]
    subprocess.run([*launcher, *door, *options], check=True)


def _described(tensor: torch.Tensor) -> list[object]:
    """dtype, shape and SHA-256 of the bytes."""
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return [str(tensor.dtype), list(tensor.shape), hashlib.sha256(data).hexdigest()]


if __name__ == "__main__":
    main()
