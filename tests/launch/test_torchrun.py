"""The launcher under torchrun: the same training whatever the ranks, and checkpoints that go on elsewhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = """
run: {{name: tiny, output_dir: {directory}/runs}}
model: {{d_model: 24, num_layers: 2, num_heads: 4, vocab_size: 61, sequence_length: 24, ffn_size: 40, local_window_size: [6, 12],
  global_tokens: 3, score: lorentz, chain: both}}
data: {{train: {directory}/train, validation: {directory}/validation}}
precision: {{dtype: fp32}}
optim: {{learning_rate: 1e-2, warmup_steps: 3}}
train: {{global_batch_size: 4, num_steps: 6, evaluate_every_n_steps: 3, evaluation_sequences: 5}}
checkpoint: {{every_n_steps: 3}}
observe: {{tensorboard: false, report: false}}
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Starts the launcher, on several ranks through torchrun, and returns what the run recorded."""
    sys.path.insert(0, str(ROOT / "tests" / "train"))
    from tiny_run import write_documents

    directory = tmp_path_factory.mktemp("torchrun")
    write_documents(directory / "train", num_documents=200, seed=0)
    write_documents(directory / "validation", num_documents=20, seed=1)
    (directory / "tiny.yaml").write_text(CONFIG.format(directory=directory))

    def start(name, *settings, num_ranks=None, resume="auto"):
        launcher = [sys.executable] if num_ranks is None else [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={num_ranks}"]
        options = ["--config", directory / "tiny.yaml", "--device", "cpu", "--resume", resume, "--set", f"run.name={name}", *settings]
        command = [*launcher, str(ROOT / "launch" / "pretrain.py"), *map(str, options)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
        path = directory / "runs" / name / "metrics.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return done, records

    start.directory = directory
    return start


def figures(records):
    return [(record["loss"], record["grad_norm"]) for record in records if "grad_norm" in record]


def losses_held_out(records):
    return [record["validation_loss"] for record in records if "validation_loss" in record]


@pytest.fixture(scope="module")
def alone(runs):
    done, records = runs("alone")
    assert done.returncode == 0, done.stderr
    return records


def test_one_process_of_torchrun_is_the_plain_process_bit_for_bit(runs, alone):
    done, records = runs("torchrun", num_ranks=1)
    assert done.returncode == 0, done.stderr
    assert figures(records) == figures(alone) and losses_held_out(records) == losses_held_out(alone) and len(figures(records)) == 6


def test_four_ranks_train_as_one_and_one_goes_on_from_their_checkpoint(runs, alone):
    settings = ("parallel.tensor_parallel_size=2", "zero.stage=3")
    done, records = runs("four", *settings, "train.stop_at_step=3", num_ranks=4)
    assert done.returncode == 0, done.stderr
    assert "tp 2" in done.stdout and "ZeRO stage 3" in done.stdout
    done, records = runs("four")  # one process, which takes the run over
    assert done.returncode == 0 and "resumed from" in done.stdout, done.stderr
    for found, expected in zip(figures(records), figures(alone), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    assert losses_held_out(records) == pytest.approx(losses_held_out(alone), rel=1e-5)


def test_two_ranks_go_on_from_the_checkpoint_of_one(runs, alone):
    done, _ = runs("handed_over", "train.stop_at_step=3")
    assert done.returncode == 0, done.stderr
    done, records = runs("handed_over", "zero.stage=1", "zero.offload_optimizer=cpu", num_ranks=2)
    assert done.returncode == 0 and "resumed from" in done.stdout, done.stderr
    assert losses_held_out(records) == pytest.approx(losses_held_out(alone), rel=1e-5)


def test_a_mistake_in_the_config_is_told_once(runs):
    done, records = runs("wrong", "parallel.tensor_parallel_size=3", num_ranks=2)
    assert done.returncode == 1 and records == []
    assert done.stderr.count("parallel.tensor_parallel_size 3 does not divide model.num_heads 4; change one of them.") == 1
