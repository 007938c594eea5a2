"""Measures the loss of a checkpoint on held-out tokens, for each source and for each place in the sequence.

    python tools/evaluate.py --checkpoint runs/ablation_30m --data data/python_validation_text_document
    python tools/evaluate.py --checkpoint runs/ablation_30m --data A B --length 8192 --sequences 256 --output losses.json

--data names .bin/.idx pairs that the tokenizer of the model's training has made. The sequences are those that an evaluation during training
takes: evenly spread over each source, the same ones every time. --length may be longer than that of the training. The table goes to standard
output; what later positions gain over earlier ones is what the model makes of a longer context.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from phase8.config.arguments import path_argument
from phase8.errors import ConfigError
from phase8.imports import imports_that_stay
from phase8.terminal import output_is_the_product, run_door


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code, see phase8/errors.py."""
    return run_door(lambda: _run(arguments))


def _run(arguments: list[str] | None) -> int:
    parsed = _parser().parse_args(arguments)
    problems = [
        f"--{name.replace('_', '-')} is {vars(parsed)[name]}; it must be at least 1"
        for name in ("sequences", "batch_size", "length")
        if vars(parsed)[name] is not None and vars(parsed)[name] < 1
    ]
    if problems:
        raise ConfigError(problems)
    with output_is_the_product():
        _evaluate(parsed)
    return 0


def _evaluate(parsed: argparse.Namespace) -> None:
    from dataclasses import asdict

    from rich.progress import TextColumn, TimeElapsedColumn

    with imports_that_stay():
        from phase8.config.schema import DataSource
        from phase8.data.loader import open_dataset
        from phase8.data.staging import write_json
        from phase8.data.token_ids import check_token_ids
        from phase8.evaluate.by_position import evaluate_sources, position_table
        from phase8.generate.restore import restore_model
        from phase8.observe.stage_progress import ProgressDisplay
        from phase8.train.device import select_device

    device = select_device(parsed.device)
    model, section, checkpoint = restore_model(parsed.checkpoint, device=device)
    dataset = open_dataset(
        [DataSource(path=str(prefix), weight=1) for prefix in parsed.data],
        sequence_length=parsed.length or model.section.sequence_length,
        vocab_size=model.section.vocab_size,
        seed=0,
        key="--data",
        ignore_sequence_modes=section.ignore_sequence_modes,
    )
    with ProgressDisplay(TextColumn("{task.percentage:3.0f} %"), TimeElapsedColumn()) as display:
        for pair in (pair for source in dataset.sources for pair in source.pairs):
            check_token_ids(pair, vocab_size=model.section.vocab_size, cache_dir=Path(section.cache_dir), on_progress=display.show)
        found = evaluate_sources(
            model,
            dataset,
            section.model_copy(update={"num_workers": 0, "pin_memory": False}),
            num_sequences=parsed.sequences,
            micro_batch_size=parsed.batch_size,
            device=device,
            on_progress=partial(display.show, "evaluating"),
        )
    if parsed.output is not None:
        results = [asdict(source) | {"perplexity": source.perplexity} for source in found]
        write_json(parsed.output, {"checkpoint": str(checkpoint.path), "sequence_length": dataset.sequence_length, "sources": results})
    print(position_table(found), end="")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=path_argument, metavar="DIR", help="a checkpoint, or a run (its newest one)")
    parser.add_argument("--data", required=True, nargs="+", type=path_argument, metavar="PREFIX", help="pairs .bin/.idx, each a source of its own")
    parser.add_argument("--sequences", type=int, default=256, metavar="N", help="sequences in all (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="sequences of a forward (default: %(default)s)")
    parser.add_argument("--length", type=int, metavar="T", help="tokens of a sequence (default: as trained)")
    parser.add_argument("--output", type=path_argument, metavar="FILE", help="JSON with all results")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: the GPU if there is one")
    return parser


if __name__ == "__main__":
    sys.exit(main())
