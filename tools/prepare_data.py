"""Prepares training data: text and JSON lines to Megatron `.bin/.idx`.

    python tools/prepare_data.py books/ chats.jsonl.gz --train-tokenizer --vocab-size 16384 --output-prefix data/mine --validation-fraction 0.01

Text and source files are one document each, lines of .jsonl files one document each; both may be gzipped. Of a directory all text,
source and .jsonl files are read, in order of their path. Run the same command again after an interruption (or a kill -9): it goes on
with what is missing, and the output is the same, byte for byte, as without it.
"""

from __future__ import annotations

import argparse
import os
import sys

from rich.progress import TextColumn, TimeElapsedColumn, TimeRemainingColumn

from phase8.config.arguments import path_argument
from phase8.data.muse import MuseReport, import_muse
from phase8.data.preparation import PrepareOptions, PrepareReport
from phase8.data.prepare import prepare
from phase8.data.shards import DocumentRules
from phase8.data.tokenizer import load_tokenizer
from phase8.errors import ConfigError, Phase8Error, describe_error
from phase8.observe.stage_progress import ProgressDisplay

EXIT_INTERRUPTED = 130


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="*", type=path_argument, metavar="INPUT", help="text, source, .jsonl or .gz file, or a directory of them")
    parser.add_argument("--output-prefix", type=path_argument, required=True, metavar="P", help="begin of every path that is written")
    parser.add_argument("--json-key", default="text", metavar="KEY", help="where a JSON line holds its text (default: text)")
    parser.add_argument(
        "--import-muse",
        type=path_argument,
        metavar="PREFIX",
        help="instead of inputs: convert the MUSE pair PREFIX.bin/.idx (ResNet-BK), made with --tokenizer",
    )
    tokenizer = parser.add_argument_group("tokenizer (one of the two)")
    tokenizer.add_argument("--tokenizer", type=path_argument, metavar="FILE", help="existing sentencepiece .model or Hugging Face tokenizer.json")
    tokenizer.add_argument("--train-tokenizer", action="store_true", help="train a sentencepiece BPE with byte fallback on a sample of the inputs")
    tokenizer.add_argument("--vocab-size", type=int, metavar="N", help="vocabulary of the tokenizer to train")
    tokenizer.add_argument("--tokenizer-sample-bytes", type=int, default=20_000_000, metavar="N", help="size of that sample (default: %(default)s)")
    documents = parser.add_argument_group("documents")
    documents.add_argument(
        "--validation-fraction", type=float, default=0.0, metavar="X", help="share held out, chosen by a hash of the text (default: 0, none)"
    )
    documents.add_argument(
        "--append-eod", action=argparse.BooleanOptionalAction, default=True, help="put the end-of-document token behind every document"
    )
    documents.add_argument("--skip-invalid", action="store_true", help="count and skip what is not a document instead of stopping")
    work = parser.add_argument_group("work")
    work.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes that tokenise (default: one per CPU, %(default)s)"
    )
    work.add_argument("--shard-bytes", type=int, default=16 << 20, metavar="N", help="input per unit of work (default: %(default)s)")
    return parser.parse_args(arguments)


def print_report(report: PrepareReport) -> None:
    """What was written and how to train on it."""
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
    if report.num_passed_over:
        print(f"files of directories passed over, not being text by their suffix: {report.num_passed_over:,}")
    print("train on it with: --set " + " ".join(report.settings))


def print_muse_report(report: MuseReport) -> None:
    """What was imported, what was odd about it, and how to train on it."""
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
    print(f"train on it with: --set data.train={report.destination} data.tokenizer={report.tokenizer} model.vocab_size={report.vocab_size}")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; its exit code is that of the error, see phase8/errors.py."""
    parsed = parse_arguments(arguments)
    try:
        if parsed.import_muse is not None:
            print_muse_report(import_muse_pair(parsed))
        else:
            with ProgressDisplay(TextColumn("{task.percentage:3.0f} %"), TimeElapsedColumn(), TimeRemainingColumn()) as display:
                report = prepare(options_of(parsed), on_progress=display.show)
            print_report(report)
    except Phase8Error as error:
        print(describe_error(error), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


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
            validation_fraction=parsed.validation_fraction,
            append_eod=parsed.append_eod,
            skip_invalid=parsed.skip_invalid,
        ),
        shard_bytes=parsed.shard_bytes,
        num_workers=parsed.workers,
    )


def import_muse_pair(parsed: argparse.Namespace) -> MuseReport:
    """Converts a MUSE pair, whose tokens the given tokenizer made."""
    if parsed.inputs or parsed.train_tokenizer or parsed.tokenizer is None:
        raise ConfigError("--import-muse takes the place of inputs and needs --tokenizer FILE, the tokenizer that made the data")
    tokenizer = load_tokenizer(parsed.tokenizer)
    destination = f"{parsed.output_prefix}_{parsed.json_key}_document"
    return import_muse(parsed.import_muse, destination, vocab_size=tokenizer.vocab_size, eod_id=tokenizer.eod_id, tokenizer=str(parsed.tokenizer))


if __name__ == "__main__":
    sys.exit(main())
