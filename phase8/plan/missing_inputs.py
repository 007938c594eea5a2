"""What a run would read and does not find on this machine, which may be another one than that of the run."""

from __future__ import annotations

import os
from collections.abc import Iterator

from phase8.config.schema import DataSection, DataSource
from phase8.data.sources import missing_pairs


def missing_inputs(data: DataSection, *, initialise_from: str | None) -> Iterator[str]:
    """Yields a sentence for each path of data, tokenizer or first weights that leads to nothing; no file is opened."""
    for name, given in (("data.train", data.train), ("data.validation", data.validation)):
        if given is not None:
            yield from missing_pairs([DataSource(path=given, weight=1)] if isinstance(given, str) else given, key=name)
    remedies = {
        "data.tokenizer": (data.tokenizer, "copy it here, or train one with tools/prepare_data.py --train-tokenizer"),
        "checkpoint.initialise_from": (initialise_from, "copy the weights here, or correct the path"),
    }
    for name, (path, remedy) in remedies.items():
        if path is not None and not os.path.exists(path):
            yield f"{name}: {path} is missing; {remedy}"
