"""Where the figures of a run go besides `metrics.jsonl`: TensorBoard, Weights & Biases, trackio, and a file for Prometheus.

| key of `observe` | what is written | where a resumed run goes on |
|---|---|---|
| `tensorboard` | events under `<run>/tensorboard` | a new event file; steps that are taken again are hidden |
| `wandb` | a run in wandb, or under `<run>/wandb` when offline | the same run, by the id in `<run>/logger.json` |
| `trackio` | a run in trackio's local data base | the same run, `<name>-<id>` |
| `openmetrics` | one text file, see `openmetrics.py` | the file is replaced |

Only the first rank opens loggers, once for all rollbacks. No logger ends training: what fails is said once. wandb refuses steps that are not
above the last one, and after a rollback or from an earlier checkpoint a run takes steps again; so there the step is a figure of its own, over
which charts are drawn.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from phase8.closing import Tolerated
from phase8.config.schema import ObserveSection
from phase8.durable import replace_file, storage_errors
from phase8.errors import ConfigError
from phase8.observe.scalars import scalars_of

_FINISH_SECONDS = 60


class Logger(Protocol):
    """A receiver of the lines of `metrics.jsonl`."""

    def begin(self, resume_step: int) -> None:
        """Says that lines follow of the steps after this one, which may have been taken before; 0: of a new run."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Takes a line, whose numbers are finite or None."""

    def close(self) -> None:
        """Writes what is left."""


class LenientLogger:
    """A logger whose failures are said once and do not reach training; later lines are tried again.

    Args:
        name: Name of the logger in the sentence.
        logger: The logger.
        say: Shows a sentence.
    """

    def __init__(self, name: str, logger: Logger, say: Callable[[str], None]):
        self._name, self._logger, self._say = name, logger, say
        self._has_failed = False

    def begin(self, resume_step: int) -> None:
        """Says which steps follow."""
        with Tolerated(f"step {resume_step}: {self._name} does not know that steps are taken again", self._say_once):
            self._logger.begin(resume_step)

    def log(self, record: Mapping[str, Any]) -> None:
        """Takes a line."""
        with Tolerated(f"step {record['step']}: {self._name} loses figures, training goes on", self._say_once):
            self._logger.log(record)

    def close(self) -> None:
        """Closes the logger."""
        with Tolerated(f"{self._name} may lack the last figures", self._say_once):
            self._logger.close()

    def _say_once(self, sentence: str) -> None:
        if not self._has_failed:
            self._say(sentence)
        self._has_failed = True


class Tracker:
    """A run in wandb or trackio, which share an interface.

    Args:
        log: Records scalars by tag of a step.
        finish: Ends the run's process in the tracker; the run itself can go on later.
    """

    def __init__(self, log: Callable[[dict[str, float], int], None], finish: Callable[[], None]):
        self._log, self.close = log, finish

    def begin(self, resume_step: int) -> None:
        """Does nothing: every value has its step."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Records the scalars of a line."""
        if scalars := scalars_of(record):
            self._log(scalars, record["step"])


def require_packages(section: ObserveSection) -> None:
    """Refuses a start with a logger whose package is not installed.

    Raises:
        ConfigError: The packages that are missing, one sentence each.
    """
    asked = {"wandb": section.wandb != "none", "trackio": section.trackio}
    problems = [
        f"observe.{name} is {str(value).lower()}, but the package {name} is not installed; pip install 'phase8[{name}]', or set the key to {off}."
        for name, value, off in (("wandb", section.wandb, "none"), ("trackio", section.trackio, "false"))
        if asked[name] and find_spec(name) is None
    ]
    if problems:
        raise ConfigError(problems)


@contextmanager
def open_loggers(
    section: ObserveSection, directory: Path, *, name: str, config: Mapping[str, Any], say: Callable[[str], None]
) -> Iterator[list[Logger]]:
    """A context with the loggers that a config asks for; one that cannot be opened is reported and left out.

    Args:
        section: The section `observe`.
        directory: Directory of the run, which keeps the id of the run in trackers.
        name: Name of the run.
        config: The whole config as plain values, which trackers show.
        say: Shows a sentence.
    """
    openers: dict[str, Callable[[], Logger]] = {}
    if section.tensorboard:
        openers["TensorBoard"] = lambda: _open_tensorboard(directory / "tensorboard")
    if section.wandb != "none":
        openers["wandb"] = lambda: _open_wandb(section, directory, name, config)
    if section.trackio:
        openers["trackio"] = lambda: _open_trackio(section, directory, name, config)
    if section.openmetrics is not None:
        path = Path(section.openmetrics)
        openers["the OpenMetrics file"] = lambda: _open_openmetrics(path, name)
    loggers: list[Logger] = []
    for what, open_logger in openers.items():
        with Tolerated(f"{what} gets nothing of this run", say):
            loggers.append(LenientLogger(what, open_logger(), say))
    try:
        yield loggers
    finally:
        for logger in loggers:
            logger.close()


# Each imports its package itself: that costs seconds of start-up, which a run without the logger does not owe.


def _open_tensorboard(directory: Path) -> Logger:
    from phase8.observe.event_file import EventFile

    return EventFile(directory)


def _open_openmetrics(path: Path, name: str) -> Logger:
    from phase8.observe.openmetrics import OpenMetricsFile

    return OpenMetricsFile(path, run=name)


def _open_wandb(section: ObserveSection, directory: Path, name: str, config: Mapping[str, Any]) -> Logger:
    import wandb

    run = wandb.init(
        project=section.project,
        entity=section.wandb_entity,
        name=name,
        id=_run_id(directory),
        resume="allow",
        config=dict(config),
        mode=section.wandb,
        dir=str(directory),
        # The console stays ours: what wraps it would outlive a lost reader of the output. A host without network must not wait for ever.
        settings=wandb.Settings(console="off", finish_timeout=_FINISH_SECONDS, finish_timeout_raises=True),
    )
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    return Tracker(lambda scalars, step: run.log({"step": step, **scalars}), run.finish)


def _open_trackio(section: ObserveSection, directory: Path, name: str, config: Mapping[str, Any]) -> Logger:
    import trackio

    run = trackio.init(project=section.project, name=f"{name}-{_run_id(directory)}", resume="allow", config=dict(config), embed=False)
    return Tracker(lambda scalars, step: run.log(scalars, step=step), trackio.finish)


def _run_id(directory: Path) -> str:
    """The id of the run in trackers; it is chosen once, and renamed with the directory of an earlier run.

    Raises:
        StorageError: It cannot be read or written.
    """
    path = directory / "logger.json"
    with storage_errors(path):
        try:
            known = json.loads(path.read_bytes())
        except (FileNotFoundError, ValueError):
            known = None
    if isinstance(known, dict) and isinstance(known.get("id"), str) and known["id"].isalnum():
        return known["id"]
    chosen = secrets.token_hex(4)
    replace_file(path, json.dumps({"id": chosen}).encode())
    return chosen
