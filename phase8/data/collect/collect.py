"""Collects the documents of many files into one file of JSON lines: each document once, in the order of a hash of its text.

The order depends on the texts alone, so it mixes all places, does not change with names or with the number of processes, and the first N
bytes of it are a sample of everything.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from phase8.data.collect.documents import NotADocumentError, document_of
from phase8.data.collect.roots import FoundFile, find_files
from phase8.data.shard_pool import exit_with_parent, sigint_blocked
from phase8.data.staging import write_json
from phase8.durable import staged_file, storage_errors
from phase8.errors import ConfigError, DataError

OnProgress = Callable[[str, int, int], None]

COLLECTING = "collecting"
_TASK_BYTES = 4_000_000


@dataclass(frozen=True, kw_only=True)
class Collection:
    """Counts of a collection, also written beside it as `<kind>_collected.json`.

    Attributes:
        path: The file of JSON lines.
        roots: The directories.
        num_files: Files read.
        num_documents: Documents written.
        text_bytes: UTF-8 bytes of their texts.
        num_duplicates: Files whose document another file has as well.
        num_beyond_limit: Different documents that the limit left out.
        skipped: Number of files left out, by reason.
    """

    path: str
    roots: list[str]
    num_files: int
    num_documents: int
    text_bytes: int
    num_duplicates: int
    num_beyond_limit: int
    skipped: dict[str, int] = field(default_factory=dict)


class _Line(NamedTuple):
    """A document as a line of JSON with its hash, which is also its place in the order.

    The hash is not SHA-256, by which a preparation chooses held-out documents: then a sample's first documents would all be held out.
    """

    digest: bytes
    text_bytes: int
    line: bytes


def collect(
    kind: str,
    roots: Sequence[Path],
    output: Path,
    *,
    limit_bytes: int | None = None,
    num_workers: int = 1,
    overwrite: bool = False,
    on_progress: OnProgress,
) -> Collection:
    """Writes `<output>/<kind>.jsonl` with all documents of a kind below some directories; a file that holds them already stays as it is.

    Args:
        kind: `python`, `c` or `prose`.
        roots: The directories.
        output: Directory of the result.
        limit_bytes: Bytes of text to write at most; None: everything.
        num_workers: Processes that read.
        overwrite: Replace a file that holds another text.
        on_progress: Called with stage, stored bytes read and stored bytes in all.

    Raises:
        ConfigError: The file holds another text and may not be replaced.
        DataError: There is no document, or a process was killed.
        StorageError: The output cannot be written.
    """
    files = find_files(kind, roots)
    lines: dict[bytes, _Line] = {}
    skipped: Counter[str] = Counter()
    num_duplicates = 0
    for found, left_out in _read_all(kind, files, num_workers, on_progress):
        skipped += left_out
        for line in found:
            num_duplicates += line.digest in lines
            lines[line.digest] = line
    if not lines:
        places = ", ".join(map(str, roots)) or "the usual places of this machine"
        raise DataError(f"there is no document of the kind {kind!r} in {places}; name directories that hold some with --roots")
    chosen = list(_up_to(limit_bytes, (lines[digest] for digest in sorted(lines))))
    if not chosen:
        raise DataError(f"--limit-bytes is {limit_bytes}, which is less than the first document has; give more")
    destination = output / f"{kind}.jsonl"
    if not _holds(destination, chosen):
        if destination.exists() and not overwrite:
            raise ConfigError(f"--output has {destination}, which holds another text than is collected now; give another --output, or --overwrite.")
        with staged_file(destination) as partial, partial.open("xb") as file:
            file.writelines(line.line for line in chosen)
    collection = Collection(
        path=str(destination),
        roots=[str(root) for root in roots],
        num_files=len(files),
        num_documents=len(chosen),
        text_bytes=sum(line.text_bytes for line in chosen),
        num_duplicates=num_duplicates,
        num_beyond_limit=len(lines) - len(chosen),
        skipped=dict(skipped.most_common()),
    )
    write_json(output / f"{kind}_collected.json", asdict(collection))
    return collection


def _holds(path: Path, lines: Sequence[_Line]) -> bool:
    """Whether a file consists of these lines; what was prepared from it is recognised by the file, so it is not written again."""
    with storage_errors(path):
        if not path.is_file() or path.stat().st_size != sum(len(line.line) for line in lines):
            return False
        with path.open("rb") as file:
            return all(file.read(len(line.line)) == line.line for line in lines)


def _up_to(limit_bytes: int | None, lines: Iterable[_Line]) -> Iterator[_Line]:
    total = 0
    for line in lines:
        total += line.text_bytes
        if limit_bytes is not None and total > limit_bytes:
            return
        yield line


def _read_all(kind: str, files: Sequence[FoundFile], num_workers: int, on_progress: OnProgress) -> Iterator[tuple[list[_Line], Counter[str]]]:
    """Reads all files, with one worker in this process, else in new ones."""
    tasks = _tasks(files)
    done, total = 0, sum(file.num_bytes for file in files)
    on_progress(COLLECTING, 0, total)
    for task, result in zip(tasks, _results(kind, [[file.path for file in task] for task in tasks], num_workers), strict=True):
        yield result
        done += sum(file.num_bytes for file in task)
        on_progress(COLLECTING, done, total)


def _results(kind: str, tasks: Sequence[Sequence[str]], num_workers: int) -> Iterator[tuple[list[_Line], Counter[str]]]:
    if min(num_workers, len(tasks)) <= 1:
        yield from (_read(kind, task) for task in tasks)
        return
    context = multiprocessing.get_context("spawn")  # fork would copy the threads of imported libraries
    with ProcessPoolExecutor(min(num_workers, len(tasks)), context, _begin_worker) as pool:
        with sigint_blocked():  # the workers start here and inherit the mask
            results = pool.map(_read, [kind] * len(tasks), tasks)
        try:
            yield from results
        except BrokenProcessPool as error:
            raise DataError("a process that reads files was killed, perhaps for lack of memory; run again with fewer --workers") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=exit_with_parent, daemon=True).start()


def _tasks(files: Iterable[FoundFile]) -> list[list[FoundFile]]:
    """Files in groups of a few megabytes."""
    tasks: list[list[FoundFile]] = [[]]
    num_bytes = 0
    for file in files:
        if num_bytes > _TASK_BYTES:
            tasks.append([])
            num_bytes = 0
        tasks[-1].append(file)
        num_bytes += file.num_bytes + 1000  # opening a file costs time as well
    return tasks


def _read(kind: str, paths: Sequence[str]) -> tuple[list[_Line], Counter[str]]:
    """The documents of some files, and how many files were left out for which reason."""
    lines, skipped = [], Counter[str]()
    for path in paths:
        try:
            text = document_of(kind, Path(path))
        except NotADocumentError as reason:
            skipped[str(reason)] += 1
            continue
        encoded = text.encode()
        line = json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
        lines.append(_Line(hashlib.blake2b(encoded, digest_size=16).digest(), len(encoded), line))
    return lines, skipped
