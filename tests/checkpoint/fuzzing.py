"""What the fuzzers of checkpoint and data files share: mutated bytes and JSON, a watch over what reading may do, and counts of what came of it."""

from __future__ import annotations

import codecs
import copy
import json
import os
import resource
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from phase8.checkpoint.checksum import checksum_of
from phase8.errors import Phase8Error

MOST_NEW_MEMORY = 128 * 2**20  # the samples take a few KiB, and a file is read in pieces of 4 MiB
LONGEST_MESSAGE = 2000
EXECUTING = (
    "pickle.", "marshal.", "exec", "compile", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "socket.", "ctypes."
)  # fmt: skip
CHANGING = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown", "os.utime", "shutil.")
LISTING = ("os.listdir", "os.scandir")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

DUPLICATE, RAW = "~duplicate~", "~raw~"
RAW_JSON = {  # what no Python value is written as
    f"{RAW}{index}": text
    for index, text in enumerate(
        ("NaN", "-Infinity", "1e999", "9" * 5000, "-" + "9" * 30, "1.0", "0.0", "-0", "[" * 101 + "]" * 101, "[" * 20_000, '{"a":' * 20_000)
    )
}
NUMBERS = (-1, 0, 1, 2, 3, 7, 64, 2**31 - 1, 2**31, 2**33, 2**40, 2**60, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, -(2**63), 0.5)
NAMES = (
    "", ".", "..", "../outside.safetensors", "../../outside.safetensors", "../outside", "/etc/hostname", "/dev/zero", "a/b.safetensors",
    "a\\b", "a\0b.safetensors", "model.safetensors\n", "\x1b[31m", "\ud800", "☃", "link.safetensors", "manifest.json", "__metadata__",
    "__class__", "x" * 5000, "F32", "F64", "U8", "BOOL", "crc32:00000000", "pickle", "phase8-checkpoint",
)  # fmt: skip


class ForbiddenOperationError(BaseException):
    """Reading did what reading never does; no handler of the library's catches it."""


class Watch:
    """Refuses, while a block runs, to run code, to change any file, to open one outside a directory, and to take memory without bound."""

    def __init__(self) -> None:
        self._readable: tuple[str, ...] | None = None
        self._writable: tuple[str, ...] = ()
        self.violations: list[str] = []
        for encoding in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"):
            codecs.lookup(encoding)  # json.loads looks for them, which would open files of Python's
        sys.addaudithook(self._hear)

    @contextmanager
    def over(self, *roots: Path, may_write: Path | None = None) -> Iterator[None]:
        """Files may be read below `roots`, and changed below `may_write`; nothing else happens.

        Raises:
            AssertionError: Something else did, even if the block went on.
        """
        self.violations = []
        own_limit = resource.getrlimit(resource.RLIMIT_AS)
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        writable = () if may_write is None else (os.path.realpath(may_write),)
        self._readable, self._writable = (*(os.path.realpath(root) for root in roots), *writable), writable
        resource.setrlimit(resource.RLIMIT_AS, (in_use + MOST_NEW_MEMORY, own_limit[1]))
        try:
            yield
        finally:
            self._readable = None
            resource.setrlimit(resource.RLIMIT_AS, own_limit)
        assert self.violations == []

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        readable = self._readable
        if readable is None:
            return
        self._readable = None  # the look at the paths is not to be watched
        try:
            allowed = self._is_allowed(event, arguments, readable)
        finally:
            self._readable = readable
        if not allowed:
            self.violations.append(f"{event} {arguments!r}")
            raise ForbiddenOperationError(self.violations[-1])

    def _is_allowed(self, event: str, arguments: tuple[Any, ...], readable: tuple[str, ...]) -> bool:
        if event.startswith(CHANGING):
            paths = [argument for argument in arguments if isinstance(argument, str | bytes | os.PathLike)]
            return all(_is_below(path, self._writable) for path in paths)
        if event == "open":
            roots = self._writable if arguments[2] & WRITING else readable
            return _is_below(arguments[0], roots, follows=not arguments[2] & os.O_NOFOLLOW)
        return _is_below(arguments[0], readable) if event in LISTING else not event.startswith(EXECUTING)


def _is_below(path: object, roots: tuple[str, ...], *, follows: bool = False) -> bool:
    """Whether a path, or what it links to, lies in a root.

    A descriptor was a path when it was opened, and a removed tree goes name by name from its descriptor.
    """
    if isinstance(path, int):
        return True
    parent, name = os.path.split(os.fsdecode(path))
    if not parent:
        return name not in ("", ".", "..")
    real = os.path.realpath(os.fsdecode(path)) if follows else os.path.join(os.path.realpath(parent), name)
    return any(real == root or real.startswith(root + os.sep) for root in roots)


class Tally:
    """What came of the inputs of one fuzzer: how many were refused, with which error, and how many loaded."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()

    def count(self, outcome: str) -> None:
        """One more input."""
        self.outcomes[outcome] += 1

    def refused(self, error: Phase8Error) -> None:
        """One more input that was refused, in one readable sentence."""
        sentence = str(error)
        assert sentence.isprintable() and 0 < len(sentence) < LONGEST_MESSAGE, repr(sentence[:3000])
        self.count(type(error).__name__)

    def check(self, name: str, *, at_least: int, among: set[str]) -> None:
        """Enough inputs were tried, of every kind, and says how many."""
        print(f"\n{name}: {sum(self.outcomes.values())} inputs, {dict(self.outcomes)}")
        assert sum(self.outcomes.values()) >= at_least and among <= self.outcomes.keys(), (name, self.outcomes)


def fuzz(test: Callable[..., None], *, num_inputs: int, derandomize: bool) -> Callable[..., None]:
    """A test that hypothesis runs on so many inputs: always the same ones, or new ones at every call."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example, HealthCheck.filter_too_much]
    return settings(max_examples=num_inputs, derandomize=derandomize, database=None, deadline=None, suppress_health_check=slow)(test)


def strange_values(*names: str) -> st.SearchStrategy[Any]:
    """Values that a JSON file of ours might not hold: numbers, names, RAW_JSON, and containers of them."""
    single = st.sampled_from([None, True, False, *NUMBERS, *NAMES, *names, *RAW_JSON])
    lists = st.lists(single, max_size=3) | st.lists(st.sampled_from(NUMBERS), min_size=1, max_size=3)
    return st.one_of(single, single, lists, st.dictionaries(st.sampled_from([*NAMES, *names]), single, max_size=2), st.just([1] * 70))


@st.composite
def mutated_json(draw: st.DrawFn, document: Any, *names: str, num_edits: int | None = None) -> str:
    """The text of a JSON document after a few edits: values, names, order, repetitions, what JSON has no value for.

    Args:
        draw: Of hypothesis.
        document: The good one.
        names: That other names may turn into.
        num_edits: How many; None: one to three.
    """
    root = {"": copy.deepcopy(document)}
    for _ in range(draw(st.integers(1, 3)) if num_edits is None else num_edits):
        found = list(_places(root))
        container, key = draw(st.sampled_from(found))
        if key not in container if isinstance(container, dict) else key >= len(container):
            continue
        edit = draw(st.sampled_from([_replace, _replace, _nudge, _delete, _copy_from_elsewhere, _grow, _rename, _repeat, _reorder]))
        if container is root and edit in (_delete, _rename, _repeat, _reorder):
            continue
        edit(draw, container, key, found, names)
    return as_text(root[""], indent=draw(st.sampled_from([None, None, None, 1])))


def as_text(value: Any, *, indent: int | None = None) -> str:
    """JSON, in which the marks of repetitions and of RAW_JSON became what they stand for."""
    text = json.dumps(value, indent=indent)
    for mark, raw in RAW_JSON.items():
        text = text.replace(f'"{mark}"', raw)
    return text.replace(f'"{DUPLICATE}', '"')


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value inside a document."""
    for key, child in list(value.items()) if isinstance(value, dict) else list(enumerate(value)):
        yield value, key
        if isinstance(child, dict | list):
            yield from _places(child)


def _replace(draw: st.DrawFn, container: Any, key: Any, found: list, names: tuple[str, ...]) -> None:
    container[key] = draw(strange_values(*names))


def _nudge(draw: st.DrawFn, container: Any, key: Any, found: list, names: tuple[str, ...]) -> None:
    value = container[key]
    if type(value) is int:
        container[key] = draw(st.sampled_from([value + 1, value - 1, -value, value * 2, value + 2**32, value + 2**64, float(value), str(value)]))
    elif type(value) is str and value:
        at = draw(st.integers(0, len(value) - 1))
        container[key] = value[:at] + draw(st.sampled_from("0/.\0Aa@ \n")) + value[at + draw(st.integers(0, 1)) :]
    elif isinstance(value, list):
        container[key] = draw(st.sampled_from([value[:-1], value[1:], value[::-1], value * 2, []]))


def _delete(draw: st.DrawFn, container: Any, key: Any, found: list, names: tuple[str, ...]) -> None:
    del container[key]


def _copy_from_elsewhere(draw: st.DrawFn, container: Any, key: Any, found: list, names: tuple[str, ...]) -> None:
    """A value of the right form in the wrong place: another file's checksum, another tensor's slices."""
    elsewhere, other = draw(st.sampled_from(found))
    if other in elsewhere if isinstance(elsewhere, dict) else other < len(elsewhere):
        container[key] = copy.deepcopy(elsewhere[other])


def _grow(draw: st.DrawFn, container: Any, key: Any, found: list, names: tuple[str, ...]) -> None:
    value = container[key]
    if isinstance(value, list):
        value.insert(draw(st.integers(0, len(value))), copy.deepcopy(value[0]) if value and draw(st.booleans()) else draw(strange_values(*names)))
    elif isinstance(value, dict):
        value[draw(st.sampled_from([*NAMES, *names]))] = draw(strange_values(*names))


def _rename(draw: st.DrawFn, container: Any, key: Any, found: list, names: tuple[str, ...]) -> None:
    if isinstance(container, dict):
        container[draw(st.sampled_from([*NAMES, *names]))] = container.pop(key)


def _repeat(draw: st.DrawFn, container: Any, key: Any, found: list, names: tuple[str, ...]) -> None:
    if isinstance(container, dict):
        container[DUPLICATE + key] = copy.deepcopy(container[key]) if draw(st.booleans()) else draw(strange_values(*names))


def _reorder(draw: st.DrawFn, container: Any, key: Any, found: list, names: tuple[str, ...]) -> None:
    if isinstance(container, dict):
        container[key] = container.pop(key)


@st.composite
def mutated_bytes(draw: st.DrawFn, original: bytes) -> bytes:
    """Bytes after a few edits: flips, cuts, insertions, numbers of 4 or 8 bytes overwritten, parts moved."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)) | st.integers(0, min(40, len(data))))
        kind = draw(st.sampled_from(["flip", "flip", "cut", "insert", "overwrite", "number", "truncate", "move", "extend"]))
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[at : at + draw(st.integers(1, 40))]
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=20))
        elif kind == "overwrite":
            patch = draw(st.binary(min_size=1, max_size=20))
            data[at : at + len(patch)] = patch[: len(data) - at]
        elif kind == "number":
            size = draw(st.sampled_from([4, 8]))
            number = draw(st.sampled_from([number for number in NUMBERS if type(number) is int])) % 2 ** (8 * size)
            data[at : at + size] = number.to_bytes(size, "little")[: len(data) - at]
        elif kind == "truncate":
            del data[at:]
        elif kind == "move":
            end = draw(st.integers(at, min(at + 40, len(data))))
            part = data[at:end]
            del data[at:end]
            to = draw(st.integers(0, len(data)))
            data[to:to] = part
        elif kind == "extend":
            data += draw(st.sampled_from([b"\0", b"\n", b" ", bytes(original), bytes(64)]))
    return bytes(data)


def seal(text: str) -> bytes:
    """A manifest of this content whose checksum is right, written independently of the library."""
    body = text.encode("utf-8", "surrogatepass").rstrip()
    if body.endswith(b"}"):
        body = body[:-1].rstrip() + (b"" if body[:-1].rstrip().endswith(b"{") else b", ")
    return body + f'"checksum": "{checksum_of(body)}"\n}}\n'.encode()
