"""Where a run goes on from: the position in the data, the weights, and what must be the same as before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from phase8.checkpoint.layout import step_of
from phase8.checkpoint.load import Checkpoint, find_checkpoint, list_checkpoints, newest_good_checkpoint, open_checkpoint
from phase8.checkpoint.random_state import capture_random_state, check_random_state, restore_random_state
from phase8.checkpoint.run_metadata import OF_A_RUN, run_metadata
from phase8.checkpoint.state import restore_state
from phase8.config.batch import batch_shape
from phase8.config.load import config_to_mapping
from phase8.config.model_keys import WITHOUT_SHAPE, model_differences
from phase8.config.schema import ModelSection, RunConfig
from phase8.data.fingerprint import describe_fingerprint_difference
from phase8.errors import CheckpointMismatchError, ConfigError
from phase8.train.learner import Learner
from phase8.train.run_directory import RunDirectory


@dataclass
class Position:
    """How far a run has come.

    Args:
        step: Optimizer steps done, skipped ones included.
        samples_consumed: Sequences read, which is also the number of the next sample.
        tokens_seen: Tokens read.
        consecutive_skipped: Skipped steps in a row up to now.
        total_skipped: Skipped steps so far.
        recent_losses: The last ones that counted, where spikes are looked for.
        rolled_back_to: Step of the checkpoint that the last rollback went to; None: there was none.
        rollbacks_in_a_row: Rollbacks to that checkpoint.
    """

    step: int = 0
    samples_consumed: int = 0
    tokens_seen: int = 0
    consecutive_skipped: int = 0
    total_skipped: int = 0
    recent_losses: list[float] = field(default_factory=list)
    rolled_back_to: int | None = None
    rollbacks_in_a_row: int = 0


def checkpoint_metadata(
    config: RunConfig, position: Position, *, global_batch_size: int | None, fingerprint: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """What a checkpoint holds beside tensors: plain JSON. A batch of None: nobody has chosen one yet."""
    return {
        "config": config_to_mapping(config),
        "position": asdict(position),
        "global_batch_size": global_batch_size,
        "data_fingerprint": fingerprint,
        "random_state": capture_random_state(device),
        "torch_version": str(torch.__version__),
    }


def resume_run(
    choice: str,
    directory: RunDirectory,
    *,
    restore: Callable[[Checkpoint], None],
    on_message: Callable[[str], None],
) -> Checkpoint | None:
    """Restores the checkpoint that `--resume` asks for; None: start from the beginning.

    Args:
        choice: `auto`, `none`, or a checkpoint directory.
        directory: Of the run.
        restore: Checks that a checkpoint belongs to this run and loads it.
        on_message: Told of damaged checkpoints and of what was moved.

    Raises:
        CheckpointError: The named one, or every one there is, cannot be used.
    """
    if choice == "none":
        aside = directory.set_aside()
        if aside is not None:
            on_message(f"the earlier run of this name is now {aside}")
        return None
    if choice == "auto":
        return newest_good_checkpoint(
            directory.checkpoints,
            on_damaged=lambda path, error: on_message(f"checkpoint {path.name} is damaged and passed over: {error}"),
            check=restore,
        )
    checkpoint = open_checkpoint(find_checkpoint(Path(choice)))
    restore(checkpoint)
    if not directory.owns(checkpoint.path):
        aside = directory.set_aside()
        if aside is not None:
            on_message(f"the earlier run of this name is now {aside}")
        return checkpoint
    later = [
        path
        for path in list_checkpoints(directory.checkpoints)
        if (step_of(path.name) or 0) >= checkpoint.step and path.resolve() != checkpoint.path.resolve()
    ]
    if later:
        directory.set_aside_checkpoints(later)
        on_message(f"{len(later)} later checkpoints were moved to {directory.superseded}")
    return checkpoint


def restore_run(
    checkpoint: Checkpoint,
    config: RunConfig,
    *,
    fingerprint: dict[str, Any],
    learner: Learner,
) -> Position:
    """Loads weights, optimizer and random state, after checking that config and data continue those of the checkpoint.

    Raises:
        CheckpointMismatchError: Another model, other data, or a batch that another number of ranks would change unasked.
    """
    metadata = run_metadata(checkpoint, needed=OF_A_RUN)
    saved_config, saved_fingerprint, random_state = metadata.config, metadata.data_fingerprint, metadata.random_state
    position = Position(**metadata.position.model_dump())
    _check_model(checkpoint.path, metadata.model, config.model)
    _check_batch(checkpoint.path, metadata.global_batch_size, config, learner.mesh.topology.data_parallel_size)
    if not config.data.allow_fingerprint_change:
        _check_data(checkpoint.path, (saved_config["train"]["seed"], saved_fingerprint), (config.train.seed, fingerprint))
    for name in checkpoint.manifest.attachments:
        checkpoint.attachment(name)  # a damaged tokenizer is found now, not when somebody generates
    check_random_state(random_state, learner.device)  # what cannot be restored is found before anything is changed
    is_part = learner.mesh.pp.size > 1
    restore_state(checkpoint, learner.stage.module, learner.optimizer, learner.shards.parts, is_part=is_part)
    learner.shards.read_again()
    restore_random_state(random_state, learner.device)
    return position


def check_stop(config: RunConfig, position: Position) -> int:
    """The step at which this process stops.

    Raises:
        ConfigError: The checkpoint is already past it because train.num_steps was lowered.
    """
    if position.step > config.train.num_steps:
        raise ConfigError(
            f"train.num_steps is {config.train.num_steps}, but the checkpoint is at step {position.step}; "
            "raise train.num_steps, or start again with --resume none."
        )
    return config.train.num_steps if config.train.stop_at_step is None else config.train.stop_at_step


def _check_model(path: Path, saved: ModelSection, current: ModelSection) -> None:
    """Refuses another model, by the keys that its block reads."""
    different = model_differences(saved, current)
    if different:
        listed = ", ".join(f"model.{name} was {was} and is {now}" for name, (was, now) in different.items())
        remedy = ", or begin a new run with its weights by checkpoint.initialise_from" if different.keys() <= WITHOUT_SHAPE else ""
        raise CheckpointMismatchError(
            f"{path} is a checkpoint of another model: {listed}; use its config, another run.name, or --resume none{remedy}."
        )


def _check_batch(path: Path, saved: int | None, config: RunConfig, data_parallel_size: int) -> None:
    """Refuses a batch that nobody has chosen; imported checkpoints have none, those of earlier releases do not say theirs."""
    current = batch_shape(config.train, config.parallel, data_parallel_size=data_parallel_size).global_batch_size
    if config.train.global_batch_size is None and saved not in (None, current):
        raise CheckpointMismatchError(
            f"{path} was trained with {saved} sequences a step, but train.global_batch_size is null, and {data_parallel_size} data-parallel "
            f"ranks would make it {current}; set it to {saved} to go on as before, or to {current} to accept the change."
        )


def _check_data(path: Path, saved: tuple[int, dict[str, Any]], current: tuple[int, dict[str, Any]]) -> None:
    sentences = describe_fingerprint_difference(saved[1], current[1])
    if saved[0] != current[0]:
        sentences.append(f"train.seed was {saved[0]} and is {current[0]}")
    if sentences:
        raise CheckpointMismatchError(
            f"{path} was trained on another order of samples: {'; '.join(sentences)}; restore the data, "
            "or accept the change with --set data.allow_fingerprint_change=true."
        )
