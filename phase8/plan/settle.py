"""The settings of a config before it runs: explicit ones as they are, `auto` ones as a run would choose them by plan for the GPU of this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from phase8 import accelerator
from phase8.config.auto import automatic_keys, without_auto
from phase8.config.schema import RunConfig
from phase8.formatting import format_bytes
from phase8.observe.devices import find_gpu
from phase8.plan.candidates import Device, find_candidates, nothing_fits, smallest_candidate
from phase8.plan.memory import free_bytes
from phase8.plan.prediction import ASSUMED_GPU, assumed_gpu
from phase8.plan.rank_memory import StageMemory


@dataclass(frozen=True)
class Settled:
    """A config in which nothing is `auto`.

    Args:
        config: The config with its settings.
        device: The GPU for which they were chosen.
        chosen: The chosen settings in words; None: `train` left none to choose.
        too_large: A sentence about settings that were to be chosen of which none fit into the GPU; None: some do, or there were none to choose.
    """

    config: RunConfig
    device: Device
    chosen: str | None = None
    too_large: str | None = None


def settle(config: RunConfig, *, world_size: int) -> Settled:
    """The config with the settings that would be chosen by plan; where nothing fits, with those that need least memory.

    Args:
        config: A config that can run on `world_size` ranks. Its explicit settings are obeyed, whatever they need.
        world_size: Number of ranks.
    """
    device = planned_gpu(config)
    if not any(name.startswith("train.") for name in automatic_keys(config)) or config.train.tuning == "off":
        return Settled(without_auto(config), device)
    found = find_candidates(config, world_size=world_size, device=device, most=1)
    if found:
        return Settled(without_auto(found[0].config), device, f"{found[0]}, by plan")
    smallest = smallest_candidate(config, world_size=world_size, device=device)
    chosen = f"nothing fits into {format_bytes(device.memory_bytes)}, by plan"
    return Settled(without_auto(smallest.config), device, chosen, nothing_fits(config, smallest, device, world_size=world_size))


def lacking_room(planned: Sequence[StageMemory], device: Device) -> str | None:
    """The stages that need more memory than a GPU has, in words without a full stop; None: there are none."""
    needed = {stage.stage: stage.memory.total_bytes for stage in planned if stage.memory.total_bytes > device.memory_bytes}
    if not needed:
        return None
    stages = "pipeline stage {} needs" if len(needed) == 1 else "pipeline stages {} need up to"
    return f"{stages.format(', '.join(map(str, needed)))} {format_bytes(max(needed.values()))} by plan, more than the {device.room}"


def planned_gpu(config: RunConfig) -> Device:
    """This machine's GPU, or an H100 if it has no known GPU; with the memory that `train.device_memory_gib` leaves of it."""
    name = own_gpu() or ASSUMED_GPU
    total = int((find_gpu(name) or assumed_gpu()).memory_gib * 2**30)
    return Device(accelerator.GPU, name, memory_bytes=free_bytes(total), total_bytes=total).limited_to(config.train.device_memory_gib)


def own_gpu() -> str | None:
    """The name of this machine's GPU, or None."""
    return accelerator.name_of(accelerator.GPU) if accelerator.present() == accelerator.GPU else None
