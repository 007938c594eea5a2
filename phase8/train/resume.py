"""Where a run goes on from: the position in the data, the weights, and what must be the same as before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from phase8.checkpoint.load import Checkpoint
from phase8.checkpoint.random_state import capture_random_state, check_random_state, restore_random_state
from phase8.checkpoint.run_metadata import OF_A_RUN, run_metadata
from phase8.config.batch import batch_shape
from phase8.config.describe import describe_value
from phase8.config.dotted import value_of
from phase8.config.load import config_to_mapping
from phase8.config.model_keys import WITHOUT_SHAPE, model_differences
from phase8.config.schema import ModelSection, RunConfig
from phase8.data.fingerprint import describe_fingerprint_difference
from phase8.errors import CheckpointMismatchError, ConfigError
from phase8.train.engine.protocol import TrainingEngine


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
    config: RunConfig,
    position: Position,
    *,
    global_batch_size: int | None,
    fingerprint: dict[str, Any],
    device: torch.device,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What a checkpoint holds beside tensors: plain JSON. A batch of None: nobody has chosen one yet; settings of None: none were automatic."""
    return {
        **({} if settings is None else {"settings": settings}),
        "config": config_to_mapping(config),
        "position": asdict(position),
        "global_batch_size": global_batch_size,
        "data_fingerprint": fingerprint,
        "random_state": capture_random_state(device),
        "torch_version": str(torch.__version__),
    }


def restore_run(
    checkpoint: Checkpoint,
    config: RunConfig,
    *,
    fingerprint: dict[str, Any],
    attachments: Mapping[str, bytes],
    engine: TrainingEngine,
) -> tuple[Position, RunConfig]:
    """Loads weights, optimizer and random state, after checking that config and data continue those of the checkpoint.

    Args:
        checkpoint: To go on from.
        config: Of the run.
        fingerprint: Of its data.
        attachments: What its own checkpoints have attached: the tokenizer, if it has one.
        engine: What is loaded into.

    Returns:
        Where the run goes on, and the config of the run that saved the checkpoint.

    Raises:
        CheckpointMismatchError: Another model, other data, another tokenizer, or a batch that another number of ranks would change unasked.
    """
    metadata = run_metadata(checkpoint, needed=OF_A_RUN)
    saved, saved_fingerprint, random_state = metadata.config, metadata.data_fingerprint, metadata.random_state
    position = Position(**metadata.position.model_dump())
    _check_model(checkpoint.path, saved.model, config.model)
    _check_batch(checkpoint.path, metadata.global_batch_size, config, engine.mesh.topology.data_parallel_size)
    attached = attached_to(checkpoint)  # a damaged tokenizer is found now, not when somebody generates
    if not config.data.allow_fingerprint_change:
        differences = describe_fingerprint_difference(saved_fingerprint, fingerprint) + _changed_for_data(saved, config)
        _check_data(checkpoint.path, differences + _changed_tokenizer(checkpoint.path, attached, attachments))
    check_random_state(random_state, engine.device)  # what cannot be restored is found before anything is changed
    engine.restore(checkpoint)
    restore_random_state(random_state, engine.device)
    return position, saved


def attached_to(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The files that a checkpoint carries beside its state, by name.

    Raises:
        CheckpointCorruptError: One is missing or altered.
    """
    return {name: checkpoint.attachment(name).read_bytes() for name in checkpoint.manifest.attachments}


def check_stop(config: RunConfig, position: Position) -> int:
    """The step at which this process stops.

    Raises:
        ConfigError: The checkpoint is already past it.
    """
    if position.step > config.train.num_steps:
        raise ConfigError(
            f"train.num_steps is {config.train.num_steps}, but the checkpoint is at step {position.step}; "
            "raise train.num_steps, or start again with --resume none."
        )
    if config.train.stop_at_step is not None and position.step > config.train.stop_at_step:
        raise ConfigError(
            f"train.stop_at_step is {config.train.stop_at_step}, but the checkpoint is at step {position.step}; raise train.stop_at_step or set it "
            "to null, or resume from an earlier checkpoint with --resume DIR."
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


def _changed_for_data(saved: RunConfig, config: RunConfig) -> list[str]:
    """A sentence for each key that decides with data and tokenizer what a step is trained on."""
    keys = ("train.seed", "data.reset_at_document_boundaries", "data.eod_token")
    values = ((name, value_of(saved, name), value_of(config, name)) for name in keys)
    return [f"{name} was {describe_value(old)} and is {describe_value(new)}" for name, old, new in values if old != new]


def _changed_tokenizer(path: Path, attached: Mapping[str, bytes], current: Mapping[str, bytes]) -> list[str]:
    """A sentence if both have a tokenizer and it is not the same one, whatever the names of the files."""
    if not attached or not current or list(attached.values()) == list(current.values()):
        return []
    return [f"its tokenizer is {', '.join(str(path / name) for name in attached)}, and data.tokenizer is of other content"]


def _check_data(path: Path, differences: list[str]) -> None:
    if differences:
        raise CheckpointMismatchError(
            f"{path} was trained on other data or in another order of samples: {'; '.join(differences)}; restore what was changed, "
            "or accept the change with --set data.allow_fingerprint_change=true."
        )
