"""The tokenizer of a checkpoint: which token ends a document, and what is said when it does not fit the model."""

import re

import pytest
import sentencepiece
import torch

from phase8.errors import CheckpointError
from phase8.generate.restore import hold_in_compute_dtype, restore_model, restore_tokenizer
from tests.train.tiny_run import train_tiny


@pytest.fixture
def run(tiny, tmp_path):
    """A tiny run whose tokenizer has two end-of-document pieces, one of them named in the config."""
    with (tmp_path / "two.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a b c"] * 9), model_writer=file, vocab_size=9, user_defined_symbols=["</s>", "[EOS]"], minloglevel=2
        )
    return train_tiny(tiny, f"data.tokenizer={tmp_path / 'two.model'}", "data.eod_token=[EOS]", "train.num_steps=5")


def test_the_end_of_document_named_in_the_config_reaches_training_and_generation(run):
    assert run.data.tokenizer.eod_token == "[EOS]"
    _, data, checkpoint = restore_model(run.directory.path, device=torch.device("cpu"))
    assert restore_tokenizer(checkpoint, vocab_size=61, eod_token=data.eod_token).eod_id == run.data.tokenizer.eod_id
    assert restore_tokenizer(checkpoint, vocab_size=61, eod_token="</s>").eod_token == "</s>"


def test_a_stored_tokenizer_that_does_not_fit_is_named_by_where_it_came_from(run):
    _, data, checkpoint = restore_model(run.directory.path, device=torch.device("cpu"))
    expected = re.escape(f"the tokenizer stored in {checkpoint.path} has 9 ids, but its model has 8; give the tokenizer it was trained with")
    with pytest.raises(CheckpointError, match=expected):
        restore_tokenizer(checkpoint, vocab_size=8, eod_token=data.eod_token)


def test_a_model_held_in_its_dtype_computes_the_same(tiny):
    model, _, _ = restore_model(train_tiny(tiny, "train.num_steps=5", "precision.dtype=bf16").directory.path, device=torch.device("cpu"))
    tokens = torch.arange(24)[None] % 61
    with torch.no_grad():
        expected = model.logits(model(tokens)[0])
        hold_in_compute_dtype(model)
        assert torch.equal(model.logits(model(tokens)[0]), expected)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert dtypes["blocks.0.mixer.q.weight"] == dtypes["embedding.weight"] == torch.bfloat16
    assert dtypes["blocks.0.mixer_norm.weight"] == dtypes["blocks.0.mixer.global_path.scalars.weight"] == torch.float32
