"""Training as users start it: launch/pretrain.py with a tiny config, alone or under a launcher."""

import sys

import pytest

from phase8.checkpoint.load import list_checkpoints
from phase8.checkpoint.step_directories import step_of
from phase8.observe.metrics import read_metrics
from tests.processes.launched import ROOT, torchrun_command
from tests.train.tiny_run import train_tiny, write_documents

# A small learning rate: twenty steps then amplify the order of sums, in float32, to 1e-7 of the loss.
CONFIG = """
run: {{name: tiny, output_dir: {directory}/runs}}
model: {{d_model: 24, num_layers: 2, num_heads: 4, vocab_size: 61, sequence_length: 24, ffn_size: 40, local_window_size: [6, 12],
  global_tokens: 3, score: lorentz, chain: both}}
data: {{train: {directory}/train, validation: {directory}/validation}}
precision: {{dtype: fp32}}
optim: {{learning_rate: 1e-3, warmup_steps: 3}}
train: {{global_batch_size: 4, num_steps: 24, evaluate_every_n_steps: 6, evaluation_sequences: 5}}
checkpoint: {{every_n_steps: 3}}
observe: {{tensorboard: false, report: false}}
"""


class LaunchedTraining:
    """Commands that train, and what their runs recorded. Runs differ in their name.

    Args:
        directory: Where config, data and runs are.
    """

    def __init__(self, directory):
        self.directory, self.config = directory, directory / "tiny.yaml"
        write_documents(directory / "train", num_documents=200, seed=0)
        write_documents(directory / "validation", num_documents=20, seed=1)
        self.config.write_text(CONFIG.format(directory=directory))

    def door(self, name, *settings):
        """The launcher and its arguments."""
        return [str(ROOT / "launch" / "pretrain.py"), "--config", str(self.config), "--device", "cpu", "--set", f"run.name={name}", *settings]

    def plain(self, name, *settings):
        """The command of one process."""
        return [sys.executable, *self.door(name, *settings)]

    def torchrun(self, name, *settings, num_ranks, options=()):
        """The command of several on this host."""
        return torchrun_command(*self.door(name, *settings), num_processes=num_ranks, options=options)

    def in_this_process(self, name, *settings):
        """Trains without a launcher, or goes on; returns the step of the checkpoint that it went on from."""
        saved = self.saved_steps(name)
        train_tiny(self.config, f"run.name={name}", *settings)
        return saved[-1] if saved else None

    def figures(self, name):
        """Loss and gradient norm of every step so far."""
        return [(record["loss"], record["grad_norm"]) for record in self._records(name) if "grad_norm" in record]

    def losses_held_out(self, name):
        """Of every evaluation so far."""
        return [record["validation_loss"] for record in self._records(name) if "validation_loss" in record]

    def events(self, name, kind):
        """Records of what happened between steps."""
        return [record for record in self._records(name) if record.get("event") == kind]

    def saved_steps(self, name):
        """Steps of the checkpoints, in order."""
        return sorted(step_of(path.name) for path in list_checkpoints(self.directory / "runs" / name / "checkpoints"))

    def assert_same(self, name, other, *, num_steps):
        """Two runs, the second of which may have gone on, drew the same curve."""
        found = self.figures(name)
        assert len(found) == num_steps
        for step, (figures, expected) in enumerate(zip(found, self.figures(other), strict=False), start=1):
            assert figures[0] == pytest.approx(expected[0], rel=1e-5), f"loss of step {step}"
            assert figures[1] == pytest.approx(expected[1], rel=1e-4), f"gradient norm of step {step}"

    def _records(self, name):
        path = self.directory / "runs" / name / "metrics.jsonl"
        return read_metrics(path) if path.exists() else []
