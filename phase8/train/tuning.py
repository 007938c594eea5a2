"""Chooses the settings that are `auto` when a run starts: planned, measured by a few real steps, remembered.

| where | what happens |
|---|---|
| a run that goes on, on the same device and ranks | it keeps what it has: its steps stay the same bit for bit |
| chosen before for such a run (`data.cache_dir/tuning`) | the same |
| one process on a GPU, `train.tuning: measure` | the best few that fit by plan are tried, the fastest is taken |
| several ranks, or `train.tuning: plan` | the best by plan: a rank that runs out of memory beside others would leave them waiting |
| a CPU, or `train.tuning: off` | a rule |
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from phase8.config.auto import OFF, WITH_RECOMPUTE, automatic_keys, with_values, without_auto
from phase8.config.dotted import values_of
from phase8.config.load import config_to_mapping, with_settings
from phase8.config.schema import RunConfig
from phase8.config.validate import find_problems
from phase8.data.staging import read_json, write_json
from phase8.distributed.collectives import broadcast_text, gather_texts
from phase8.distributed.mesh import Mesh
from phase8.errors import ConfigError, OutOfMemoryError, Phase8Error
from phase8.observe.formatting import format_count
from phase8.plan.candidates import Candidate, Device, find_candidates, how_to_fit, nearest_that_fits, plan_on, smallest_candidate
from phase8.plan.prediction import predict_step
from phase8.train.device import host_settings
from phase8.train.trial import OUT_OF_MEMORY, Trial, run_trial

# Raise it when the same machine may choose otherwise than before.
TUNING_VERSION = 3
_MOST_TRIALS = 3
# Of the candidates those are tried whose predicted time is within this of the best.
_WORTH_A_TRIAL = 1.08
# A shorter run would spend more time on compilation than it saves.
_LONG_ENOUGH_TO_COMPILE_SECONDS = 120.0
_UNLIMITED = 1 << 60
_CHOSEN_KEYS = (*OFF, *WITH_RECOMPUTE)


@dataclass(frozen=True)
class Chosen:
    """Settings that were chosen, and for what.

    Args:
        values: By dotted name; empty: the config left nothing to choose.
        device: Its name.
        world_size: Ranks.
        reason: For the banner.
    """

    values: dict[str, Any] = field(default_factory=dict)
    device: str = ""
    world_size: int = 1
    reason: str = ""

    def as_record(self) -> dict[str, Any] | None:
        """For the checkpoints of the run; None: nothing was chosen."""
        return asdict(self) if self.values else None


def choose_settings(
    config: RunConfig,
    *,
    mesh: Mesh,
    device: torch.device,
    facts: Device,
    recorded: Callable[[], object] = lambda: None,
    refused: Sequence[dict[str, Any]] = (),
    say: Callable[[str], None],
) -> tuple[RunConfig, Chosen]:
    """The config with nothing left to choose, the same on all ranks, and what was chosen.

    Args:
        config: Validated.
        mesh: The ranks.
        device: Of this rank.
        facts: About it, before the run takes anything of it.
        recorded: Reads what the checkpoint that the run goes on from says of its settings, whoever wrote it; called on all ranks or on none.
        refused: Values that ran out of memory in this process.
        say: Shows a line.

    Raises:
        OutOfMemoryError: Nothing fits.
    """
    automatic, world_size = automatic_keys(config), mesh.topology.world_size
    if not automatic:
        return config, Chosen()
    if config.train.tuning == "off":
        settled = without_auto(config)
        return settled, Chosen(values_of(settled, automatic), reason="train.tuning is off")
    facts = _common_memory(facts)
    known = _kept(config, recorded(), facts, world_size, say) if not refused else None
    if known is None:
        known = _agreed(lambda: _choose(config, mesh, device, facts, refused, say), mesh)
    return with_values(config, known.values), known


def _choose(
    config: RunConfig, mesh: Mesh, device: torch.device, facts: Device, refused: Sequence[dict[str, Any]], say: Callable[[str], None]
) -> Chosen:
    """What this rank would choose for all."""
    world_size = mesh.topology.world_size
    config = with_values(config, host_settings(config, facts.type))
    automatic = automatic_keys(config)
    if not automatic:
        return Chosen(values_of(config, _CHOSEN_KEYS), facts.name, world_size, "of the host")
    cache = _cache_file(config, facts, world_size)
    if (found := _read_cache(cache, config)) is not None and not refused:
        return found
    search = _Search(config, mesh, device, facts, refused, say)
    if facts.type != "cuda" or world_size > 1 or config.train.tuning == "plan":
        best = search.candidates(compiles=search.is_long(None))[0]
        return Chosen(values_of(best.config, _CHOSEN_KEYS), facts.name, world_size, f"{best}, by plan")
    chosen = search.measure()
    if not refused:
        _write_cache(cache, chosen, say)
    return chosen


class _Search:
    """The search of one process on a GPU for the fastest settings.

    Args:
        config: Settings of the step are open, those of the host are not.
        mesh: Of the process.
        device: The GPU.
        facts: About it.
        refused: Values that ran out of memory.
        say: Shows a line.
    """

    def __init__(
        self, config: RunConfig, mesh: Mesh, device: torch.device, facts: Device, refused: Sequence[dict[str, Any]], say: Callable[[str], None]
    ):
        self._config, self._mesh, self._device, self._facts, self._say = config, mesh, device, facts, say
        self._world_size = mesh.topology.world_size
        # The least planned of what ran out of memory: all that needs as much would, too.
        self._too_much = min((self._planned_bytes(with_values(config, values)) for values in refused), default=_UNLIMITED)
        self._found: list[tuple[Trial, Candidate]] = []

    def candidates(self, *, compiles: bool) -> list[Candidate]:
        """Those that fit by plan, the fastest by prediction first.

        Raises:
            OutOfMemoryError: There are none.
        """
        found = self._fitting(compiles=compiles)
        if not found:
            raise OutOfMemoryError(_nothing_fits(self._config, self._world_size, self._facts))
        return found

    def _fitting(self, *, compiles: bool) -> list[Candidate]:
        facts = self._facts
        if not {"train.micro_batch_size", "train.recompute"} & set(automatic_keys(self._config)):
            facts = replace(facts, memory_bytes=_UNLIMITED)  # explicit values are obeyed; what does not fit will be told
        return find_candidates(
            self._config, world_size=self._world_size, device=facts, most=_MOST_TRIALS, compiles=compiles, below_bytes=self._too_much
        )

    def _planned_bytes(self, config: RunConfig) -> int:
        return plan_on(self._facts, config, world_size=self._world_size).total_bytes

    def is_long(self, seconds: float | None) -> bool:
        """Whether a run of steps that take so long (None: as predicted) is worth the time of compilation."""
        if seconds is not None:
            return seconds * self._config.train.num_steps >= _LONG_ENOUGH_TO_COMPILE_SECONDS
        settled = with_values(self._config, OFF | {"train.cuda_graphs": True})
        if find_problems(settled, world_size=self._world_size):  # a pipeline cannot be recorded
            settled = with_values(self._config, OFF)
        return self.is_long(predict_step(settled, self._world_size, self._facts.name).seconds)

    def measure(self) -> Chosen:
        """Tries the best few and takes the fastest. A short run is tried without compilation first, and with it if it is not short after all.

        Raises:
            OutOfMemoryError: None could be used.
        """
        if self.is_long(None):
            self._try(compiles=True, most=_MOST_TRIALS)
        else:
            self._try(compiles=False, most=1)
            if self._found and self.is_long(self._found[0][0].step_seconds):
                self._try(compiles=True, most=_MOST_TRIALS)
        if not self._found:
            raise OutOfMemoryError("none of the settings that fit by plan could be used; give train.micro_batch_size and train.recompute")
        return _fastest(self._found, self._facts)

    def _try(self, *, compiles: bool, most: int) -> None:
        """Tries the first ones that are close to the best, and more only if none of these can be used."""
        candidates = self.candidates(compiles=compiles)
        limit, num_found, tried = candidates[0].step_seconds * _WORTH_A_TRIAL, len(self._found), list[RunConfig]()
        while candidates:
            candidate, *candidates = candidates
            if len(self._found) > num_found and (candidate.step_seconds > limit or len(tried) >= most):
                break
            tried.append(candidate.config)
            self._say(f"trying {candidate} ...")
            trial = run_trial(candidate.config, mesh=self._mesh, device=self._device)
            if isinstance(trial, Trial):
                self._say(f"  {format_count(trial.tokens_per_second)} tok/s, {trial.peak_bytes / 2**30:.1f} GiB ({trial.seconds:.0f} s)")
                self._found.append((trial, candidate))
                continue
            self._say(f"  {trial}")
            if trial == OUT_OF_MEMORY:
                self._too_much = candidate.planned_bytes
                candidates = [each for each in self._fitting(compiles=compiles) if each.config not in tried]


def _fastest(found: Sequence[tuple[Trial, Candidate]], facts: Device) -> Chosen:
    (best, chosen), *others = sorted(found, key=lambda each: -each[0].tokens_per_second)
    reason = f"{chosen}: {format_count(best.tokens_per_second)} tok/s measured, {best.peak_bytes / 2**30:.1f} of {facts.memory_bytes / 2**30:.1f} GiB"
    if others:
        reason += f"; next best: {others[0][1]}, {format_count(others[0][0].tokens_per_second)} tok/s"
    return Chosen(values_of(chosen.config, _CHOSEN_KEYS), facts.name, 1, reason)


def _kept(config: RunConfig, recorded: object, facts: Device, world_size: int, say: Callable[[str], None]) -> Chosen | None:
    """What the run was trained with, if device and ranks are the same; None: it has to be chosen anew."""
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
    if find_problems(with_values(config, stored.values), world_size=world_size):
        return None
    return Chosen(stored.values, stored.device, stored.world_size, f"as the run began: {stored.reason}")


def _parse(value: object, config: RunConfig) -> Chosen | None:
    """A record, whoever wrote it; None where it is not one that leaves nothing of this config to choose."""
    if not isinstance(value, dict) or not isinstance(value.get("values"), dict) or not set(automatic_keys(config)) <= value["values"].keys():
        return None
    if not value["values"].keys() <= set(_CHOSEN_KEYS):
        return None
    try:
        settled = with_settings(config, value["values"], source="record")
    except ConfigError:
        return None
    texts = [value.get(name) for name in ("device", "reason")]
    world_size = value.get("world_size")
    if automatic_keys(settled) or not all(isinstance(text, str) for text in texts) or type(world_size) is not int:
        return None
    return Chosen(values_of(settled, tuple(value["values"])), str(texts[0]), world_size, str(texts[1]))


def _common_memory(facts: Device) -> Device:
    """The device with the memory that every rank has."""
    smallest = min(int(text or 0) for text in gather_texts(str(facts.memory_bytes)))
    return replace(facts, memory_bytes=smallest)


def _agreed(choose: Callable[[], Chosen], mesh: Mesh) -> Chosen:
    """What the first rank chooses, on all of them; its error is everybody's."""
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


def _nothing_fits(config: RunConfig, world_size: int, facts: Device) -> str:
    smallest = smallest_candidate(config, world_size=world_size, device=facts)
    nearest = nearest_that_fits(config, facts, world_size=world_size, below_bytes=smallest.planned_bytes)
    remedy = "make the model smaller, use more ranks with zero.stage=3, or offload with zero.offload_optimizer=cpu"
    if nearest is not None:
        remedy = how_to_fit(smallest.config, nearest)
    return (
        f"no settings fit into the {facts.memory_bytes / 2**30:.1f} GiB that are free on {facts.name}: {smallest} needs "
        f"{smallest.planned_bytes / 2**30:.1f} GiB by plan; {remedy}."
    )


def _cache_file(config: RunConfig, facts: Device, world_size: int) -> Path:
    """Where the choice for such a run is kept: named by all that it depends on."""
    mapping = config_to_mapping(config)
    matters = {name: mapping[name] for name in ("model", "parallel", "zero", "precision", "train")}
    for name in ("seed", "num_steps", "stop_at_step", "evaluate_every_n_steps", "evaluation_sequences", "anomaly", "check_replicas_every_n_steps"):
        matters["train"].pop(name)
    key = {
        "version": TUNING_VERSION,
        "config": matters,
        "packed": config.data.reset_at_document_boundaries,
        "device": facts.name,
        "memory_gib": round(facts.memory_bytes / 2**30),
        "world_size": world_size,
        "torch": str(torch.__version__),
        "steps": config.train.num_steps.bit_length(),  # a long run has time to compile
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return Path(config.data.cache_dir) / "tuning" / f"{digest[:24]}.json"


def _read_cache(path: Path, config: RunConfig) -> Chosen | None:
    try:
        return _parse(read_json(path), config)
    except Phase8Error:  # an unreadable cache is no cache
        return None


def _write_cache(path: Path, chosen: Chosen, say: Callable[[str], None]) -> None:
    try:
        write_json(path, asdict(chosen))
    except Phase8Error as error:
        say(f"the choice is not kept for the next run: {error}")
