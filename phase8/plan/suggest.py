"""Suggests layouts of a config for a number of GPUs: which of them fit, and how fast each is predicted to train.

Predicting is cheap and planning memory is not. So all layouts are predicted, then planned from the fastest on until enough of them fit. The
largest microbatch that fits is found by bisection; it is skipped if the smallest one with full recomputation does not fit. Where nothing fits,
the same is done with more of the config in host memory.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from phase8.accelerator import GPU
from phase8.config.batch import batch_shape, run_topology
from phase8.config.dotted import replaced, values_of
from phase8.config.schema import RunConfig
from phase8.config.validate import find_problems
from phase8.errors import ConfigError
from phase8.formatting import format_bytes
from phase8.observe.devices import Gpu
from phase8.plan.candidates import Device
from phase8.plan.divided_batch import about_batch, nearest_batch
from phase8.plan.layouts import PLACES, RECOMPUTATIONS, layout_in_words, layouts, microbatches, offloaded, settings_of
from phase8.plan.memory import free_bytes, usable_bytes
from phase8.plan.prediction import StepPrediction, predict_step, recorded_where_it_pays
from phase8.plan.rank_memory import fullest
from phase8.plan.whole_config import plan_stages

# NVLink lets GPUs use each other's memory; PCIe is slower.
PEER_LINK = 100
# Predictions nearer to each other than this are alike.
NO_SLOWER = 0.999


@dataclass(frozen=True)
class Suggestion:
    """A layout that fits.

    Args:
        config: The config with the layout's settings.
        world_size: Number of GPUs.
        prediction: Predicted speed.
        planned_bytes: Memory of the fullest rank.
        host_bytes: Host memory of the rank that needs most.
    """

    config: RunConfig
    world_size: int
    prediction: StepPrediction
    planned_bytes: int
    host_bytes: int = 0

    def changes(self, before: RunConfig) -> dict[str, Any]:
        """Settings, by dotted name, that differ from the original config."""
        own, other = settings_of(self.config), settings_of(before)
        return {name: value for name, value in own.items() if value != other[name]}

    @property
    def layout(self) -> str:
        """The layout in words: `tensor 2 x pipeline 4 (interleaved, 2 chunks) x data 8, ZeRO 1`."""
        return layout_in_words(self.config, self.world_size)


def suggest(config: RunConfig, *, world_size: int, gpu: Gpu, memory_bytes: int, most: int = 10) -> list[Suggestion]:
    """The fastest layouts that fit, the best first; only some for each division into tensor, pipeline and data ranks.

    Where no layout can divide the batch among its data-parallel ranks, the batch is the nearest that one can divide. Where none fits, optimizer,
    parameters, sums of gradients, and inputs of layers of long sequences go to host memory, as far as the config says nothing about them.

    Args:
        config: Model, batch and precision; layout, microbatch and recomputation are replaced.
        world_size: Number of GPUs.
        gpu: Kind of GPU.
        memory_bytes: Memory of each GPU, of which `train.device_memory_gib` may leave a part.
        most: Maximum number of suggestions.

    Raises:
        ConfigError: No layout can run, or none fits.
    """
    config = _with_batch(config, world_size)
    own = _Search([config], world_size, gpu, memory_bytes)
    if not own.can_run and (batch := nearest_batch(own.layouts(), world_size=world_size)) is not None:
        config = replaced(config, {"train.global_batch_size": batch})
    searches = []
    for configs in ([config], offloaded(config)):
        if configs:
            searches.append(_Search(configs, world_size, gpu, memory_bytes))
            if found := searches[-1].best(most):
                return found
    raise ConfigError(min(searches, key=lambda each: each.smallest_bytes).nothing_fits())


def price_of_offloading(best: Suggestion, before: RunConfig, gpu: Gpu) -> str | None:
    """A sentence about a suggestion that puts into host memory what the original config does not; None: it puts nothing there.

    Args:
        best: The suggestion.
        before: The original config.
        gpu: Kind of GPU.
    """
    own = values_of(before, PLACES)
    if values_of(best.config, PLACES) == own:
        return None
    whole = predict_step(replaced(best.config, own), best.world_size, gpu)
    fact, speed = "nothing fits with everything on the GPUs, so host memory holds a part", best.prediction.tokens_per_second
    if speed > NO_SLOWER * whole.tokens_per_second:
        return f"{fact}; what travels does so beside computation, so the first is predicted to be no slower"
    return f"{fact}, and steps are slower: with room on the GPUs the first would make {whole.tokens_per_second:,.0f} tok/s instead of {speed:,.0f}"


def layouts_left_out(best: Suggestion, before: RunConfig, gpu: Gpu) -> str | None:
    """A sentence about layouts whose data-parallel ranks cannot divide the original config's batch; None: nothing was left out for that.

    Args:
        best: A suggestion.
        before: The original config.
        gpu: Kind of GPU.
    """
    config = _with_batch(before, best.world_size)
    assert config.train.global_batch_size is not None
    all_layouts = layouts(config, world_size=best.world_size, has_peer_memory=gpu.link >= PEER_LINK)
    return about_batch(best.config, config.train.global_batch_size, all_layouts, world_size=best.world_size)


def _with_batch(config: RunConfig, world_size: int) -> RunConfig:
    """The config with the batch that it has on so many ranks, where it only says how ranks make it up."""
    if config.train.global_batch_size is not None:
        return config
    topology = run_topology(config.parallel, world_size=world_size)
    shape = batch_shape(config.train, config.parallel, data_parallel_size=topology.data_parallel_size)
    return replaced(config, {"train.global_batch_size": shape.global_batch_size})


@dataclass(frozen=True)
class _Candidate:
    """A layout with its predicted speed, before memory is planned.

    Args:
        config: The config with the layout's settings.
        prediction: Predicted speed.
    """

    config: RunConfig
    prediction: StepPrediction

    @property
    def degrees(self) -> tuple[object, ...]:
        """The division of ranks, and what is offloaded: candidates that differ here are different layouts to a reader."""
        parallel = self.config.parallel
        ranks = parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.pipeline_chunks, parallel.expert_parallel_size
        return *ranks, *values_of(self.config, PLACES).values()

    @property
    def family(self) -> tuple[object, ...]:
        """Key shared by layouts that differ only in microbatch and recomputation; recording is part of it because it changes usable memory."""
        return (*self.degrees, self.config.zero.stage, self.config.zero.shard_size, self.config.train.cuda_graphs)

    @property
    def size(self) -> int:
        """Sequences per microbatch."""
        assert self.config.train.micro_batch_size is not None
        return self.config.train.micro_batch_size


class _Search:
    """The search for the fastest candidates that fit.

    Args:
        configs: The config to lay out, or several forms of it of which each may be best.
        world_size: Number of GPUs.
        gpu: Kind of GPU.
        memory_bytes: Memory of each GPU, of which `train.device_memory_gib` may leave a part.
    """

    def __init__(self, configs: Sequence[RunConfig], world_size: int, gpu: Gpu, memory_bytes: int):
        self._configs, self._config, self._world_size, self._gpu = configs, configs[0], world_size, gpu
        whole = Device(GPU, gpu.name, memory_bytes=free_bytes(memory_bytes), total_bytes=memory_bytes)
        self._device = whole.limited_to(self._config.train.device_memory_gib)
        self._planned: dict[RunConfig, tuple[int, int]] = {}
        self._smallest: dict[tuple[object, ...], _Candidate] = {}
        self._largest_sizes: dict[tuple[object, ...], int] = {}

    def best(self, most: int) -> list[Suggestion]:
        """The fastest candidates that fit; empty if none does."""
        found: list[Suggestion] = []
        shown: dict[tuple[object, ...], int] = {}
        most_of_a_layout = max(2, most // len({each.degrees for each in self._candidates}))
        for each in self._candidates:
            if len(found) == most:
                break
            if shown.get(each.degrees, 0) == most_of_a_layout or not self._fits(each):
                continue
            shown[each.degrees] = shown.get(each.degrees, 0) + 1
            found.append(Suggestion(each.config, self._world_size, each.prediction, *self._plan(each)))
        return found

    @cached_property
    def _candidates(self) -> list[_Candidate]:
        """All candidates that can run, the fastest first; of equally fast ones, the lowest ZeRO stage first."""
        found = list(self._predicted())
        if not found:
            raise ConfigError(self._problems())
        return sorted(found, key=lambda each: (-each.prediction.tokens_per_second, each.config.zero.stage))

    def _predicted(self) -> Iterator[_Candidate]:
        for settled in self._settled():
            best = _Candidate(*recorded_where_it_pays(settled, self._world_size, self._gpu))
            yield best
            if settled.train.recompute == "full" and best.config.train.cuda_graphs:  # it needs less memory
                yield _Candidate(settled, predict_step(settled, self._world_size, self._gpu))

    @property
    def can_run(self) -> bool:
        """Whether there is a candidate."""
        return any(True for _ in self._settled())

    def _settled(self) -> Iterator[RunConfig]:
        for layout in self.layouts():
            yield from microbatches(layout, world_size=self._world_size)

    def layouts(self) -> Iterator[RunConfig]:
        """Every layout, before microbatch and recomputation are chosen."""
        for config in self._configs:
            yield from layouts(config, world_size=self._world_size, has_peer_memory=self._gpu.link >= PEER_LINK)

    def _plan(self, candidate: _Candidate) -> tuple[int, int]:
        """Planned memory of the fullest rank, and the most host memory of a rank."""
        if candidate.config not in self._planned:
            stages = plan_stages(candidate.config, world_size=self._world_size, device_type=GPU, device_bytes=self._device.total_bytes)
            self._planned[candidate.config] = fullest(stages).memory.total_bytes, max(each.memory.host_bytes for each in stages)
        return self._planned[candidate.config]

    def _usable(self, candidate: _Candidate) -> int:
        """Bytes that the plan may fill."""
        return usable_bytes(self._device.memory_bytes, is_recorded=candidate.config.train.cuda_graphs is True)

    def _has_room(self, candidate: _Candidate) -> bool:
        return self._plan(candidate)[0] <= self._usable(candidate)

    def _fits(self, candidate: _Candidate) -> bool:
        key = (*candidate.family, candidate.config.train.recompute)
        if key not in self._largest_sizes:
            self._largest_sizes[key] = self._largest_size(candidate)
        return candidate.size <= self._largest_sizes[key]

    def _largest_size(self, candidate: _Candidate) -> int:
        """The largest microbatch that fits with the candidate's other settings; 0 if none fits."""
        family = [each for each in self._candidates if each.family == candidate.family]
        if candidate.family not in self._smallest:
            self._smallest[candidate.family] = min(family, key=lambda each: (each.size, RECOMPUTATIONS.index(each.config.train.recompute)))
        if not self._has_room(self._smallest[candidate.family]):
            return 0
        alike = sorted((each for each in family if each.config.train.recompute == candidate.config.train.recompute), key=lambda each: each.size)
        num_fitting = bisect_left(alike, True, key=lambda each: not self._has_room(each))
        return alike[num_fitting - 1].size if num_fitting else 0

    @property
    def smallest_bytes(self) -> int:
        """Planned memory of the smallest candidate, once a search has found nothing."""
        return self._plan(self._smallest_of_all)[0]

    @cached_property
    def _smallest_of_all(self) -> _Candidate:
        return min(self._smallest.values(), key=lambda each: (self._plan(each)[0], -self._usable(each)))

    def nothing_fits(self) -> str:
        """A sentence about a search that has found nothing: what the smallest candidate lacks, and what to change."""
        smallest = self._smallest_of_all
        layout = layout_in_words(smallest.config, self._world_size)
        how = f"train.micro_batch_size {smallest.size} and train.recompute {smallest.config.train.recompute}"
        gpus = "one GPU" if self._world_size == 1 else f"{self._world_size} GPUs"
        return (
            f"no layout of {self._config.run.name} fits on {gpus} of {format_bytes(self._device.total_bytes)}: the smallest planned, "
            f"{layout} with {how}, takes {format_bytes(self._plan(smallest)[0])} of {format_bytes(self._usable(smallest))} that can be used; "
            "take more or larger GPUs, or a smaller model."
        )

    def _problems(self) -> list[str]:
        """What is wrong with a config that has no candidate: its own problems, or else those of the layout that has fewest."""
        found = find_problems(self._config, world_size=self._world_size)
        settings = {"train.micro_batch_size": 1, "train.recompute": "full", "train.recompute_every_n_layers": 1, "train.cuda_graphs": False}
        each = [find_problems(replaced(layout, settings), world_size=self._world_size) for layout in self.layouts()]
        return found or min((problems for problems in each if problems), key=len)
