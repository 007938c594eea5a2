"""Special token ids of models made elsewhere: a text ends at any of several, and all come back, with a tokenizer and without."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import transformers

from phase8.checkpoint.huggingface.text_settings import id_settings
from phase8.checkpoint.load import open_checkpoint
from phase8.config.load import load_config
from phase8.config.model_section import ModelSection
from phase8.config.schema import DataSection
from phase8.data.tokenizer import load_tokenizer
from phase8.errors import CheckpointCorruptError
from phase8.train.sample import sample_text
from tests.checkpoint.huggingface.exported import exported, run
from tests.checkpoint.huggingface.test_exported_text import byte_level
from tests.model.small import scaled_down
from tests.tools.doors import load_door

PROMPT = "def main("
NAMES = {"bos_token_id": "begin_id", "eos_token_id": "end_ids", "pad_token_id": "padding_id"}


def small_llama() -> transformers.LlamaForCausalLM:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=400, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, max_position_embeddings=64,
        initializer_range=0.4, bos_token_id=0, eos_token_id=[1, 9], pad_token_id=-1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def ids_in(directory: Path, name: str) -> dict[str, object]:
    content = json.loads((directory / name).read_text())
    return {key: content.get(key) for key in NAMES}


@pytest.fixture
def generated(capsys, monkeypatch):
    """Runs tools/generate.py, and returns the object that it writes."""
    monkeypatch.setattr("sys.stdout.reconfigure", lambda **_: None, raising=False)  # what pytest captures into has no encoding

    def call(checkpoint: Path, *options: str) -> dict[str, object]:
        arguments = ("--checkpoint", str(checkpoint), "--prompt", PROMPT, "--max-tokens", "30", "--temperature", "0", "--json", "--device", "cpu")
        monkeypatch.setattr("sys.argv", ["generate.py", *arguments, *options])
        capsys.readouterr()
        assert load_door("generate").main() == 0
        return json.loads(capsys.readouterr().out)

    return call


def test_a_llama_with_several_ends_stops_at_any_as_in_transformers_and_gives_them_back(tmp_path, generated):
    llama = small_llama()
    directory = tmp_path / "llama"
    llama.save_pretrained(directory)
    (directory / "tokenizer.json").write_bytes(byte_level(adds_tokens=True))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    tokenizer = load_tokenizer(directory / "tokenizer.json")
    prompt = torch.tensor([[0, *tokenizer.encode(PROMPT)]])
    options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "max_new_tokens": 30, "pad_token_id": 2}
    drawn = llama.generate(prompt, eos_token_id=None, **options)[0, prompt.shape[1] :].tolist()
    end = next(token for token in drawn[3:] if token not in drawn[:3])  # an end that the tokenizer does not name
    ends = [1, end, 399]
    (directory / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": ends}))
    theirs = transformers.LlamaForCausalLM.from_pretrained(directory).generate(prompt, **options)[0, prompt.shape[1] :].tolist()
    assert 1 not in drawn and theirs == drawn[: drawn.index(end) + 1] and len(theirs) < 30
    assert run(directory, tmp_path / "imported") == run(directory, tmp_path / "merged", "--format", "consolidated") == 0
    assert run(tmp_path / "imported", tmp_path / "again", "--format", "hf") == 0
    for each in ("llama", "imported", "merged", "again"):
        found = generated(tmp_path / each)
        assert (found["text"], found["tokens"], found["reason"]) == (tokenizer.decode(theirs[:-1]), len(theirs) - 1, "end_of_document"), each
    for name in ("config.json", "generation_config.json"):
        assert ids_in(tmp_path / "again", name) == {"bos_token_id": 0, "eos_token_id": ends, "pad_token_id": 2}
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again.generate(prompt, **options)[0, prompt.shape[1] :].tolist() == theirs


def test_a_llama_without_a_tokenizer_keeps_its_ids(tmp_path):
    small_llama().save_pretrained(tmp_path / "llama")
    (tmp_path / "llama" / "generation_config.json").unlink()
    assert ids_in(tmp_path / "llama", "config.json") == {"bos_token_id": 0, "eos_token_id": [1, 9], "pad_token_id": -1}
    assert run(tmp_path / "llama", tmp_path / "imported") == 0
    data = open_checkpoint(tmp_path / "imported").metadata["config"]["data"]
    assert {key: data[key] for key in NAMES.values()} == {"begin_id": 0, "end_ids": [1, 9], "padding_id": None}
    assert run(tmp_path / "imported", tmp_path / "merged", "--format", "consolidated") == run(tmp_path / "merged", tmp_path / "back") == 0
    for number, source in enumerate(("imported", "merged", "back")):
        assert run(tmp_path / source, tmp_path / f"again{number}", "--format", "hf") == 0
        for name in ("config.json", "generation_config.json"):
            assert ids_in(tmp_path / f"again{number}", name) == {"bos_token_id": 0, "eos_token_id": [1, 9], "pad_token_id": None}


def test_a_model_that_brings_its_code_keeps_its_ids(tmp_path):
    data = DataSection(end_ids=(3, 5), begin_id=7, padding_id=60)
    _, directory = exported(tmp_path, scaled_down(ModelSection()), data=data)
    assert ids_in(directory, "config.json") == {"bos_token_id": 7, "eos_token_id": [3, 5], "pad_token_id": 60}
    assert run(directory, tmp_path / "back") == 0
    found = open_checkpoint(tmp_path / "back").metadata["config"]["data"]
    assert {key: found[key] for key in NAMES.values()} == {"begin_id": 7, "end_ids": [3, 5], "padding_id": 60}


def test_the_end_of_a_document_is_one_of_the_ends_that_are_exported(tmp_path):
    attachments = {"tokenizer.json": byte_level(adds_tokens=False)}
    _, directory = exported(tmp_path, scaled_down(ModelSection(), vocab_size=400), attachments=attachments, data=DataSection(end_ids=(9,)))
    assert ids_in(directory, "generation_config.json")["eos_token_id"] == [9, 1]


def test_a_sample_of_training_ends_at_any_of_them(monkeypatch, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(byte_level(adds_tokens=False))
    asked = []
    monkeypatch.setattr("phase8.train.sample.continued_text", lambda *_, **options: asked.append(options["end_ids"]) or "")
    config = load_config(os.devnull, ["data.train=mine", f"data.tokenizer={tmp_path}/tokenizer.json", "data.end_ids=[9,11]"])
    sample_text(lambda: None, load_tokenizer(tmp_path / "tokenizer.json"), config, torch.device("cpu"))
    assert asked == [(9, 11)]


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({}, {}, {}),
        ({"eos_token_id": [3, 1, 3]}, {"eos_token_id": 5}, {"end_ids": [3, 1]}),
        ({"eos_token_id": None}, {"eos_token_id": 5, "bos_token_id": None}, {"end_ids": [5]}),
        ({"pad_token_id": -1, "eos_token_id": [10, 9], "bos_token_id": 2}, {"pad_token_id": 4}, {"end_ids": [9], "begin_id": 2}),
        ({"eos_token_id": []}, {"eos_token_id": 5}, {}),
    ],
)
def test_the_files_say_which_ids(generation, config, expected):
    assert id_settings({Path("generation_config.json"): generation, Path("config.json"): config}, vocab_size=10) == expected


@pytest.mark.parametrize("value", ["1", 1.0, True, [1, None], {"a": 1}, [[1]]])
def test_what_is_no_id_is_refused(value):
    with pytest.raises(CheckpointCorruptError, match=r"^config.json: eos_token_id is .*, but a token id, a list of them or null is needed"):
        id_settings({Path("generation_config.json"): {}, Path("config.json"): {"eos_token_id": value}}, vocab_size=10)
