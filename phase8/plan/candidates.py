"""Candidate values for the settings that are `auto`: those whose plan fits into the memory of a device, the fastest prediction first.

Predicting is cheap and planning memory is not. For each microbatch the settings are ordered: more recomputation is slower and needs less
memory. So the fastest setting that fits is found by bisection, and skipped where it cannot be faster than one already found. Where no budget can
be had and every layer would be recomputed, every n-th one may do.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

from phase8.accelerator import has_kernels, is_accelerator, records_steps
from phase8.config.auto import AUTO, automatic_keys, with_values
from phase8.config.batch import batch_shape, run_topology
from phase8.config.dotted import values_of
from phase8.config.schema import RunConfig, ZeroSection
from phase8.config.validate import find_problems
from phase8.formatting import format_bytes
from phase8.plan.memory import MemoryPlan, usable_bytes
from phase8.plan.prediction import predict_step, recorded_where_it_pays
from phase8.plan.rank_memory import fullest
from phase8.plan.whole_config import plan_stages

# Larger microbatches are no faster.
MOST_TOKENS = 131_072
_CPU_TOKENS = 4096  # tokens at once; the caches of a CPU hold no more
# Budgets for which torch.compile makes different graphs. The first stands for all from 0.8 on, the second for those from 0.5 to 0.8; between
# two of the smaller ones speed differs by little more than 1 %.
_BUDGETS = (0.9, 0.5, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1)
# In the order from the fastest to the smallest memory. A budget is faster than `selective` and needs less.
_WAYS = (("none", 0.5), *(("budget", budget) for budget in _BUDGETS), ("selective", 0.5), ("full", 0.5), ("slices", 0.5))
# Recomputation of layers 0, n, 2n, ... alone, the fastest first. With budgets all layers keep a part, which is faster than some that keep nothing.
_INTERVALS = (8, 4, 3, 2)
_OF_SOME_LAYERS = ("selective", "full")
_STEP_KEYS = (
    "train.micro_batch_size",
    "train.recompute",
    "train.activation_memory_budget",
    "train.recompute_every_n_layers",
    "train.compile.enabled",
    "train.cuda_graphs",
)


@dataclass(frozen=True)
class Device:
    """The device of a rank.

    Args:
        type: Type of device, as torch names it.
        name: The vendor's name.
        memory_bytes: Memory that the run may use; ignored on a CPU.
        total_bytes: Memory that the device has; 0: unknown.
        can_compile: Whether torch.compile finds what it needs.
        limit_gib: `train.device_memory_gib` where that is less than what is free; None: the run may use what is free.
    """

    type: str
    name: str
    memory_bytes: int
    total_bytes: int
    can_compile: bool = True
    limit_gib: float | None = None

    @property
    def room(self) -> str:
        """The memory that the run may use, in words: `79.2 GiB that are free on a GPU`."""
        where = f"are free on {self.name}" if self.limit_gib is None else f"train.device_memory_gib {self.limit_gib:g} leaves on {self.name}"
        return f"{format_bytes(self.memory_bytes)} that {where}"

    @property
    def is_limited(self) -> bool:
        """Whether it has memory of its own, of a known size."""
        return is_accelerator(self.type) and self.total_bytes > 0

    def limited_to(self, limit_gib: float | None) -> Device:
        """The same device with its memory limited to `train.device_memory_gib`; None: no limit."""
        if limit_gib is None:
            return self
        limit = int(limit_gib * 2**30)
        limit_gib = limit_gib if limit < self.memory_bytes else None
        return replace(self, memory_bytes=min(self.memory_bytes, limit), total_bytes=min(self.total_bytes, limit), limit_gib=limit_gib)


@dataclass(frozen=True)
class Candidate:
    """Values for the settings of a step.

    Args:
        config: The config with these values; settings of the host may still be `auto`.
        planned_bytes: Planned memory of the fullest rank.
        step_seconds: Predicted; for an H100 if the device is unknown.
        is_recorded: Whether the device records steps where `train.cuda_graphs` is set.
    """

    config: RunConfig
    planned_bytes: int
    step_seconds: float
    is_recorded: bool = True

    @property
    def values(self) -> dict[str, Any]:
        """The values by dotted name."""
        return values_of(self.config, _STEP_KEYS)

    def __str__(self) -> str:
        """The values in words."""
        train = self.config.train
        how = [
            f"micro batch {train.micro_batch_size}",
            "nothing recomputed" if train.recompute == "none" else f"recompute {train.recomputation}",
            *(["compiled"] if train.compile.enabled else []),
            *(["CUDA graphs"] if train.cuda_graphs and self.is_recorded else []),
        ]
        return ", ".join(how)


class _Setting(NamedTuple):
    """Settings of a step that can run, before memory is planned.

    Args:
        config: The config with these settings.
        step_seconds: Predicted duration of a step.
    """

    config: RunConfig
    step_seconds: float


class _OfSize(NamedTuple):
    """Settings of a microbatch size.

    Args:
        settings: From the fastest one to that with the smallest memory.
        of_some_layers: Predicts those that recompute some of the layers: for each way a list like `settings`.
    """

    settings: list[_Setting]
    of_some_layers: Callable[[], list[list[_Setting]]]


def plan_on(device: Device, config: RunConfig, *, world_size: int) -> MemoryPlan:
    """Planned memory of the fullest rank on such devices."""
    return fullest(plan_stages(config, world_size=world_size, device_type=device.type, device_bytes=device.total_bytes or None)).memory


def find_candidates(
    config: RunConfig, *, world_size: int, device: Device, most: int, compiles: bool = True, below_bytes: int | None = None
) -> list[Candidate]:
    """The fastest settings that fit for each microbatch, the fastest prediction first; empty if none fits.

    Args:
        config: Its explicit settings are obeyed.
        world_size: Ranks.
        device: Device of each rank.
        most: Maximum number of candidates.
        compiles: Whether compilation is worth its time.
        below_bytes: Candidates must need less than this, which was too much.
    """

    @cache
    def planned(setting: _Setting) -> Candidate | None:
        """The candidate with its plan; None if it does not fit."""
        candidate = _planned(setting, world_size, device)
        usable = usable_bytes(device.memory_bytes, is_recorded=setting.config.train.cuda_graphs is True)
        too_much = device.is_limited and candidate.planned_bytes > usable
        return None if too_much or (below_bytes is not None and candidate.planned_bytes >= below_bytes) else candidate

    found: list[Candidate] = []
    all_sizes = list(_settings(config, world_size=world_size, device=device, compiles=compiles))
    # Settings that need no search come first: they show how fast the rest must be.
    for of_size in sorted(all_sizes, key=lambda each: planned(each.settings[0]) is None):
        limit = found[-1].step_seconds if len(found) == most else float("inf")
        best = _fastest_that_fits(of_size, planned, limit, may_search=below_bytes is None)
        found = sorted([*found, *([] if best is None else [best])], key=lambda each: each.step_seconds)[:most]
    return found


def _fastest_that_fits(
    of_size: _OfSize, planned: Callable[[_Setting], Candidate | None], limit: float, *, may_search: bool
) -> Candidate | None:
    """The fastest settings of a microbatch size that fit and take less than `limit`; None: there are none.

    Args:
        of_size: The settings.
        planned: Plans settings; None where they do not fit.
        limit: Seconds of a step.
        may_search: Recomputing some of the layers is an option. Where a plan was too small, one that is little smaller would be so, too.
    """
    settings = of_size.settings
    best = _first_that_fits([each for each in settings if each.step_seconds < limit], planned)
    # What recomputes only some layers needs more than what recomputes all of them in the same way.
    if not may_search or planned(settings[0]) is not None or planned(settings[-1]) is None:
        return best
    for family in of_size.of_some_layers():
        fastest = limit if best is None else best.step_seconds
        best = _first_that_fits([each for each in family if each.step_seconds < fastest], planned) or best
    return best


def _first_that_fits(settings: Sequence[_Setting], planned: Callable[[_Setting], Candidate | None]) -> Candidate | None:
    """The first of some settings that fits; each fits more easily than the one before. First and last are cheap to plan."""
    if not settings or (first := planned(settings[0])) is not None:
        return first if settings else None
    if planned(settings[-1]) is None:
        return None
    return planned(settings[bisect_left(settings, True, lo=1, hi=len(settings) - 1, key=lambda each: planned(each) is not None)])


def _planned(setting: _Setting, world_size: int, device: Device) -> Candidate:
    planned = plan_on(device, setting.config, world_size=world_size).total_bytes
    return Candidate(setting.config, planned, setting.step_seconds, records_steps(device.type))


def smallest_candidate(config: RunConfig, *, world_size: int, device: Device) -> Candidate:
    """The settings that need least memory, whether or not they fit."""
    smallest, *_ = _settings(config, world_size=world_size, device=device, compiles=True)
    return _planned(smallest.settings[-1], world_size, device)


def nearest_that_fits(config: RunConfig, facts: Device, *, world_size: int, below_bytes: int) -> Candidate | None:
    """The fastest settings below `below_bytes`: with another microbatch if that is enough, otherwise with more recomputation."""
    if not facts.is_limited:
        return None
    train = config.train.model_copy(update={"micro_batch_size": AUTO})
    for changed in (train, train.model_copy(update={"recompute": AUTO, "recompute_every_n_layers": 1})):
        asked = config.model_copy(update={"train": changed})
        if found := find_candidates(asked, world_size=world_size, device=facts, most=1, below_bytes=below_bytes):
            return found[0]
    return None


def how_to_fit(config: RunConfig, nearest: Candidate) -> str:
    """The overrides that make a config fit that needs too much memory, in words."""
    before = values_of(config, _STEP_KEYS)
    overrides = " ".join(f"{name}={value}" for name, value in nearest.values.items() if before[name] != value)
    otherwise = "" if config.train.tuning == "off" else ", or leave these keys auto"
    return f"{overrides} fits with {format_bytes(nearest.planned_bytes)}{otherwise}"


def remedy_for(config: RunConfig, settled: RunConfig, facts: Device, *, world_size: int, planned_bytes: int) -> str:
    """What to change, in words, where a config with its `auto` settings settled needs `planned_bytes`, which is too much."""
    nearest = nearest_that_fits(config, facts, world_size=world_size, below_bytes=planned_bytes)
    return _general_remedy(settled.zero) if nearest is None else how_to_fit(settled, nearest)


def _general_remedy(zero: ZeroSection) -> str:
    """What makes a model fit for which no microbatch and no recomputation does: what its config does not ask for yet."""
    others = "make the model smaller, or use more ranks with zero.stage=3"
    if zero.engine == "deepspeed" or zero.offload_gradients:
        return others
    wanted = "zero.stage=3 zero.offload_optimizer=cpu zero.offload_params=cpu"
    if zero.offload_params != "none":
        wanted = "zero.offload_gradients=true"
    return f"offload with {wanted} (tools/plan.py suggest finds the fastest layout that fits), {others}"


def nothing_fits(config: RunConfig, smallest: Candidate, facts: Device, *, world_size: int) -> str:
    """A sentence about a device whose memory not even the smallest candidate of a config fits into: what is missing, and what to change."""
    needed = f"{smallest} needs {format_bytes(smallest.planned_bytes)} by plan"
    if not facts.is_limited:
        return f"no other settings are left for {facts.name}: {needed}; make the model, its sequences or its batch smaller."
    remedy = remedy_for(config, smallest.config, facts, world_size=world_size, planned_bytes=smallest.planned_bytes)
    if smallest.planned_bytes <= facts.memory_bytes:  # all of the memory would do, but not the part that a plan may fill
        needed += f", of which {format_bytes(usable_bytes(facts.memory_bytes, is_recorded=smallest.config.train.cuda_graphs is True))} may be planned"
    return f"no settings fit into the {facts.room}: {needed}; {remedy}."


def _settings(config: RunConfig, *, world_size: int, device: Device, compiles: bool) -> Iterator[_OfSize]:
    """Every combination that can run, by microbatch, the smallest first; on a CPU only the fastest one."""
    automatic = automatic_keys(config)
    compiled = config.train.recompute == "budget" or (compiles and device.can_compile and has_kernels(device.type))
    sizes, ways = _microbatch_sizes(config, world_size), _WAYS if "train.recompute" in automatic and device.is_limited else _WAYS[:1]
    if not device.is_limited:
        sizes = [size for size in sizes if size * config.model.sequence_length <= _CPU_TOKENS][-1:] or sizes[:1]
    predicted = partial(_predicted, world_size=world_size, device=device, may_record=records_steps(device.type) and "train.cuda_graphs" in automatic)

    def settled(size: int, way: str, *, budget: float = 0.5, every: int = 1) -> list[RunConfig]:
        """The config with these settings; empty if it cannot run."""
        values = {
            "train.micro_batch_size": size,
            "train.recompute": way,
            "train.activation_memory_budget": budget,
            "train.recompute_every_n_layers": every,
            "train.compile.enabled": compiled,
            "train.cuda_graphs": False,
        }
        each = with_values(config, values)
        return [] if find_problems(each, world_size=world_size) else [each]

    def of_some_layers(size: int) -> list[list[_Setting]]:
        # The smallest of the distances with which as many layers are recomputed spreads them best.
        intervals = {math.ceil(config.model.num_layers / every): every for every in _INTERVALS}.values()
        families = [[each for every in intervals for each in settled(size, way, every=every)] for way in _OF_SOME_LAYERS]
        return [predicted(family) for family in families if family]

    for size in sizes:
        found: list[RunConfig] = []
        has_budgets = False
        for way, budget in ways:
            has_budgets = any(before.train.recompute == "budget" for before in found)
            is_one_slice = way == "slices" and config.model.sequence_length <= config.train.recompute_slice_tokens
            if not (way == "selective" and has_budgets) and not is_one_slice:
                found += settled(size, way, budget=budget)
        if found:
            yield _OfSize(predicted(found), list if has_budgets else partial(of_some_layers, size))


def _predicted(settled: Sequence[RunConfig], world_size: int, device: Device, *, may_record: bool) -> list[_Setting]:
    """Settings with predictions, recorded where allowed and worthwhile; the last one also unrecorded, which needs least memory."""

    def plain(config: RunConfig) -> _Setting:
        return _Setting(config, predict_step(config, world_size, device.name).seconds)

    if not may_record:
        return [plain(each) for each in settled]
    recorded = [recorded_where_it_pays(each, world_size, device.name) for each in settled]
    last = [] if recorded[-1][0] == settled[-1] else [plain(settled[-1])]
    return [*(_Setting(config, prediction.seconds) for config, prediction in recorded), *last]


def _microbatch_sizes(config: RunConfig, world_size: int) -> list[int]:
    """Divisors of a rank's sequences per step, smallest first; a single size if the config sets it."""
    topology = run_topology(config.parallel, world_size=world_size)
    shape = batch_shape(config.train, config.parallel, data_parallel_size=topology.data_parallel_size)
    if "train.micro_batch_size" not in automatic_keys(config) or config.parallel.num_microbatches is not None:
        return [shape.micro_batch_size]
    slice_length = config.model.sequence_length // topology.context_parallel_size
    return divisors(shape.global_batch_size // shape.data_parallel_size, max(MOST_TOKENS // slice_length, 1))


def divisors(number: int, largest: int) -> list[int]:
    """The divisors up to `largest`, smallest first."""
    return [each for each in range(1, min(number, largest) + 1) if number % each == 0]
