"""Measures training speed: `python tools/benchmark.py quickstart`.

Prints tokens per second and the share of a step spent waiting for data, as medians after a warm-up. Compare ratios, not absolute
times, on a machine that does other work. Exit codes as in launch/pretrain.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from phase8.errors import ConfigError, Phase8Error, describe_error

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def main() -> int:
    """Runs the command line and returns the exit code."""
    arguments = _parser().parse_args()
    try:
        _benchmark(arguments)
    except Phase8Error as error:
        print(describe_error(error), file=sys.stderr)
        return error.exit_code
    return 0


def _benchmark(arguments: argparse.Namespace) -> None:
    from phase8.config.load import load_config
    from phase8.train.benchmark import measure_throughput
    from phase8.train.device import select_device

    if arguments.iterations < 1:
        raise ConfigError(f"--iterations is {arguments.iterations}, but at least 1 is needed.")
    config = load_config(CONFIGS / f"{arguments.what}.yaml", [override for group in arguments.set for override in group])
    result = measure_throughput(config, device=select_device(arguments.device), num_steps=arguments.iterations)
    if arguments.json:
        print(json.dumps(asdict(result)))
        return
    for name, value in asdict(result).items():
        print(f"{name:20s} {f'{value:,.5g}' if isinstance(value, float) else value}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("quickstart",), help="quickstart: training as configs/quickstart.yaml does it")
    parser.add_argument("--iterations", type=int, default=30, metavar="N", help="measured steps, after 3 of warm-up")
    parser.add_argument("--set", nargs="+", action="append", default=[], metavar="a.b=c", help="override config keys")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(main())
