"""Preparation of training data: text and JSON lines in, Megatron `.bin/.idx` out.

The inputs are cut into shards, which processes tokenise independently and commit by a rename; then the shards are appended in order.
So the output depends only on the inputs and the options, never on the number of processes or on interruptions, and a run that was
killed continues with the shards that are missing. Until the end everything is in `<output_prefix>_<json_key>.preparing/`.
"""

from __future__ import annotations

import functools
import operator
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np

from phase8.data.documents import cut_shards, spread
from phase8.data.earlier_output import refuse_earlier_output
from phase8.data.indexed import IndexedDataset, IndexedWriter, best_dtype
from phase8.data.input_files import Source, Span, check_unchanged, find_sources
from phase8.data.lost_text import stored_lost_text
from phase8.data.made_with import made_with
from phase8.data.pair_record import MadeWith
from phase8.data.prepare_options import Layout, PreparedSplit, PrepareOptions, PrepareReport
from phase8.data.shard_pool import make_shards
from phase8.data.shards import DocumentRules, InvalidInputs, Shard, ShardCounts, finished_counts, read_texts
from phase8.data.staging import exclusive_lock, read_json, write_json
from phase8.data.tokenizer import load_tokenizer
from phase8.data.tokenizer_file import tokenizer_digest
from phase8.data.tokenizer_training import train_sentencepiece
from phase8.data.utf8 import num_encoded_bytes
from phase8.durable import staged_directory, staged_file, storage_errors
from phase8.errors import ConfigError, DataError

OnProgress = Callable[[str, int, int], None]

# Must be raised when the same inputs and options give other bytes or another record than before.
FORMAT_VERSION = 3
TOKENIZING = "tokenizing"
_SAMPLE_BYTES_PER_SHARD = 1 << 20


def prepare(options: PrepareOptions, *, on_progress: OnProgress | None = None) -> PrepareReport:
    """Tokenises the inputs; continues where an earlier run with the same options stopped, and does nothing if one finished.

    Args:
        options: Inputs, outputs and rules.
        on_progress: Called with stage, amount done and amount in all; while `TOKENIZING` these are bytes of the inputs.

    Raises:
        ConfigError: The options are invalid, or data of other inputs or options are there and may not be replaced.
        DataError: There is no input, an input or the tokenizer is bad, or another process writes the same output. Committed shards are kept.
        StorageError: The output cannot be written.
    """
    if problems := options.problems():
        raise ConfigError(problems)
    sources, left_out = find_sources(options.inputs)
    _check_number(sources, options.rules)
    layout = Layout(options)
    made_from = _made_from(options, sources)
    with exclusive_lock(layout.lock, wait=False):
        report = _finished_report(options, layout, made_from)
        if report is None:
            refuse_earlier_output(options, layout, made_from)
            layout.sweep()
            try:
                report = _prepare(options, sources, layout, made_from, on_progress or _silent)
            finally:
                with suppress(OSError):  # the finished shards are kept for the next run
                    layout.work.rmdir()
            write_json(layout.record, {"made_from": made_from, "report": asdict(report)})
        shutil.rmtree(layout.work, ignore_errors=True)
    return replace(report, not_read=left_out.sentence, dangling_links=left_out.dangling_links)


def _silent(stage: str, completed: int, total: int) -> None:
    pass


def _made_from(options: PrepareOptions, sources: list[Source]) -> dict[str, object]:
    """Everything on which the output depends, as JSON."""
    if options.tokenizer is not None:
        tokenizer: dict[str, object] = {"sha256": tokenizer_digest(options.tokenizer)}
    else:
        tokenizer = {"vocab_size": options.vocab_size, "sample_bytes": options.tokenizer_sample_bytes, "shard_bytes": options.shard_bytes}
    rules, files = asdict(options.rules), [asdict(source) for source in sources]
    return {"format_version": FORMAT_VERSION, "sources": files, "rules": rules, "tokenizer": tokenizer}


def _finished_report(options: PrepareOptions, layout: Layout, made_from: dict[str, object]) -> PrepareReport | None:
    """The report of an earlier run whose output is unchanged; None if there is work to do."""
    record = read_json(layout.record)
    if not isinstance(record, dict) or record.get("made_from") != made_from:
        return None
    stored, tokenizer = record["report"], str(options.tokenizer or layout.tokenizer)
    lost = stored_lost_text(stored.get("lost"))
    if lost is None:
        return None
    try:
        pairs = {name: IndexedDataset(layout.split(name)) for name in options.rules.splits}
        is_whole = all(pair.record is not None for pair in pairs.values())  # a record counts only beside the tokens that it describes
        is_whole &= tokenizer_digest(Path(tokenizer)) == stored["tokenizer_sha256"]
    except DataError:
        return None
    splits = {name: _prepared_split(pair) for name, pair in pairs.items()}
    for name, split in splits.items():
        is_whole &= (split.num_documents, split.num_tokens) == (stored["splits"][name]["num_documents"], stored["splits"][name]["num_tokens"])
    stored = {field.name: stored[field.name] for field in fields(PrepareReport) if field.name in stored}  # earlier versions wrote more
    return PrepareReport(**stored | {"splits": splits, "lost": lost, "tokenizer": tokenizer, "is_reused": True}) if is_whole else None


def _prepared_split(written: IndexedDataset) -> PreparedSplit:
    return PreparedSplit(prefix=written.prefix, num_documents=written.num_documents, num_tokens=written.num_tokens)


def _prepare(options: PrepareOptions, sources: list[Source], layout: Layout, made_from: dict[str, object], on_progress: OnProgress) -> PrepareReport:
    cut = cut_shards(sources, options.shard_bytes, document_separator=options.rules.document_separator)
    tokenizer_path = options.tokenizer or _trained_tokenizer(options, cut, layout, made_from, on_progress)
    tokenizer = load_tokenizer(tokenizer_path, eod_token=options.rules.eod_token)
    dtype = best_dtype(tokenizer.vocab_size)
    maker = made_with(tokenizer, eod_id=tokenizer.eod_id if options.rules.append_eod else None)
    shards = [
        Shard(directory=layout.work / f"shard-{i:06d}", spans=spans, tokenizer=tokenizer_path, tokenizer_sha256=tokenizer.sha256, rules=options.rules)
        for i, spans in enumerate(cut)
    ]
    counts = _tokenise(shards, options.num_workers, on_progress)
    check_unchanged(sources)
    num_empty = sum(found.num_empty for found in counts) + _num_empty_files(sources)
    try:
        _check_splits(counts, options.rules, num_empty)
    except DataError:
        shutil.rmtree(layout.work, ignore_errors=True)  # no options that would do go on with these shards
        raise
    write_json(layout.publishing, made_from)
    with storage_errors(layout.record):
        layout.record.unlink(missing_ok=True)  # it must never describe the pairs that are replaced now
    splits = {name: _merge(shards, name, layout.split(name), dtype, maker, on_progress) for name in options.rules.splits}
    if options.tokenizer is None:
        with staged_file(layout.tokenizer) as partial:
            shutil.copyfile(tokenizer_path, partial)
    return PrepareReport(
        splits=splits,
        tokenizer=str(options.tokenizer or layout.tokenizer),
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        dtype=dtype.name,
        text_bytes=sum(found.text_bytes for found in counts),
        num_empty=num_empty,
        num_with_nul=sum(found.num_with_nul for found in counts),
        num_invalid=sum(found.num_invalid for found in counts),
        first_invalid=next((found.first_invalid for found in counts if found.first_invalid), None),
        lost=functools.reduce(operator.add, (found.lost for found in counts)),
        eod_token=options.rules.eod_token,
    )


def _trained_tokenizer(
    options: PrepareOptions, cut: list[tuple[Span, ...]], layout: Layout, made_from: dict[str, object], on_progress: OnProgress
) -> Path:
    directory = layout.work / "tokenizer"
    if read_json(directory / "record.json") != made_from:
        on_progress("training the tokenizer", 0, 1)
        with staged_directory(directory) as partial:
            train_sentencepiece(_sample(options, cut), partial / "tokenizer.model", vocab_size=options.vocab_size)
            write_json(partial / "record.json", made_from)
        on_progress("training the tokenizer", 1, 1)
    return directory / "tokenizer.model"


def _sample(options: PrepareOptions, cut: list[tuple[Span, ...]]) -> Iterator[str]:
    """Training documents from shards all over the inputs, `tokenizer_sample_bytes` in all (the last document is cut to fit)."""
    remaining = options.tokenizer_sample_bytes
    most_per_shard = max(_SAMPLE_BYTES_PER_SHARD, -(-remaining // max(len(cut), 1)))
    on_invalid = InvalidInputs(skip=options.rules.skip_invalid)
    for spans in spread(cut):
        left_in_shard = min(most_per_shard, remaining)
        for text, _ in read_texts(spread(spans), options.rules, on_invalid):
            if left_in_shard <= 0:
                break
            if options.rules.split_of(text) == "train":
                part = text[:left_in_shard]
                yield part
                num_bytes = num_encoded_bytes(part)
                left_in_shard -= num_bytes
                remaining -= num_bytes
        if remaining <= 0:
            return


def _tokenise(shards: list[Shard], num_workers: int, on_progress: OnProgress) -> list[ShardCounts]:
    """Makes the shards that are not finished; returns the counts of all shards in order."""
    counts = {shard.directory: found for shard in shards if (found := finished_counts(shard)) is not None}
    missing = [shard for shard in shards if shard.directory not in counts]
    total = sum(shard.num_bytes for shard in shards)
    completed = total - sum(shard.num_bytes for shard in missing)
    on_progress(TOKENIZING, completed, total)

    def on_bytes(count: int) -> None:
        # A line longer than its shard counts twice, since later shards count it too; so the end is when all shards are done.
        is_done = len(counts) == len(shards)
        on_progress(TOKENIZING, total if is_done else min(completed + count, total - 1), total)

    make_shards(missing, num_workers=num_workers, on_done=lambda shard, found: counts.update({shard.directory: found}), on_bytes=on_bytes)
    return [counts[shard.directory] for shard in shards]


def _num_empty_files(sources: list[Source]) -> int:
    """Files without bytes, of which no shard has a part; where an empty file is damaged, its reader counts it."""
    return sum(source.size_bytes == 0 and not (source.is_compressed or source.is_parquet) for source in sources)


def _check_splits(counts: list[ShardCounts], rules: DocumentRules, num_empty: int) -> None:
    num_documents = {name: sum(found.num_documents[name] for found in counts) for name in rules.splits}
    total = sum(num_documents.values())
    if total == 0:
        skipped = sum(found.num_invalid for found in counts) + num_empty
        why = f" ({skipped:,} {'was' if skipped == 1 else 'were'} empty or invalid)" if skipped else ""
        raise DataError(f"the inputs hold no document with text{why}; give other inputs or another --json-key")
    for name, number in num_documents.items():
        if number == 0:
            raise DataError(
                f"none of the {total} documents fell into the {name} split with --validation-fraction {rules.validation_fraction}; "
                "give more documents (a text file is one, or many with --document-separator) or another fraction"
            )


def _check_number(sources: list[Source], rules: DocumentRules) -> None:
    """Refuses a single text file for two splits at once, not after it has been tokenised: it is one document."""
    documents = [source for source in sources if source.size_bytes or source.is_compressed]
    if len(documents) != 1 or len(rules.splits) == 1 or rules.document_separator is not None:
        return
    (source,) = documents
    if not (source.is_json_lines or source.is_parquet):
        raise DataError(
            f"{source.path} is one document, as a text file is, but --validation-fraction {rules.validation_fraction} needs at least two; give "
            "--document-separator LINE, the line that stands between its documents, or more files, or leave the fraction out"
        )


def _merge(shards: list[Shard], name: str, prefix: Path, dtype: np.dtype, maker: MadeWith, on_progress: OnProgress) -> PreparedSplit:
    """Appends a split of all shards, in order, into its final pair."""
    with IndexedWriter(prefix, dtype=dtype, made_with=maker) as writer:
        for i, shard in enumerate(shards):
            on_progress(f"writing {name}", i, len(shards))
            writer.append_indexed(shard.directory / name)
    on_progress(f"writing {name}", len(shards), len(shards))
    return _prepared_split(IndexedDataset(prefix))
