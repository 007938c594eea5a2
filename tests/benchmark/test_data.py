from pathlib import Path

import pytest

from phase8.benchmark.data import DOCUMENT_TOKENS, MIN_TOKENS, on_random_tokens, write_random_tokens
from phase8.data.indexed import IndexedDataset
from phase8.data.loader import open_dataset
from tests.train.tiny_run import tiny_config


@pytest.mark.parametrize(("vocab_size", "dtype"), [(61, "uint16"), (50257, "uint16"), (200_000, "int32")])
def test_ids_fill_the_vocabulary_and_are_the_same_every_time(tmp_path, vocab_size, dtype):
    for name in "ab":
        write_random_tokens(tmp_path / name, vocab_size=vocab_size, sequence_length=32)
    first, second = (IndexedDataset(tmp_path / name) for name in "ab")
    tokens = first.tokens(0, first.num_tokens)
    assert (tokens == second.tokens(0, second.num_tokens)).all() and tokens.dtype == dtype
    assert tokens.min() == 0 and 0.98 * vocab_size <= tokens.max() < vocab_size
    assert first.num_tokens == MIN_TOKENS + 1 and first.num_documents == -(-first.num_tokens // DOCUMENT_TOKENS)


def test_a_long_sequence_has_a_few_windows(tmp_path):
    write_random_tokens(tmp_path / "long", vocab_size=100, sequence_length=MIN_TOKENS)
    data = open_dataset(str(tmp_path / "long"), sequence_length=MIN_TOKENS, vocab_size=100, seed=0)
    assert data.order.num_windows == (4,)


def test_only_the_data_change_and_they_vanish(tiny):
    config = tiny_config(tiny, "data.num_workers=1", "observe.sample_prompt=x", "data.tokenizer=absent.model")
    with on_random_tokens(config) as changed:
        prefix = changed.data.train
        assert Path(f"{prefix}.bin").exists() and Path(f"{prefix}.idx").exists()
        assert (changed.data.validation, changed.data.tokenizer, changed.observe.sample_prompt, changed.data.num_workers) == (None, None, None, 1)
        assert changed.model == config.model and changed.train == config.train
    assert not Path(prefix).parent.exists()
