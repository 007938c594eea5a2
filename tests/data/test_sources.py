"""Paths of data as users write them: with endings, as patterns, and with every kind of thing missing."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from phase8.config.schema import DataSource
from phase8.data.fingerprint import data_fingerprint
from phase8.data.indexed import IndexedDataset, IndexedWriter
from phase8.data.loader import open_dataset
from phase8.data.sources import open_sources, pairs_by_pattern_in_both, source_names
from phase8.errors import DataError


def write(prefix: Path, first: int = 0, count: int = 9) -> Path:
    with IndexedWriter(prefix, dtype=np.dtype("<u2")) as writer:
        writer.add_document(np.arange(first, first + count))
    return prefix


def opened(*paths: object, ignore_sequence_modes: bool = False):
    entries = [DataSource(path=str(path), weight=1) for path in paths]
    return open_sources(entries, key="data.train", ignore_sequence_modes=ignore_sequence_modes)


def message(*paths: object) -> str:
    with pytest.raises(DataError) as caught:
        opened(*paths)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("data.train")
    return str(caught.value)


@pytest.mark.parametrize("ending", ["", ".bin", ".idx"])
def test_a_pair_may_be_named_with_an_ending_and_is_the_same_pair(tmp_path, ending):
    (stream,) = opened(f"{write(tmp_path / 'a.b')}{ending}")
    assert stream.prefix == str(tmp_path / "a.b") and stream.tokens(0, 9).tolist() == list(range(9))
    plain, named = (
        data_fingerprint(open_dataset(f"{tmp_path}/a.b{given}", sequence_length=8, vocab_size=50, seed=0)) for given in ("", ending)
    )
    assert plain == named


def test_a_prefix_that_looks_like_an_ending_is_a_prefix(tmp_path):
    write(tmp_path / "a.bin", 20), write(tmp_path / "a", 0)
    assert opened(tmp_path / "a.bin")[0].tokens(0, 1).tolist() == [20]


def test_what_is_missing_is_said(tmp_path):
    assert "a.bin and" in message(tmp_path / "a") and "must both exist and neither does; give the path" in message(tmp_path / "a")
    write(tmp_path / "only_bin"), write(tmp_path / "only_idx")
    (tmp_path / "only_bin.idx").unlink()
    (tmp_path / "only_idx.bin").unlink()
    for path in ("only_bin", "only_bin.bin"):
        found = message(tmp_path / path)
        assert f"{tmp_path}/only_bin.bin exists, but {tmp_path}/only_bin.idx, which says where its documents begin, does not" in found
        assert f"tools/prepare_data.py --import-raw {tmp_path}/only_bin.bin --dtype uint16 --eod-id N" in found
    assert f"only_idx.idx exists, but {tmp_path}/only_idx.bin, which holds the tokens, does not; copy that file too" in message(tmp_path / "only_idx")


def test_other_things_under_the_path_are_named(tmp_path):
    (tmp_path / "tokens.ds").write_bytes(b"12")
    assert "tokens.ds exists, but is none" in message(tmp_path / "tokens.ds") and "--import-raw" in message(tmp_path / "tokens.ds")
    assert f"is a directory; name a pair in it without its ending, or all of them with {tmp_path}/*" in message(f"{tmp_path}/")
    (tmp_path / "gone.bin").symlink_to(tmp_path / "moved.bin")
    assert f"gone.bin is a symbolic link to {tmp_path}/moved.bin, which does not exist" in message(tmp_path / "gone")
    (tmp_path / "loop.bin").symlink_to("loop.bin")
    (tmp_path / "loop.idx").symlink_to("loop.idx")
    with pytest.raises(DataError, match="Too many levels of symbolic links"):
        opened(tmp_path / "loop")


def test_a_pattern_is_all_its_pairs_in_sorted_order(tmp_path):
    for i, name in enumerate(("s_10", "s_1", "s_2")):
        write(tmp_path / name, 100 * i)
    for pattern in ("s_*", "s_*.bin", "s_?*.idx", "s_[0-9]*", "**/s_*"):
        (stream,) = opened(tmp_path / pattern)
        assert [Path(pair.prefix).name for pair in stream.pairs] == ["s_1", "s_10", "s_2"], pattern
        assert stream.tokens(0, 27).tolist() == [*range(100, 109), *range(9), *range(200, 209)]
    assert stream.num_documents == 3


def test_a_name_with_the_letters_of_a_pattern_is_a_name(tmp_path):
    write(tmp_path / "s[1]", 50), write(tmp_path / "s1")
    (stream,) = opened(tmp_path / "s[1]")
    assert stream.tokens(0, 1).tolist() == [50]


def test_a_pattern_leaves_nothing_out_without_a_word(tmp_path):
    assert "no .bin/.idx pair matches" in message(tmp_path / "s_*")
    write(tmp_path / "s_1"), write(tmp_path / "s_2")
    (tmp_path / "s_2.idx").unlink()
    assert "s_2.bin exists, but" in message(tmp_path / "s_*")


def test_a_pair_named_twice_is_refused(tmp_path):
    write(tmp_path / "a"), write(tmp_path / "b")
    for twice in ("a.bin", "a*", "*", "./a"):
        assert f"names {tmp_path}/a more than once" in message(f"{tmp_path}/a", f"{tmp_path}/{twice}")
    assert len(opened(tmp_path / "a*", tmp_path / "b*")) == 2


def test_a_pair_under_two_names_is_refused(tmp_path):
    write(tmp_path / "a")
    for ending in (".bin", ".idx"):
        (tmp_path / f"link{ending}").symlink_to(tmp_path / f"a{ending}")
    (tmp_path / "here").symlink_to(tmp_path)
    for other in ("link", "here/a"):
        found = message(tmp_path / "a", tmp_path / other)
        assert f"data.train names {tmp_path}/a and {tmp_path}/{other}, which are the same files; keep one entry" in found
    assert "which are the same files" in message(tmp_path / "*")


def test_weights_that_cannot_be_are_named_with_their_key(tmp_path):
    sources = [DataSource(path=str(write(tmp_path / name)), weight=weight) for name, weight in (("a", 200_000), ("b", 2))]
    with pytest.raises(DataError, match=r"^data\.train: blend weights \[200000, 2\] sum to 100001 .* at most 100000 is allowed"):
        open_dataset(sources, sequence_length=4, vocab_size=50, seed=0)


def test_pairs_that_a_pattern_puts_on_both_sides_are_found(tmp_path):
    write(tmp_path / "train"), write(tmp_path / "validation")
    (tmp_path / "link.bin").symlink_to(tmp_path / "validation.bin")
    (tmp_path / "link.idx").symlink_to(tmp_path / "validation.idx")
    everything, train, validation, link = (opened(tmp_path / name) for name in ("[tv]*", "train", "validation", "link"))
    assert pairs_by_pattern_in_both(everything, validation) == [f"{tmp_path}/validation"]
    assert pairs_by_pattern_in_both(validation, everything) == [f"{tmp_path}/validation"]
    assert pairs_by_pattern_in_both(everything, link) == [f"{tmp_path}/validation"]
    assert pairs_by_pattern_in_both(train, validation) == pairs_by_pattern_in_both(train, train) == []  # asked for by name


def test_modes_are_refused_unless_asked_for(tmp_path):
    prefix = write(tmp_path / "a")
    with open(f"{prefix}.idx", "ab") as file:
        file.write(b"\1")
    assert IndexedDataset(prefix).sequence_modes is not None
    assert "gives each sequence a mode (multimodal data)" in message(prefix) and "data.ignore_sequence_modes to true" in message(prefix)
    assert opened(prefix, ignore_sequence_modes=True)[0].num_tokens == 9


def test_too_many_files_are_said_to_be(tmp_path, monkeypatch):
    prefix = write(tmp_path / "a")

    def refuse(path, *_):
        raise OSError(24, "Too many open files", str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(DataError, match="Too many open files; raise ulimit -n, or give fewer pairs"):
        IndexedDataset(prefix)


def test_sources_of_one_name_are_told_apart():
    assert source_names(["a/train", "b/validation"]) == ["train", "validation"]
    assert source_names(["a/train", "b/train"]) == ["a/train", "b/train"]
