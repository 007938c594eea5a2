"""Measures a model on held-out text: loss, perplexity and bits per byte, by source and by position.

    python tools/evaluate.py --checkpoint runs/quickstart --text book.txt articles.jsonl.gz
    python tools/evaluate.py --checkpoint runs/ablation_30m --data data/python_validation_text_document --json
    python tools/evaluate.py --checkpoint runs/long --text book.txt --carry-state                     # position 100,000 has seen 99,999 tokens
    python tools/evaluate.py --checkpoint runs/ablation_30m --held-out --sequences 256
    torchrun --nproc_per_node=8 tools/evaluate.py --checkpoint runs/phase8_7b_3d --data A B

Every token is predicted once. --data names .bin/.idx pairs that the tokenizer of the model has made (one whose record names another
tokenizer is refused); their windows follow each other across documents, as in training. --held-out reads in the same way what the training
run of the checkpoint was evaluated on. --text names files or directories that tools/prepare_data.py can read; each document is read by itself,
after an end-of-document token, or the one that begins texts of a model made elsewhere. A window has the length of the training unless --length
says otherwise; the last one reaches back, so that it is full. With --stride S every window predicts S tokens more than the one before and has the
rest as context. --sequences N takes N windows of --data as an evaluation during training does: evenly spread, the same ones every time; with
--held-out they are those of the evaluations of its training.

The bytes of a text are those of its UTF-8, known if its tokens hold all of it. Those of a pair are known if its record names the model's
tokenizer and this one rewrites no text; otherwise bits per byte are `unknown` (null in JSON). Under torchrun each rank holds the whole model
and reads its share; the result is that of one process.

Progress goes to standard error, the result to standard output. Exit codes as in launch/pretrain.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import phase8.early_interrupt  # noqa: F401  # first: later imports take time
from phase8.config.arguments import add_device_option, path_argument
from phase8.data.documents import separator_problem
from phase8.errors import CheckpointError, ConfigError, DataError, Phase8Error, first_few
from phase8.imports import imports_that_stay
from phase8.processes.bootstrap import World, world_from_environment
from phase8.terminal import output_is_the_product, run_door, warn
from phase8.train.outputs import require_own_output

if TYPE_CHECKING:
    from phase8.checkpoint.load import Checkpoint
    from phase8.config.schema import DataSection
    from phase8.data.loader import SequenceDataset
    from phase8.data.tokenizer import Tokenizer
    from phase8.evaluate.results import SourceResult
    from phase8.evaluate.sources import Source

Show = Callable[[str, int, int], None]


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code, see phase8/errors.py."""
    return run_door(lambda: _run(arguments))


def _run(arguments: list[str] | None) -> int:
    parsed = _parser().parse_args(arguments)
    _check(parsed)
    texts = [*(parsed.text or []), *([parsed.tokenizer] if parsed.tokenizer is not None else [])]
    require_own_output(parsed.output, inputs=texts, pairs=parsed.data or [])
    with output_is_the_product():
        _evaluate(parsed, world_from_environment(os.environ))
    return 0


def _evaluate(parsed: argparse.Namespace, world: World) -> None:
    # Imported late: a mistake in the arguments is answered before torch is loaded.
    with imports_that_stay():
        from torch.distributed.device_mesh import init_device_mesh

        from phase8.distributed.collectives import ALONE, Axis
        from phase8.evaluate.batch_size import planned_batch_size
        from phase8.evaluate.score import Forward, evaluate
        from phase8.evaluate.selection import select_pieces
        from phase8.generate.restore import restore_model
        from phase8.processes.exit import one_voice
        from phase8.processes.watch import running
        from phase8.train.device import select_device

    with one_voice(world):
        device = select_device(parsed.device, local_rank=world.local_rank)
    with running(world, device_type=device.type) as watch, _progress(world, watch.report) as show:
        model, section, checkpoint = restore_model(parsed.checkpoint, device=device)
        length = parsed.length or model.section.sequence_length
        sources = _sources(parsed, section, checkpoint, vocab_size=model.section.vocab_size, show=show, say=warn if world.rank == 0 else _silent)
        how = {"length": length, "stride": parsed.stride, "carry_state": parsed.carry_state, "num_sequences": parsed.sequences}
        sources, pieces = select_pieces(sources, **how)
        size = parsed.batch_size or planned_batch_size(model, length=length, packed=section.reset_at_document_boundaries, device=device)
        found = evaluate(
            model,
            sources,
            pieces,
            Forward(length, size, is_adjustable=parsed.batch_size is None, device=device),
            ranks=ALONE if world.world_size == 1 else Axis(init_device_mesh("cpu", (world.world_size,))),
            on_progress=partial(show, "evaluating"),
        )
        if world.rank == 0:
            _report(parsed, {"checkpoint": str(checkpoint.path), **how}, found)


@contextmanager
def _progress(world: World, report: Callable[..., None]) -> Iterator[Show]:
    """A context manager for the progress: on rank 0 for people, on every rank for the watch over the ranks."""
    from rich.progress import TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from phase8.observe.stage_progress import ProgressDisplay

    with ProgressDisplay(TextColumn("{task.percentage:3.0f} %"), TimeElapsedColumn(), TimeRemainingColumn()) as display:

        def show(stage: str, done: int, total: int) -> None:
            report(step=1, doing=f"{stage}, {done} of {total}")
            if world.rank == 0:
                display.show(stage, done, total)

        yield show


def _silent(sentence: str) -> None:
    """Says nothing, since rank 0 says it."""


def _sources(
    parsed: argparse.Namespace, section: DataSection, checkpoint: Checkpoint, *, vocab_size: int, show: Show, say: Callable[[str], None]
) -> list[Source]:
    from phase8.evaluate.sources import held_out_sources, open_pairs, read_text_sources
    from phase8.generate.text import text_begin

    if parsed.text is None:
        tokenizer = _tokenizer_if_any(parsed, section, checkpoint, vocab_size=vocab_size, say=say)
        if parsed.held_out:
            return held_out_sources(_held_out_data(checkpoint, show), tokenizer, resets=section.reset_at_document_boundaries)
        return open_pairs(parsed.data, tokenizer, section, vocab_size=vocab_size, on_progress=show)
    tokenizer = _tokenizer(parsed, section, checkpoint, vocab_size=vocab_size, say=say)
    return read_text_sources(
        parsed.text,
        tokenizer,
        begin_id=next(iter(text_begin(tokenizer, section)), tokenizer.eod_id),
        json_key="text" if parsed.json_key is None else parsed.json_key,
        document_separator=parsed.document_separator,
        on_progress=partial(show, "tokenizing"),
        on_message=say,
    )


def _held_out_data(checkpoint: Checkpoint, show: Show) -> SequenceDataset:
    from phase8.checkpoint.run_metadata import run_metadata
    from phase8.data.fingerprint_difference import describe_fingerprint_difference
    from phase8.train.datasets import open_run_data

    metadata = run_metadata(checkpoint)
    if metadata.validation_fingerprint is None:
        raise CheckpointError(f"{checkpoint.path} records no held-out data, which a checkpoint of training does if the run had any; give --data")
    data = open_run_data(metadata.config, on_progress=show)
    if data.validation is None or data.validation_fingerprint is None:
        raise CheckpointError(f"{checkpoint.path} records held-out data, but its config names none; give --data")
    differences = describe_fingerprint_difference(metadata.validation_fingerprint, data.validation_fingerprint)
    if differences:
        raise DataError(f"--held-out: the data are not those of the training: {first_few(differences)}; restore them, or name others with --data")
    return data.validation


def _tokenizer(parsed: argparse.Namespace, section: DataSection, checkpoint: Checkpoint, *, vocab_size: int, say: Callable[[str], None]) -> Tokenizer:
    from phase8.generate.restore import choose_tokenizer

    eod_token = parsed.eod_token or section.eod_token
    return choose_tokenizer(checkpoint, parsed.tokenizer, vocab_size=vocab_size, eod_token=eod_token, on_message=say)


def _tokenizer_if_any(
    parsed: argparse.Namespace, section: DataSection, checkpoint: Checkpoint, *, vocab_size: int, say: Callable[[str], None]
) -> Tokenizer | None:
    """The tokenizer, which pairs need for their bytes and to be compared with theirs; None if the model has none that can be used.

    Raises:
        Phase8Error: The one that an option names, or whose piece an option names, cannot be used.
    """
    try:
        return _tokenizer(parsed, section, checkpoint, vocab_size=vocab_size, say=say)
    except Phase8Error as error:
        if parsed.tokenizer is not None or parsed.eod_token is not None:
            raise
        say(f"bits per byte are unknown: {error}")
        return None


def _report(parsed: argparse.Namespace, how: dict[str, object], found: list[SourceResult]) -> None:
    """Prints the result, and writes it where --output says."""
    from phase8.data.staging import write_json
    from phase8.evaluate.results import TOTAL, table

    sources = found[:-1] if len(found) > 1 else found  # the last of several is that of all
    tree = how | {"sources": [source.as_json() for source in sources], "total": found[-1].as_json() | {"name": TOTAL}}
    print(json.dumps(tree, indent=1) if parsed.json else table(found), end="\n" if parsed.json else "", flush=True)
    if parsed.output is not None:
        write_json(parsed.output, tree)


def _check(parsed: argparse.Namespace) -> None:
    names = ("sequences", "batch_size", "length", "stride")
    problems = [
        f"--{name.replace('_', '-')} is {vars(parsed)[name]}; it must be at least 1"
        for name in names
        if vars(parsed)[name] is not None and vars(parsed)[name] < 1
    ]
    if parsed.sequences is not None and parsed.text is not None:
        problems.append("--sequences takes some windows of --data or --held-out, but a --text is read as a whole; leave it out")
    given = {"--sequences": parsed.sequences is not None, "--stride": parsed.stride is not None, "--carry-state": parsed.carry_state}
    together = [name for name, is_given in given.items() if is_given]
    if len(together) > 1:
        problems.append(f"{' and '.join(together)} are different ways to read the tokens; give one of them")
    if parsed.text is None and parsed.document_separator is not None:
        problems.append("--document-separator is for --text: pairs know where their documents begin; leave it out")
    elif (problem := separator_problem(parsed.document_separator)) is not None:
        problems.append(problem)
    if parsed.text is None and parsed.json_key is not None:
        problems.append("--json-key is for --text: pairs hold tokens; leave it out")
    if problems:
        raise ConfigError(problems)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=path_argument,
        metavar="DIR",
        help="a checkpoint, a run (its newest one), consolidated or quantised weights, or a Hugging Face directory",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", nargs="+", type=path_argument, metavar="PREFIX", help="pairs .bin/.idx or patterns of them, each a source of its own")
    what.add_argument("--held-out", action="store_true", help="the held-out data of the training run")
    what.add_argument("--text", nargs="+", type=path_argument, metavar="FILE", help="text, source, .jsonl or .parquet files, or directories of them")
    reading = parser.add_argument_group("reading")
    reading.add_argument("--length", type=int, metavar="T", help="tokens of a window (default: as trained)")
    reading.add_argument("--stride", type=int, metavar="S", help="tokens that each window adds (default: T)")
    reading.add_argument("--carry-state", action="store_true", help="read every document whole, T tokens at a time, with the state carried over")
    reading.add_argument("--sequences", type=int, metavar="N", help="windows of --data or --held-out in all, evenly spread (default: all)")
    reading.add_argument("--batch-size", type=int, metavar="N", help="windows or documents of a forward (default: what the memory holds)")
    texts = parser.add_argument_group("texts")
    texts.add_argument("--json-key", metavar="KEY", help="where a JSON line or a Parquet row holds its text (default: text)")
    texts.add_argument("--document-separator", metavar="LINE", help="lines of text files that stand between two documents (default: none)")
    texts.add_argument("--tokenizer", type=path_argument, metavar="FILE", help="instead of the one in the checkpoint")
    texts.add_argument("--eod-token", metavar="NAME", help="piece between documents (default: data.eod_token, else the tokenizer's own)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--output", type=path_argument, metavar="FILE", help="write that object to a file, too")
    add_device_option(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
