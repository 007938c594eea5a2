import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import train_tiny, write_config

from phase8.data.tokenizer_training import train_sentencepiece

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Run directory of a tiny model with a tokenizer that was deleted after training."""
    directory = tmp_path_factory.mktemp("generate")
    config = write_config(directory)
    tokenizer = train_sentencepiece(["def main(): pass\n"] * 50, directory / "tokenizer.model", vocab_size=280)
    run = train_tiny(config, "train.num_steps=5", "model.vocab_size=300", f"data.tokenizer={tokenizer}")
    tokenizer.unlink()
    return run.directory.path


def generate(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "tools/generate.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_continues_the_prompt_from_a_checkpoint_alone(trained):
    first, again, other = (generate("--checkpoint", str(trained), "--prompt", "def ma", "--max-tokens", "20", "--seed", seed) for seed in "001")
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("def ma") and len(first.stdout) > len("def ma\n")
    assert first.stdout == again.stdout != other.stdout


def test_problems_are_one_line_with_a_documented_exit_code(trained, tmp_path):
    missing = generate("--checkpoint", str(tmp_path / "nothing"))
    assert missing.returncode == 4 and missing.stderr.startswith("error: there is no checkpoint") and missing.stderr.count("\n") == 1
    wrong = generate("--checkpoint", str(trained), "--top-p", "3")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: top_p is 3.0")
    damaged = tmp_path / "step-0000000005"
    shutil.copytree(trained / "checkpoints" / "step-0000000005", damaged)
    file = next(damaged.glob("model-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    broken = generate("--checkpoint", str(damaged))
    assert broken.returncode == 4 and "error: " in broken.stderr and "Traceback" not in broken.stderr
