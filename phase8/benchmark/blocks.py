"""The Phase 8 block beside the transformer baseline in one run on one machine: at one length, and over several lengths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from phase8.benchmark.data import on_random_tokens
from phase8.benchmark.throughput import Measurement, measure_alone
from phase8.config.auto import without_auto
from phase8.config.load import with_settings
from phase8.config.schema import RunConfig, TrainSection

BLOCKS = ("phase8", "transformer")
# What the transformer alone can have is left out of the other one.
_SETTINGS: Mapping[str, Mapping[str, object]] = {
    "phase8": {"model.block": "phase8", "model.num_kv_heads": None, "model.rope_scaling": None},
    "transformer": {"model.block": "transformer"},
}
# Budgets that fit where keeping all activations does not, measured on an H100 with 1.3B parameters from 65,536 tokens on.
_BUDGETS = (0.35, 0.1)
_Settings = dict[str, object]


@dataclass(frozen=True)
class LengthSpeed:
    """Both blocks at one length.

    Args:
        sequence_length: T.
        batch_size: Sequences of a step, one microbatch.
        blocks: Measurement of each block, by its name.
    """

    sequence_length: int
    batch_size: int
    blocks: Mapping[str, Measurement]


def compare_blocks(
    config: RunConfig, *, device: torch.device, num_steps: int, profile_directory: Path | None = None
) -> Iterator[tuple[str, Measurement]]:
    """Trains the two blocks one after the other, each when its result is requested; all other keys are the same.

    Args:
        config: What to train.
        device: Device to train on.
        num_steps: Measured steps.
        profile_directory: Directory for the kernel tables of both blocks; None: no profile.
    """
    with on_random_tokens(config) as config:
        for block in BLOCKS:
            profile_to = None if profile_directory is None else profile_directory / f"{block}.txt"
            changed = with_settings(config, _SETTINGS[block])
            yield block, measure_alone(changed, device=device, num_steps=num_steps, profile_to=profile_to)


def sweep_lengths(
    config: RunConfig, lengths: Sequence[int], *, tokens_per_step: int, device: torch.device, num_steps: int
) -> Iterator[LengthSpeed]:
    """Trains both blocks at each length, shortest first, each length when its result is requested.

    A step is one microbatch of `tokens_per_step` tokens, or one sequence if that is longer. When memory runs out, more is recomputed:
    from `train.recompute` on to `selective` (with compiled blocks: to smaller budgets) and to `full`. A longer sequence starts with the
    setting with which the one before it ended.

    Args:
        config: What to train at each length.
        lengths: T of each row.
        tokens_per_step: Tokens that a step holds at least.
        device: Device to train on.
        num_steps: Measured steps of each length and block.
    """
    config = without_auto(config)
    ways = dict.fromkeys(BLOCKS, _ways_to_recompute(config.train))
    for length in sorted(lengths):
        batch_size = max(tokens_per_step // length, 1)
        shape = {
            "model.sequence_length": length,
            "train.global_batch_size": batch_size,
            "train.micro_batch_size": batch_size,
            "parallel.num_microbatches": None,
        }
        blocks = {}
        with on_random_tokens(with_settings(config, shape)) as shaped:
            for block in BLOCKS:
                of_block = with_settings(shaped, _SETTINGS[block])
                blocks[block], ways[block] = _with_enough_recomputed(of_block, ways[block], device=device, num_steps=num_steps)
        yield LengthSpeed(length, batch_size, blocks)


def speed_ratio(blocks: Mapping[str, Measurement]) -> float | None:
    """Speed of the Phase 8 block over the transformer's; None if one of them was not measured."""
    ours, theirs = (blocks[block].throughput for block in BLOCKS)
    return None if ours is None or theirs is None else ours.tokens_per_second / theirs.tokens_per_second


def _ways_to_recompute(train: TrainSection) -> list[_Settings]:
    """The recomputation that the config sets, followed by those that recompute more."""
    budgets: list[_Settings] = [{"train.recompute": "budget", "train.activation_memory_budget": share} for share in _BUDGETS]
    between = budgets if train.compile.enabled else [{"train.recompute": "selective"}]
    more = [{"train.recompute": "none"}, *between, {"train.recompute": "full"}]
    position = {"none": 1, "selective": len(more) - 1, "full": len(more)}
    begin = position[train.recompute] if train.recompute != "budget" else 1 + sum(share >= train.activation_memory_budget for share in _BUDGETS)
    return [{}, *({**way, "train.recompute_every_n_layers": 1} for way in more[begin:])]


def _with_enough_recomputed(
    config: RunConfig, ways: Sequence[_Settings], *, device: torch.device, num_steps: int
) -> tuple[Measurement, Sequence[_Settings]]:
    """Measures with the first of these recomputation settings that fits; also returns the settings from that one on."""
    while True:
        measurement = measure_alone(with_settings(config, ways[0]), device=device, num_steps=num_steps)
        if measurement.throughput is not None or len(ways) == 1:
            return measurement, ways
        ways = ways[1:]
