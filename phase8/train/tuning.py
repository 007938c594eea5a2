"""Chooses the settings that are `auto` when a run starts: candidates from the plan, measured in a few real steps, and cached.

| where | what happens |
|---|---|
| a run that resumes on the same device and ranks | it keeps its settings, so its steps stay the same bit for bit |
| a cached choice for such a run (`data.cache_dir/tuning`) | it is used |
| one process on a GPU, `train.tuning: measure` | the best few candidates that fit by plan are tried, unless one has no rival and takes long |
| several ranks, or `train.tuning: plan` | the best by plan is taken: a trial that runs out of memory on one rank would leave the rest waiting |
| a CPU, or `train.tuning: off` | a fixed rule applies |
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from phase8.accelerator import has_kernels
from phase8.config.auto import OFF, WITH_RECOMPUTE, automatic_keys, with_values, without_auto
from phase8.config.dotted import values_of
from phase8.config.load import config_to_mapping, with_settings
from phase8.config.schema import RunConfig
from phase8.config.validate import find_problems
from phase8.data.staging import read_json, write_json
from phase8.distributed.collectives import broadcast_text, gather_texts
from phase8.distributed.mesh import Mesh
from phase8.errors import ConfigError, OutOfMemoryError, Phase8Error
from phase8.formatting import format_bytes, format_count
from phase8.plan.candidates import Candidate, Device, find_candidates, nothing_fits, plan_on, smallest_candidate
from phase8.plan.prediction import predict_step
from phase8.train.device import host_settings
from phase8.train.engine.protocol import BuildEngine
from phase8.train.trial import OUT_OF_MEMORY, Trial, run_trial, trial_seconds

TUNING_VERSION = 5  # must be raised when the same machine may choose otherwise than before
_MOST_TRIALS = 3
# Candidates are tried if their predicted time is within this ratio of the best.
_WORTH_A_TRIAL = 1.08
_LONG_ENOUGH_TO_COMPILE_SECONDS = 120.0  # in a shorter run, compilation would take more time than it saves
# Where a trial would take longer, by its prediction, a candidate without a rival is taken untried.
_WORTH_A_TRIAL_OF_ONE_SECONDS = 30.0
_UNLIMITED = 1 << 60
COPIES: dict[str, Any] = {"checkpoint.asynchronous": True}  # among refused values: the host has no room for copies of what is saved
_AS_BEFORE = "as the run began: "
_Try = Callable[[RunConfig], Trial | str]
_CHOSEN_KEYS = (*OFF, *WITH_RECOMPUTE)


@dataclass(frozen=True)
class Chosen:
    """Settings that were chosen, with the conditions of the choice.

    Args:
        values: Values by dotted name; empty: the config had no automatic settings.
        device: Name of the device; empty: `train.tuning` is off.
        world_size: Number of ranks.
        reason: Reason for the banner.
    """

    values: dict[str, Any] = field(default_factory=dict)
    device: str = ""
    world_size: int = 1
    reason: str = ""

    @property
    def can_change(self) -> bool:
        """Whether others can be chosen in their place: not where nothing is tuned."""
        return bool(self.device)

    def as_record(self) -> dict[str, Any] | None:
        """The record for the run's checkpoints; None: nothing was chosen."""
        return asdict(self) if self.values else None


def choose_settings(
    config: RunConfig,
    *,
    mesh: Mesh,
    device: torch.device,
    facts: Device,
    build_engine: BuildEngine,
    recorded: Callable[[], object] = lambda: None,
    refused: Sequence[dict[str, Any]] = (),
    say: Callable[[str], None],
) -> tuple[RunConfig, Chosen]:
    """The config without automatic settings, the same on all ranks, and the choice.

    Args:
        config: A validated config.
        mesh: Mesh of the ranks.
        device: Device of this rank.
        facts: Facts about the device, before the run uses it.
        build_engine: Builds the engine of a trial.
        recorded: Reads the settings recorded in the checkpoint from which the run continues (not trusted); called on all ranks or on none.
        refused: Values that ran out of memory in this process.
        say: Shows a line of text.

    Raises:
        OutOfMemoryError: Nothing fits.
    """
    if COPIES in refused:
        config, refused = with_values(config, dict.fromkeys(COPIES, False)), [each for each in refused if each != COPIES]
    automatic, world_size = automatic_keys(config), mesh.topology.world_size
    if not automatic:
        return config, Chosen()
    if config.train.tuning == "off":
        settled = without_auto(config)
        return settled, Chosen(values_of(settled, automatic), reason="train.tuning is off")
    facts = _common_memory(facts)
    known = _kept(config, recorded(), facts, world_size, say) if not refused else None
    if known is None:
        try_settings = partial(run_trial, mesh=mesh, device=device, build_engine=build_engine)
        known = _agreed(lambda: _choose(config, mesh, try_settings, facts, refused, say), mesh)
    settled = with_values(config, known.values)
    return settled, replace(known, values=values_of(settled, tuple(known.values)))  # a cached choice does not know what is explicit now


def _choose(
    config: RunConfig, mesh: Mesh, try_settings: _Try, facts: Device, refused: Sequence[dict[str, Any]], say: Callable[[str], None]
) -> Chosen:
    """The choice of this rank for all ranks."""
    world_size, host = mesh.topology.world_size, host_settings(config, facts.type)
    config = with_values(config, host)
    automatic = automatic_keys(config)
    if not automatic:
        return Chosen(values_of(config, _CHOSEN_KEYS), facts.name, world_size, "of the host")
    cache = _cache_file(config, facts, world_size)
    if (found := _read_cache(cache, config)) is not None and not refused:
        return replace(found, values=found.values | values_of(config, tuple(host)))  # found on another host, or with others given
    search = _Search(config, mesh, try_settings, facts, refused, say)
    if not has_kernels(facts.type) or world_size > 1 or config.train.tuning == "plan":
        return _by_plan(search.candidates(compiles=search.is_long(None)), facts, world_size)
    chosen = search.measure()
    if not refused:
        _write_cache(cache, chosen, say)
    return chosen


class _Search:
    """The search of one process on a GPU for the fastest settings.

    Args:
        config: Config whose step settings are open and whose host settings are explicit.
        mesh: Mesh of the process.
        try_settings: Measures a config on the GPU, or says why it cannot be used.
        facts: Facts about the GPU.
        refused: Values that ran out of memory.
        say: Shows a line of text.
    """

    def __init__(
        self, config: RunConfig, mesh: Mesh, try_settings: _Try, facts: Device, refused: Sequence[dict[str, Any]], say: Callable[[str], None]
    ):
        self._config, self._try_settings, self._facts, self._say = config, try_settings, facts, say
        self._world_size = mesh.topology.world_size
        # The smallest plan that ran out of memory: whatever needs as much would run out too.
        self._too_much = min((self._planned_bytes(with_values(config, values)) for values in refused), default=_UNLIMITED)
        self._found: list[tuple[Trial, Candidate]] = []

    def candidates(self, *, compiles: bool) -> list[Candidate]:
        """Candidates that fit by plan, the fastest prediction first.

        Raises:
            OutOfMemoryError: No candidate fits.
        """
        found = self._fitting(compiles=compiles)
        if not found:
            smallest = smallest_candidate(self._config, world_size=self._world_size, device=self._facts)
            raise OutOfMemoryError(nothing_fits(self._config, smallest, self._facts, world_size=self._world_size))
        return found

    def _fitting(self, *, compiles: bool) -> list[Candidate]:
        facts = self._facts
        if not {"train.micro_batch_size", "train.recompute"} & set(automatic_keys(self._config)):
            facts = replace(facts, memory_bytes=_UNLIMITED)  # explicit values are obeyed; one that does not fit is reported later
        return find_candidates(
            self._config, world_size=self._world_size, device=facts, most=_MOST_TRIALS, compiles=compiles, below_bytes=self._too_much
        )

    def _planned_bytes(self, config: RunConfig) -> int:
        return plan_on(self._facts, config, world_size=self._world_size).total_bytes

    def is_long(self, seconds: float | None) -> bool:
        """Whether a run with steps of this duration (None: the predicted one) is long enough for compilation to pay."""
        if seconds is not None:
            return seconds * self._config.train.num_steps >= _LONG_ENOUGH_TO_COMPILE_SECONDS
        settled = with_values(self._config, OFF | {"train.cuda_graphs": True})
        if find_problems(settled, world_size=self._world_size):  # a pipeline cannot be recorded
            settled = with_values(self._config, OFF)
        return self.is_long(predict_step(settled, self._world_size, self._facts.name).seconds)

    def measure(self) -> Chosen:
        """Tries the best few candidates and takes the fastest. A short run is tried without compilation first, and with it if it proves long.

        Raises:
            OutOfMemoryError: No candidate could run.
        """
        if self.is_long(None):
            best, *others = candidates = self.candidates(compiles=True)
            has_rival = any(other.step_seconds <= best.step_seconds * _WORTH_A_TRIAL for other in others)
            host_bytes = plan_on(self._facts, best.config, world_size=1).host_bytes
            if not has_rival and trial_seconds(best.config, best.step_seconds, host_bytes=host_bytes) > _WORTH_A_TRIAL_OF_ONE_SECONDS:
                return _by_plan(candidates, self._facts, 1, ", which finds nothing as fast")
            self._try(candidates, compiles=True, most=_MOST_TRIALS)
        else:
            self._try(self.candidates(compiles=False), compiles=False, most=1)
            if self._found and self.is_long(self._found[0][0].step_seconds):
                self._try(self.candidates(compiles=True), compiles=True, most=_MOST_TRIALS)
        if not self._found:
            raise OutOfMemoryError("none of the settings that fit by plan could be used; give train.micro_batch_size and train.recompute")
        return _fastest(self._found, self._facts)

    def _try(self, candidates: list[Candidate], *, compiles: bool, most: int) -> None:
        """Tries the candidates close to the best, and further ones only if none of these can run."""
        limit, num_found, tried = candidates[0].step_seconds * _WORTH_A_TRIAL, len(self._found), list[RunConfig]()
        while candidates:
            candidate, *candidates = candidates
            if len(self._found) > num_found and (candidate.step_seconds > limit or len(tried) >= most):
                break
            tried.append(candidate.config)
            self._say(f"trying {candidate} ...")
            trial = self._try_settings(candidate.config)
            if isinstance(trial, Trial):
                self._say(f"  {format_count(trial.tokens_per_second)} tok/s, {format_bytes(trial.peak_bytes)} ({trial.seconds:.0f} s)")
                self._found.append((trial, candidate))
                continue
            self._say(f"  {trial}")
            if trial == OUT_OF_MEMORY:
                self._too_much = candidate.planned_bytes
                candidates = [each for each in self._fitting(compiles=compiles) if each.config not in tried]


def _by_plan(candidates: Sequence[Candidate], facts: Device, world_size: int, remark: str = "") -> Chosen:
    (best, *others), compared = candidates, ""
    if others:  # on a CPU, whose speed is not predicted, there are none
        speeds = [format_count(predict_step(each.config, world_size, facts.name).tokens_per_second) for each in candidates[:2]]
        compared = f": {speeds[0]} tok/s predicted; next best: {others[0]}, {speeds[1]} tok/s"
    return Chosen(values_of(best.config, _CHOSEN_KEYS), facts.name, world_size, f"{best}, by plan{remark}{compared}")


def _fastest(found: Sequence[tuple[Trial, Candidate]], facts: Device) -> Chosen:
    (best, chosen), *others = sorted(found, key=lambda each: -each[0].tokens_per_second)
    reason = f"{chosen}: {format_count(best.tokens_per_second)} tok/s measured, {format_bytes(best.peak_bytes)} of {format_bytes(facts.memory_bytes)}"
    if others:
        reason += f"; next best: {others[0][1]}, {format_count(others[0][0].tokens_per_second)} tok/s"
    return Chosen(values_of(chosen.config, _CHOSEN_KEYS), facts.name, 1, reason)


def _kept(config: RunConfig, recorded: object, facts: Device, world_size: int, say: Callable[[str], None]) -> Chosen | None:
    """The settings with which the run was trained, if device and ranks are the same; otherwise None."""
    stored = _parse(recorded, config)
    if stored is None:
        return None
    changed = [
        f"{what} was {before} and is {now}"
        for what, before, now in (("the device", stored.device, facts.name), ("the number of ranks", stored.world_size, world_size))
        if before != now
    ]
    if changed:
        say(f"settings are chosen anew: {', '.join(changed)}")
        return None
    settled = with_values(config, stored.values)
    if find_problems(settled, world_size=world_size):
        return None
    values = values_of(settled, tuple(stored.values))
    explicit = [name for name, value in values.items() if value != stored.values[name]]
    but_for = f", but for {', '.join(explicit)}" if explicit else ""
    return Chosen(values, stored.device, stored.world_size, f"{_AS_BEFORE}{stored.reason.removeprefix(_AS_BEFORE)}{but_for}")


def _parse(value: object, config: RunConfig) -> Chosen | None:
    """Parses an untrusted record; None if it is malformed or leaves a setting of this config open."""
    if not isinstance(value, dict) or not isinstance(value.get("values"), dict) or not set(automatic_keys(config)) <= value["values"].keys():
        return None
    if not value["values"].keys() <= set(_CHOSEN_KEYS):
        return None
    try:
        settled = with_settings(config, value["values"], source="record")
    except ConfigError:
        return None
    texts, world_size = [value.get(name) for name in ("device", "reason")], value.get("world_size")
    if automatic_keys(settled) or not all(isinstance(text, str) for text in texts) or type(world_size) is not int:
        return None
    return Chosen(values_of(settled, tuple(value["values"])), str(texts[0]), world_size, str(texts[1]))


def _common_memory(facts: Device) -> Device:
    """The device with the memory that every rank has at least."""
    smallest = min(int(text or 0) for text in gather_texts(str(facts.memory_bytes)))
    return replace(facts, memory_bytes=smallest)


def _agreed(choose: Callable[[], Chosen], mesh: Mesh) -> Chosen:
    """Shares the choice of the first rank with all ranks; its error is raised on all."""
    if mesh.topology.world_size == 1:
        return choose()
    chosen: Chosen | None = None
    failure: Phase8Error | None = None
    if mesh.rank == 0:
        try:
            chosen = choose()
        except Phase8Error as error:
            failure = error
    said = broadcast_text(None if chosen is None else json.dumps(asdict(chosen)))
    if failure is not None:
        raise failure
    if said is None:
        raise OutOfMemoryError("the first rank found no settings that fit; see its message")
    return Chosen(**json.loads(said))


def _cache_file(config: RunConfig, facts: Device, world_size: int) -> Path:
    """The cache file for such a run; its name depends on everything that affects the choice."""
    mapping = config_to_mapping(config)
    matters = {name: mapping[name] for name in ("model", "parallel", "zero", "precision", "train")}
    for name in ("seed", "num_steps", "stop_at_step", "evaluate_every_n_steps", "evaluation_sequences", "anomaly", "check_replicas_every_n_steps"):
        matters["train"].pop(name)
    key = {
        "version": TUNING_VERSION,
        "config": matters,
        "optimizer": [config.optim.name, config.optim.state_dtype],  # what it keeps and how long it takes
        "packed": config.data.reset_at_document_boundaries,
        "device": facts.name,
        "memory_gib": round(facts.memory_bytes / 2**30),
        "world_size": world_size,
        "torch": str(torch.__version__),
        "steps": config.train.num_steps.bit_length(),  # only a long run pays for compilation
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return Path(config.data.cache_dir) / "tuning" / f"{digest[:24]}.json"


def _read_cache(path: Path, config: RunConfig) -> Chosen | None:
    try:
        return _parse(read_json(path), config)
    except Phase8Error:  # an unreadable cache is ignored
        return None


def _write_cache(path: Path, chosen: Chosen, say: Callable[[str], None]) -> None:
    try:
        write_json(path, asdict(chosen))
    except Phase8Error as error:
        say(f"the choice is not kept for the next run: {error}")
