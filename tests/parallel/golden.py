"""Records what training computes, bit for bit, and compares it with a record: a change of structure must change no number.

    python tests/parallel/golden.py record before.json
    python tests/parallel/golden.py compare before.json
    python tests/parallel/golden.py compare tests/parallel/golden.json --only 'tp2-*'

A record has loss and gradient norm of every step and a digest of every final parameter, for each case of `golden_training.py`. `compare` prints
the first difference of each case. Bits depend on the version of torch and on the CPU, so a record counts on a machine like its own only.

Exit codes: 0 all equal, 1 some case differs, 2 command line, 77 not compared, for the record is from another CPU or version of torch.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import platform
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import zip_longest
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from tests.parallel.golden_training import CASES, golden_numbers
from tests.parallel.pool import Pool

EXIT_DIFFERENT, EXIT_NOT_COMPARED = 1, 77  # 77: what test harnesses take for a skipped test
LONG = 600.0  # seconds; a case that takes so long hangs, however busy the machine is
ABSENT = "absent"

Numbers = dict[str, Any]


def machine() -> dict[str, str]:
    """What bits depend on."""
    return {"torch": torch.__version__, "cpu": _cpu_name(), "cpu_capability": torch.backends.cpu.get_cpu_capability()}


def _cpu_name() -> str:
    """The name of the CPU, with family and model where the system tells them: several models share a name."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = (re.search(rf"^{key}\s*: (.+)$", text, re.MULTILINE) for key in ("model name", "cpu family", "model"))
    return " / ".join(match[1] for match in found if match) or platform.processor() or platform.machine()


def reason_not_to_compare(record: dict[str, Any]) -> str | None:
    """Why the bits of a record may differ from those of this machine, in one sentence; None: they may not."""
    theirs, different = record["machine"], []
    for key, ours in machine().items():
        if theirs.get(key) != ours:
            different.append(f"{key} is {ours} and was {theirs.get(key, ABSENT)}")
    return f"{', '.join(different)}; record the code before the change on this machine" if different else None


def numbers_of(pool: Pool, name: str) -> Numbers:
    """Trains a case on the first workers of the pool."""
    return pool.run(golden_numbers, name, world_size=CASES[name].world_size, timeout_seconds=LONG)[0]


def differences(pool: Pool, record: dict[str, Any], names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Trains cases, one after the other: the name of each that is not as recorded, and its first difference."""
    for name in names:
        before, after = record["cases"].get(name), numbers_of(pool, name) if name in CASES else None
        if before is None or after is None:
            yield name, "the record lacks it; make a new one" if before is None else "it is in the record, but no longer trained"
        elif difference := first_difference(before, after):
            yield name, difference


def first_difference(before: Numbers, after: Numbers) -> str | None:
    """The first step, or else the first parameter, in which the numbers of a case differ, with both values; None: they are equal."""
    quantities = ("loss", "gradient norm")
    old_steps, new_steps = (list(zip(*(numbers[what] for what in quantities), strict=True)) for numbers in (before, after))
    no_step = (ABSENT,) * len(quantities)
    for step, (old_values, new_values) in enumerate(zip_longest(old_steps, new_steps, fillvalue=no_step), start=1):
        for what, old, new in zip(quantities, old_values, new_values, strict=True):
            if old != new:
                return f"step {step}: {what}: {_readable(old)} -> {_readable(new)}"
    old_digests, new_digests = before["parameters"], after["parameters"]
    for name in sorted(old_digests.keys() | new_digests.keys()):
        old, new = (digests.get(name, ABSENT) for digests in (old_digests, new_digests))
        if old != new:
            return f"after step {len(old_steps)}: {name}: {old} -> {new}"
    return None


def _readable(value: str) -> str:
    return value if value == ABSENT else f"{value} ({float.fromhex(value):.9g})"


def record_text(numbers: dict[str, Numbers]) -> str:
    """A record as JSON with sorted keys, a line per case."""
    cases = ",\n".join(f"{_compact(name)}:{_compact(numbers[name])}" for name in sorted(numbers))
    return f'{{"cases":{{\n{cases}\n}},\n"machine":{_compact(machine())}}}\n'


def _compact(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def compare(record: dict[str, Any], names: list[str]) -> int:
    """Prints the first difference of each case, as soon as it is known; exit code."""
    if reason := reason_not_to_compare(record):
        print(f"not compared: {reason}")
        return EXIT_NOT_COMPARED
    num_different = 0
    with closing(Pool()) as pool:
        for name, difference in differences(pool, record, names):
            num_different += 1
            print(f"{name}: {difference}", flush=True)
    print(f"cases that differ: {num_different} of {len(names)}" if num_different else f"all equal, bit for bit (cases: {len(names)})")
    return EXIT_DIFFERENT if num_different else 0


def main() -> int:
    """Exit code of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("record", "compare"), help="write the numbers of cases, or compare them with a record")
    parser.add_argument("file", type=Path, metavar="FILE", help="the record")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="the cases whose names fit, as file names do (default: all)")
    options = parser.parse_args()
    is_compared = options.command == "compare"
    if is_compared and not options.file.exists():
        parser.error(f"{options.file} does not exist; record it first, with the code before the change")
    record = json.loads(options.file.read_text(encoding="utf-8")) if is_compared else {"cases": {}}
    names = fnmatch.filter(dict.fromkeys([*CASES, *record["cases"]]), options.only)
    if not names:
        parser.error(f"--only {options.only} fits no case; the names are {', '.join(CASES)}")
    if is_compared:
        return compare(record, names)
    with closing(Pool()) as pool:
        options.file.write_text(record_text({name: numbers_of(pool, name) for name in names}), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
