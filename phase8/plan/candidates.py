"""Values for the settings that are `auto`: those that fit into the memory of a device by plan, the fastest first.

The order is a prediction from ratios: how much more work each way to recompute is, how much of a device a microbatch fills, and whether
launches from Python take longer than what they launch. It only has to put the best among the first few, which are then measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from phase8.config.auto import AUTO, automatic_keys, with_values
from phase8.config.batch import BatchShape, batch_shape, run_topology
from phase8.config.dotted import values_of
from phase8.config.schema import RunConfig
from phase8.config.validate import find_problems
from phase8.model.flops import training_flops_per_token
from phase8.plan.rank_memory import fullest
from phase8.plan.whole_config import plan_stages

# Time of a step over that of one which recomputes nothing, of compiled blocks; measured on an H100 (docs/performance.md).
_EXTRA_WORK = {"none": 1.0, "budget 0.5": 1.06, "budget 0.25": 1.10, "selective": 1.10, "full": 1.22}
_EAGER = 1.45  # the same without torch.compile
# A microbatch of so many tokens, over the width of the model, reaches half of what a device can do; beyond the largest nothing is gained.
_HALF_SPEED_TOKENS_TIMES_WIDTH = 2.4e6
MOST_TOKENS = 131_072
_CPU_TOKENS = 4096  # at once; the caches of a CPU hold no more
# Launches of a layer, forward and backward of a microbatch, from Python; what a GPU does of its peak. A step is recorded where launches
# take more than a share of what is launched: a recording needs memory of its own.
_LAUNCH_SECONDS = 7e-3
_RECORDED_FROM = 0.7
_SUSTAINED = 0.45
_ASSUMED_PEAK = 3e14
# Planned memory is within 2 % of what is measured; the allocator cannot use its last gaps.
_USABLE = 0.97
_RESERVE_BYTES = 256 << 20
_STEP_KEYS = (
    "train.micro_batch_size",
    "train.recompute",
    "train.activation_memory_budget",
    "train.recompute_every_n_layers",
    "train.compile.enabled",
    "train.cuda_graphs",
)
# So many tokens in a microbatch without recomputation, and nothing that saves memory can be faster.
_ENOUGH_TOKENS = 32_768


@dataclass(frozen=True)
class Device:
    """What a rank computes on.

    Args:
        type: `cuda` or `cpu`.
        name: As its vendor calls it.
        memory_bytes: That the run may take; of a CPU not looked at.
        total_bytes: That it has.
        peak_flops: FLOP/s that count as MFU 1; None: unknown.
        can_compile: torch.compile finds what it needs.
    """

    type: str
    name: str
    memory_bytes: int
    total_bytes: int
    peak_flops: float | None = None
    can_compile: bool = True


@dataclass(frozen=True)
class Candidate:
    """Values for the settings of a step.

    Args:
        config: With these values; settings of the host may still be `auto`.
        planned_bytes: Memory of the fullest rank.
        relative_seconds: Predicted duration of a step; only ratios mean something.
    """

    config: RunConfig
    planned_bytes: int
    relative_seconds: float

    @property
    def values(self) -> dict[str, Any]:
        """By dotted name."""
        return values_of(self.config, _STEP_KEYS)

    def __str__(self) -> str:
        """In words."""
        train = self.config.train
        how = [
            f"micro batch {train.micro_batch_size}",
            "nothing recomputed" if train.recompute == "none" else f"recompute {train.recomputation}",
            *(["compiled"] if train.compile.enabled else []),
            *(["CUDA graphs"] if train.cuda_graphs else []),
        ]
        return ", ".join(how)


def usable_bytes(device: Device) -> int:
    """Memory that a plan may fill."""
    return int(_USABLE * device.memory_bytes) - _RESERVE_BYTES


def find_candidates(config: RunConfig, *, world_size: int, device: Device, most: int, compiles: bool = True) -> list[Candidate]:
    """The settings that fit, by predicted speed; empty where none does.

    Args:
        config: Its explicit settings are obeyed.
        world_size: Ranks.
        device: Of each rank.
        most: How many are looked for.
        compiles: Whether compilation is worth its time.
    """
    found: list[Candidate] = []
    settings = _settings(config, world_size=world_size, device=device, compiles=compiles)
    enough = min(_ENOUGH_TOKENS, max((_microbatch_tokens(each, world_size) for each in settings), default=0))
    keeps_all = False
    for settled in sorted(settings, key=lambda each: _seconds(each, world_size, device)):
        if len(found) == most:
            break
        if keeps_all and settled.train.recompute != "none":
            continue
        candidate = _planned(settled, world_size, device)
        if device.type == "cuda" and candidate.planned_bytes > usable_bytes(device):
            continue
        keeps_all |= settled.train.recompute == "none" and _microbatch_tokens(settled, world_size) >= enough
        found.append(candidate)
    return found


def _planned(settled: RunConfig, world_size: int, device: Device) -> Candidate:
    stages = plan_stages(settled, world_size=world_size, device_type=device.type, device_bytes=device.total_bytes)
    return Candidate(settled, fullest(stages).memory.total_bytes, _seconds(settled, world_size, device))


def smallest_candidate(config: RunConfig, *, world_size: int, device: Device) -> Candidate:
    """The settings that need least memory, whether or not they fit."""
    settings = _settings(config, world_size=world_size, device=device, compiles=True)
    fewest = min(_microbatch_tokens(each, world_size) for each in settings)
    smallest = [_planned(each, world_size, device) for each in settings if _microbatch_tokens(each, world_size) == fewest]
    return min(smallest, key=lambda each: each.planned_bytes)


def nearest_that_fits(config: RunConfig, facts: Device, *, world_size: int, below_bytes: int) -> Candidate | None:
    """The fastest settings that need less than `below_bytes` and fit: with another microbatch if that is enough, else with more recomputed."""
    if facts.type != "cuda":
        return None
    train = config.train.model_copy(update={"micro_batch_size": AUTO})
    for changed in (train, train.model_copy(update={"recompute": AUTO, "recompute_every_n_layers": 1})):
        asked = config.model_copy(update={"train": changed})
        smaller = replace(facts, memory_bytes=min(facts.memory_bytes, below_bytes))
        if found := find_candidates(asked, world_size=world_size, device=smaller, most=1):
            return found[0]
    return None


def how_to_fit(config: RunConfig, nearest: Candidate) -> str:
    """What a user may do instead of training a config that needs too much: the overrides that lead to a candidate."""
    before = values_of(config, _STEP_KEYS)
    overrides = " ".join(f"{name}={value}" for name, value in nearest.values.items() if before[name] != value)
    return f"{overrides} fits with {nearest.planned_bytes / 2**30:.1f} GiB, or leave these keys auto"


def _settings(config: RunConfig, *, world_size: int, device: Device, compiles: bool) -> list[RunConfig]:
    """Every combination that can run; on a CPU the one that is fastest there."""
    automatic = automatic_keys(config)
    sizes, ways = _microbatch_sizes(config, world_size), [("none", 0.5)]
    compiled = config.train.recompute == "budget"
    if device.type == "cuda":
        ways += [("budget", 0.5), ("budget", 0.25), ("selective", 0.5), ("full", 0.5)]
        compiled |= compiles and device.can_compile
    else:
        sizes = [size for size in sizes if size * config.model.sequence_length <= _CPU_TOKENS][-1:] or sizes[:1]
    result = []
    for size in sizes:
        for way, budget in ways if "train.recompute" in automatic else ways[:1]:
            values = {
                "train.micro_batch_size": size,
                "train.recompute": way,
                "train.activation_memory_budget": budget,
                "train.recompute_every_n_layers": 1,
                "train.compile.enabled": compiled,
                "train.cuda_graphs": False,
            }
            settled = with_values(config, values)
            if not find_problems(settled, world_size=world_size):
                result.append(_recorded_where_it_pays(settled, config, world_size, device))
    return list(dict.fromkeys(result))


def _recorded_where_it_pays(settled: RunConfig, config: RunConfig, world_size: int, device: Device) -> RunConfig:
    """The same with its step recorded as a CUDA graph, where that is free to choose, can be done, and launches would take long otherwise."""
    if device.type != "cuda" or "train.cuda_graphs" not in automatic_keys(config):
        return settled
    computing, launching = _microbatch_seconds(settled, world_size, device)
    recorded = with_values(config, values_of(settled, _STEP_KEYS) | {"train.cuda_graphs": True})
    return recorded if launching > _RECORDED_FROM * computing and not find_problems(recorded, world_size=world_size) else settled


def _microbatch_sizes(config: RunConfig, world_size: int) -> list[int]:
    """Divisors of the sequences of a rank, smallest first; one where the config says it."""
    shape = _shape(config, world_size)
    if "train.micro_batch_size" not in automatic_keys(config) or config.parallel.num_microbatches is not None:
        return [shape.micro_batch_size]
    return divisors(shape.global_batch_size // shape.data_parallel_size, max(MOST_TOKENS // config.model.sequence_length, 1))


def divisors(number: int, largest: int) -> list[int]:
    """Those that are at most `largest`, smallest first."""
    return [each for each in range(1, min(number, largest) + 1) if number % each == 0]


def _microbatch_tokens(config: RunConfig, world_size: int) -> int:
    return _shape(config, world_size).micro_batch_size * config.model.sequence_length


def _shape(config: RunConfig, world_size: int) -> BatchShape:
    return batch_shape(config.train, config.parallel, data_parallel_size=run_topology(config.parallel, world_size=world_size).data_parallel_size)


def _seconds(config: RunConfig, world_size: int, device: Device) -> float:
    """Predicted seconds of a step, of which only ratios mean something."""
    bubble = config.parallel.pipeline_parallel_size - 1
    return (_shape(config, world_size).num_microbatches + bubble) * max(_microbatch_seconds(config, world_size, device))


def _microbatch_seconds(config: RunConfig, world_size: int, device: Device) -> tuple[float, float]:
    """What the device computes for in a microbatch, and what its launches take."""
    parallel, train = config.parallel, config.train
    way = f"budget {train.activation_memory_budget:g}" if train.recompute == "budget" else train.recompute
    work = _EXTRA_WORK.get(way, _EXTRA_WORK["budget 0.5"]) * (1 if train.compile.enabled else _EAGER)
    tokens = _microbatch_tokens(config, world_size) + _HALF_SPEED_TOKENS_TIMES_WIDTH / config.model.d_model
    flops = training_flops_per_token(config.model) * tokens / (parallel.tensor_parallel_size * parallel.pipeline_parallel_size)
    computing = work * flops / (_SUSTAINED * (device.peak_flops or _ASSUMED_PEAK))
    launching = 0.0 if train.cuda_graphs or device.type != "cuda" else _LAUNCH_SECONDS * config.model.num_layers / parallel.pipeline_parallel_size
    return computing, launching


def predicted_run_seconds(config: RunConfig, *, world_size: int, device: Device) -> float:
    """What the whole run would take at the predicted speed."""
    return config.train.num_steps * _seconds(config, world_size, device)
