"""One shard of a preparation: a bounded part of the inputs, tokenised by one process and committed by one rename.

A shard directory holds `<split>.bin/.idx` for each split and `record.json`, which says what it was made from. What a shard holds
depends on nothing but that record, so it does not matter which process makes it, when, or how often.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

import numpy as np

from phase8.data.documents import is_whole, read_documents
from phase8.data.indexed import IndexedDataset, IndexedWriter, best_dtype
from phase8.data.input_files import Document, OnInvalid, Span
from phase8.data.lost_text import LostText, LostTextCounter, stored_lost_text
from phase8.data.staging import read_json, write_json
from phase8.data.tokenizer import Tokenizer, load_tokenizer
from phase8.data.utf8 import encoded_pieces, num_encoded_bytes
from phase8.durable import staged_directory
from phase8.errors import DataError

# Longer documents are encoded in pieces that end at a line end, so that a file of gigabytes does not become a single list of ids.
_PIECE_CHARACTERS = 1 << 22


OnBytes = Callable[[int], None]


def ignore_progress(_: float) -> None:
    """A progress callback that does nothing."""


@dataclass(frozen=True, kw_only=True)
class DocumentRules:
    """Treatment of a document; part of every record.

    Attributes:
        json_key: Key of the text in an object of JSON lines; the column in Parquet.
        document_separator: Content of the lines between the documents of a text file; None if a file is one document.
        validation_fraction: Share of the documents held out, chosen by a hash of their text: a text that occurs twice never ends up
            in both splits, and a document stays in its split when others come or go.
        append_eod: Put the end-of-document token after every document.
        eod_token: The end-of-document piece; None: the tokenizer's own.
        skip_invalid: Count and skip what is not a document, instead of stopping.
    """

    json_key: str = "text"
    document_separator: str | None = None
    validation_fraction: float = 0.0
    append_eod: bool = True
    eod_token: str | None = None
    skip_invalid: bool = False

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that are written."""
        return ("train", "validation") if self.validation_fraction else ("train",)

    def split_of(self, text: str) -> str:
        """The split of a document."""
        if not self.validation_fraction:
            return "train"
        digest = hashlib.sha256()
        for piece in encoded_pieces(text):
            digest.update(piece)
        is_validation = int.from_bytes(digest.digest()[:8], "big") < round(self.validation_fraction * 2**64)
        return "validation" if is_validation else "train"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The inputs and the output directory of one shard.

    Attributes:
        directory: Where it is committed.
        spans: The parts of the inputs, in order.
        tokenizer: The tokenizer file.
        tokenizer_sha256: Digest of that file.
        rules: Treatment of a document.
    """

    directory: Path
    spans: tuple[Span, ...]
    tokenizer: Path
    tokenizer_sha256: str
    rules: DocumentRules

    @property
    def made_from(self) -> dict[str, object]:
        """Everything on which the content depends, as JSON."""
        spans = [[*astuple(span.source), span.start, span.end] for span in self.spans]
        return {"spans": spans, "tokenizer_sha256": self.tokenizer_sha256, "rules": asdict(self.rules)}

    @property
    def num_bytes(self) -> int:
        """Input bytes of the spans."""
        return sum(span.end - span.start for span in self.spans)


@dataclass(frozen=True, kw_only=True)
class ShardCounts:
    """Counts of a finished shard.

    Attributes:
        num_documents: Documents written, by split.
        text_bytes: UTF-8 bytes of the documents written.
        num_empty: Documents without tokens, which are not written.
        num_with_nul: Documents written that hold NUL bytes.
        num_invalid: Number of inputs that were skipped because they are not documents.
        first_invalid: Reason for skipping the first of them.
        lost: Text that the tokenizer could not keep.
    """

    num_documents: dict[str, int]
    text_bytes: int
    num_empty: int
    num_with_nul: int
    num_invalid: int
    first_invalid: str | None
    lost: LostText


class InvalidInputs:
    """Called with what is not a document: raises at the first one, or counts.

    Args:
        skip: Count instead of stopping.
    """

    def __init__(self, *, skip: bool):
        self._skip = skip
        self.count = 0
        self.first: str | None = None

    def __call__(self, error: DataError) -> None:
        """Receives one error."""
        if not self._skip:
            raise DataError(f"{error} (or pass --skip-invalid to leave such documents out)")
        self.count += 1
        self.first = self.first or str(error)


def read_texts(spans: Iterable[Span], rules: DocumentRules, on_invalid: OnInvalid) -> Iterator[Document]:
    """The texts of several spans, one after the other."""
    for span in spans:
        # Where damaged files are skipped, the damage must be found before any of their texts is written.
        if not rules.skip_invalid or is_whole(span.source, on_invalid):
            yield from read_documents(span, json_key=rules.json_key, document_separator=rules.document_separator, on_invalid=on_invalid)


def finished_counts(shard: Shard) -> ShardCounts | None:
    """The counts of a committed shard; None if it is missing, damaged, altered or made from something else."""
    record = read_json(shard.directory / "record.json")
    if not isinstance(record, dict) or record.get("made_from") != shard.made_from:
        return None
    try:
        pairs = {split: IndexedDataset(shard.directory / split) for split in shard.rules.splits}
        is_as_written = all(pair.record is not None for pair in pairs.values())
    except DataError:
        return None
    if not is_as_written:
        return None
    num_documents = {split: pair.num_documents for split, pair in pairs.items()}
    return _stored_counts(record.get("counts"), num_documents)


def _stored_counts(values: object, num_documents: dict[str, int]) -> ShardCounts | None:
    """The counts in a record; None if it is malformed, or disagrees with the files about the number of documents."""
    if not isinstance(values, dict) or values.keys() != {field.name for field in fields(ShardCounts)}:
        return None
    numbers, reason = [values[name] for name in ("text_bytes", "num_empty", "num_with_nul", "num_invalid")], values["first_invalid"]
    lost = stored_lost_text(values["lost"])
    is_whole = all(type(number) is int and number >= 0 for number in numbers) and (reason is None or isinstance(reason, str))
    if lost is None or not is_whole or values["num_documents"] != num_documents:
        return None
    return ShardCounts(**values | {"lost": lost})


def make_shard(shard: Shard, *, on_bytes: OnBytes = ignore_progress) -> ShardCounts:
    """Tokenises the documents of a shard and commits it.

    Args:
        shard: The shard.
        on_bytes: Called often with the input bytes that were tokenised so far.

    Raises:
        DataError: Something is not a document and `skip_invalid` is off, an input cannot be read, or the tokenizer was changed.
        StorageError: The place cannot be written.
    """
    rules = shard.rules
    tokenizer = load_tokenizer(shard.tokenizer, eod_token=rules.eod_token)
    if tokenizer.sha256 != shard.tokenizer_sha256:  # shards of two tokenizers would become one pair
        raise DataError(f"the tokenizer {shard.tokenizer} was changed while it was being used; run again when nothing writes to it")
    invalid, lost = InvalidInputs(skip=rules.skip_invalid), LostTextCounter(tokenizer)
    dtype = best_dtype(tokenizer.vocab_size)
    end = np.array([tokenizer.eod_id] if rules.append_eod else [], dtype)
    num_documents = dict.fromkeys(rules.splits, 0)
    text_bytes = num_empty = num_with_nul = bytes_done = 0
    with staged_directory(shard.directory) as directory:
        with ExitStack() as stack:
            writers = {split: stack.enter_context(IndexedWriter(directory / split, dtype=dtype)) for split in rules.splits}
            for text, source_bytes in read_texts(shard.spans, rules, invalid):
                on_part = _part_of_document(on_bytes, bytes_done, source_bytes)
                bytes_done += source_bytes
                try:
                    tokens = encode_document(text, tokenizer, end=end, on_part=on_part)
                except DataError as error:
                    invalid(error)
                    continue
                lost.add(document_pieces(text), tokens[: tokens.size - end.size])
                if tokens.size == end.size:
                    num_empty += 1
                    continue
                split = rules.split_of(text)
                writers[split].add_document(tokens)
                num_documents[split] += 1
                text_bytes += num_encoded_bytes(text)
                num_with_nul += "\0" in text
                del text, tokens  # otherwise they would be in memory while the next document is read
        counts = ShardCounts(
            num_documents=num_documents,
            text_bytes=text_bytes,
            num_empty=num_empty,
            num_with_nul=num_with_nul,
            num_invalid=invalid.count,
            first_invalid=invalid.first,
            lost=lost.total,
        )
        write_json(directory / "record.json", {"made_from": shard.made_from, "counts": asdict(counts)})
    return counts


def _part_of_document(on_bytes: OnBytes, bytes_before: int, source_bytes: int) -> Callable[[float], None]:
    return lambda part: on_bytes(bytes_before + int(part * source_bytes))


def encode_document(
    text: str, tokenizer: Tokenizer, *, end: np.ndarray | None = None, on_part: Callable[[float], None] = ignore_progress
) -> np.ndarray:
    """Token ids of a document; one beyond four million characters is encoded in pieces that end at a line end.

    Args:
        text: The document.
        tokenizer: What encodes it.
        end: Ids that are appended to its own.
        on_part: Called after each piece with the part of the document that is encoded, up to 1.

    Shape:
        [num_tokens], in the type of the token file.
    """
    dtype = best_dtype(tokenizer.vocab_size)
    encoded, num_characters = [np.empty(0, dtype)], 0
    for piece in document_pieces(text):
        encoded.append(np.array(tokenizer.encode(piece), dtype))
        num_characters += len(piece)
        on_part(num_characters / len(text))
    return np.concatenate(encoded if end is None else [*encoded, end])


def document_pieces(text: str) -> Iterator[str]:
    """The pieces of a document that are encoded one after the other, of four million characters at most."""
    start = 0
    while start < len(text):
        end = start + _PIECE_CHARACTERS
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end
