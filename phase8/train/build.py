"""The one place where everything meets: from a config to a run that can train."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from rich.console import Console

from phase8.checkpoint.load import Checkpoint
from phase8.checkpoint.step_directories import step_of
from phase8.config.batch import BatchShape, batch_shape, run_topology
from phase8.config.schema import RunConfig
from phase8.config.validate import validate
from phase8.distributed.collectives import broadcast_text, gather_texts
from phase8.distributed.mesh import Mesh, build_mesh
from phase8.errors import DataError
from phase8.kernels.backends import select_kernels
from phase8.observe.banner import print_banner, print_line
from phase8.observe.devices import peak_flops
from phase8.plan.candidates import Device, plan_on
from phase8.plan.cost_facts import memory_fact
from phase8.plan.whole_config import count_parameters, shapes_only
from phase8.precision.policy import set_matmul_precision
from phase8.train.changed_keys import ChangedKey, changed_keys
from phase8.train.datasets import RunData, open_run_data
from phase8.train.device import limit_memory, require_determinism, this_device
from phase8.train.engine.fsdp import build_fsdp_engine
from phase8.train.engine.protocol import TrainingEngine
from phase8.train.initialise import Origin, initialise_run
from phase8.train.memory_limits import memory_errors
from phase8.train.resume import Position, attached_to, check_stop, restore_run
from phase8.train.run_directory import RunDirectory, run_directory
from phase8.train.run_facts import run_facts
from phase8.train.start import Choice, check_place, choice_of, make_way, recorded_settings, restore_asked
from phase8.train.tuning import Chosen, choose_settings
from phase8.zero.fsdp import shard_size


@dataclass
class Run:
    """A run, ready to train.

    Args:
        config: Its config, validated.
        device: Where the model lives.
        directory: Where it writes.
        lock: Ends the claim of this process to write there; another rank may have it.
        data: What it trains on.
        attachments: Content of what goes into checkpoints beside the state, by file name: the tokenizer, if the data have one.
        engine: Model and optimizer, and what takes the steps.
        position: How far it has come.
        saved_step: Step of the newest checkpoint in `directory`; None: there is none.
        machine: The device before the run took anything of it.
        chosen: What was chosen of the settings that the config leaves open.
        origin: Where the weights of a run that begins here came from; None: from the seed, or it goes on from a checkpoint.
        changed_keys: What is not as it was when the checkpoint was saved that the run goes on from.
        stop_step: The last step that this process takes.
        shape: The batch.
        facts: What banner and report say.
        host_group: All ranks, for what they say to each other from host memory; None: there is one.
        peak_flops: FLOP/s of one rank that count as MFU 1; None: unknown.
        console: Where it prints.
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
    changed_keys: list[ChangedKey]
    stop_step: int
    shape: BatchShape
    facts: list[tuple[str, str]]
    host_group: dist.ProcessGroup | None
    peak_flops: float | None
    console: Console

    @property
    def is_main(self) -> bool:
        """This rank writes and prints."""
        return self.engine.mesh.rank == 0

    def say(self, text: str) -> None:
        """Prints a line."""
        print_line(text, self.console)

    @property
    def is_complete(self) -> bool:
        """No step is left to take, and the last one is saved."""
        return self.position.step >= self.stop_step and self.saved_step == self.position.step


def build_run(
    config: RunConfig,
    *,
    device: torch.device,
    resume: str,
    console: Console,
    world_size: int = 1,
    agents: Collection[str] = (),
    refused: Sequence[Mapping[str, object]] = (),
) -> Run:
    """Opens the data, makes the model, goes on from a checkpoint if asked, and prints the banner.

    A start that is refused, on whatever rank and for whatever reason, leaves the run directory as it was.

    Args:
        config: Any config; it is validated here.
        device: From `select_device`.
        resume: `auto`, `none`, or a checkpoint directory.
        console: Where to print; a quiet one on all ranks but the first.
        world_size: Processes of the run; of several, the process group exists.
        agents: Those of torchrun that have started this group.
        refused: Automatic settings that ran out of memory in this process.

    Raises:
        Phase8Error: Whatever keeps the run from starting.
    """
    validate(config, world_size=world_size)
    if config.train.deterministic:
        require_determinism()
    set_matmul_precision(config.precision)
    select_kernels(config.train.kernels, device)
    machine = this_device(device, config)
    limit_memory(device, config.train.device_memory_gib)
    mesh = _build_mesh(config, device, world_size)
    directory = run_directory(config.run)
    with ExitStack() as lock:
        if mesh.rank == 0:
            lock.enter_context(directory.lock())
        data = _open_data(config, console, is_main=mesh.rank == 0)
        config, chosen = choose_settings(
            config,
            mesh=mesh,
            device=device,
            facts=machine,
            build_engine=build_engine,
            recorded=lambda: recorded_settings(resume, directory, is_first=mesh.rank == 0),
            refused=refused,
            say=partial(print_line, console=console),
        )
        validate(config, world_size=world_size)
        with memory_errors(config, chosen, machine, world_size=world_size, has_begun=False):
            run, choice = _decide(config, mesh, directory, data, machine, chosen, device=device, resume=resume, console=console)
        if run.is_main:
            check_place(choice, directory, agents=agents)
        gather_texts(None)  # no rank has refused: from here on the disk may change
        if run.is_main and (choice.moves or not run.is_complete):
            make_way(choice, directory, config, attachments=run.attachments, agents=agents, on_message=run.say)
        run.lock = lock.pop_all()
    print_banner(f"phase8 pretraining: {config.run.name}", [*run.facts, ("run directory", str(directory.path))], console)
    return run


def _decide(
    config: RunConfig,
    mesh: Mesh,
    directory: RunDirectory,
    data: RunData,
    machine: Device,
    chosen: Chosen,
    *,
    device: torch.device,
    resume: str,
    console: Console,
) -> tuple[Run, Choice]:
    """The run as it is going to be, and what has to make way for it. Nothing is written into the run directory."""
    engine = build_engine(config, mesh=mesh, device=device)
    origin = initialise_run(config, engine, data.tokenizer, directory=directory, resume=resume, say=partial(print_line, console=console))
    shape = batch_shape(config.train, config.parallel, data_parallel_size=mesh.topology.data_parallel_size)
    facts = run_facts(config, device=device, shape=shape, num_parameters=count_parameters(shapes_only(config)), topology=mesh.topology)
    if mesh.rank == 0:  # which is the one that shows it
        facts.append(memory_fact(plan_on(machine, config, world_size=mesh.topology.world_size)))
    facts.append(("data", data.description))
    if chosen.reason:
        facts.append(("settings", chosen.reason))
    if origin is not None:
        facts.append(("first weights", str(origin)))
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
        changed_keys=[],
        stop_step=0,
        shape=shape,
        facts=facts,
        host_group=None if mesh.device_mesh is None else dist.new_group(backend="gloo"),
        peak_flops=_peak(config, device),
        console=console,
    )
    choice = _go_on(run, resume)
    run.stop_step = check_stop(config, run.position)
    return run, choice


def build_engine(config: RunConfig, *, mesh: Mesh, device: torch.device) -> TrainingEngine:
    """The engine that a config asks for, with its first weights: the one place where it is chosen.

    Args:
        config: Everything is explicit.
        mesh: The ranks, which all build theirs at the same time.
        device: Where the model computes.
    """
    return build_fsdp_engine(config, mesh=mesh, device=device)  # `validate` refuses every other value of zero.engine


def _build_mesh(config: RunConfig, device: torch.device, world_size: int) -> Mesh:
    topology = run_topology(config.parallel, world_size=world_size)
    if world_size == 1 and config.zero.offload_params != "none" and not dist.is_initialized():  # FSDP wants a group, if only of one
        dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    return build_mesh(
        topology,
        device_type=device.type,
        shard_size=shard_size(config.zero, data_parallel_size=topology.data_parallel_size),
        async_tensor_parallel=config.parallel.async_tensor_parallel,
    )


def _open_data(config: RunConfig, console: Console, *, is_main: bool) -> RunData:
    """The data; what has to be prepared once is prepared by the first rank, while the others wait."""

    def open_them() -> RunData:
        return open_run_data(config, on_progress=lambda stage, done, total: _print_stage(console, stage, done), check_ids=is_main)

    data = open_them() if is_main else None
    broadcast_text("prepared")
    return open_them() if data is None else data


def _attachments(data: RunData) -> dict[str, bytes]:
    """What checkpoints of these data carry, read once: what becomes of the file is of no matter to a save."""
    if data.tokenizer is None:
        return {}
    path = data.tokenizer.path
    try:
        return {f"tokenizer{path.suffix}": path.read_bytes()}
    except OSError as error:
        raise DataError(f"cannot read the tokenizer {path}: {error.strerror}; make it readable") from error


def _go_on(run: Run, resume: str) -> Choice:
    """Puts the run where `--resume` says; the first rank chooses the checkpoint, and its choice is the one that counts."""
    saved = run.config

    def restore(checkpoint: Checkpoint) -> None:
        nonlocal saved
        run.position, saved = restore_run(
            checkpoint, run.config, fingerprint=run.data.fingerprint, attachments=run.attachments, engine=run.engine
        )

    checkpoint = restore_asked(resume, run.directory, restore, is_first=run.is_main, on_message=run.say)
    choice = choice_of(resume, run.directory, checkpoint) if run.is_main else Choice()
    if checkpoint is None:
        return choice
    if run.data.tokenizer is None:
        run.attachments = attached_to(checkpoint)  # its tokenizer stays with the run
    is_own = run.directory.owns(checkpoint.path) and step_of(checkpoint.path.name) is not None  # a copy of another name is not resumed by itself
    run.saved_step = run.position.step if is_own else None
    run.changed_keys = changed_keys(saved, run.config)
    run.say(f"resumed from {checkpoint.path} (step {run.position.step}, {run.position.tokens_seen:,} tokens seen)")
    for change in run.changed_keys:
        run.say(f"  {change}")
    return choice


def _peak(config: RunConfig, device: torch.device) -> float | None:
    if config.observe.peak_flops is not None or device.type != "cuda":
        return config.observe.peak_flops
    dtype = "tf32" if config.precision.dtype == "fp32" and config.precision.tf32 else config.precision.dtype
    return peak_flops(torch.cuda.get_device_name(device), dtype)


def _print_stage(console: Console, stage: str, done: int) -> None:
    if done == 0:
        print_line(f"{stage} (once) ...", console)
