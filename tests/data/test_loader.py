"""The loader: the tokens of sample n, in the order of n, whatever the batch, the workers or the length of the run."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import weakref
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from phase8.config.schema import DataSection, DataSource
from phase8.data.fingerprint import data_fingerprint
from phase8.data.fingerprint_difference import describe_fingerprint_difference
from phase8.data.indexed import IndexedWriter
from phase8.data.loader import build_loader, evaluation_microbatches, microbatch_sample_numbers, open_dataset
from phase8.data.microbatch import Microbatch
from phase8.errors import DataError, IndexedFormatError

SEQUENCE_LENGTH = 8
VOCAB_SIZE = 5000


def write(prefix: Path, lengths: list[int], *, first_token: int = 0, dtype: str = "<u2") -> str:
    """Documents whose flat stream counts up from `first_token`, so that a token tells its position."""
    with IndexedWriter(prefix, dtype=np.dtype(dtype)) as writer:
        for length in lengths:
            writer.add_document(np.arange(first_token, first_token + length))
            first_token += length
    return str(prefix)


def sources(directory: Path, **weights: float) -> list[DataSource]:
    return [DataSource(path=str(directory / name), weight=weight) for name, weight in weights.items()]


def opened(path: str | list[DataSource], *, seed: int = 7, vocab_size: int = VOCAB_SIZE, sequence_length: int = SEQUENCE_LENGTH):
    return open_dataset(path, sequence_length=sequence_length, vocab_size=vocab_size, seed=seed)


@pytest.fixture
def prefix(tmp_path) -> str:
    return write(tmp_path / "text", [3, 30, 1, 0, 200, 167])  # 401 tokens, 50 windows of 8 + 1


@pytest.fixture
def blend(tmp_path) -> list[DataSource]:
    write(tmp_path / "web", [300, 101])
    write(tmp_path / "code", [90], first_token=1000)
    return sources(tmp_path, web=3, code=1)


HERE = {"num_workers": 0, "pin_memory": False}


def consumed(dataset, num_samples: int, *, micro_batch_size: int = 4, samples_consumed: int = 0, **section) -> list[list[int]]:
    """The tokens of the first `num_samples` samples, one list each, as a run of that batch and those workers sees them."""
    numbers = microbatch_sample_numbers(samples_consumed=samples_consumed, micro_batch_size=micro_batch_size)
    loader = build_loader(dataset, DataSection(**HERE | section), sample_numbers=numbers)
    microbatches = list(islice(loader, -(-num_samples // micro_batch_size)))
    return torch.cat([all_tokens(microbatch) for microbatch in microbatches])[:num_samples].tolist()


def all_tokens(microbatch: Microbatch) -> torch.Tensor:
    """Inputs and the last target, where boundaries are not reset."""
    return torch.cat((microbatch.tokens, microbatch.targets[:, -1:]), dim=1)


def test_sample_holds_one_window_and_where_documents_begin(prefix):
    dataset = opened(prefix)
    document_starts = {0, 3, 33, 34, 234}
    for n in range(100):
        sample = dataset[n]
        _, window = dataset.order.locate(n)
        positions = list(range(8 * window, 8 * window + 9))
        assert sample["tokens"].tolist() == positions and sample["tokens"].dtype == torch.int64
        assert sample["document_starts"].dtype == torch.bool
        assert sample["document_starts"].tolist() == [i == 0 or position in document_starts for i, position in enumerate(positions)]


def test_every_window_comes_once_per_epoch(prefix):
    dataset = opened(prefix)
    for epoch in range(3):
        firsts = [int(dataset[epoch * 50 + i]["tokens"][0]) for i in range(50)]
        assert sorted(firsts) == list(range(0, 400, 8))
        assert firsts != sorted(firsts)


def test_blend_delivers_each_source_by_its_weight(blend):
    dataset = opened(blend)
    from_code = [int(dataset[n]["tokens"][0]) >= 1000 for n in range(80)]
    assert [sum(from_code[: 4 * i]) for i in range(21)] == list(range(21))
    assert dataset.order.num_windows == (50, 11)


def test_decimal_weights_are_the_blend_of_the_whole_numbers_of_their_ratios(blend):
    decimal = opened([source.model_copy(update={"weight": source.weight / 4}) for source in blend])
    assert [source.weight / 4 for source in blend] == [0.75, 0.25]
    assert data_fingerprint(decimal) == data_fingerprint(opened(blend))


@pytest.mark.parametrize("micro_batch_size", [1, 3, 4, 16])
def test_samples_do_not_depend_on_the_micro_batch_size(blend, micro_batch_size):
    dataset = opened(blend)
    assert consumed(dataset, 30, micro_batch_size=micro_batch_size) == [dataset[n]["tokens"].tolist() for n in range(30)]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
@pytest.mark.parametrize("num_workers", [1, 4])
@pytest.mark.parametrize("persistent_workers", [False, True])
def test_samples_do_not_depend_on_the_workers(blend, num_workers, persistent_workers):
    section = {"num_workers": num_workers, "prefetch_factor": 3, "persistent_workers": persistent_workers}
    assert consumed(opened(blend), 40, **section) == consumed(opened(blend), 40)


def test_a_longer_run_begins_like_a_shorter_one(blend):
    assert consumed(opened(blend), 90)[:20] == consumed(opened(blend), 20)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_continues_the_exact_list(blend, num_workers):
    whole = consumed(opened(blend), 40)
    assert consumed(opened(blend), 28, samples_consumed=12, micro_batch_size=2, num_workers=num_workers) == whole[12:]


def test_seed_changes_the_order_and_nothing_else(prefix):
    first, second = consumed(opened(prefix, seed=1), 50), consumed(opened(prefix, seed=2), 50)
    assert first != second and sorted(first) == sorted(second)


def test_numbers_of_a_microbatch_are_consecutive_without_end():
    numbers = microbatch_sample_numbers(samples_consumed=6, micro_batch_size=3)
    assert list(islice(numbers, 3)) == [[6, 7, 8], [9, 10, 11], [12, 13, 14]]


def test_microbatch_has_the_promised_shapes(prefix):
    numbers = microbatch_sample_numbers(samples_consumed=0, micro_batch_size=5)
    microbatch = next(iter(build_loader(opened(prefix), DataSection(**HERE), sample_numbers=numbers)))
    assert microbatch.tokens.shape == microbatch.targets.shape == (5, 8) and microbatch.tokens.dtype == microbatch.targets.dtype == torch.int64
    assert microbatch.starts is None and microbatch.num_valid == 40


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_tensors_are_without_gaps(prefix, num_workers, resets):
    """Else a device would copy them by way of memory that is not page-locked."""
    section = DataSection(num_workers=num_workers, pin_memory=False, reset_at_document_boundaries=resets)
    (microbatch,) = build_loader(opened(prefix), section, sample_numbers=[[0, 1, 2]])
    assert (microbatch.starts is not None) == resets
    assert all(x.is_contiguous() for x in (microbatch.tokens, microbatch.targets, microbatch.starts) if x is not None)


@pytest.mark.gpu
@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_a_gpu_copies_is_page_locked(prefix, num_workers):
    section = DataSection(num_workers=num_workers, pin_memory=True, reset_at_document_boundaries=True)
    (microbatch,) = build_loader(opened(prefix), section, sample_numbers=[[0, 1, 2]])
    assert all(x.is_pinned() and x.is_contiguous() for x in (microbatch.tokens, microbatch.targets, microbatch.starts))


def test_pinning_is_harmless_without_a_gpu(prefix, recwarn):
    assert consumed(opened(prefix), 8, pin_memory=True) == consumed(opened(prefix), 8)
    assert not [warning for warning in recwarn if "pin_memory" in str(warning.message)]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_global_random_state_is_untouched(prefix, num_workers):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    consumed(opened(prefix), 12, num_workers=num_workers)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_evaluation_is_the_same_every_time_and_spread_over_the_data(prefix, num_workers):
    dataset = opened(prefix)
    (microbatches,) = evaluation_microbatches(dataset, num_samples=10, micro_batch_size=4)
    assert [len(microbatch) for microbatch in microbatches] == [4, 4, 2]
    assert [microbatches] == evaluation_microbatches(opened(prefix, seed=99), num_samples=10, micro_batch_size=4)
    loader = build_loader(dataset, DataSection(pin_memory=False, num_workers=num_workers), sample_numbers=microbatches)
    for _ in range(2):
        assert torch.cat([microbatch.tokens for microbatch in loader])[:, 0].tolist() == [40 * i for i in range(10)]


def test_evaluation_of_little_data_takes_each_window_once(prefix):
    (microbatches,) = evaluation_microbatches(opened(prefix), num_samples=1000, micro_batch_size=8)
    assert [window for microbatch in microbatches for _, window in microbatch] == list(range(50))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_token_outside_the_vocabulary_is_our_error_in_one_sentence(tmp_path, num_workers):
    path = write(tmp_path / "text", [100])
    kind = message = None
    try:
        consumed(opened(path, vocab_size=60), 12, num_workers=num_workers)
    except Exception as error:  # kept as text: pytest's record of an exception is a cycle that keeps the workers running
        kind, message = type(error), str(error)
    assert kind is DataError
    assert "\n" not in message and f"{path}.bin holds token id" in message and "model.vocab_size is 60" in message


def test_refused_token_leaves_no_reference_cycle(tmp_path):
    """A cycle would hand the running workers to the garbage collector, where stopping each takes torch five seconds."""
    dataset = opened(write(tmp_path / "text", [100]), vocab_size=60)
    numbers = microbatch_sample_numbers(samples_consumed=0, micro_batch_size=4)
    loader = build_loader(dataset, DataSection(pin_memory=False, num_workers=1), sample_numbers=numbers)
    alive = weakref.ref(loader)
    gc.disable()
    try:
        with suppress(DataError):
            for _ in loader:
                pass
        del loader
        assert alive() is None
    finally:
        gc.enable()


def test_largest_allowed_and_negative_ids(tmp_path):
    path = write(tmp_path / "text", [9], first_token=10)
    assert opened(path, vocab_size=19)[0]["tokens"].max() == 18
    with pytest.raises(DataError, match=r"holds token id 18 at position 8, but model.vocab_size is 18"):
        opened(path, vocab_size=18)[0]
    (tmp_path / "signed.idx").write_bytes((tmp_path / "text.idx").read_bytes().replace(b"\x08", b"\x03", 1))
    (tmp_path / "signed.bin").write_bytes(np.array([1, 2, 3, -4, 5, 6, 7, 8, 9], "<i2").tobytes())
    with pytest.raises(DataError, match="holds token id -4 at position 3"):
        opened(str(tmp_path / "signed"))[0]


def test_missing_files_name_the_key_and_the_remedy(tmp_path, blend):
    with pytest.raises(DataError, match=r"data.train: .*absent.bin and .*absent.idx must both exist .* make the pair with tools/prepare_data.py"):
        opened(str(tmp_path / "absent"))
    with pytest.raises(DataError, match=r"data.validation: .*absent.bin"):
        open_dataset(str(tmp_path / "absent"), sequence_length=8, vocab_size=10, seed=0, key="data.validation")
    (tmp_path / "code.bin").unlink()
    with pytest.raises(DataError, match=r"data.train: .*code.idx exists, but .*code.bin, which holds the tokens, does not"):
        opened(blend)


def test_empty_short_and_damaged_data_are_refused(tmp_path, blend):
    with pytest.raises(DataError, match=r"data.train: .*empty holds no tokens"):
        opened(write(tmp_path / "empty", []))
    with pytest.raises(DataError, match=r"data.train: .*short holds 8 tokens, fewer than the 9 of one sample with model.sequence_length 8"):
        opened(write(tmp_path / "short", [8]))
    assert opened(write(tmp_path / "just", [9]))[5]["tokens"].tolist() == list(range(9))
    with pytest.raises(DataError, match=r"code holds 90 tokens, fewer than the 92"):
        opened(blend, sequence_length=91)
    os.truncate(tmp_path / "web.bin", 100)
    with pytest.raises(IndexedFormatError, match="truncated"):
        opened(blend)


def test_dataset_travels_to_a_spawned_worker(blend):
    dataset = opened(blend)
    copy = pickle.loads(pickle.dumps(dataset))
    assert [copy[n]["tokens"].tolist() for n in range(20)] == [dataset[n]["tokens"].tolist() for n in range(20)]


def test_fingerprint_is_json_and_describes_what_changed(tmp_path, blend):
    old = json.loads(json.dumps(data_fingerprint(opened(blend))))
    assert describe_fingerprint_difference(old, data_fingerprint(opened(blend, seed=8))) == []
    assert describe_fingerprint_difference(old, data_fingerprint(opened(blend, sequence_length=9))) == [
        "model.sequence_length was 8 and is 9"
    ]
    assert describe_fingerprint_difference(old, {**old, "order_version": 2}) == ["the version of the sample order was 1 and is 2"]

    assert describe_fingerprint_difference(old, data_fingerprint(opened(sources(tmp_path, web=6, code=2)))) == []
    assert describe_fingerprint_difference(old, data_fingerprint(opened(sources(tmp_path, web=2, code=1)))) == [
        "source 0 (web, now web): the blend weight was 3 and is 2"
    ]
    fewer = data_fingerprint(opened(str(tmp_path / "web")))
    assert describe_fingerprint_difference(old, fewer) == ["the data had 2 sources and have 1"]

    write(tmp_path / "code", [45, 45], first_token=1000)
    [sentence] = describe_fingerprint_difference(old, data_fingerprint(opened(blend)))
    assert "source 1 (code, now code): the hash of .idx was" in sentence
    write(tmp_path / "code", [91], first_token=1000)
    assert len(describe_fingerprint_difference(old, data_fingerprint(opened(blend)))) == 2


def test_moved_data_are_the_same_data(tmp_path, prefix):
    moved = write(tmp_path / "elsewhere" / "renamed", [3, 30, 1, 0, 200, 167])
    assert describe_fingerprint_difference(data_fingerprint(opened(prefix)), data_fingerprint(opened(moved))) == []


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a signal does not tell its sender")
def test_signals_to_the_whole_job_leave_the_workers_alive(prefix):
    """Ctrl-C, the end of a terminal and what schedulers send reach every process; the trainer must still get the batches of the step it is in."""
    expected = consumed(opened(prefix), 24)
    before = multiprocessing.active_children()
    numbers = microbatch_sample_numbers(samples_consumed=0, micro_batch_size=4)
    batches = iter(build_loader(opened(prefix), DataSection(pin_memory=False, num_workers=2, prefetch_factor=1), sample_numbers=numbers))
    received = all_tokens(next(batches)).tolist() + all_tokens(next(batches)).tolist()  # both workers are past their start
    workers = [str(process.pid) for process in multiprocessing.active_children() if process not in before]
    assert len(workers) == 2
    for name in ("TERM", "INT", "TERM", "HUP", "USR1"):
        subprocess.run(["kill", f"-{name}", *workers], check=True)
    for _ in range(4):
        received += all_tokens(next(batches)).tolist()
    assert received == expected


def test_a_process_that_ends_amid_an_epoch_ends_its_workers(prefix):
    """Forked workers inherit a trainer's SIGTERM handler, which would keep them, and with them the trainer, from ending."""
    program = f"""
import signal
from phase8.config.schema import DataSection, DataSource
from phase8.data.loader import build_loader, microbatch_sample_numbers, open_dataset
signal.signal(signal.SIGTERM, lambda *_: None)
dataset = open_dataset({prefix!r}, sequence_length=8, vocab_size=5000, seed=0)
numbers = microbatch_sample_numbers(samples_consumed=0, micro_batch_size=2)
batches = iter(build_loader(dataset, DataSection(pin_memory=False, num_workers=2), sample_numbers=numbers))
print(next(batches).tokens.shape)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, timeout=60, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "torch.Size([2, 8])", "")
