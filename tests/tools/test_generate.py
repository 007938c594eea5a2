import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from phase8 import terminal
from phase8.data.tokenizer_training import train_sentencepiece
from phase8.generate import decode, restore
from phase8.generate.prompts import Prompt, read_prompts
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


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nSee documentation")
HOST = RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 2 bytes.")
FEWER_BITS = "weights of fewer bits (tools/quantize_checkpoint.py SRC DST --bits 4)"


def fail_with(error, monkeypatch, owner, name):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(owner, name, fail)


@pytest.mark.parametrize("error", [OUT_OF_MEMORY, HOST, MemoryError()])
def test_a_model_that_does_not_fit_into_memory_is_one_sentence(trained, generated_here, monkeypatch, error):
    fail_with(error, monkeypatch, restore, "restore_state")
    where = "cpu" if error is OUT_OF_MEMORY else "the host"
    expected = f"error: the memory of {where} did not suffice while the model was loaded; give {FEWER_BITS}.\n"
    assert generated_here("--checkpoint", trained, "--device", "cpu") == (9, "", expected)


@pytest.mark.parametrize("name", ["Decoder.feed", "DecodingLoop.advance", "DecodingLoop.__init__"])
@pytest.mark.parametrize(("num_samples", "fewer"), [(1, ""), (3, "a --batch-size below 3, or ")])
def test_text_that_does_not_fit_into_memory_is_one_sentence(trained, generated_here, monkeypatch, name, num_samples, fewer):
    owner, method = name.split(".")
    fail_with(HOST, monkeypatch, vars(decode)[owner], method)
    code, output, errors = generated_here("--checkpoint", trained, "--device", "cpu", "--prompt", "def", "--num-samples", num_samples)
    doing = "a sequence was continued" if num_samples == 1 else "3 sequences were continued"
    assert (code, errors.count("\n")) == (9, 1)
    assert errors == (
        f"error: the memory of the host did not suffice while {doing}; give {fewer}shorter prompts, or a smaller --max-tokens, or {FEWER_BITS}.\n"
    )
    assert output.startswith("def") or num_samples > 1 or name == "DecodingLoop.__init__"


def test_other_errors_of_generation_are_no_lack_of_memory(trained, generated_here, monkeypatch):
    fail_with(RuntimeError("a shape"), monkeypatch, decode.Decoder, "feed")
    with pytest.raises(RuntimeError, match="a shape"):
        generated_here("--checkpoint", trained, "--device", "cpu")


def records(output: str) -> list[dict]:
    return [json.loads(line) for line in output.splitlines()]


def test_prompts_of_a_file_and_samples_are_what_each_is_alone(trained, generated_here, tmp_path):
    (tmp_path / "prompts.txt").write_text("def ma\n\npass\ndef main(): pa\n")
    options = ("--checkpoint", trained, "--max-tokens", 12, "--device", "cpu", "--json")
    code, output, _ = generated_here(*options, "--batch-file", tmp_path / "prompts.txt", "--num-samples", 2, "--batch-size", 4)
    found = records(output)
    assert code == 0
    expected = [(line, p, s) for line, p in ((1, "def ma"), (3, "pass"), (4, "def main(): pa")) for s in (0, 1)]  # a blank line is left out
    assert [(each["line"], each["prompt"], each["sample"]) for each in found] == expected
    for each in found:
        alone = records(generated_here(*options, "--prompt", each["prompt"], "--seed", each["seed"])[1])
        assert [alone[0][key] for key in ("text", "tokens", "reason")] == [each[key] for key in ("text", "tokens", "reason")]
        assert (each["seconds"] > 0 and (each["reason"], each["tokens"]) == ("max_tokens", 12)) or each["reason"] == "end_of_document"
    assert len({each["text"] for each in found}) > 3
    stopped = records(generated_here(*options, "--batch-file", tmp_path / "prompts.txt", "--num-samples", 2, "--batch-size", 4, "--stop", "a")[1])
    assert [(each["prompt"], each["sample"]) for each in stopped] == [(each["prompt"], each["sample"]) for each in found]
    lengths = [each["tokens"] for each in stopped]
    assert lengths[:4] != sorted(lengths[:4])  # some ended before others that come first


def test_a_stop_text_ends_the_text_and_is_not_written(trained, generated_here):
    options = ("--checkpoint", trained, "--prompt", "def ma", "--max-tokens", 20, "--device", "cpu")
    text = generated_here(*options)[1].removesuffix("\n").removeprefix("def ma")
    stop = text[5:8]
    before = text[: text.index(stop)]
    assert generated_here(*options, "--stop", "@@@@", "--stop", stop)[1] == f"def ma{before}\n"
    (found,) = records(generated_here(*options, "--stop", stop, "--json")[1])
    assert (found["text"], found["reason"]) == (before, "stop")


@pytest.mark.parametrize("text", ["def ma\n\npass\n", '{"prompt": "def ma"}\n{"prompt": "pass", "id": 7}\n'])
def test_prompts_come_from_standard_input(trained, generated_here, monkeypatch, text):
    options = ("--checkpoint", trained, "--max-tokens", 5, "--device", "cpu")
    expected = [generated_here(*options, "--prompt", prompt)[1] for prompt in ("def ma", "pass")]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert generated_here(*options, "--batch-file", "-")[1] == f"[prompt 1, sample 1]\n{expected[0]}[prompt 2, sample 1]\n{expected[1]}"
    # A byte that is not UTF-8 reaches Python as a lone surrogate; the lines around it are continued. A byte order mark is no part of a line.
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfdef ma\n \n\xff\npass"), errors="surrogateescape"))
    told = []
    monkeypatch.setattr(terminal, "tell", told.append)
    typed = generated_here(*options, "--interactive")[1]
    assert told[0] == "that line is not UTF-8 and is passed over\n"
    assert typed == "".join(text.removeprefix(prompt) for text, prompt in zip(expected, ("def ma", "pass"), strict=True))


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (("--stop", ""), 2, "--stop is empty"),
        (("--num-samples", 0, "--batch-size", -1), 2, "--num-samples is 0, but at least 1 is needed."),
        (("--interactive", "--num-samples", 2), 2, "--num-samples is 2, but --interactive writes one"),
        (("--batch-file", "nothing.txt"), 3, "cannot read nothing.txt: No such file"),
        (("--batch-file", "empty.txt"), 3, "empty.txt holds no prompt"),
        (("--batch-file", "latin.txt"), 3, "latin.txt is not UTF-8 (byte 1)"),
        (("--batch-file", "text.jsonl"), 3, "line 3 of text.jsonl is not a JSON object"),
        (("--batch-file", "key.jsonl"), 3, 'line 2 of key.jsonl has no text under the key "prompt"'),
        (("--batch-file", "more.jsonl"), 3, 'line 3 of more.jsonl has the key "max_tokens", but --max-tokens applies to all prompts'),
        (("--batch-file", "first.jsonl"), 3, 'line 1 of first.jsonl has no text under the key "prompt"'),
        (("--batch-file", "comma.jsonl"), 3, "line 1 of comma.jsonl is not a JSON object"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_loaded(generated_here, tmp_path, monkeypatch, options, code, sentence):
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "empty.txt": b" \n\n", "latin.txt": b"a\xe9", "text.jsonl": b'{"prompt": "a"}\n\nb\n', "key.jsonl": b'{"prompt": "a"}\n{"prompt": 3}\n',
        "first.jsonl": b'{"text": "a"}\n', "more.jsonl": b'{"prompt": "a"}\n\n{"prompt": "y", "max_tokens": 3}\n',
        "comma.jsonl": b'{"prompt": "a",}\n{"prompt": "y"}\n',
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
    found, output, error = generated_here("--checkpoint", tmp_path / "none", *options)
    assert (found, output) == (code, "") and sentence in error and "Traceback" not in error


def test_lines_of_a_batch_file_end_as_lines_of_a_file_do(tmp_path):
    (tmp_path / "p.jsonl").write_bytes('{"prompt": "a\u2028b"}\r\n\r\n{"prompt": "c\x85"}'.encode())
    assert read_prompts(tmp_path / "p.jsonl") == [Prompt("a\u2028b", 1), Prompt("c\x85", 3)]
    (tmp_path / "p.txt").write_bytes(b"a\x0cb\n \n c \n")
    assert read_prompts(tmp_path / "p.txt") == [Prompt("a\x0cb", 1), Prompt(" c ", 3)]


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path, monkeypatch):
    for name, content in {"p.txt": "a\nb\n", "p.jsonl": '{"prompt": "a"}\n{"prompt": "b"}\n'}.items():
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
        assert read_prompts(tmp_path / name) == [Prompt("a", 1), Prompt("b", 2)]
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((tmp_path / name).read_bytes())))
        assert read_prompts(Path("-")) == [Prompt("a", 1), Prompt("b", 2)]


def test_a_transformer_beyond_its_training_is_said(trained, trained_transformer, generated_here, monkeypatch):
    told = []
    monkeypatch.setattr(terminal, "tell", told.append)
    length = restore.restore_model(trained, device=torch.device("cpu"))[0].section.sequence_length
    for run, most in ((trained, length), (trained_transformer, length - 1), (trained_transformer, length)):
        assert generated_here("--checkpoint", run, "--prompt", "", "--max-tokens", most, "--device", "cpu")[0] == 0
    assert [sentence for sentence in told if "tok/s" not in sentence] == [
        f"prompt and continuation may have {length + 1} tokens, but this transformer was trained on sequences of {length}; its text may make no "
        "sense beyond that\n"
    ]


def test_another_tokenizer_is_said(trained, tmp_path, generated_here, monkeypatch):
    said = []
    monkeypatch.setattr("phase8.terminal.tell", said.append)
    other = train_sentencepiece(["for x in many: more\n"] * 50, tmp_path / "other.model", vocab_size=280)
    stored = trained / "checkpoints/step-0000000005/tokenizer.model"
    options = ("--checkpoint", trained, "--prompt", "def ma", "--max-tokens", 3, "--device", "cpu", "--tokenizer")
    assert generated_here(*options, stored)[0] == generated_here(*options, other)[0] == 0
    assert [sentence for sentence in said if "tok/s" not in sentence] == [
        f"{stored} is the tokenizer of these weights, but that of --tokenizer, {other}, is another: an id may mean other text\n"
    ]
    larger = train_sentencepiece(["Größe und 日本語, naïve words; plain words too.\n" * 9], tmp_path / "larger.model", vocab_size=301)
    code, output, error = generated_here(*options, larger)
    assert (code, output) == (2, "") and "has 301 ids, but the model has 300; give the tokenizer it was trained with." in error


def test_problems_are_one_line_with_a_documented_exit_code(trained, tmp_path, generated_here):
    code, _, error = generated_here("--checkpoint", tmp_path / "nothing")
    assert code == 4 and error.startswith("error: there is no checkpoint") and error.count("\n") == 1
    code, _, error = generated_here("--checkpoint", trained, "--top-p", "3")
    assert code == 2 and error.startswith("error: --top-p is 3.0")
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
        (lambda path: (path / "config.json").write_text('{"model": {"num_layer": 2}}'), "unknown key model.num_layer, which a later release may"),
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
