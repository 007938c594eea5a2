import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from phase8.data.tokenizer_training import train_sentencepiece
from tests.tools.doors import load_door
from tests.train.tiny_run import train_tiny, write_config

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


@pytest.fixture(scope="module")
def trained_transformer(tmp_path_factory):
    """The same of the transformer baseline."""
    directory = tmp_path_factory.mktemp("transformer")
    tokenizer = train_sentencepiece(["def main(): pass\n"] * 50, directory / "tokenizer.model", vocab_size=280)
    config = write_config(directory)
    return train_tiny(config, "train.num_steps=5", "model.vocab_size=300", "model.block=transformer", f"data.tokenizer={tokenizer}").directory.path


@pytest.fixture
def generated_here(capsys, monkeypatch):
    """The door in this process: exit code, output and errors."""
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **options: None, raising=False)  # what pytest captures into has no encoding

    def call(*arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, arguments)])
        return load_door("generate").main(), *capsys.readouterr()

    return call


def generate(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "tools/generate.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_continues_the_prompt_from_a_checkpoint_alone(trained, generated_here):
    options = ("--checkpoint", str(trained), "--prompt", "def ma", "--max-tokens", "20", "--device", "cpu", "--seed")
    first, again, other = generate(*options, "0"), generated_here(*options, "0"), generated_here(*options, "1")
    assert first.returncode == again[0] == other[0] == 0, first.stderr
    assert first.stdout.startswith("def ma") and len(first.stdout) > len("def ma\n")
    assert first.stdout == again[1] != other[1]


def test_problems_are_one_line_with_a_documented_exit_code(trained, tmp_path, generated_here):
    code, _, error = generated_here("--checkpoint", tmp_path / "nothing")
    assert code == 4 and error.startswith("error: there is no checkpoint") and error.count("\n") == 1
    code, _, error = generated_here("--checkpoint", trained, "--top-p", "3")
    assert code == 2 and error.startswith("error: top_p is 3.0")
    damaged = tmp_path / "step-0000000005"
    shutil.copytree(trained / "checkpoints" / "step-0000000005", damaged)
    file = next(damaged.glob("model-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    code, _, error = generated_here("--checkpoint", damaged)
    assert code == 4 and "error: " in error and "Traceback" not in error


@pytest.mark.parametrize(("format", "block"), [("consolidated", "phase8"), ("hf", "phase8"), ("hf", "transformer")])
def test_weights_without_a_manifest_write_what_their_checkpoint_writes(tmp_path, trained, trained_transformer, generated_here, format, block):
    source = {"phase8": trained, "transformer": trained_transformer}[block]
    assert load_door("reshard_checkpoint").main([str(source), str(tmp_path / "weights"), "--format", format]) == 0
    options = ("--prompt", "def ma", "--max-tokens", 20, "--device", "cpu")
    of_checkpoint, of_weights = (generated_here("--checkpoint", path, *options) for path in (source, tmp_path / "weights"))
    assert of_checkpoint[0] == 0 and of_weights == of_checkpoint and len(of_weights[1]) > len("def ma\n")
    for tokenizer in (tmp_path / "weights").glob("tokenizer.*"):
        tokenizer.unlink()
    code, _, error = generated_here("--checkpoint", tmp_path / "weights", *options)
    assert code == 4 and "holds no tokenizer" in error


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda path: (path / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda path: (path / "model.safetensors").write_bytes(b"\x08" + bytes(7) + b"{}      "), "there are weights of 0 layers"),
        (lambda path: (path / "config.json").write_text('{"model": {"num_layers": "two"}}'), "model.num_layers is 'two', but a whole number"),
        (lambda path: (path / "config.json").write_text('{"model": {"num_layer": 2}}'), "unknown key model.num_layer; did you mean"),
        (lambda path: (path / "config.json").write_text('{"model": []}'), "model_type is None"),
        (lambda path: (path / "tokenizer.model").symlink_to("/dev/zero"), "tokenizer.model is a link"),
    ],
)
def test_damaged_weights_are_refused_in_one_sentence(tmp_path, trained, generated_here, damage, sentence):
    weights = tmp_path / "weights"
    assert load_door("reshard_checkpoint").main([str(trained), str(weights), "--format", "consolidated"]) == 0
    (weights / "tokenizer.model").unlink()
    damage(weights)
    code, _, error = generated_here("--checkpoint", weights, "--device", "cpu")
    assert code == 4 and sentence in error and error.count("\n") == 1
