"""A checkpoint of a tiny run, and its manifest with other values under a right checksum."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.checkpoint.fuzzing import seal
from tests.train.tiny_run import train_tiny, write_config

STEP = 3
# Where in the metadata, what is put there, and what the sentence about it says.
FORGERIES: list[tuple[str, Any, str]] = [
    ("config", [1], "config is [1], but an object of sections is needed"),
    ("config", None, "holds no config"),
    ("config.model", "x" * 100_000, "model"),
    ("config.model.d_model", 2**40, "d_model"),
    ("config.model.d_model", "24", "d_model"),
    ("config.model.num_layers", 10**9, "num_layers"),
    ("config.model.num_layers", 3, "model.num_layers is 3, but there are weights of 2 layers"),
    ("config.model.num_heads", 2**40, "num_heads"),
    ("config.model.head_size", 2**40, "head_size"),
    ("config.model.ffn_size", 2**40, "ffn_size"),
    ("config.model.vocab_size", 10**12, "vocab_size"),
    ("config.model.vocab_size", 62, "vocab_size 62"),
    ("config.model.low_rank_rank", 2**40, "low_rank_rank"),
    ("config.model.convolution_size", 10**9, "convolution_size"),
    ("config.model.local_window_size", ["x"] * 1000, "local_window_size"),
    ("config.model.x\x1b[2J", 1, "unknown key"),
    ("config.precision.dtype", "fp8", "precision.dtype is 'fp8', but one of bf16, fp32 is needed"),
    ("config.train.seed", -1, "train.seed"),
    ("position", None, "holds no position"),
    ("position", 7, "position is 7"),
    ("position.step", "7", "position.step is '7'"),
    ("position.step", 4, "position.step is 4, but the checkpoint is of step 3"),
    ("position.step", True, "position.step is True"),
    ("position.samples_consumed", -5, "position.samples_consumed is -5"),
    ("position.samples_consumed", 2, "position.samples_consumed is 2, but each of 3 steps reads at least one"),
    ("position.samples_consumed", 2**64, "position.samples_consumed"),
    ("position.samples_consumed", 10**18, "position.samples_consumed is 1000000000000000000"),
    ("position.tokens_seen", 10**18, "position.tokens_seen is 1000000000000000000"),
    ("position.tokens_seen", 10**14, "position.tokens_seen is 100000000000000, more than 12 sequences can hold"),
    ("position.tokens_seen", 1.5, "position.tokens_seen is 1.5"),
    ("position.consecutive_skipped", 2, "position.consecutive_skipped is 2, but position.total_skipped is 0"),
    ("position.recent_losses", ["x"], "position.recent_losses.0 is 'x'"),
    ("position.recent_losses", [1.0] * 5000, "position.recent_losses"),
    ("position.rolled_back_to", 9, "position.rolled_back_to is 9"),
    ("position.rollbacks_in_a_row", "x" * 100_000, "position.rollbacks_in_a_row"),
    ("position.of_tomorrow", 1, "position.of_tomorrow"),
    ("global_batch_size", 0, "global_batch_size is 0"),
    ("global_batch_size", 10**18, "global_batch_size is 1000000000000000000"),
    ("global_batch_size", "4", "global_batch_size is '4'"),
    ("data_fingerprint", 3, "data_fingerprint is 3"),
    ("data_fingerprint.sources", {}, "data_fingerprint.sources"),
    ("data_fingerprint.sources.0.num_tokens", -1, "data_fingerprint.sources.0.num_tokens is -1"),
    ("data_fingerprint.sources.0.name", None, "data_fingerprint.sources.0.name is None"),
    ("data_fingerprint.sources.0.documents", [1], "data_fingerprint.sources.0.documents is"),
    ("data_fingerprint.sources.0.files", [{"name": "a"}], "data_fingerprint.sources.0.files.0 lacks idx_sha256"),
    ("data_fingerprint.sources.0.files", 3, "data_fingerprint.sources.0.files is 3"),
    ("validation_fingerprint", 3, "validation_fingerprint is 3"),
    ("validation_fingerprint.sources.0.num_tokens", -1, "validation_fingerprint.sources.0.num_tokens is -1"),
    ("losses", {"training": "low", "num_steps": 3}, "losses.training is 'low'"),
    ("order_history", 3, "order_history is 3"),
    ("order_history", {"begin": 10**9, "draws": [{"key": 0, "drawn": 1}], "left": []}, "order_history.begin is 1000000000, but the run has read"),
    ("order_history", {"begin": 1, "draws": [], "left": []}, "order_history.draws has 0 entries, but data_fingerprint has 1 sources"),
    ("order_history", {"begin": 1, "draws": [{"key": 0, "drawn": -1}], "left": []}, "order_history.draws.0.drawn is -1"),
    ("order_history", {"begin": 1, "draws": [], "left": [{"source": 3, "draws": {"key": 0, "drawn": 1}}]}, "order_history.left.0"),
    ("random_state", [1], "random_state is [1]"),
    ("random_state", {}, "the random state in the checkpoint's metadata is not valid"),
    ("random_state.numpy.position", 10**6, "numpy's position is 1000000"),
    ("random_state.python", "\x1b[2J" * 10_000, "the random state"),
    ("torch_version", 3, "torch_version is 3"),
]


def write_run(directory: Path) -> Path:
    """The checkpoint of three steps of a tiny run, whose config and data lie in `directory`."""
    config = write_config(directory)
    run = train_tiny(config, "train.num_steps=3", "optim.warmup_steps=1", "train.evaluate_every_n_steps=0")
    return run.directory.checkpoints / f"step-{STEP:010d}"


def forge(directory: Path, path: str, value: Any) -> None:
    """Puts a value into the metadata of a checkpoint."""
    document = json.loads((directory / "manifest.json").read_bytes())
    del document["checksum"]
    holder = document["metadata"]
    *parents, last = path.split(".")
    for name in parents:
        holder = holder[int(name)] if isinstance(holder, list) else holder[name]
    holder[last] = value
    (directory / "manifest.json").write_bytes(seal(json.dumps(document)))
