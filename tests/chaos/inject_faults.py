"""Kills processes until something breaks: ranks of training runs, and the reshard tool.

    python tests/chaos/inject_faults.py --faults 50 --output chaos.jsonl
    python tests/chaos/inject_faults.py --summarise chaos.jsonl

Every record is a line of JSON; the first one has the seed that --seed takes. An error ends the command; directory and seed are printed.
"""

from __future__ import annotations

import argparse
import json
import random
import secrets
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.chaos.chaos_reshard import KIND, LAYOUTS, ReshardChaos  # noqa: E402
from tests.chaos.chaos_training import SAVES, TOPOLOGIES, VICTIMS, Kind, TrainingChaos  # noqa: E402

FAULTS_PER_RUN = 4
KINDS = [*(Kind(victims, saves) for saves in SAVES for victims in VICTIMS), KIND]


def inject(
    directory: Path,
    *,
    seed: int,
    num_faults: int,
    kinds: Iterable[Kind | str] = tuple(KINDS),
    topologies: tuple[str, ...] = tuple(TOPOLOGIES),
    layouts: tuple[str, ...] = tuple(LAYOUTS),
) -> Iterator[dict]:
    """Injects faults of each kind in turn, as many of each.

    Args:
        directory: For all that is written.
        seed: Of everything random.
        num_faults: In all, at least.
        kinds: Of KINDS.
        topologies: Of the runs, one after the other.
        layouts: Of the rewrites, one after the other.

    Yields:
        A record of the seed, of each fault, and of each run that has come to its end.

    Raises:
        AssertionError: What a fault has broken.
    """
    generator = random.Random(seed)
    yield {"record": "seed", "seed": seed}
    training, kinds = TrainingChaos(directory, generator), list(kinds)
    training.undisturbed(topologies[0])
    source = training.newest_checkpoint(topologies[0]).path
    reshard = ReshardChaos(directory, training.launcher, source, generator)
    for position, kind in enumerate(kinds):
        left, number = num_faults // len(kinds) + (position < num_faults % len(kinds)), position
        while left > 0:
            count = min(left, FAULTS_PER_RUN)
            if kind == KIND:
                records = reshard.disturbed_rewrite(layouts[number % len(layouts)], max_faults=count)
            else:
                records = training.disturbed_run(kind, topologies[number % len(topologies)], max_faults=count)
            for record in records:
                left -= record["record"] == "fault"
                yield record
            number += 1


def summarise(records: list[dict]) -> str:
    """A table in Markdown: a row per kind, and one for all."""
    header = ["fault", "injected", "while starting", "while saving", "survived", "runs finished, all bit-equal", "steps lost at most"]
    lines = [header, ["---"] * len(header)]
    for kind in [*dict.fromkeys(record["kind"] for record in records if "kind" in record), "all"]:
        faults, runs = ([each for each in records if each["record"] == what and kind in ("all", each["kind"])] for what in ("fault", "run"))
        starting, saving = sum(fault["moment"] == "starting" for fault in faults), sum(fault.get("during_a_save", False) for fault in faults)
        lost = max((fault["steps_lost"] for fault in faults if "steps_lost" in fault), default="")
        lines.append([kind, len(faults), starting, saving, sum(run["faults"] for run in runs), len(runs), lost])
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def main() -> int:
    """Exit code of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=50, metavar="N", help="in all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=None, metavar="S", help="default: a new one")
    parser.add_argument("--output", type=Path, default=None, metavar="FILE", help="where records go (default: below the printed directory)")
    parser.add_argument("--summarise", type=Path, nargs="+", metavar="FILE", help="print the table of what was recorded, and stop")
    options = parser.parse_args()
    if options.summarise:
        print(summarise([json.loads(line) for path in options.summarise for line in path.read_text().splitlines()]))
        return 0
    directory = Path(tempfile.mkdtemp(prefix="chaos-"))
    seed = secrets.randbelow(2**32) if options.seed is None else options.seed
    output = options.output or directory / "chaos.jsonl"
    print(f"seed {seed}, directory {directory}, records {output}", flush=True)
    records = []
    with output.open("a", encoding="utf-8") as file:
        for record in inject(directory, seed=seed, num_faults=options.faults):
            records.append(record)
            print(json.dumps(record), file=file, flush=True)
            print(record, flush=True)
    print(summarise(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
