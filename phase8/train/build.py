"""The one place where everything meets: from a config to a run that can train."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from rich.console import Console

from phase8.checkpoint.layout import step_of
from phase8.checkpoint.load import Checkpoint
from phase8.config.batch import BatchShape, batch_shape
from phase8.config.schema import RunConfig
from phase8.config.validate import validate
from phase8.kernels.backends import select_kernels
from phase8.model.model import LanguageModel, build_model
from phase8.model.parameters import decayed_parameter_names, initialise
from phase8.observe.banner import print_banner, print_line
from phase8.observe.devices import peak_flops
from phase8.optim.adamw import build_optimizer
from phase8.plan.dry_run import count_parameters
from phase8.precision.policy import compute_dtype, set_matmul_precision
from phase8.train.datasets import RunData, open_run_data
from phase8.train.device import require_determinism
from phase8.train.facts import run_facts
from phase8.train.resume import Position, restore_run, resume_run
from phase8.train.run_directory import RunDirectory, run_directory


@dataclass
class Run:
    """A run, ready to train.

    Args:
        config: Its config, validated.
        device: Where the model lives.
        directory: Where it writes.
        lock: Held while this process may write there.
        data: What it trains on.
        tokenizer_file: Copy of the tokenizer that goes into checkpoints; None: the data have none.
        model: With its weights.
        optimizer: With its state.
        position: How far it has come.
        saved_step: Step of the newest checkpoint in `directory`; None: there is none.
        shape: The batch.
        facts: What banner and report say.
        peak_flops: FLOP/s that count as MFU 1; None: unknown.
        console: Where it prints.
    """

    config: RunConfig
    device: torch.device
    directory: RunDirectory
    lock: IO[str]
    data: RunData
    tokenizer_file: Path | None
    model: LanguageModel
    optimizer: torch.optim.Optimizer
    position: Position
    saved_step: int | None
    shape: BatchShape
    facts: list[tuple[str, str]]
    peak_flops: float | None
    console: Console

    @property
    def uses_cuda_graphs(self) -> bool:
        """The compiled blocks replay CUDA graphs."""
        compiled = self.config.train.compile
        return compiled.enabled and compiled.mode != "default" and self.device.type == "cuda"


def build_run(config: RunConfig, *, device: torch.device, resume: str, console: Console) -> Run:
    """Opens the data, makes the model, goes on from a checkpoint if asked, and prints the banner.

    Args:
        config: Any config; it is validated here.
        device: From `select_device`.
        resume: `auto`, `none`, or a checkpoint directory.
        console: Where to print.

    Raises:
        Phase8Error: Whatever keeps the run from starting.
    """
    validate(config)
    if config.train.deterministic:
        require_determinism()
    set_matmul_precision(config.precision)
    select_kernels(config.train.kernels, device)
    directory = run_directory(config.run)
    lock = directory.lock()
    data = open_run_data(config, on_progress=lambda stage, done, total: _print_stage(console, stage, done))
    model = _build_model(config, device)
    optimizer = build_optimizer(model, config.optim, decayed_names=decayed_parameter_names(model))
    position, saved_step = _go_on(config, directory, data, model, optimizer, resume=resume, console=console)
    directory.create()
    directory.record(config)
    tokenizer_file = None if data.tokenizer is None else directory.keep_tokenizer(data.tokenizer.path)
    if config.train.compile.enabled:
        for block in model.blocks:
            block.compile(mode=config.train.compile.mode, fullgraph=config.train.compile.fullgraph)
    shape = batch_shape(config.train, config.parallel, data_parallel_size=1)
    facts = run_facts(config, device=device, shape=shape, num_parameters=count_parameters(model))
    facts.append(("data", data.description))
    print_banner(f"phase8 pretraining: {config.run.name}", [*facts, ("run directory", str(directory.path))], console)
    return Run(
        config=config,
        device=device,
        directory=directory,
        lock=lock,
        data=data,
        tokenizer_file=tokenizer_file,
        model=model,
        optimizer=optimizer,
        position=position,
        saved_step=saved_step,
        shape=shape,
        facts=facts,
        peak_flops=_peak(config, device),
        console=console,
    )


def _build_model(config: RunConfig, device: torch.device) -> LanguageModel:
    model = build_model(
        config.model,
        dtype=compute_dtype(config.precision),
        device=device,
        recompute=config.train.recompute,
        recompute_every_n_layers=config.train.recompute_every_n_layers,
    )
    initialise(model, seed=config.train.seed)
    return model


def _go_on(
    config: RunConfig,
    directory: RunDirectory,
    data: RunData,
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    *,
    resume: str,
    console: Console,
) -> tuple[Position, int | None]:
    """The position to go on from, and the step of its checkpoint if that is one of this run."""
    position = Position()

    def restore(checkpoint: Checkpoint) -> None:
        nonlocal position
        position = restore_run(checkpoint, config, fingerprint=data.fingerprint, model=model, optimizer=optimizer)

    def say(text: str) -> None:
        print_line(text, console)

    checkpoint = resume_run(resume, directory, restore=restore, on_message=say)
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
