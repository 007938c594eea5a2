r"""Tests recall: writes sequences to train on, and measures how many tokens of the distant past a trained model recalls.

    python tools/recall.py data --task mqar --length 2048 --output data/recall     # prints the settings of a run on it
    python launch/pretrain.py --config configs/ablation_30m.yaml --set data.train=data/recall/mqar_2048_train ...
    python tools/recall.py evaluate --checkpoint runs/ablation_30m --task mqar --lengths 2048 8192 16384 32768 --output mqar.json

`mqar`: pairs of key and value, then filler, then every key is asked for its value (in training data mostly in many rounds). `passkey`: one
passkey at a random depth of filler, asked for at the end. phase8/recall/tasks.py says more. Sequences are drawn from --seed, those of an
evaluation apart from those of training; files of other settings are not replaced. To train on several lengths at once, write several and blend
them in data.train, with data.reset_at_document_boundaries=true. The table goes to standard output, one column for each length.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

import phase8.early_interrupt  # noqa: F401  # first: later imports take time
from phase8.config.arguments import add_device_option, path_argument
from phase8.errors import ConfigError
from phase8.imports import imports_that_stay
from phase8.terminal import output_is_the_product, run_door
from phase8.train.outputs import require_own_output

PAIRS, KEY_TOKENS, ONCE_RATIO = (64, 128, 256), 6, 0.25  # defaults


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code, see phase8/errors.py."""
    return run_door(lambda: _run(arguments))


def _run(arguments: list[str] | None) -> int:
    parsed = _parser().parse_args(arguments)
    _check(parsed)
    require_own_output(parsed.output)
    if parsed.command == "data":
        _write(parsed)
    else:
        with output_is_the_product():
            _evaluate(parsed)
    return 0


def _write(parsed: argparse.Namespace) -> None:
    from rich.progress import TextColumn, TimeElapsedColumn

    from phase8.observe.stage_progress import ProgressDisplay
    from phase8.recall.tasks import Task
    from phase8.recall.write import write_task

    task = Task(parsed.task, parsed.vocab_size, _sizes(parsed))
    num_sequences = {"train": -(-parsed.tokens // parsed.length), "validation": parsed.validation_sequences}
    with ProgressDisplay(TextColumn("{task.percentage:3.0f} %"), TimeElapsedColumn()) as display:
        prefixes = write_task(
            task,
            parsed.output,
            length=parsed.length,
            num_sequences=num_sequences,
            once_ratio=ONCE_RATIO if parsed.once_ratio is None else parsed.once_ratio,
            seed=parsed.seed,
            on_progress=display.show,
        )
    for split, prefix in prefixes.items():
        print(f"{prefix}.bin/.idx: {num_sequences[split]:,} sequences of {parsed.length} tokens")
    pairs = shlex.join(f"data.{split}={prefix}" for split, prefix in prefixes.items())
    print(f"train on it with: --set {pairs} model.vocab_size={parsed.vocab_size} model.sequence_length={parsed.length}")


def _evaluate(parsed: argparse.Namespace) -> None:
    from dataclasses import asdict

    with imports_that_stay():
        from phase8.data.staging import write_json
        from phase8.generate.restore import restore_model
        from phase8.recall.evaluate import evaluate_recall, greedy_predictions, recall_table
        from phase8.recall.tasks import Task
        from phase8.train.device import select_device

    device = select_device(parsed.device)
    model, _, checkpoint = restore_model(parsed.checkpoint, device=device)
    vocab_size = parsed.vocab_size or model.section.vocab_size
    if vocab_size > model.section.vocab_size:
        raise ConfigError(f"--vocab-size is {vocab_size}, but the model has {model.section.vocab_size} ids; give that of its training data")
    task = Task(parsed.task, vocab_size, _sizes(parsed))
    found = evaluate_recall(
        task,
        greedy_predictions(model, device),
        lengths=parsed.lengths,
        num_sequences=parsed.sequences,
        seed=parsed.seed,
        on_result=lambda result: print(f"{result.size} at {result.length}: {100 * result.answer_ratio:.1f} %", file=sys.stderr, flush=True),
    )
    if parsed.output is not None:
        made_from = {"checkpoint": str(checkpoint.path), "seed": parsed.seed, **asdict(task)}
        write_json(parsed.output, made_from | {"results": [asdict(result) for result in found]})
    print(recall_table(task, found), end="")


def _sizes(parsed: argparse.Namespace) -> tuple[int, ...]:
    """Numbers of tokens to recall."""
    if parsed.task == "mqar":
        return PAIRS if parsed.pairs is None else tuple(dict.fromkeys(parsed.pairs))
    return (KEY_TOKENS if parsed.key_tokens is None else parsed.key_tokens,)


def _check(parsed: argparse.Namespace) -> None:
    is_data = parsed.command == "data"
    names = ("length", "tokens", "validation_sequences") if is_data else ("lengths", "sequences")
    given = {name: vars(parsed)[name] for name in names} | {"vocab_size": parsed.vocab_size}
    problems = [f"--{name.replace('_', '-')} is {value}; it must be at least 1" for name, value in given.items() if not _is_positive(value)]
    for name, task in (("pairs", "mqar"), ("once_ratio", "mqar"), ("key_tokens", "passkey")):
        if vars(parsed).get(name) is not None and parsed.task != task:
            problems.append(f"--{name.replace('_', '-')} is for --task {task}; leave it out")
    if is_data and parsed.once_ratio is not None and not 0 <= parsed.once_ratio <= 1:
        problems.append(f"--once-ratio is {parsed.once_ratio}; it must be between 0 and 1")
    if parsed.seed < 0:
        problems.append(f"--seed is {parsed.seed}; it must be at least 0")
    if problems:
        raise ConfigError(problems)


def _is_positive(value: int | Sequence[int] | None) -> bool:
    return value is None or (min(value) if isinstance(value, Sequence) else value) >= 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--task", required=True, choices=("mqar", "passkey"), help="what is recalled")
    shared.add_argument("--pairs", nargs="+", type=int, metavar="N", help=f"mqar: numbers of pairs (default: {' '.join(map(str, PAIRS))})")
    shared.add_argument("--key-tokens", type=int, metavar="N", help=f"passkey: its tokens (default: {KEY_TOKENS})")
    shared.add_argument("--seed", type=int, default=1, metavar="N", help="seed of the sequences (default: %(default)s)")

    data = commands.add_parser("data", parents=[shared], help="write sequences to train on")
    data.add_argument("--length", type=int, required=True, metavar="T", help="tokens of a sequence, as model.sequence_length")
    data.add_argument("--output", required=True, type=path_argument, metavar="DIR", help="where the pairs are written")
    data.add_argument("--tokens", type=int, default=50_000_000, metavar="N", help="training tokens, at least (default: %(default)s)")
    data.add_argument("--validation-sequences", type=int, default=256, metavar="N", help="sequences held out (default: %(default)s)")
    data.add_argument("--vocab-size", type=int, default=1024, metavar="N", help="number of ids, as model.vocab_size (default: %(default)s)")

    data.add_argument(
        "--once-ratio",
        type=float,
        metavar="X",
        help="mqar: share of sequences that ask for every key once, as an evaluation does; the rest ask in as many rounds as fit "
        f"(default: {ONCE_RATIO}; at 1 too few of the targets are answers, and models learn late)",
    )

    evaluate = commands.add_parser("evaluate", parents=[shared], help="measure the recall of a checkpoint")
    evaluate.add_argument("--checkpoint", required=True, type=path_argument, metavar="DIR", help="a checkpoint, or a run (its newest one)")
    evaluate.add_argument("--lengths", nargs="+", type=int, default=[2048], metavar="T", help="tokens of the sequences (default: 2048)")
    evaluate.add_argument("--sequences", type=int, default=64, metavar="N", help="sequences of each length and size (default: %(default)s)")
    evaluate.add_argument("--vocab-size", type=int, metavar="N", help="that of the training data (default: that of the model)")
    evaluate.add_argument("--output", type=path_argument, metavar="FILE", help="JSON with all results")
    add_device_option(evaluate)
    return parser


if __name__ == "__main__":
    sys.exit(main())
