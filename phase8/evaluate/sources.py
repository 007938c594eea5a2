"""What is evaluated: the pairs of `--data` or of the training's held-out data, and the texts of `--text`, each a source of its own.

| | `--data` | `--text` |
|---|---|---|
| a source is | a pair, or all pairs that a pattern matches | a file or a directory |
| read together are | all its tokens, across documents, as in training | the tokens of a document, after the token that begins a text |
| refused are | pairs whose record names another tokenizer, as in training | inputs that hold no text |
| the first token | is not predicted, since nothing is before it | is predicted from the token before it |
| bytes are those | of each token, if the pair's record names the tokenizer and this one rewrites no text | of the texts, if tokens hold all of them |

A text is predicted without an end-of-document token behind it, so that tokens and bytes are those of the text alone.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from phase8.config.schema import DataSection, DataSource
from phase8.data.documents import cut_shards
from phase8.data.input_files import find_sources
from phase8.data.loader import SequenceDataset
from phase8.data.lost_text import LostTextCounter
from phase8.data.made_with import Wording, check_tokenizer
from phase8.data.shards import DocumentRules, document_pieces, encode_document, read_texts
from phase8.data.sources import ENDINGS, missing_pairs, open_sources, source_names
from phase8.data.streams import TokenStream
from phase8.data.token_ids import OnProgress, check_token_ids
from phase8.data.tokenizer import Tokenizer
from phase8.data.utf8 import num_encoded_bytes
from phase8.errors import DataError
from phase8.evaluate.pieces import Piece, Range

_WHOLE_FILES = 1 << 62
_CHUNK_TOKENS = 1 << 24
_NUM_SAMPLES, _SAMPLE_TOKENS = 256, 1 << 12
_WORDING = Wording(
    named="the evaluation's",
    other_tokenizer="give pairs that it has made, or name the tokenizer of these with --tokenizer if its ids mean the same",
    other_end="name the piece of the data with --eod-token",
)


@dataclass(frozen=True)
class Source:
    """The tokens of a source, and what is known of their bytes.

    Args:
        name: Its name.
        num_tokens: Number of tokens.
        read: The tokens from a position on: called with the position and their number.
        starts: Where documents begin among them, which see nothing before them: called with the same; None: boundaries inside a range do not count.
        ranges: What is read together: called without arguments.
        documents: The documents: called without arguments.
        text_bytes: UTF-8 bytes of all predicted tokens; None: `bytes_per_id` tells, if anything does.
        bytes_per_id: UTF-8 bytes of each token, -1 where it has none that is known; None: unknown.
        weight: Share of the windows where only some are read.
    """

    name: str
    num_tokens: int
    read: Callable[[int, int], np.ndarray]
    starts: Callable[[int, int], np.ndarray] | None
    ranges: Callable[[], Iterable[Range]]
    documents: Callable[[], Iterable[Range]]
    text_bytes: int | None = None
    bytes_per_id: np.ndarray | None = None
    weight: int = 1


def digest_of(sources: Sequence[Source], pieces: Sequence[Piece]) -> int:
    """A number below 2^56 of what is read: the pieces, and tokens from all over the sources. Other hosts may hold others under the same names."""
    found = hashlib.sha256(np.array(pieces, np.int64).tobytes())
    for source in sources:
        size = min(_SAMPLE_TOKENS, source.num_tokens)
        for place in sorted({i * (source.num_tokens - size) // (_NUM_SAMPLES - 1) for i in range(_NUM_SAMPLES)}):
            found.update(source.read(place, size).astype(np.int64).tobytes())
    return int.from_bytes(found.digest()[:7], "big")


def open_pairs(
    prefixes: Sequence[Path], tokenizer: Tokenizer | None, section: DataSection, *, vocab_size: int, on_progress: OnProgress
) -> list[Source]:
    """Opens `.bin/.idx` pairs.

    Args:
        prefixes: Prefixes or patterns, each a source.
        tokenizer: The tokenizer of the model; None: unknown.
        section: Settings of the data with which the model was trained, such as whether documents see nothing of those before them.
        vocab_size: Every id is below it.
        on_progress: Called with stage, tokens read and tokens in all, where all ids have to be read.

    Raises:
        DataError: A file is missing or is no pair, another tokenizer made a pair, a source has too few tokens for a prediction, or an id is
            outside the vocabulary.
        IndexedFormatError: A damaged or foreign pair.
    """
    entries = [DataSource(path=str(prefix), weight=1) for prefix in prefixes]
    for prefix, entry in zip(prefixes, entries, strict=True):
        _refuse_text(prefix, entry)
    streams = open_sources(entries, key="--data", ignore_sequence_modes=section.ignore_sequence_modes)
    for stream in streams:
        if stream.num_tokens < 2:
            raise DataError(f"--data: {stream.prefix} holds {stream.num_tokens} tokens, but a prediction takes two; prepare it from more text")
        if tokenizer is not None and not section.allow_fingerprint_change:  # as in training
            check_tokenizer(stream.pairs, tokenizer, wording=_WORDING)
        for pair in stream.pairs:
            check_token_ids(pair, vocab_size=vocab_size, cache_dir=Path(section.cache_dir), on_progress=on_progress)
    return _of_streams(streams, [1] * len(streams), tokenizer, resets=section.reset_at_document_boundaries)


def _refuse_text(path: Path, entry: DataSource) -> None:
    """Refuses a file, or a directory without pairs, where the name of a pair is expected."""
    kind = "a file" if os.path.isfile(path) else "a directory without pairs" if os.path.isdir(path) and not any(path.glob("*.idx")) else None
    if kind is not None and missing_pairs([entry], key="--data") and path.suffix not in ENDINGS:
        raise DataError(
            f"--data: {path} is {kind}, but --data names .bin/.idx pairs without their ending; read text with --text {path}, or make a pair with "
            "tools/prepare_data.py (--import-raw for raw token ids)"
        )


def held_out_sources(dataset: SequenceDataset, tokenizer: Tokenizer | None, *, resets: bool) -> list[Source]:
    """The sources of the held-out data of a training run.

    Args:
        dataset: Its held-out sequences.
        tokenizer: The tokenizer of the model; None: unknown.
        resets: Documents see nothing of those before them.
    """
    return _of_streams(dataset.sources, dataset.order.blend.weights, tokenizer, resets=resets)


def _of_streams(streams: Sequence[TokenStream], weights: Sequence[int], tokenizer: Tokenizer | None, *, resets: bool) -> list[Source]:
    names = source_names([stream.prefix for stream in streams])
    return [_of_stream(*each, tokenizer, resets=resets) for each in zip(names, streams, weights, strict=True)]


def _of_stream(name: str, stream: TokenStream, weight: int, tokenizer: Tokenizer | None, *, resets: bool) -> Source:
    is_known = tokenizer is not None and all(
        pair.record is not None and pair.record.made_with is not None and pair.record.made_with.tokenizer_sha256 == tokenizer.sha256
        for pair in stream.pairs
    )
    return Source(
        name=name,
        num_tokens=stream.num_tokens,
        read=stream.tokens,
        starts=stream.document_starts if resets else None,
        ranges=lambda: [Range(0, stream.num_tokens - 1)],
        documents=lambda: _documents(stream, resets=resets),
        bytes_per_id=tokenizer.bytes_per_id if is_known else None,
        weight=weight,
    )


def _documents(stream: TokenStream, *, resets: bool) -> Iterator[Range]:
    """Documents of a stream; where boundaries are not reset, the token before a document predicts its first one."""
    chunks = range(0, stream.num_tokens, _CHUNK_TOKENS)
    found = [first + np.flatnonzero(stream.document_starts(first, min(_CHUNK_TOKENS, stream.num_tokens - first))) for first in chunks]
    bounds = [*np.concatenate(found).tolist(), stream.num_tokens]
    for first, end in itertools.pairwise(bounds):
        begin = first if resets or first == 0 else first - 1
        if end - begin > 1:
            yield Range(begin, end - begin - 1)


def read_text_sources(
    inputs: Sequence[Path],
    tokenizer: Tokenizer,
    *,
    begin_id: int | None = None,
    json_key: str,
    document_separator: str | None,
    on_progress: Callable[[int, int], None],
    on_message: Callable[[str], None],
) -> list[Source]:
    """Reads and tokenises texts.

    Args:
        inputs: Files and directories, each a source.
        tokenizer: The tokenizer of the model.
        begin_id: The token before each document; None: that of the end of a document.
        json_key: Key of the text in JSON lines; the column in Parquet.
        document_separator: Content of the lines between the documents of a text file; None: a file is one document.
        on_progress: Called with the number of bytes that were tokenised and that there are.
        on_message: Called with a sentence about what of each directory is not read.

    Raises:
        DataError: An input cannot be read, is not text or names a pair, or holds none.
    """
    found = []
    for path in inputs:
        if not os.path.exists(path) and not missing_pairs([DataSource(path=str(path), weight=1)], key="--text"):
            raise DataError(f"--text: {path} names .bin/.idx pairs, which hold tokens; read them with --data {path}")
        files, left_out = find_sources([path])
        found.append(files)
        if left_out.sentence is not None:
            on_message(f"--text {path}: {left_out.sentence}")
    done, total = 0, sum(file.size_bytes for files in found for file in files)
    rules, sources = DocumentRules(json_key=json_key, document_separator=document_separator), []
    for name, path, files in zip(source_names([str(path) for path in inputs]), inputs, found, strict=True):
        tokens, text_bytes, counter = [], 0, LostTextCounter(tokenizer)
        spans = itertools.chain.from_iterable(cut_shards(files, _WHOLE_FILES))
        for text, source_bytes in read_texts(spans, rules, _refuse):
            encoded, done = encode_document(text, tokenizer), done + source_bytes
            if encoded.size:
                tokens.append(encoded)
                text_bytes += num_encoded_bytes(text)
            counter.add(document_pieces(text), encoded)
            on_progress(done, total)
        if not tokens:
            raise DataError(f"--text: {path} holds no text; give a file or directory with some")
        is_whole = not (counter.total.num_unknown or counter.total.num_dropped)
        begin = tokenizer.eod_id if begin_id is None else begin_id
        sources.append(_of_texts(name, tokens, text_bytes if is_whole else None, begin_id=begin))
    return sources


def _of_texts(name: str, texts: Sequence[np.ndarray], text_bytes: int | None, *, begin_id: int) -> Source:
    begin = np.array([begin_id], texts[0].dtype)
    stream = np.concatenate([part for text in texts for part in (begin, text)])
    firsts = np.cumsum([0, *(text.size + 1 for text in texts)])
    documents = [Range(int(first), text.size) for first, text in zip(firsts, texts, strict=False)]
    return Source(
        name=name,
        num_tokens=stream.size,
        read=lambda start, count: stream[start : start + count],
        starts=None,
        ranges=lambda: documents,
        documents=lambda: documents,
        text_bytes=text_bytes,
    )


def _refuse(error: DataError) -> NoReturn:
    raise error
