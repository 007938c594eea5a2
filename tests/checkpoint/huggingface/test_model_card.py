"""The model card says what the model is and what it was trained on, and whatever names contain, they stay text."""

from __future__ import annotations

import yaml
from hypothesis import given
from hypothesis import strategies as st

from phase8.checkpoint.huggingface.model_card import escaped
from phase8.config.model_section import ModelSection
from phase8.config.schema import DataSection, OptimSection, RunSection
from tests.checkpoint.huggingface.exported import exported
from tests.model.small import scaled_down

EVIL = "a\n# b\r<script>x</script> | [c](http://d) `e` ![f](g) \u2028&amp; \\ ../../etc"

OWN = DataSection(train="web")


def metadata(name: str) -> dict:
    source = {"idx_sha256": "0" * 64, "bin_bytes": 8, "num_tokens": 4, "weight": 0.25, "name": name}
    return {
        "position": {"step": 7, "samples_consumed": 14, "tokens_seen": 12_345}, "global_batch_size": 2,
        "losses": {"training": 2.375, "num_steps": 2, "validation_step": 6, "validation": 2.5},
        "data_fingerprint": {"order_version": 1, "sequence_length": 29, "sources": [source, source | {"name": "books", "weight": 0.75}]},
    }  # fmt: skip


def test_what_it_says(tmp_path):
    section = scaled_down(ModelSection(ffn="moe"))
    model, directory = exported(
        tmp_path, section, metadata=metadata("web.train"), run=RunSection(name="first_run"), optim=OptimSection(learning_rate=0.002), data=OWN
    )
    card = (directory / "README.md").read_text()
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(front) == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["phase8"]}
    rows = dict(line.strip("| ").split(" | ") for line in body.splitlines() if line.startswith("| ") and not line.startswith("| training | |"))
    assert rows == {
        "data": "web\\.train (weight 0.25), books (weight 0.75)", "steps": "7", "tokens": "12,345",
        "training loss": "2.3750 nats per token, mean of the last 2 steps", "validation loss": "2.5000 nats per token, after step 6",
        "sequence length": "29 tokens", "sequences in a step": "2",
        "optimizer": "adamw, learning rate 0.002, cosine", "precision": "bf16",
    }  # fmt: skip
    assert f"with {sum(parameter.numel() for parameter in model.parameters()):,} parameters" in body  # the router's buffers are none
    assert "# first\\_run" in body and " and model\\.ffn moe, so its code" in body
    assert "trust_remote_code=True" in body and "Experts drop no token" in body and '"num_experts": 4' in body


def test_names_of_data_are_text(tmp_path):
    _, directory = exported(tmp_path, scaled_down(ModelSection()), metadata=metadata(EVIL), data=OWN)
    rows = [line for line in (directory / "README.md").read_text().splitlines() if line.startswith("| data")]
    assert len(rows) == 1 and "script\\&gt;" not in rows[0]
    assert rows[0] == f"| data | {escaped(EVIL)} (weight 0.25), books (weight 0.75) |" and rows[0].isascii()


def test_the_embedded_corpus_is_named(tmp_path):
    _, directory = exported(tmp_path, scaled_down(ModelSection()), metadata=metadata("train"))
    assert "| data | Python's standard library, the embedded corpus |\n" in (directory / "README.md").read_text()


@given(st.text())
def test_escaped_text_has_neither_lines_nor_markup_nor_html(text):
    found = escaped(text)
    assert found.isprintable() and "<" not in found and ">" not in found
    position = 0
    while position < len(found):
        if found[position] == "\\":
            position += 2
            continue
        assert found[position] not in "`*_{}[]()#+-.!|~$:@"
        position += 1
