"""Errors for too little memory: what the run needs by plan, what is available, and the nearest setting that fits."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from phase8 import accelerator
from phase8.config.dotted import replaced, value_of
from phase8.config.schema import RunConfig
from phase8.config.validate import find_problems
from phase8.errors import OutOfMemoryError
from phase8.formatting import format_bytes
from phase8.memory_errors import told_by
from phase8.plan.candidates import Device, how_to_fit, nearest_that_fits, plan_on
from phase8.plan.memory import MemoryPlan
from phase8.processes.host_memory import available_bytes
from phase8.train.restart import resume_own_run
from phase8.train.run_directory import RunDirectory
from phase8.train.tuning import COPIES, Chosen

_SHORT_MOMENTS: dict[str, Any] = {"optim.state_dtype": "fp8"}
_ON_DISK: dict[str, Any] = {
    "zero.engine": "deepspeed", "zero.offload_optimizer": "nvme", "zero.offload_params": "nvme", "zero.offload_gradients": False,
    "zero.nvme_path": "DIRECTORY", "optim.state_dtype": "fp32",
}  # fmt: skip
_NOTHING_OFFLOADED: dict[str, Any] = {"zero.offload_optimizer": "none", "zero.offload_params": "none", "zero.offload_gradients": False}


def require_host_memory(config: RunConfig, facts: Device, *, world_size: int, ranks_of_host: int) -> None:
    """Refuses a run that keeps more in host memory than there is, before it takes any: the system would kill it, or others, without a word.

    Args:
        config: Config without automatic settings.
        facts: The device before the run used any of it.
        world_size: Number of ranks.
        ranks_of_host: Number of ranks on this host.

    Raises:
        OutOfMemoryError: The plan exceeds what is available.
    """
    available = available_bytes()
    planned = ranks_of_host * _state_on_host(plan_on(facts, config, world_size=world_size), facts)
    if available is None or planned <= available:
        return
    ranks = f" of the {ranks_of_host} ranks here" if ranks_of_host > 1 else ""
    what = "copies and what is offloaded" if accelerator.is_accelerator(facts.type) else "weights, gradients and optimizer"
    remedy = _how_to_need_less_of_the_host(config, facts, world_size=world_size, kind="", most_bytes=available // ranks_of_host)
    raise OutOfMemoryError(
        f"the host has too little memory: {format_bytes(planned)}{ranks} are planned for {what}, and {format_bytes(available)} are available, "
        f"{format_bytes(planned - available)} too little; {remedy}.",
        None,
        has_begun=False,
    )


def _state_on_host(plan: MemoryPlan, facts: Device) -> int:
    """Bytes that a rank keeps in host memory.

    A model on the host itself needs at least its weights, their gradients and the optimizer's state; what a CPU keeps for backward is not planned so
    well that a run should be refused for it.
    """
    computes = not accelerator.is_accelerator(facts.type)
    return plan.host_bytes + (plan.weights_bytes + plan.gradients_bytes + plan.optimizer_bytes if computes else 0)


def memory_errors(config: RunConfig, chosen: Chosen, facts: Device, *, world_size: int, has_begun: bool) -> AbstractContextManager[None]:
    """A context manager that turns running out of memory into one sentence.

    Args:
        config: Config without automatic settings.
        chosen: The settings that were chosen automatically.
        facts: The device before the run used any of it.
        world_size: Number of ranks.
        has_begun: Whether the run directory belongs to this run already.

    Raises:
        OutOfMemoryError: In place of what torch or Python raises; with the automatic values, if others can be chosen in their place.
    """
    values = (chosen.values or None) if chosen.can_change else None

    def tell(lacking: accelerator.Memory) -> OutOfMemoryError:
        if lacking == "device":
            sentence = _device_sentence(config, facts, world_size)
        else:
            sentence = _host_sentence(config, facts, world_size, "page-locked " if lacking == "page-locked" else "")
        return OutOfMemoryError(sentence, values, has_begun=has_begun, of_host=lacking != "device")

    return told_by(tell)


def retry_with_less_memory(
    attempt: Callable[[list[dict[str, object]], str], None],
    directory: RunDirectory,
    *,
    resume: str,
    is_alone: bool,
    say: Callable[[str], None],
) -> None:
    """Trains; when automatically chosen settings run out of memory, trains again with the next best ones.

    Args:
        attempt: Builds and trains the run, given the values that ran out of memory before, and what to resume.
        directory: Directory of the run.
        resume: What the first attempt resumes; later attempts continue from what the run has saved meanwhile.
        is_alone: Whether there is one process; one of several ranks ends with the rest.
        say: Shows a line of text.

    Raises:
        OutOfMemoryError: The settings were explicit, or nothing else fits.
    """
    refused: list[dict[str, object]] = []
    while True:
        try:
            return attempt(refused, resume)
        except OutOfMemoryError as error:
            given_up = _to_give_up(error, refused)
            if given_up is None or not is_alone:
                raise
            refused.append(given_up)
            say(f"{error} Trying the next best settings.")
            if error.has_begun:
                resume = resume_own_run(resume, directory)
        gc.collect()
        accelerator.give_back_memory(accelerator.present())


def _to_give_up(error: OutOfMemoryError, refused: Sequence[Mapping[str, object]]) -> dict[str, object] | None:
    """The values to do without: copies for checkpoints where the host has no room for them, or else all that were chosen together; None: none."""
    values = dict(error.values or {})
    has_copies = error.of_host and COPIES.items() <= values.items()
    return next((each for each in ([COPIES] if has_copies else []) + [values] if each and each not in refused), None)


def _device_sentence(config: RunConfig, facts: Device, world_size: int) -> str:
    planned = plan_on(facts, config, world_size=world_size).total_bytes
    nearest = nearest_that_fits(config, facts, world_size=world_size, below_bytes=planned)
    remedy = "make the model smaller, or use more ranks with zero.stage=3"
    if nearest is not None:
        remedy = how_to_fit(config, nearest)
    room = f"{format_bytes(facts.memory_bytes)} of {format_bytes(facts.total_bytes)} were free when it started"
    if facts.limit_gib is not None:
        room = f"train.device_memory_gib {facts.limit_gib:g} left it {format_bytes(facts.memory_bytes)}"
    return f"out of memory on {facts.name}: the run needs {format_bytes(planned)} by plan, and {room}; {remedy}."


def _host_sentence(config: RunConfig, facts: Device, world_size: int, kind: str) -> str:
    plan = plan_on(facts, config, world_size=world_size)
    remedy = _how_to_need_less_of_the_host(config, facts, world_size=world_size, kind=kind, most_bytes=_state_on_host(plan, facts) - 1)
    planned, what = plan.host_bytes, "copies and what is offloaded"
    if not accelerator.is_accelerator(facts.type):
        planned, what = plan.host_bytes + plan.total_bytes, "the run"
    return f"the host has too little {kind}memory; {format_bytes(planned)} a rank are planned for {what}: {remedy}."


def _how_to_need_less_of_the_host(config: RunConfig, facts: Device, *, world_size: int, kind: str, most_bytes: int) -> str:
    """What to do; of changes of the optimizer's state and its place those alone after which a rank keeps at most `most_bytes` in host memory."""
    remedies = [
        *(["checkpoint.asynchronous=false (copies of weights and optimizer)"] if config.checkpoint.asynchronous else []),
        *(["data.pin_memory=false"] if kind and config.data.pin_memory else []),
        *(["fewer data.num_workers"] if config.data.num_workers else []),
        *(["train.offload_activations=none"] if config.train.offload_activations != "none" else []),
        *_smaller_states(config, facts, world_size=world_size, most_bytes=most_bytes),
    ]
    return f"set {' or '.join(remedies)}" if remedies else "use a host with more memory, or a smaller model or batch"


def _smaller_states(config: RunConfig, facts: Device, *, world_size: int, most_bytes: int) -> Iterator[str]:
    """Overrides with which host and device have enough memory: moments of fewer bits, nothing offloaded, or what is offloaded on a disk."""
    is_offloaded = accelerator.is_accelerator(facts.type) and config.zero.offload_optimizer == "cpu"
    for values in (_SHORT_MOMENTS, _NOTHING_OFFLOADED, *([_ON_DISK] if is_offloaded else [])):
        changed = {name: value for name, value in values.items() if value_of(config, name) != value}
        candidate = replaced(config, changed)
        if not changed or find_problems(candidate, world_size=world_size):
            continue
        plan = plan_on(facts, candidate, world_size=world_size)
        if _state_on_host(plan, facts) <= most_bytes and not (facts.is_limited and plan.total_bytes > facts.memory_bytes):
            yield " ".join(f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in changed.items())
