"""The one place where everything meets: from a config to a run that can train."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from phase8.checkpoint.layout import step_of
from phase8.checkpoint.load import Checkpoint
from phase8.config.batch import BatchShape, batch_shape, run_topology
from phase8.config.schema import RunConfig
from phase8.config.validate import validate
from phase8.distributed.collectives import broadcast_text
from phase8.distributed.mesh import Mesh, build_mesh
from phase8.kernels.backends import select_kernels
from phase8.observe.banner import print_banner, print_line
from phase8.observe.devices import peak_flops
from phase8.plan.dry_run import count_parameters, shapes_only
from phase8.precision.policy import compute_dtype, set_matmul_precision
from phase8.train.compilation import compile_blocks
from phase8.train.datasets import RunData, open_run_data
from phase8.train.device import require_determinism
from phase8.train.facts import run_facts
from phase8.train.learner import Learner, build_learner
from phase8.train.restore import restore_together
from phase8.train.resume import Position, restore_run, resume_run
from phase8.train.run_directory import RunDirectory, run_directory
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
        tokenizer_file: Copy of the tokenizer that goes into checkpoints; None: the data have none.
        learner: Model and optimizer.
        position: How far it has come.
        saved_step: Step of the newest checkpoint in `directory`; None: there is none.
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
    tokenizer_file: Path | None
    learner: Learner
    position: Position
    saved_step: int | None
    shape: BatchShape
    facts: list[tuple[str, str]]
    host_group: dist.ProcessGroup | None
    peak_flops: float | None
    console: Console

    @property
    def is_main(self) -> bool:
        """This rank writes and prints."""
        return self.learner.mesh.rank == 0

    @property
    def uses_cuda_graphs(self) -> bool:
        """Steps are replayed as one CUDA graph."""
        return self.config.train.cuda_graphs and self.device.type == "cuda"


def build_run(config: RunConfig, *, device: torch.device, resume: str, console: Console, world_size: int = 1) -> Run:
    """Opens the data, makes the model, goes on from a checkpoint if asked, and prints the banner.

    Args:
        config: Any config; it is validated here.
        device: From `select_device`.
        resume: `auto`, `none`, or a checkpoint directory.
        console: Where to print; a quiet one on all ranks but the first.
        world_size: Processes of the run; of several, the process group exists.

    Raises:
        Phase8Error: Whatever keeps the run from starting.
    """
    validate(config, world_size=world_size)
    if config.train.deterministic:
        require_determinism()
    set_matmul_precision(config.precision)
    select_kernels(config.train.kernels, device)
    mesh = _build_mesh(config, device, world_size)
    is_main = mesh.rank == 0
    directory = run_directory(config.run)
    lock = ExitStack()
    if is_main:
        lock.enter_context(directory.lock())
    data = _open_data(config, console, is_main=is_main)
    learner = build_learner(config, mesh=mesh, device=device, dtype=compute_dtype(config.precision))
    position, saved_step = _go_on(config, directory, data, learner, resume=resume, console=console)
    tokenizer_file = None
    if is_main:
        directory.create()
        directory.record(config)
        tokenizer_file = None if data.tokenizer is None else directory.keep_tokenizer(data.tokenizer.path)
    compile_blocks(learner, config)
    shape = batch_shape(config.train, config.parallel, data_parallel_size=mesh.topology.data_parallel_size)
    facts = run_facts(config, device=device, shape=shape, num_parameters=count_parameters(shapes_only(config)), topology=mesh.topology)
    facts.append(("data", data.description))
    print_banner(f"phase8 pretraining: {config.run.name}", [*facts, ("run directory", str(directory.path))], console)
    return Run(
        config=config,
        device=device,
        directory=directory,
        lock=lock,
        data=data,
        tokenizer_file=tokenizer_file,
        learner=learner,
        position=position,
        saved_step=saved_step,
        shape=shape,
        facts=facts,
        host_group=None if mesh.device_mesh is None else dist.new_group(backend="gloo"),
        peak_flops=_peak(config, device),
        console=console,
    )


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
        return open_run_data(config, on_progress=lambda stage, done, total: _print_stage(console, stage, done))

    data = open_them() if is_main else None
    broadcast_text("prepared")
    return open_them() if data is None else data


def _go_on(
    config: RunConfig, directory: RunDirectory, data: RunData, learner: Learner, *, resume: str, console: Console
) -> tuple[Position, int | None]:
    """The position to go on from, and the step of its checkpoint if that is one of this run. The first rank chooses the checkpoint."""
    position = Position()

    def restore(checkpoint: Checkpoint) -> None:
        nonlocal position
        position = restore_run(checkpoint, config, fingerprint=data.fingerprint, learner=learner)

    def say(text: str) -> None:
        print_line(text, console)

    checkpoint = restore_together(
        lambda restore_all: resume_run(resume, directory, restore=restore_all, on_message=say), restore, is_first=learner.mesh.rank == 0
    )
    if checkpoint is None:
        return position, None
    say(f"resumed from {checkpoint.path} (step {position.step}, {position.tokens_seen:,} tokens seen)")
    is_own = directory.owns(checkpoint.path) and step_of(checkpoint.path.name) is not None  # a copy of another name is not resumed by itself
    return position, position.step if is_own else None


def _peak(config: RunConfig, device: torch.device) -> float | None:
    if config.observe.peak_flops is not None or device.type != "cuda":
        return config.observe.peak_flops
    dtype = "tf32" if config.precision.dtype == "fp32" and config.precision.tf32 else config.precision.dtype
    return peak_flops(torch.cuda.get_device_name(device), dtype)


def _print_stage(console: Console, stage: str, done: int) -> None:
    if done == 0:
        print_line(f"{stage} (once) ...", console)
