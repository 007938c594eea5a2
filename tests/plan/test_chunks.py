"""What chunks declare, read from a block of each kind: against the model with all its blocks, and at a cost that does not grow with the layers."""

from __future__ import annotations

import io
from collections import Counter

import pytest
import torch
from rich.console import Console

from phase8.config.load import load_config
from phase8.config.model_section import ModelSection
from phase8.config.pipeline import Pipeline
from phase8.division import DividedShape
from phase8.model.block import Block
from phase8.model.model import build_model
from phase8.model.parameters import buffer_shapes, divided_shapes
from phase8.plan import chunks
from phase8.plan.chunks import chunk_exchanges, chunk_parameters, stage_tensors
from phase8.plan.dry_run import dry_run

SIZES = {"d_model": 32, "num_layers": 7, "num_heads": 2, "vocab_size": 64, "sequence_length": 32}
MODELS = {
    "phase8": ModelSection(**SIZES, local_window_size=(16, 0, 8), chain="both"),
    "transformer": ModelSection(**SIZES, block="transformer", rotary=(True, False), tie_embeddings=True),
    "experts": ModelSection(**SIZES, ffn="moe", first_dense_layers=2, moe_every_n_layers=2, router_bias_rate=0.1, local_window_size=(16, 4)),
    "low rank": ModelSection(**SIZES, ffn="low_rank_swiglu", low_rank_rank=4, tie_embeddings=True),
}


def built(model: ModelSection, layers: range):
    return build_model(model, dtype=torch.float32, device=torch.device("meta"), layers=layers)


@pytest.mark.parametrize("layers", [range(7), range(3), range(2, 5), range(4, 7)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_block_of_each_kind_tells_what_the_whole_chunk_has(name, layers):
    model = MODELS[name]
    whole, chunk = built(model, layers), chunk_parameters(model, layers)
    assert chunk.parameters == divided_shapes(whole)
    assert [list(block) for block in chunk.blocks] == [
        [key for key in divided_shapes(whole) if key.startswith(f"blocks.{layer}.")] for layer in layers
    ]
    counted = Counter(repr(shape) for shape, times in chunk.counted_parameters for _ in range(times))
    assert counted == Counter(map(repr, divided_shapes(whole).values()))
    for recompute in ("none", "full", "selective"):
        for is_divided in (False, True):
            how = {"recompute": recompute, "is_divided": is_divided, "recompute_every_n_layers": 3}
            exchanges = whole.exchanges(**how)
            assert chunk_exchanges(model, layers, **how) == Counter(exchanges.forward + exchanges.backward)


@pytest.mark.parametrize("name", MODELS)
def test_stages_have_the_buffers_of_all_their_blocks(name):
    model = MODELS[name]
    (only,) = stage_tensors(model, Pipeline("1f1b", 1, 1))
    whole = built(model, range(7))
    assert only == divided_shapes(whole) | buffer_shapes(whole)


def test_a_dry_run_costs_as_much_for_many_layers_of_a_kind_as_for_few(tmp_path, monkeypatch):
    (tmp_path / "small.yaml").write_text(
        "model: {d_model: 32, num_heads: 2, vocab_size: 64, sequence_length: 48, local_window_size: [16, 8]}\n"
        "train: {global_batch_size: 24, micro_batch_size: 2, num_steps: 1000, tuning: off}\n"
        "zero: {stage: 3}\n"
    )
    calls: Counter[str] = Counter()

    def counting(owner, name):
        original = getattr(owner, name)

        def counted(*arguments, **options):
            calls[name] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, counted)

    counting(Block, "__init__")
    counting(DividedShape, "region")
    found = []
    for num_layers in (6, 60):
        for cached in (chunks.chunk_parameters, chunks.chunk_exchanges, chunks.mixer_exchanges, chunks._block):
            cached.cache_clear()
        calls.clear()
        config = load_config(tmp_path / "small.yaml", [f"model.num_layers={num_layers}"])
        dry_run(config, world_size=4, console=Console(file=io.StringIO()))
        found.append(dict(calls))
    assert found[0]["region"] == found[1]["region"] and all(each["__init__"] <= 8 for each in found)
