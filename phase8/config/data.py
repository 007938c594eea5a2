"""Rules about the data of a run and the processes that load them."""

from __future__ import annotations

from collections.abc import Iterator

from phase8.config.describe import describe_value
from phase8.config.schema import DataSection, RunConfig
from phase8.config.split import split_problems

# Every rank of a host starts so many processes, and each of them prepares so many microbatches ahead; one or two keep up with a GPU.
MOST_LOADER_WORKERS = 64
MOST_PREFETCHED = 1024


def data_problems(config: RunConfig) -> Iterator[str]:
    """The problems of the data and their loader, one sentence each."""
    data = config.data
    pieces = (("eod_token", data.eod_token), ("begin_token", data.begin_token))
    ids = (("end_ids", data.end_ids), ("begin_id", data.begin_id), ("padding_id", data.padding_id))
    if data.train is None:
        for name, value in (("validation", data.validation), ("tokenizer", data.tokenizer), *pieces, *ids):
            if value is not None:
                yield f"data.{name} is {describe_value(value)}, but data.train is null and the embedded corpus brings its own; set data.train too."
    elif data.tokenizer is None:
        for name, value in pieces:
            if value is not None:
                yield f"data.{name} is {describe_value(value)}, but data.tokenizer is null; give the tokenizer with this piece, or leave it null."
    yield from _unknown_ids(data, config.model.vocab_size)
    if isinstance(data.num_workers, int) and data.num_workers > MOST_LOADER_WORKERS:
        yield (
            f"data.num_workers is {data.num_workers}, but every rank starts as many processes, and {MOST_LOADER_WORKERS} is the most that is "
            "allowed; leave it auto, or set a smaller number."
        )
    if data.prefetch_factor > MOST_PREFETCHED:
        yield (
            f"data.prefetch_factor is {data.prefetch_factor}, but every worker keeps as many microbatches in memory, and {MOST_PREFETCHED} is the "
            "most that is allowed; set a smaller number."
        )
    yield from _repeated_sources(data)
    yield from split_problems(data)
    if data.train is not None and config.observe.sample_prompt is not None and data.tokenizer is None:
        yield "observe.sample_prompt is set, but data.tokenizer is null; give the tokenizer of the data, or leave the prompt null."


def _unknown_ids(data: DataSection, vocab_size: int) -> Iterator[str]:
    for name, ids in (("end_ids", data.end_ids or ()), ("begin_id", (data.begin_id,)), ("padding_id", (data.padding_id,))):
        for token_id in ids:
            if token_id is not None and token_id >= vocab_size:
                yield f"data.{name} has the token id {token_id}, but model.vocab_size is {vocab_size}; leave it out, or give a smaller one."


def _repeated_sources(data: DataSection) -> Iterator[str]:
    for name, sources in (("train", data.train), ("validation", data.validation)):
        paths = [] if sources is None or isinstance(sources, str) else [source.path for source in sources]
        for path in sorted({path for path in paths if paths.count(path) > 1}):
            yield f"data.{name} lists {path} more than once; keep one entry and add the weights up."
