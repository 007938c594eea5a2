"""A run that offloads to a disk and is killed in the middle of a step, or finds the disk full, goes on from its last checkpoint."""

import importlib
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from phase8.checkpoint.load import open_checkpoint
from phase8.checkpoint.reshard.compare import compare_checkpoints
from phase8.checkpoint.step_directories import step_directory_name
from phase8.observe.metrics import read_metrics
from tests.chaos.swapped_training import FOUND
from tests.processes import launched
from tests.train.tiny_run import write_documents

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")  # it imports triton
TRAINING = Path(__file__).with_name("swapped_training.py")
STEPS, SAVED = 6, 2
COMPILED = 900.0  # the library of DeepSpeed, with the other core busy
# Smaller buffers than those of this width DeepSpeed does not offload.
CONFIG = """
run: {{output_dir: {directory}/runs}}
model: {{d_model: 256, num_layers: 2, num_heads: 4, vocab_size: 61, sequence_length: 24, ffn_size: 2048, local_window_size: 6}}
data: {{train: {directory}/train}}
precision: {{dtype: fp32}}
optim: {{learning_rate: 1e-3, warmup_steps: 3}}
train: {{global_batch_size: 2, num_steps: {steps}}}
zero: {{engine: deepspeed, stage: 3, offload_optimizer: nvme, offload_params: nvme}}
checkpoint: {{every_n_steps: {saved}}}
observe: {{tensorboard: false, report: false}}
"""


class Swapping:
    """Runs whose disk is a directory.

    Args:
        directory: For everything.
        library: What reads and writes there.
    """

    def __init__(self, directory, library):
        self.directory, self.disk, self._library = directory, directory / "disk", library
        write_documents(directory / "train", num_documents=100, seed=0)
        (directory / "swap.yaml").write_text(CONFIG.format(directory=directory, steps=STEPS, saved=SAVED))

    def train(self, name, fault="none", step=0):
        """Exit code and output of a run, which goes on if it has begun."""
        settings = (f"run.name={name}", f"zero.nvme_path={self.disk}")
        arguments = (fault, step, self._library, "--config", self.directory / "swap.yaml", "--device", "cpu", "--set", *settings)
        code, output, errors = launched.run([sys.executable, TRAINING, *arguments], timeout_seconds=COMPILED)
        return code, output + errors

    def steps(self, name):
        """Loss and gradient norm by step."""
        records = read_metrics(self.directory / "runs" / name / "metrics.jsonl")
        return {record["step"]: (record["loss"], record["grad_norm"]) for record in records if "grad_norm" in record}

    def checkpoint(self, name, step):
        return open_checkpoint(self.directory / "runs" / name / "checkpoints" / step_directory_name(step))

    def left(self):
        """The files on the disk."""
        return sorted(path.name for path in self.disk.rglob("*") if path.is_file())


def can_compile():
    return importlib.import_module("deepspeed.ops.op_builder").AsyncIOBuilder().is_compatible(verbose=False)


@pytest.mark.slow
@pytest.mark.parametrize("library", ["stand-in", pytest.param("deepspeed", marks=pytest.mark.full)])
def test_a_run_whose_disk_fails_in_the_middle_of_a_step_goes_on_from_its_checkpoint(tmp_path, library):
    """Killed, then started on a full disk, then with room; the second start removes what the kill has left."""
    if library == "deepspeed" and not can_compile():
        pytest.skip("libaio's headers, ninja or a C++ compiler is missing (apt install g++ ninja-build libaio-dev)")
    runs = Swapping(tmp_path, library)
    code, output = runs.train("undisturbed")
    assert code == 0 and runs.left() == [], output

    code, output = runs.train("disturbed", "killed", 2 * SAVED)
    assert code == -9 and list(runs.steps("disturbed")) == list(range(1, 2 * SAVED)), output
    assert any(name.startswith("exp_avg-") for name in runs.left())
    (runs.disk / "disturbed.swap" / "older.swp").write_bytes(b"an older run's")

    code, output = runs.train("disturbed", "full", SAVED + 1)
    assert code == 5 and f"{FOUND}[]" in output, output
    (sentence,) = (line for line in output.splitlines() if line.startswith("error: "))
    assert sentence.startswith("error: zero.nvme_path: ") and "(No space left on device); make room there" in sentence
    assert runs.left() == [] and "Traceback" not in output

    code, output = runs.train("disturbed")
    assert code == 0 and f"{FOUND}[]" in output and runs.left() == [], output
    assert runs.steps("disturbed") == runs.steps("undisturbed") and len(runs.steps("disturbed")) == STEPS
    assert not list(compare_checkpoints(runs.checkpoint("disturbed", STEPS), runs.checkpoint("undisturbed", STEPS)))
