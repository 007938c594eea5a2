"""EleutherAI's lm-evaluation-harness (package lm_eval), called as docs/quality.md says, finds the log-likelihoods of a text that are found here."""

import json
import math
import os

import pytest
import tokenizers
import torch

from phase8.checkpoint.save import save_checkpoint
from phase8.config.load import config_to_mapping, load_config
from phase8.model.model import build_model
from phase8.model.parameters import initialise
from tests.tools.doors import load_door

TEXT = "Größe und 日本語, naïve words; plain words too.\n" * 7
MODEL = ("model.d_model=24", "model.num_layers=2", "model.num_heads=3", "model.vocab_size=300", "model.sequence_length=64",
         "model.ffn_size=40", "precision.dtype=fp32")  # fmt: skip


def byte_level_tokenizer(path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=280, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(path))
    return path


# The first one is exported as a Llama, the others bring their code.
BLOCKS = [("model.block=transformer",), (), ("model.local_window_size=[8,64]", "model.chain=both", "model.global_path=delta")]


@pytest.mark.parametrize("settings", BLOCKS, ids=["llama", "phase8", "phase8-options"])
def test_the_harness_finds_the_log_likelihood_that_evaluate_finds(tmp_path, capsys, settings):
    api, models = (pytest.importorskip(name) for name in ("lm_eval.api.instance", "lm_eval.models.huggingface"))
    config = load_config(os.devnull, (*MODEL, *settings))
    model = build_model(config.model, dtype=torch.float32, device=torch.device("cpu"))
    initialise(model, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    tokenizer = byte_level_tokenizer(tmp_path / "tokenizer.json")
    attachments = {"tokenizer.json": tokenizer.read_bytes()}
    saved = save_checkpoint(tmp_path / "c", step=1, tensors=tensors, metadata={"config": config_to_mapping(config)}, attachments=attachments)
    assert load_door("reshard_checkpoint").main([str(saved), str(tmp_path / "hf"), "--format", "hf"]) == 0
    (tmp_path / "text.txt").write_text(TEXT)
    capsys.readouterr()
    arguments = ["--checkpoint", str(tmp_path / "hf"), "--text", str(tmp_path / "text.txt"), "--json", "--device", "cpu"]
    assert load_door("evaluate").main(arguments) == 0
    found = json.loads(capsys.readouterr().out)["total"]

    model_args = f"pretrained={tmp_path / 'hf'},trust_remote_code=True,dtype=float32,prefix_token_id=0"  # the length is the model's
    harness = models.HFLM.create_from_arg_string(model_args, {"batch_size": 2, "device": "cpu"})
    request = api.Instance(request_type="loglikelihood_rolling", doc={}, arguments=(TEXT,), idx=0)
    (log_likelihood,) = harness.loglikelihood_rolling([request], disable_tqdm=True)
    assert found["num_tokens"] > 2 * 64 and found["num_tokens"] % 64
    assert found["loss"] * found["num_tokens"] == pytest.approx(-log_likelihood, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(-log_likelihood / math.log(2) / len(TEXT.encode()), rel=1e-5)
