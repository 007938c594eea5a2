"""Prepares training data: text and JSON lines to Megatron `.bin/.idx`.

    python tools/prepare_data.py books/ chats.jsonl.gz --train-tokenizer --vocab-size 16384 --output-prefix data/mine --validation-fraction 0.01

Text and source files are one document each (or many, with --document-separator), lines of .jsonl files one document each; both may be
compressed (.gz, .zst). Rows of .parquet files are one document each, with their text in the column --json-key. Of a directory all text,
source, .jsonl and .parquet files are read, in order of their path; symbolic links are followed, hidden names and Python's caches are left
out and counted. Run the same command again after an interruption (or a kill -9): it goes on with what is missing, and the output is the
same, byte for byte, as without it. Finished data are recognised: the same command does nothing then, and another one that would replace
them is refused, unless --overwrite is given. Exit codes are those of phase8/errors.py: 2 for such a refusal.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys

from rich.progress import TextColumn, TimeElapsedColumn, TimeRemainingColumn

import phase8.early_interrupt  # noqa: F401  # first: later imports take time
from phase8.config.arguments import path_argument, prefix_argument
from phase8.data.earlier_output import refuse_pair
from phase8.data.lost_text import LostText
from phase8.data.made_with import made_with
from phase8.data.muse import MuseReport, import_muse
from phase8.data.prepare import TOKENIZING, prepare
from phase8.data.prepare_options import PrepareOptions, PrepareReport, training_settings
from phase8.data.raw_tokens import RawReport, import_raw
from phase8.data.shards import DocumentRules
from phase8.data.tokenizer import Tokenizer, load_tokenizer
from phase8.errors import ConfigError
from phase8.observe.stage_progress import ProgressDisplay
from phase8.terminal import run_door


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="*", type=path_argument, metavar="INPUT", help="text, source, .jsonl or .parquet file, or a directory")
    parser.add_argument("--output-prefix", type=prefix_argument, required=True, metavar="P", help="begin of every path that is written")
    parser.add_argument("--json-key", default="text", metavar="KEY", help="where a JSON line or a Parquet row holds its text (default: text)")
    parser.add_argument("--overwrite", action="store_true", help="replace data that are there, made from other inputs or with other options")
    foreign = parser.add_argument_group("data that are tokens already, instead of inputs")
    foreign.add_argument(
        "--import-muse", type=path_argument, metavar="PREFIX", help="convert the MUSE pair PREFIX.bin/.idx (ResNet-BK), made with --tokenizer"
    )
    foreign.add_argument(
        "--import-raw",
        type=path_argument,
        metavar="FILE",
        help="convert a file of raw tokens: nanoGPT's and llm.c's .bin, datatrove's .ds (with .ds.index); --tokenizer checks their ids",
    )
    foreign.add_argument("--dtype", choices=["uint16", "uint32"], help="type of these tokens, where no header or index says it")
    foreign.add_argument("--eod-id", type=int, metavar="N", help="the token that ends a document among them (default: that of --tokenizer)")
    tokenizer = parser.add_argument_group("tokenizer (one of the two)")
    tokenizer.add_argument("--tokenizer", type=path_argument, metavar="FILE", help="existing sentencepiece .model or Hugging Face tokenizer.json")
    tokenizer.add_argument("--train-tokenizer", action="store_true", help="train a sentencepiece BPE with byte fallback on a sample of the inputs")
    tokenizer.add_argument("--vocab-size", type=int, metavar="N", help="vocabulary of the tokenizer to train")
    tokenizer.add_argument("--tokenizer-sample-bytes", type=int, default=20_000_000, metavar="N", help="size of that sample (default: %(default)s)")
    tokenizer.add_argument(
        "--eod-token", metavar="NAME", help="piece of --tokenizer between documents, where it names none itself or several (default: its own)"
    )
    documents = parser.add_argument_group("documents")
    documents.add_argument(
        "--validation-fraction", type=float, default=0.0, metavar="X", help="share held out, chosen by a hash of the text (default: 0, none)"
    )
    documents.add_argument(
        "--append-eod", action=argparse.BooleanOptionalAction, default=True, help="put the end-of-document token behind every document"
    )
    documents.add_argument(
        "--document-separator", metavar="LINE", help="lines of text files that stand between two documents, such as '<|endoftext|>' (default: none)"
    )
    documents.add_argument("--skip-invalid", action="store_true", help="count and skip what is not a document instead of stopping")
    work = parser.add_argument_group("work")
    work.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes that tokenise (default: one per CPU, %(default)s)"
    )
    work.add_argument("--shard-bytes", type=int, default=16 << 20, metavar="N", help="input per unit of work (default: %(default)s)")
    return parser.parse_args(arguments)


def print_report(report: PrepareReport) -> None:
    """Prints what was written and how to train on it."""
    if report.is_reused:
        print("already prepared from the same inputs with the same options; nothing to do")
    for split in report.splits.values():
        print(f"{split.prefix}.bin/.idx: {split.num_documents:,} documents, {split.num_tokens:,} tokens")
    ratio = report.text_bytes / report.num_tokens
    print(f"in all: {report.num_documents:,} documents, {report.num_tokens:,} tokens of {report.dtype}, {ratio:.2f} bytes per token")
    if report.num_invalid:
        print(f"invalid documents skipped: {report.num_invalid:,}, the first: {report.first_invalid}")
    if report.num_empty:
        print(f"empty documents left out: {report.num_empty:,}")
    if report.num_with_nul:
        print(f"documents with NUL bytes, which text rarely has, kept as they are: {report.num_with_nul:,}")
    print_lost(report.lost)
    if report.not_read is not None:
        print(report.not_read)
    if report.dangling_links:
        print(f"symbolic links of directories that lead to nothing: {len(report.dangling_links):,}, the first: {report.dangling_links[0]}")
    print_settings(report.settings)


def print_lost(lost: LostText) -> None:
    """Prints what the tokens lose of the text."""
    if lost.num_unknown:
        print(
            f"unknown tokens: {lost.num_unknown:,} in {lost.num_documents_with_unknown:,} documents, "
            f"for text without a token of its own, the first: {lost.first_unknown}"
        )
    if lost.num_dropped:
        print(
            f"characters that the tokenizer drops: {lost.num_dropped:,} in {lost.num_documents_with_dropped:,} documents, "
            f"the first: {lost.first_dropped}"
        )


def print_muse_report(report: MuseReport, eod_token: str | None) -> None:
    """Prints what was imported, its irregularities, and how to train on it."""
    print(f"{report.destination}.bin/.idx: {report.num_documents:,} documents, {report.num_tokens:,} tokens of {report.dtype}")
    print(f"documents that end in the end-of-document token {report.eod_id}: {report.num_documents_ending_in_eod:,}")
    if report.num_zero_length_documents:
        print(f"empty documents left out: {report.num_zero_length_documents:,}")
    if report.num_overlapping_ranges:
        print(
            f"documents that overlap earlier ones: {report.num_overlapping_ranges:,}, so {report.num_overlapping_tokens:,} tokens are written twice"
        )
    if report.num_uncovered_ranges:
        print(f"tokens left out for belonging to no document: {report.num_uncovered_tokens:,}, in stretches: {report.num_uncovered_ranges:,}")
    print(f"log: {report.destination}.import.json")
    print_settings(training_settings({"train": report.destination}, tokenizer=report.tokenizer, eod_token=eod_token, vocab_size=report.vocab_size))


def print_raw_report(report: RawReport, tokenizer: Tokenizer | None, eod_token: str | None) -> None:
    """Prints what was imported and how to train on it."""
    print(f"{report.destination}.bin/.idx: {report.num_documents:,} documents, {report.num_tokens:,} tokens of {report.dtype}")
    print(f"read as {report.layout} {report.source_dtype} tokens, the largest id: {report.largest_id}")
    if report.eod_id is not None:
        print(f"documents that end in the end-of-document token {report.eod_id}: {report.num_documents_ending_in_eod:,}")
    if report.num_zero_length_documents:
        print(f"empty documents left out: {report.num_zero_length_documents:,}")
    print(f"log: {report.destination}.import.json")
    train = {"train": report.destination}
    if tokenizer is None:
        print_settings(training_settings(train), " and the data.tokenizer that made the tokens")
    else:
        print_settings(training_settings(train, tokenizer=tokenizer.path, eod_token=eod_token, vocab_size=tokenizer.vocab_size))


def print_settings(settings: list[str], besides: str = "") -> None:
    """Prints how to train on what was written."""
    print(f"train on it with: --set {shlex.join(settings)}{besides}")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code, see phase8/errors.py."""
    return run_door(lambda: _run(arguments), interrupted="interrupted; run the same command again to go on")


def _run(arguments: list[str] | None) -> int:
    """Prepares or imports, and reports."""
    parsed = parse_arguments(arguments)
    check_import(parsed)
    if parsed.import_muse is not None:
        print_muse_report(import_muse_pair(parsed), parsed.eod_token)
    elif parsed.import_raw is not None:
        tokenizer = None if parsed.tokenizer is None else load_tokenizer(parsed.tokenizer, eod_token=parsed.eod_token)
        print_raw_report(import_raw_file(parsed, tokenizer), tokenizer, parsed.eod_token)
    else:
        print_report(prepare_inputs(parsed))
    return 0


def progress_display() -> ProgressDisplay:
    """A progress display for a preparation or an import, which shows bytes if bytes are counted."""
    return ProgressDisplay(TextColumn("{task.percentage:3.0f} %"), TextColumn("{task.fields[amount]}"), TimeElapsedColumn(), TimeRemainingColumn())


def prepare_inputs(parsed: argparse.Namespace) -> PrepareReport:
    """Prepares text inputs."""
    options = options_of(parsed)
    with progress_display() as display:
        return prepare(options, on_progress=lambda stage, *amounts: display.show(stage, *amounts, in_bytes=stage == TOKENIZING))


def options_of(parsed: argparse.Namespace) -> PrepareOptions:
    """The options of a preparation."""
    return PrepareOptions(
        inputs=tuple(parsed.inputs),
        output_prefix=parsed.output_prefix,
        tokenizer=parsed.tokenizer,
        train_tokenizer=parsed.train_tokenizer,
        vocab_size=parsed.vocab_size,
        tokenizer_sample_bytes=parsed.tokenizer_sample_bytes,
        rules=DocumentRules(
            json_key=parsed.json_key,
            document_separator=parsed.document_separator,
            validation_fraction=parsed.validation_fraction,
            append_eod=parsed.append_eod,
            eod_token=parsed.eod_token,
            skip_invalid=parsed.skip_invalid,
        ),
        shard_bytes=parsed.shard_bytes,
        num_workers=parsed.workers,
        overwrite=parsed.overwrite,
    )


def check_import(parsed: argparse.Namespace) -> None:
    """Checks that the options of exactly one import were given together."""
    imports = {"--import-muse": parsed.import_muse, "--import-raw": parsed.import_raw}
    given = [option for option, value in imports.items() if value is not None]
    if len(given) > 1 or (given and (parsed.inputs or parsed.train_tokenizer)):
        raise ConfigError(f"{given[0]} takes the place of inputs, of --train-tokenizer and of another import; give one of them")
    if parsed.import_raw is None and (parsed.dtype is not None or parsed.eod_id is not None):
        raise ConfigError("--dtype and --eod-id belong to --import-raw; leave them out")


def import_muse_pair(parsed: argparse.Namespace) -> MuseReport:
    """Imports a MUSE pair, whose tokens the given tokenizer made."""
    if parsed.tokenizer is None:
        raise ConfigError("--import-muse takes the place of inputs and needs --tokenizer FILE, the tokenizer that made the data")
    tokenizer = load_tokenizer(parsed.tokenizer, eod_token=parsed.eod_token)
    return import_muse(
        parsed.import_muse,
        destination_of(parsed),
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        tokenizer=str(parsed.tokenizer),
        made_with=made_with(tokenizer, eod_id=tokenizer.eod_id),
    )


def import_raw_file(parsed: argparse.Namespace, tokenizer: Tokenizer | None) -> RawReport:
    """Imports a file of raw tokens, made by the given tokenizer if there is one."""
    eod_id = tokenizer.eod_id if parsed.eod_id is None and tokenizer is not None else parsed.eod_id
    with progress_display() as display:
        return import_raw(
            parsed.import_raw,
            destination_of(parsed),
            dtype=parsed.dtype,
            eod_id=eod_id,
            vocab_size=None if tokenizer is None else tokenizer.vocab_size,
            made_with=None if tokenizer is None else made_with(tokenizer, eod_id=eod_id),
            on_bytes=lambda completed, total: display.show("importing", completed, total, in_bytes=True),
        )


def destination_of(parsed: argparse.Namespace) -> str:
    """Prefix of the pair that an import writes; one that is there is refused unless it may be overwritten."""
    prefix = f"{parsed.output_prefix}_{parsed.json_key}_document"
    if not parsed.overwrite:
        refuse_pair(prefix)
    return prefix


if __name__ == "__main__":
    sys.exit(main())
