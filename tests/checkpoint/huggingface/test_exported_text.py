"""Tokenizers and generation of exported models: the ids, the special tokens and the continuations of phase8."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from phase8.config.model_section import ModelSection
from phase8.config.schema import DataSection, PrecisionSection
from phase8.data.tokenizer import load_tokenizer
from phase8.data.tokenizer_training import train_sentencepiece
from phase8.generate.sampling import SamplingOptions
from tests.checkpoint.huggingface.exported import checkpoint_of, exported, loaded, run
from tests.generate.drawn import drawn_tokens
from tests.model.small import scaled_down
from tests.tools.doors import load_door

ROOT = Path(__file__).parents[3]
TEXTS = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "phase8" / "data").glob("*.py"))]
SAMPLES = [*TEXTS[:3], "", " lead", "tail ", "a  b\n\n\tc", "<|endoftext|> x </s> <s> <unk>", "\u2581é漢😀", "<|endoftext|>"]


def phase8_model(directory: Path, model_type: str = "bpe") -> bytes:
    return train_sentencepiece(TEXTS, directory / "trained.model", vocab_size=500, model_type=model_type).read_bytes()


def foreign_model() -> bytes:
    """A sentencepiece model that rewrites text."""
    buffer = io.BytesIO()
    lines = iter([line for text in TEXTS for line in text.split("\n") if line])
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=buffer, vocab_size=500, minloglevel=2)
    return buffer.getvalue()


def byte_level(*, adds_tokens: bool) -> bytes:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<pad>"]
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False))
    if adds_tokens:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        tokenizer.enable_truncation(5)
    return tokenizer.to_str().encode()


# file, content, whether it is fast, end of document, padding
CASES = {
    "bpe": ("tokenizer.model", phase8_model, True, "<|endoftext|>", "<unk>"),
    "unigram": ("tokenizer.model", lambda directory: phase8_model(directory, "unigram"), False, "<|endoftext|>", "<unk>"),
    "foreign": ("tokenizer.model", lambda _: foreign_model(), False, "</s>", "</s>"),
    "json": ("tokenizer.json", lambda _: byte_level(adds_tokens=False), True, "</s>", "<pad>"),
    "json that adds tokens": ("tokenizer.json", lambda _: byte_level(adds_tokens=True), True, "</s>", "<pad>"),
}


@pytest.mark.parametrize(("name", "block"), [*((name, "phase8") for name in CASES), ("bpe", "transformer"), ("json", "transformer")])
def test_tokenizers_encode_decode_and_come_back(tmp_path, name, block):
    file_name, make, is_fast, end, padding = CASES[name]
    content = make(tmp_path)
    (tmp_path / file_name).write_bytes(content)
    ours = load_tokenizer(tmp_path / file_name)
    taps = {"convolution_size": 1, "local_qk_norm": False} if block == "transformer" else {}
    section = scaled_down(ModelSection(block=block, **taps), vocab_size=ours.vocab_size + 3)
    _, directory = exported(tmp_path, section, attachments={file_name: content})
    config, generation = (json.loads((directory / each).read_text()) for each in ("config.json", "generation_config.json"))
    assert config["model_type"] == {"phase8": "phase8", "transformer": "llama"}[block]
    found = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    assert found.is_fast == is_fast and (found.eos_token, found.bos_token, found.pad_token) == (end, end, padding)
    ids = {"bos_token_id": ours.eod_id, "eos_token_id": ours.eod_id, "pad_token_id": found.convert_tokens_to_ids(padding)}
    assert generation == {**ids, "suppress_tokens": [ours.vocab_size + i for i in range(3)]} and config == config | ids
    assert (found.eos_token_id, found.pad_token_id) == (ours.eod_id, ids["pad_token_id"])
    for text in SAMPLES:
        expected = ours.encode(text)
        assert found(text)["input_ids"] == expected and found.decode(expected) == ours.decode(expected)
    batch = found(["a b", "a b c d e"], return_tensors="pt", padding=True)
    assert batch["attention_mask"][0, 0] == 0 and batch["input_ids"][0, 0] == ids["pad_token_id"]  # on the left, for generation
    assert run(directory, tmp_path / "back") == 0
    back = tmp_path / "back" / file_name
    assert (back.read_bytes() == content) == (name != "json that adds tokens") and load_tokenizer(back).encode(TEXTS[0]) == ours.encode(TEXTS[0])
    found.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved", trust_remote_code=True)(TEXTS[0])["input_ids"] == ours.encode(TEXTS[0])


@pytest.mark.parametrize("block", ["phase8", "transformer"])
def test_text_is_continued_as_here_and_the_tools_read_the_directory(tmp_path, capsys, monkeypatch, block):
    content = phase8_model(tmp_path)
    section = scaled_down(ModelSection(block=block), vocab_size=520)
    model, directory = exported(tmp_path, section, attachments={"tokenizer.model": content}, precision=PrecisionSection(dtype="fp32"))
    ours, found = load_tokenizer(directory / "tokenizer.model"), AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    other = loaded(directory)
    prompt = ours.encode("def main(")
    options = SamplingOptions(temperature=0)
    drawn = drawn_tokens(model, prompt, max_tokens=40, options=options, num_ids=ours.vocab_size, stop_id=ours.eod_id)
    inputs = found("def main(", return_tensors="pt")
    whole = other.generate(**inputs, do_sample=False, max_new_tokens=40)[0]
    assert [token for token in whole[len(prompt) :].tolist() if token != ours.eod_id] == drawn
    monkeypatch.setattr("sys.stdout.reconfigure", lambda **_: None, raising=False)  # what pytest captures into has no encoding

    def tool(checkpoint: Path) -> str:
        arguments = ("--checkpoint", str(checkpoint), "--prompt", "def main(", "--temperature", "0", "--max-tokens", "40", "--device", "cpu")
        monkeypatch.setattr("sys.argv", ["generate.py", *arguments])
        capsys.readouterr()
        assert load_door("generate").main() == 0
        return capsys.readouterr().out

    assert tool(directory) == tool(tmp_path / "c") != "def main("


def test_a_sentencepiece_model_of_another_suffix_is_found(tmp_path):
    content = foreign_model()
    _, directory = exported(tmp_path, scaled_down(ModelSection(), vocab_size=500), attachments={"tokenizer.spm": content})
    found, ours = AutoTokenizer.from_pretrained(directory, trust_remote_code=True), load_tokenizer(directory / "tokenizer.spm")
    assert found(TEXTS[0])["input_ids"] == ours.encode(TEXTS[0])
    assert run(directory, tmp_path / "back") == 0 and (tmp_path / "back" / "tokenizer.model").read_bytes() == content


def test_a_named_end_of_document_is_the_end_there_and_when_it_comes_back(tmp_path):
    tokenizer = tokenizers.Tokenizer.from_str(byte_level(adds_tokens=False).decode())
    tokenizer.add_special_tokens(["<stop>"])
    content = tokenizer.to_str().encode()
    section = scaled_down(ModelSection(), vocab_size=401)
    _, directory = exported(tmp_path, section, attachments={"tokenizer.json": content}, data=DataSection(eod_token="<stop>"))
    assert json.loads((directory / "generation_config.json").read_text()) == {"bos_token_id": 400, "eos_token_id": 400, "pad_token_id": 2}
    assert run(directory, tmp_path / "again", "--format", "consolidated") == 0
    assert json.loads((tmp_path / "again" / "config.json").read_text())["data"]["eod_token"] == "<stop>"


def test_without_a_tokenizer_there_are_no_ids(tmp_path):
    _, directory = exported(tmp_path, scaled_down(ModelSection()))
    config = json.loads((directory / "config.json").read_text())
    assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [None] * 3
    assert json.loads((directory / "generation_config.json").read_text()) == {} and not list(directory.glob("token*"))


def test_a_tokenizer_that_does_not_belong_to_the_model_is_refused(tmp_path, capsys):
    _, source = checkpoint_of(tmp_path, scaled_down(ModelSection()), attachments={"tokenizer.model": phase8_model(tmp_path)})
    assert run(source, tmp_path / "hf", "--format", "hf") == 4
    assert "has 500 ids, but its model has 61" in capsys.readouterr().err and not (tmp_path / "hf").exists()
