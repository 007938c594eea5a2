import pytest
import torch

from phase8.benchmark import blocks as module
from phase8.benchmark.blocks import compare_blocks, speed_ratio, sweep_lengths
from phase8.benchmark.throughput import Measurement
from phase8.config.validate import model_problems
from tests.benchmark.benchmark_figures import measured
from tests.train.tiny_run import tiny_config

CPU = torch.device("cpu")
OUT_OF_MEMORY = Measurement(None, "out of memory")


@pytest.fixture
def memory(monkeypatch):
    """A machine where nothing is measured; `memory.fits` says what fits."""

    class Memory:
        def fits(self, config):
            return True

        def measure(self, config, *, device, num_steps, profile_to=None):
            self.tried.append(config)
            self.profiles.append(profile_to)
            return measured(config, tokens_per_second=1000 / len(self.tried)) if self.fits(config) else OUT_OF_MEMORY

    memory = Memory()
    memory.tried, memory.profiles = [], []
    monkeypatch.setattr(module, "measure_alone", memory.measure)
    return memory


def sweep(config, *lengths, tokens_per_step=64):
    return list(sweep_lengths(config, lengths, tokens_per_step=tokens_per_step, device=CPU, num_steps=2))


def attempts(memory):
    return [(c.model.sequence_length, c.model.block, c.train.recompute) for c in memory.tried]


def test_the_blocks_differ_in_nothing_else(tiny, memory):
    config = tiny_config(tiny, "train.recompute=full")
    blocks = dict(compare_blocks(config, device=CPU, num_steps=2))
    assert list(blocks) == [config.model.block for config in memory.tried] == ["phase8", "transformer"]
    ours, theirs = memory.tried
    assert ours.model.model_copy(update={"block": "transformer"}) == theirs.model and (ours.train, ours.data) == (theirs.train, theirs.data)
    assert speed_ratio(blocks) == 2.0 and speed_ratio({**blocks, "transformer": OUT_OF_MEMORY}) is None


def test_a_transformer_with_shared_keys_is_compared_with_the_block_that_has_none(tiny, memory):
    shared = ("model.block=transformer", "model.num_kv_heads=1", "model.rope_scaling.type=llama3")
    dict(compare_blocks(tiny_config(tiny, *shared), device=CPU, num_steps=2))
    sweep(tiny_config(tiny, *shared), 16)
    for ours, theirs in (memory.tried[:2], memory.tried[2:]):
        assert not list(model_problems(ours.model)) and (ours.model.num_kv_heads, ours.model.rope_scaling.type) == (None, "none")
        assert (theirs.model.num_kv_heads, theirs.model.rope_scaling.type) == (1, "llama3")


def test_each_block_s_kernels_go_to_a_file_of_its_own(tiny, memory, tmp_path):
    dict(compare_blocks(tiny_config(tiny), device=CPU, num_steps=1, profile_directory=tmp_path))
    assert memory.profiles == [tmp_path / "phase8.txt", tmp_path / "transformer.txt"]


def test_a_step_is_one_microbatch_of_the_tokens_asked_for(tiny, memory):
    rows = sweep(tiny_config(tiny), 128, 16, 48)
    assert [(row.sequence_length, row.batch_size) for row in rows] == [(16, 4), (48, 1), (128, 1)]
    for config in memory.tried:
        assert config.train.global_batch_size == config.train.micro_batch_size == max(64 // config.model.sequence_length, 1)
        assert config.parallel.num_microbatches is None
    assert len(memory.tried) == 6 and [speed_ratio(row.blocks) for row in rows] == [2.0, pytest.approx(4 / 3), pytest.approx(6 / 5)]


def test_more_is_recomputed_only_where_memory_runs_out(tiny, memory):
    memory.fits = lambda c: c.model.block == "phase8" or c.model.sequence_length == 16 or c.train.recompute == "full"
    rows = sweep(tiny_config(tiny), 16, 32, 64)
    assert attempts(memory) == [
        (16, "phase8", "none"), (16, "transformer", "none"),
        (32, "phase8", "none"), (32, "transformer", "none"), (32, "transformer", "selective"), (32, "transformer", "full"),
        (64, "phase8", "none"), (64, "transformer", "full"),
    ]  # fmt: skip
    assert [row.blocks["transformer"].throughput.recompute for row in rows] == ["none", "full", "full"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([], ["none", "budget 0.35", "budget 0.1", "full"]),
        (["train.recompute=budget"], ["budget 0.5", "budget 0.35", "budget 0.1", "full"]),
        (["train.recompute=budget", "train.activation_memory_budget=0.2"], ["budget 0.2", "budget 0.1", "full"]),
        (["train.recompute=selective", "train.recompute_every_n_layers=2"], ["selective every 2 layers", "full"]),
        (["train.recompute=full"], ["full"]),
    ],
)
def test_compiled_blocks_are_given_budgets_before_all_is_recomputed(tiny, memory, settings, expected):
    memory.fits = lambda c: c.model.block == "transformer"
    sweep(tiny_config(tiny, "train.compile.enabled=true", *settings), 32)
    assert [config.train.recomputation for config in memory.tried if config.model.block == "phase8"] == expected


def test_a_length_that_never_fits_is_reported(tiny, memory):
    memory.fits = lambda c: c.model.block == "phase8"
    (row,) = sweep(tiny_config(tiny, "train.recompute=selective", "train.recompute_every_n_layers=2"), 32)
    assert attempts(memory)[1:] == [(32, "transformer", "selective"), (32, "transformer", "full")]
    assert [config.train.recompute_every_n_layers for config in memory.tried] == [2, 2, 1]
    assert row.blocks["transformer"] == OUT_OF_MEMORY and row.blocks["phase8"].throughput is not None
