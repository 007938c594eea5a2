"""A run that trains in a second: two small blocks on random documents."""

from pathlib import Path

import numpy as np
import torch
import yaml
from rich.console import Console

from phase8.config.load import load_config
from phase8.config.schema import RunConfig
from phase8.data.indexed import IndexedWriter
from phase8.observe.metrics import read_metrics
from phase8.train.build import Run, build_run
from phase8.train.loop import train

VOCAB_SIZE = 61
CONFIG = """
run: {{name: tiny, output_dir: {directory}/runs}}
model:  # the block with all its parts
  {{d_model: 24, num_layers: 2, num_heads: 4, vocab_size: 61, sequence_length: 24, ffn_size: 40, local_window_size: 6, global_tokens: 3,
    score: lorentz, global_path: linear, chain: both}}
data: {{train: {directory}/train, validation: {directory}/validation}}
precision: {{dtype: fp32}}
optim: {{learning_rate: 1e-2, warmup_steps: 3}}
train: {{global_batch_size: 4, micro_batch_size: 2, num_steps: 20, evaluate_every_n_steps: 10, evaluation_sequences: 4}}
checkpoint: {{every_n_steps: 5}}
observe: {{tensorboard: false, report: false, log_every_n_steps: 100}}
"""


def write_documents(prefix: Path, *, num_documents: int, seed: int, vocab_size: int = VOCAB_SIZE) -> None:
    """Documents of a few dozen tokens each, where a token often repeats the one before."""
    generator = np.random.default_rng(seed)
    with IndexedWriter(prefix, dtype=np.dtype(np.uint16)) as writer:
        for _ in range(num_documents):
            tokens = np.repeat(generator.integers(0, vocab_size, size=20), generator.integers(1, 4, size=20))
            writer.add_document(tokens)


def write_config(directory: Path) -> Path:
    """The config and its data below a directory."""
    write_documents(directory / "train", num_documents=200, seed=0)
    write_documents(directory / "validation", num_documents=20, seed=1)
    path = directory / "tiny.yaml"
    path.write_text(CONFIG.format(directory=directory))
    return path


def with_blend(config: Path, *prefixes: Path) -> Path:
    """A copy of a config that trains on a blend of equal parts, beside the blended data."""
    tree = yaml.safe_load(config.read_text())
    tree["data"]["train"] = [{"path": str(prefix), "weight": 1} for prefix in prefixes]
    copy = prefixes[0].with_name(f"{prefixes[0].name}_blend.yaml")
    copy.write_text(yaml.safe_dump(tree))
    return copy


def tiny_config(path: Path, *overrides: str) -> RunConfig:
    return load_config(path, overrides)


def prepare(path: Path, *overrides: str, resume: str = "auto", console: Console | None = None) -> Run:
    return build_run(tiny_config(path, *overrides), device=torch.device("cpu"), resume=resume, console=console or Console(quiet=True))


def train_tiny(path: Path, *overrides: str, resume: str = "auto") -> Run:
    run = prepare(path, *overrides, resume=resume)
    train(run, resume_command="resume with this")
    return run


def losses(run: Run) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records(run) if "loss" in record}


def records(run: Run) -> list[dict]:
    return read_metrics(run.directory.path / "metrics.jsonl")


def weights(run: Run) -> dict[str, torch.Tensor]:
    return dict(run.engine.train_state.model.named_parameters())


def assert_same_weights(a: Run, b: Run) -> None:
    for name, value in weights(a).items():
        assert torch.equal(value, weights(b)[name]), name
