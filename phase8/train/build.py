"""Assembly of a run that can train from a config."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from rich.console import Console

from phase8 import accelerator
from phase8.checkpoint.load import Checkpoint
from phase8.checkpoint.step_directories import step_of
from phase8.config.batch import BatchShape, batch_shape, run_topology
from phase8.config.schema import RunConfig
from phase8.config.validate import validate
from phase8.config.without_effect import facts_without_effect
from phase8.data.tokenizer import SentencePieceTokenizer
from phase8.distributed.collectives import broadcast_text, gather_texts
from phase8.distributed.mesh import Mesh, build_mesh
from phase8.errors import DataError
from phase8.kernels.backends import select_kernels
from phase8.observe.banner import print_banner, print_line
from phase8.observe.devices import peak_flops
from phase8.observe.loggers import require_packages
from phase8.plan.candidates import Device, plan_on
from phase8.plan.cost_facts import memory_fact
from phase8.plan.whole_config import count_parameters, shapes_only
from phase8.precision.policy import require_matrix_units, set_matmul_precision
from phase8.train.changed_keys import ChangedKey, Consequence, changed_keys
from phase8.train.datasets import RunData, check_same_data, open_run_data
from phase8.train.device import limit_memory, require_determinism, this_device
from phase8.train.disk_room import require_room
from phase8.train.engine.deepspeed import build_deepspeed_engine
from phase8.train.engine.fsdp import build_fsdp_engine
from phase8.train.engine.protocol import TrainingEngine
from phase8.train.experts import with_recordable_experts
from phase8.train.initialise import Origin, initialise_run
from phase8.train.memory_limits import memory_errors, require_host_memory
from phase8.train.resume import Position, attached_to, check_stop, restore_run, what_changes_mean
from phase8.train.run_directory import RunDirectory, run_directory
from phase8.train.run_facts import run_facts
from phase8.train.start import Choice, check_place, choice_of, claimed, make_way, recorded_settings, restore_asked
from phase8.train.tuning import Chosen, choose_settings
from phase8.zero.fsdp import shard_size


@dataclass
class Run:
    """A run that is ready to train.

    Args:
        config: Validated config.
        device: Device on which the model computes.
        directory: Run directory.
        lock: Exit stack that releases the claim on the run directory; it is empty on ranks that do not hold the claim.
        data: Training and validation data.
        attachments: Content of files that checkpoints carry besides the state, by file name: the tokenizer, if the data have one.
        engine: Engine with model and optimizer.
        position: Progress of the run.
        saved_step: Step of the checkpoint in `directory` that holds the current state; None: there is none.
        machine: Facts about the device, measured before the run allocated anything.
        chosen: Values chosen for the `auto` settings of the config.
        origin: Source of the first weights; None: they come from the seed, or the run continues from a checkpoint.
        changes: What differs from the checkpoint from which the run continues; what changes mean is known on the first rank.
        stop_step: Last step that this process takes.
        shape: Shape of the batch.
        facts: Facts that banner and report show.
        host_group: Process group of all ranks for data in host memory; None: the run has a single process.
        peak_flops: FLOP/s of one rank that count as MFU 1; None: unknown.
        planned_memory_bytes: Planned memory of a GPU, on the first rank; None: there is no GPU, or this is another rank.
        console: Console for messages.
    """

    config: RunConfig
    device: torch.device
    directory: RunDirectory
    lock: ExitStack
    data: RunData
    attachments: dict[str, bytes]
    engine: TrainingEngine
    position: Position
    saved_step: int | None
    machine: Device
    chosen: Chosen
    origin: Origin | None
    changes: list[ChangedKey | Consequence]
    stop_step: int
    shape: BatchShape
    facts: list[tuple[str, str]]
    host_group: dist.ProcessGroup | None
    peak_flops: float | None
    planned_memory_bytes: int | None
    console: Console

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes files and prints."""
        return self.engine.mesh.rank == 0

    def say(self, text: str) -> None:
        """Prints a line."""
        print_line(text, self.console)

    @property
    def is_complete(self) -> bool:
        """Whether all steps are done and the last one is saved."""
        return self.position.step >= self.stop_step and self.saved_step == self.position.step


def build_run(
    config: RunConfig,
    *,
    device: torch.device,
    resume: str,
    console: Console,
    world_size: int = 1,
    ranks_of_host: int = 1,
    agents: Collection[str] = (),
    refused: Sequence[Mapping[str, object]] = (),
) -> Run:
    """Opens the data, builds the model, restores a checkpoint if asked, and prints the banner.

    When any rank refuses the start, for whatever reason, the run directory stays as it was.

    Args:
        config: Config, which is validated here.
        device: Device from `select_device`.
        resume: `auto`, `none`, or a checkpoint directory.
        console: Console for messages; it is quiet on all ranks except the first.
        world_size: Number of processes of the run; if there are several, the process group has been initialised.
        ranks_of_host: Number of processes of the run on this host.
        agents: Agents of torchrun that started this group of processes.
        refused: Automatic settings that have run out of memory in this process.

    Raises:
        Phase8Error: The run cannot start.
    """
    validate(config, world_size=world_size)
    machine = _prepare_process(config, device)
    mesh = _build_mesh(config, device, world_size)
    directory = run_directory(config.run)
    with ExitStack() as lock:
        if mesh.rank == 0:
            require_packages(config.observe)
            lock.enter_context(claimed(directory))
        data = _open_data(config, console, mesh)
        settled, chosen = choose_settings(
            with_recordable_experts(config, device),
            mesh=mesh,
            device=device,
            facts=machine,
            build_engine=build_engine,
            recorded=lambda: recorded_settings(resume, directory, is_first=mesh.rank == 0),
            refused=refused,
            say=partial(print_line, console=console),
        )
        validate(settled, world_size=world_size)
        require_host_memory(settled, machine, world_size=world_size, ranks_of_host=ranks_of_host)
        with memory_errors(settled, chosen, machine, world_size=world_size, has_begun=False):
            run, choice = _decide(settled, mesh, directory, data, machine, chosen, asked=config, device=device, resume=resume, console=console)
        if run.is_main:
            check_place(choice, directory, agents=agents)
        gather_texts(None)  # waits until every rank has accepted the start; only after this the disk may change
        if run.is_main and (choice.moves or not run.is_complete):
            make_way(choice, directory, settled, attachments=run.attachments, agents=agents, on_message=run.say)
        run.lock = lock.pop_all()
    _say_beginning(run, choice.checkpoint)
    print_banner(f"phase8 pretraining: {config.run.name}", [*run.facts, ("run directory", str(directory.path))], console)
    return run


def _prepare_process(config: RunConfig, device: torch.device) -> Device:
    """Makes the settings that hold for the whole process; returns the facts about its device."""
    if config.train.deterministic:
        require_determinism()
    require_matrix_units(config.precision, device)
    set_matmul_precision(config.precision)
    select_kernels(config.train.kernels, device)
    machine = this_device(device, config)
    limit_memory(device, config.train.device_memory_gib)
    return machine


def _decide(
    config: RunConfig,
    mesh: Mesh,
    directory: RunDirectory,
    data: RunData,
    machine: Device,
    chosen: Chosen,
    *,
    asked: RunConfig,
    device: torch.device,
    resume: str,
    console: Console,
) -> tuple[Run, Choice]:
    """Builds the run of a settled config, and the choice of what has to be moved for it. Nothing is written to the run directory."""
    engine = build_engine(config, mesh=mesh, device=device)
    origin = initialise_run(config, engine, data.tokenizer, directory=directory, resume=resume)
    shape = batch_shape(config.train, config.parallel, data_parallel_size=mesh.topology.data_parallel_size)
    facts = run_facts(config, device=device, shape=shape, num_parameters=count_parameters(shapes_only(config)), topology=mesh.topology)
    planned_memory_bytes = None
    if mesh.rank == 0:  # only this rank shows facts
        plan = plan_on(machine, config, world_size=mesh.topology.world_size)
        facts.append(memory_fact(plan))
        planned_memory_bytes = plan.total_bytes if accelerator.is_accelerator(device.type) else None
    facts.append(("data", data.description))
    if chosen.reason:
        facts.append(("settings", chosen.reason))
    if origin is not None:
        facts.append(("first weights", str(origin)))
    facts += facts_without_effect(asked, config)
    run = Run(
        config=config,
        device=device,
        directory=directory,
        lock=ExitStack(),
        data=data,
        attachments=_attachments(data),
        engine=engine,
        position=Position(),
        saved_step=None,
        machine=machine,
        chosen=chosen,
        origin=origin,
        changes=[],
        stop_step=0,
        shape=shape,
        facts=facts,
        host_group=None if mesh.device_mesh is None else dist.new_group(backend="gloo"),
        peak_flops=_peak(config, device),
        planned_memory_bytes=planned_memory_bytes,
        console=console,
    )
    choice = _go_on(run, resume)
    run.stop_step = check_stop(config, run.position)
    if run.is_main and not run.is_complete:
        run.facts += require_room(config, directory, choice, step=run.position.step, stop_step=run.stop_step)
    return run, choice


def build_engine(config: RunConfig, *, mesh: Mesh, device: torch.device) -> TrainingEngine:
    """Builds the engine that a config asks for, with its first weights; only this function chooses the engine.

    Args:
        config: Config without `auto` settings.
        mesh: Mesh of the ranks, which all build their engines at the same time.
        device: Device on which the model computes.
    """
    build = {"fsdp": build_fsdp_engine, "deepspeed": build_deepspeed_engine}[config.zero.engine]
    return build(config, mesh=mesh, device=device)


def _build_mesh(config: RunConfig, device: torch.device, world_size: int) -> Mesh:
    topology = run_topology(config.parallel, world_size=world_size)
    needs_group = config.zero.offload_params != "none" or config.zero.engine == "deepspeed"  # even of one rank
    if world_size == 1 and needs_group and not dist.is_initialized():
        dist.init_process_group(accelerator.collectives(device.type), store=dist.HashStore(), rank=0, world_size=1)
    return build_mesh(
        topology,
        device_type=device.type,
        shard_size=shard_size(config.zero, num_token_ranks=topology.num_token_ranks),
        async_tensor_parallel=config.parallel.async_tensor_parallel,
    )


def _open_data(config: RunConfig, console: Console, mesh: Mesh) -> RunData:
    """Opens the data. The first rank opens them first and prepares files that are made once; every other rank waits, and must find the same data."""
    is_main = mesh.rank == 0

    def open_them() -> RunData:
        return open_run_data(
            config, on_progress=lambda stage, done, total: _print_stage(console, stage, done), check_ids=is_main, own_slice=mesh.own_slice
        )

    data = open_them() if is_main else None
    of_first = broadcast_text(None if data is None else data.fingerprints)
    if data is None:
        data = open_them()
        check_same_data(data, of_first, rank=mesh.rank)
    return data


def _attachments(data: RunData) -> dict[str, bytes]:
    """The files that checkpoints carry, under names of their kind: that of the file may be any. Read once, they may go before a save."""
    if data.tokenizer is None:
        return {}
    path = data.tokenizer.path
    try:
        return {"tokenizer.model" if isinstance(data.tokenizer, SentencePieceTokenizer) else "tokenizer.json": path.read_bytes()}
    except OSError as error:
        raise DataError(f"cannot read the tokenizer {path}: {error.strerror}; make it readable") from error


def _go_on(run: Run, resume: str) -> Choice:
    """Restores the checkpoint that `--resume` selects; the first rank selects it for all ranks."""
    saved = run.config

    def restore(checkpoint: Checkpoint) -> None:
        nonlocal saved
        run.position, saved = restore_run(checkpoint, run.config, data=run.data, attachments=run.attachments, engine=run.engine)

    checkpoint = restore_asked(resume, run.directory, restore, is_first=run.is_main, on_message=run.say)
    choice = choice_of(resume, run.directory, checkpoint) if run.is_main else Choice()
    if checkpoint is None:
        return choice
    if run.data.tokenizer is None:
        run.attachments = attached_to(checkpoint)  # the run keeps the tokenizer of the checkpoint
    is_own = run.directory.owns(checkpoint.path) and step_of(checkpoint.path.name) is not None  # `auto` finds no copy of another name
    run.saved_step = run.position.step if is_own else None
    run.changes = [*changed_keys(saved, run.config)]
    return choice


def _say_beginning(run: Run, restored: Checkpoint | None) -> None:
    """Says where the run begins, once nothing can refuse the start any more; `restored` is the checkpoint from which it goes on (first rank)."""
    if run.origin is not None:
        run.say("\n  ".join([str(run.origin), *run.origin.differences]))
    if restored is not None:
        run.say(f"resumed from {restored.path} (step {run.position.step}, {run.position.tokens_seen:,} tokens seen)")
        run.changes += what_changes_mean(restored, run.config, run.data, run.position)
    for change in run.changes:
        run.say(f"  {change}")
    step = run.config.observe.profile_at_step
    if step is None or run.directory.profile(step=step, rank=0).exists():
        return
    if step <= run.position.step:
        run.say(f"observe.profile_at_step is {step}, but the run goes on after step {run.position.step}: nothing is recorded; name a later step.")
    elif step > run.stop_step:
        run.say(f"observe.profile_at_step is {step}, but this start ends after step {run.stop_step}: a later start records it.")


def _peak(config: RunConfig, device: torch.device) -> float | None:
    if config.observe.peak_flops is not None or not accelerator.is_accelerator(device.type):
        return config.observe.peak_flops
    dtype = "tf32" if config.precision.dtype == "fp32" and config.precision.tf32 else config.precision.dtype
    return peak_flops(accelerator.name_of(device), dtype)


def _print_stage(console: Console, stage: str, done: int) -> None:
    if done == 0:
        print_line(f"{stage} (once) ...", console)
