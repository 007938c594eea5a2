"""Writes the sequences of a recall task as `.bin/.idx` pairs for training and validation.

Every sequence is one document of exactly T tokens, so with `model.sequence_length` T every sample is one sequence, whole. A pair ends with a
document of one token, without which its last sequence would be no sample.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from phase8.data.indexed import IndexedWriter, best_dtype
from phase8.data.staging import read_json, write_json
from phase8.errors import ConfigError
from phase8.recall.tasks import BEGIN, Task

SPLITS = ("train", "validation", "evaluation")
_DRAWN_AT_ONCE = 256


def random_generator(task: Task, *, seed: int, split: str, length: int, size: int = 0) -> np.random.Generator:
    """The generator of a split: each split, length and size of a seed has its own stream of random numbers."""
    return np.random.default_rng([seed, SPLITS.index(split), length, size, task.vocab_size])


def write_task(
    task: Task,
    output: Path,
    *,
    length: int,
    num_sequences: dict[str, int],
    once_ratio: float,
    seed: int,
    on_progress: Callable[[str, int, int], None],
) -> dict[str, str]:
    """Writes `<output>/<task>_<length>_<split>.bin/.idx` and, in `<output>/<task>_<length>.json`, what they were drawn from.

    The size of every sequence is drawn from the task's sizes.

    Args:
        task: The task.
        output: Directory, which is created.
        length: Tokens of a sequence, T.
        num_sequences: Sequences of each split.
        once_ratio: Share of the sequences that ask for every key once; the rest ask in as many rounds as fit.
        seed: Seed of the sequences.
        on_progress: Called with stage, sequences written and sequences in all.

    Returns:
        Prefix of each pair, by split.

    Raises:
        ConfigError: The length is too short, or the files exist and are of other settings.
        StorageError: The files cannot be written.
    """
    task.check_length(length)
    prefixes = {split: str(output / f"{task.name}_{length}_{split}") for split in num_sequences}
    drawn_from = {**asdict(task), "length": length, "once_ratio": once_ratio, "seed": seed, "num_sequences": num_sequences}
    record = output / f"{task.name}_{length}.json"
    _check_earlier(record, drawn_from, prefixes.values())
    write_json(record, drawn_from)  # first, so that data whose writing was interrupted have it
    for split, count in num_sequences.items():
        generator = random_generator(task, seed=seed, split=split, length=length)
        with IndexedWriter(prefixes[split], dtype=best_dtype(task.vocab_size)) as writer:
            for i in range(count):
                if i % _DRAWN_AT_ONCE == 0:
                    on_progress(f"writing {split}", i, count)
                size = int(generator.choice(task.sizes))
                rounds = 1 if generator.random() < once_ratio else task.most_rounds(length, size)
                writer.add_document(task.draw(generator, length=length, size=size, count=1, rounds=rounds).tokens[0])
            writer.add_document(np.array([BEGIN]))  # a sample of T tokens ends with the first token after them
            on_progress(f"writing {split}", count, count)
    return prefixes


def _check_earlier(record: Path, drawn_from: dict[str, Any], prefixes: Iterable[str]) -> None:
    """Refuses to replace data that were drawn from anything else; drawn from the same, they would be the same."""
    earlier, now = read_json(record), json.loads(json.dumps(drawn_from))
    if not isinstance(earlier, dict):
        for prefix in prefixes:
            if Path(f"{prefix}.bin").exists():
                raise ConfigError(f"{prefix}.bin exists, and nothing says of which settings it is; choose another --output or remove it")
        return
    changes = [f"{name} was {earlier.get(name)} and is {value}" for name, value in now.items() if earlier.get(name) != value]
    if changes:
        raise ConfigError(f"{record} is of data with other settings ({'; '.join(changes)}); choose another --output or remove it")
