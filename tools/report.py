"""Draws the report of a run from its metrics, or compares runs on one page.

    python tools/report.py runs/quickstart                     runs/quickstart/report/index.html and loss.png, also while the run trains
    python tools/report.py runs/a runs/b [--output FILE]       one page with the curves of both (default: comparison.html)

The page is one file, which asks nothing of the network. Exit codes: 0 done; 2 command line, or a run without metrics of steps
or evaluations; 5 a place that cannot be written.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import phase8.early_interrupt  # noqa: F401  # first: later imports take time
from phase8.config.arguments import path_argument
from phase8.errors import ConfigError
from phase8.terminal import run_door, warn
from phase8.train.outputs import require_own_output


def main() -> int:
    """Runs the command line and returns the exit code."""
    return run_door(_run)


def _run() -> int:
    arguments = _parser().parse_args()
    if len(arguments.runs) == 1 and arguments.output is not None:
        raise ConfigError(f"--output {arguments.output} is for several runs: the report of one is drawn in its directory; leave it out.")
    for run in arguments.runs:
        if not (run / "metrics.jsonl").is_file():
            raise ConfigError(f"there is no run at {run}: it holds no metrics.jsonl; give the directory of a run, such as runs/NAME.")
    require_own_output(arguments.output)
    # Imported late: what is wrong on the command line is answered at once.
    from phase8.observe.comparison import write_comparison
    from phase8.observe.report import require_figures, write_report

    for run in arguments.runs:
        require_figures(run)
    if len(arguments.runs) == 1:
        page = write_report(arguments.runs[0], say=warn)
    else:
        page = arguments.output or Path("comparison.html")
        write_comparison(arguments.runs, page, say=warn)
    print(f"report: {page}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=path_argument, metavar="RUN", help="run directory")
    parser.add_argument("--output", type=path_argument, metavar="FILE", help="page that compares several runs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
