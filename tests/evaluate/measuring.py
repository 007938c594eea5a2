"""A tiny model and what is evaluated with it."""

import numpy as np
import pytest
import torch

from phase8.config.model_section import ModelSection
from phase8.config.schema import DataSection
from phase8.data.indexed import IndexedWriter
from phase8.evaluate.score import Forward, evaluate
from phase8.evaluate.selection import select_pieces
from phase8.evaluate.sources import open_pairs, read_text_sources
from phase8.model.model import build_model
from phase8.model.parameters import initialise

VOCABULARY, LENGTH, CPU = 300, 70, torch.device("cpu")
DOCUMENTS = {"a": [35, 120, 90, 41], "b": [70, 60]}


def tiny_model(**overrides):
    section = ModelSection(
        **{"d_model": 16, "num_layers": 2, "num_heads": 2, "vocab_size": VOCABULARY, "sequence_length": LENGTH, "local_window_size": 8, **overrides}
    )
    model = build_model(section, dtype=torch.float32, device=CPU)
    initialise(model, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # predictions that differ, and paths that matter
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def write_pairs(directory):
    """Two pairs of random documents; their prefixes."""
    for name, sizes in DOCUMENTS.items():
        generator = np.random.default_rng(len(sizes))
        with IndexedWriter(directory / name, dtype=np.dtype(np.uint16)) as writer:
            for size in sizes:
                writer.add_document(generator.integers(0, VOCABULARY, size=size))
    return [directory / name for name in DOCUMENTS]


def pairs(prefixes, *, resets=False, tokenizer=None, **settings):
    section = DataSection(reset_at_document_boundaries=resets, cache_dir=str(prefixes[0].parent / "cache"), **settings)
    return open_pairs(prefixes, tokenizer, section, vocab_size=VOCABULARY, on_progress=lambda *_: None)


def texts(paths, tokenizer, **options):
    options = {"json_key": "text", "document_separator": None, "on_message": pytest.fail, **options}
    return read_text_sources(paths, tokenizer, on_progress=lambda *_: None, **options)


def measure(model, sources, *, batch_size=4, ranks=None, adjustable=True, **how):
    sources, pieces = select_pieces(sources, length=LENGTH, **how)
    options = {} if ranks is None else {"ranks": ranks}
    return evaluate(model, sources, pieces, Forward(LENGTH, batch_size, is_adjustable=adjustable, device=CPU), **options)
