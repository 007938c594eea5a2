"""Texts of models made elsewhere begin and end as in transformers, wherever their weights go; and what a run said about documents survives."""

from __future__ import annotations

import io
import itertools
import json

import pytest
import sentencepiece
import torch
import transformers

from phase8.checkpoint.huggingface.text_settings import text_settings
from phase8.checkpoint.load import open_checkpoint
from phase8.config.model_section import ModelSection
from phase8.config.schema import DataSection, PrecisionSection
from phase8.data.tokenizer import load_tokenizer
from phase8.errors import DataError
from phase8.generate.text import prompt_tokens, text_begin
from tests.checkpoint.huggingface.exported import exported, run
from tests.checkpoint.huggingface.test_exported_text import TEXTS, byte_level
from tests.model.small import scaled_down
from tests.tools.doors import load_door

PROMPT = "def main("


def sentencepiece_model() -> bytes:
    buffer = io.BytesIO()
    lines = iter([line for text in TEXTS for line in text.split("\n") if line])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=buffer, vocab_size=400, model_type="bpe", byte_fallback=True, minloglevel=2
    )
    return buffer.getvalue()


# the tokenizer's file, its content, more keys of tokenizer_config.json, and what transformers puts before a text
TOKENIZERS = {
    "json": ("tokenizer.json", lambda: byte_level(adds_tokens=True), {}, ["<s>"]),
    "json without": ("tokenizer.json", lambda: byte_level(adds_tokens=False), {}, []),
    "sentencepiece": ("tokenizer.model", sentencepiece_model, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}, ["<s>"]),
    "sentencepiece without": ("tokenizer.model", sentencepiece_model, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, []),
}


@pytest.fixture
def tool(capsys, monkeypatch):
    """Runs tools/generate.py, and returns what it writes."""
    monkeypatch.setattr("sys.stdout.reconfigure", lambda **_: None, raising=False)  # what pytest captures into has no encoding

    def generated(checkpoint, *options):
        arguments = ("--checkpoint", str(checkpoint), "--prompt", PROMPT, "--max-tokens", "30", "--device", "cpu", *options)
        monkeypatch.setattr("sys.argv", ["generate.py", *arguments])
        capsys.readouterr()
        assert load_door("generate").main() == 0
        return capsys.readouterr().out.removesuffix("\n")

    return generated


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_llama_made_elsewhere_continues_text_as_transformers_does(tmp_path, tool, kind):
    name, make, keys, begin = TOKENIZERS[kind]
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=400, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, max_position_embeddings=64,
        initializer_range=0.4,
    )  # fmt: skip
    llama = transformers.LlamaForCausalLM(config).eval()
    llama.save_pretrained(tmp_path / "llama")
    (tmp_path / "llama" / name).write_bytes(make())
    (tmp_path / "llama" / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"} | keys))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "llama")
    prompt = theirs(PROMPT)["input_ids"]
    assert theirs.convert_ids_to_tokens(prompt)[: len(begin)] == begin
    prompt = torch.tensor([[*([] if begin else [theirs.eos_token_id]), *prompt]])  # a document follows the end of another one
    whole = llama.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=30, eos_token_id=None)
    ours, drawn = load_tokenizer(tmp_path / "llama" / name), whole[0, prompt.shape[1] :].tolist()
    drawn = list(itertools.takewhile(lambda each: each not in (ours.eod_id, config.eos_token_id), drawn))  # the ends of tokenizer and config
    expected = PROMPT + ours.decode(drawn)
    assert len(set(drawn)) > 1 and tool(tmp_path / "llama", "--temperature", "0") == expected
    assert run(tmp_path / "llama", tmp_path / "imported") == run(tmp_path / "llama", tmp_path / "merged", "--format", "consolidated") == 0
    assert open_checkpoint(tmp_path / "imported").metadata["config"]["data"]["begin_token"] == (begin[0] if begin else None)
    assert run(tmp_path / "imported", tmp_path / "again", "--format", "hf") == 0
    for each in ("imported", "merged", "again"):
        assert tool(tmp_path / each, "--temperature", "0") == expected, each
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again", trust_remote_code=True)
    for text in (PROMPT, "", TEXTS[0]):
        assert again(text)["input_ids"] == [theirs.convert_tokens_to_ids(piece) for piece in begin] + ours.encode(text)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["bos_token_id"] == theirs.convert_tokens_to_ids((begin or ["</s>"])[0])
    card = (tmp_path / "again" / "README.md").read_text()
    assert ("adds &lt;s&gt; before a text" if begin else "adds no token") in card
    text = tmp_path / "text.txt"
    text.write_text(TEXTS[0][:60])
    arguments = ["--checkpoint", str(tmp_path / "again"), "--text", str(text), "--output", str(tmp_path / "e.json"), "--device", "cpu"]
    assert load_door("evaluate").main(arguments) == 0
    ids = torch.tensor([[*(theirs.convert_tokens_to_ids(piece) for piece in begin or ["</s>"]), *ours.encode(TEXTS[0][:60])]])
    with torch.no_grad():
        assert json.loads((tmp_path / "e.json").read_text())["total"]["loss"] == pytest.approx(llama(ids, labels=ids).loss.item(), rel=1e-5)


@pytest.mark.parametrize("block", ["phase8", "transformer"])
def test_documents_that_do_not_see_each_other_do_not_when_they_come_back(tmp_path, tool, block):
    content, taps = byte_level(adds_tokens=False), {"convolution_size": 1, "local_qk_norm": False} if block == "transformer" else {}
    section = scaled_down(ModelSection(block=block, **taps), vocab_size=400)
    data = DataSection(reset_at_document_boundaries=True)
    precision = PrecisionSection(dtype="fp32")  # in which exported models compute
    _, directory = exported(tmp_path, section, attachments={"tokenizer.json": content}, data=data, precision=precision)
    assert tool(directory, "--seed", "5") == tool(tmp_path / "c", "--seed", "5")
    assert run(directory, tmp_path / "back") == 0
    assert open_checkpoint(tmp_path / "back").metadata["config"]["data"]["reset_at_document_boundaries"] is True
    ours = load_tokenizer(directory / "tokenizer.json")
    assert prompt_tokens(ours, PROMPT, begin=text_begin(ours, data)) == ours.encode(PROMPT)
    assert prompt_tokens(ours, "", begin=text_begin(ours, data)) == [ours.eod_id]


def test_a_piece_that_the_tokenizer_lacks_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(byte_level(adds_tokens=False))
    with pytest.raises(DataError, match=r"has no piece '<begin>', which begins texts of the model; give the model's own"):
        text_begin(load_tokenizer(tmp_path / "tokenizer.json"), DataSection(begin_token="<begin>"))


@pytest.mark.parametrize(
    ("processor", "begin"),
    [
        ({"type": "RobertaProcessing", "sep": ["</s>", 1], "cls": ["<s>", 0]}, "<s>"),
        ({"type": "Sequence", "processors": [{"type": "ByteLevel"}, {"single": [{"SpecialToken": {"id": "<s>"}}]}]}, "<s>"),
        ({"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "</s>"}}]}, None),
        ({"type": "ByteLevel"}, None), ({"single": [3]}, None), ({"cls": []}, None), ([], None), (None, None),
    ],
)  # fmt: skip
def test_what_post_processors_put_before_a_text(tmp_path, processor, begin):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"post_processor": processor}))
    config = {"eos_token": {"content": "<end>", "lstrip": False}}
    assert text_settings(tmp_path / "tokenizer.json", config) == {"eod_token": "<end>"} | ({} if begin is None else {"begin_token": begin})
    (tmp_path / "tokenizer.json").write_bytes(b"[" * 10**5)
    assert text_settings(tmp_path / "tokenizer.json", {"eos_token": 3}) == {}
