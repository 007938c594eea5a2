"""Resuming a run: position in the data, weights, and checks that config and data continue those of the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from phase8.checkpoint.load import Checkpoint
from phase8.checkpoint.random_state import capture_random_state, check_random_state, restore_random_state
from phase8.checkpoint.run_metadata import OF_A_RUN, RunMetadata, run_metadata
from phase8.config.batch import batch_shape
from phase8.config.describe import describe_value
from phase8.config.dotted import value_of
from phase8.config.load import config_to_mapping
from phase8.config.model_keys import model_differences, shape_differences
from phase8.config.model_section import ModelSection
from phase8.config.schema import RunConfig
from phase8.data.fingerprint_difference import describe_fingerprint_difference
from phase8.data.order_history import OrderHistory, changed, history_of
from phase8.errors import CheckpointMismatchError, ConfigError, first_few
from phase8.generate.restore import about_another_tokenizer
from phase8.observe.run_events import EVALUATIONS_CHANGED
from phase8.optim.schedule import learning_rate
from phase8.train.changed_keys import Consequence
from phase8.train.datasets import RunData
from phase8.train.engine.protocol import TrainingEngine


@dataclass
class Position:
    """The progress of a run.

    Args:
        step: Number of optimizer steps done, skipped ones included.
        samples_consumed: Number of sequences read, which is also the number of the next sample.
        tokens_seen: Number of tokens read.
        consecutive_skipped: Number of the latest steps in a row that were skipped.
        total_skipped: Number of skipped steps so far.
        recent_losses: Losses of the latest steps that were not skipped, with which spikes are detected.
        rolled_back_to: Step of the checkpoint to which the last rollback went; None: there was no rollback.
        rollbacks_in_a_row: Number of consecutive rollbacks to that checkpoint.
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
    validation_fingerprint: dict[str, Any] | None = None,
    order_history: dict[str, Any] | None = None,
    losses: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The metadata of a checkpoint, as plain JSON. Batch size None: none was chosen yet; settings None: no setting was automatic."""
    return {
        **({} if settings is None else {"settings": settings}),
        **({} if validation_fingerprint is None else {"validation_fingerprint": validation_fingerprint}),
        **({} if order_history is None else {"order_history": order_history}),
        **({} if losses is None else {"losses": losses}),
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
    data: RunData,
    attachments: Mapping[str, bytes],
    engine: TrainingEngine,
) -> tuple[Position, RunConfig]:
    """Loads weights, optimizer, random state and the order of the data, after checking that config and data continue those of the checkpoint.

    Args:
        checkpoint: Checkpoint from which the run continues.
        config: Config of the run.
        data: Data of the run, whose samples get the order that follows that of the checkpoint.
        attachments: Files that the run attaches to its checkpoints: the tokenizer, if it has one.
        engine: Engine into which the checkpoint is loaded.

    Returns:
        The position of the checkpoint, and the config of the run that saved it.

    Raises:
        CheckpointMismatchError: The checkpoint has another model, another optimizer, other data or another tokenizer, or the number of ranks
            would change the batch although the config does not ask for it.
    """
    metadata = run_metadata(checkpoint, needed=OF_A_RUN)
    saved, saved_fingerprint, random_state = metadata.config, metadata.data_fingerprint, metadata.random_state
    position = Position(**metadata.position.model_dump())
    _check_model(checkpoint.path, saved.model, config.model)
    _check_optimizer(checkpoint.path, saved, config)
    _check_batch(checkpoint.path, metadata.global_batch_size, config, engine.mesh.topology.data_parallel_size)
    attached = attached_to(checkpoint)  # a damaged tokenizer is found now, not at the first generation
    of_data = describe_fingerprint_difference(saved_fingerprint, data.fingerprint)
    differences = of_data + _changed_for_data(saved, config)
    if not config.data.allow_fingerprint_change:
        _check_data(checkpoint.path, differences + _changed_tokenizer(checkpoint.path, attached, attachments))
    elif differences:
        position.recent_losses.clear()  # beside losses on other data, all that follow might seem spikes
    check_random_state(random_state, engine.device)  # this raises before anything is changed
    engine.restore(checkpoint)
    restore_random_state(random_state, engine.device)
    history = history_of(metadata.order_history)
    data.train.follow(_continued(history, saved_fingerprint, data, position) if of_data else history)
    return position, saved


def _continued(history: OrderHistory, before: dict[str, Any], data: RunData, position: Position) -> OrderHistory:
    """The order of data that are others than those of a checkpoint. Where samples are cut otherwise, they are numbered as if they always were."""
    now = data.fingerprint
    if any(before[key] != now[key] for key in ("order_version", "sequence_length")):
        return OrderHistory()
    return changed(history, before, now, num_samples=position.samples_consumed)


def what_changes_mean(checkpoint: Checkpoint, config: RunConfig, data: RunData, position: Position) -> Iterator[Consequence]:
    """What changes mean, where no key tells it alone: of data, whose samples follow, of their tokenizer, held-out data, and the schedule.

    Args:
        checkpoint: Checkpoint from which the run continues.
        config: Config of the run.
        data: Data of the run.
        position: Position of the checkpoint.
    """
    metadata = run_metadata(checkpoint, needed=OF_A_RUN)
    for sentence in _other_samples(metadata, config, data, position):
        yield Consequence("data_changed", sentence)
    if data.tokenizer is not None and (sentence := about_another_tokenizer(checkpoint, data.tokenizer, of="the run")) is not None:
        yield Consequence("data_changed", sentence)
    if (sentence := _other_evaluations(metadata, config, data)) is not None:
        yield Consequence(EVALUATIONS_CHANGED, sentence)
    if (sentence := _another_schedule(metadata.config, config, position.step)) is not None:
        yield Consequence("schedule_changed", sentence)


def _other_samples(metadata: RunMetadata, config: RunConfig, data: RunData, position: Position) -> Iterator[str]:
    """How samples go on, in sentences, where they are not those that would have followed."""
    is_changed = bool(describe_fingerprint_difference(metadata.data_fingerprint, data.fingerprint))
    if is_changed and data.train.order.begin == position.samples_consumed:
        epochs = data.epochs(position.samples_consumed).items()
        yield "data: " + ", ".join(f"{name} {'begins' if read == 0 else f'goes on after {read:.4g} epochs'}" for name, read in epochs)
    elif is_changed:
        yield (
            f"samples go on with number {position.samples_consumed:,} in the order of the data as they are now, as if they had been so from the "
            "beginning: some windows come again and others are left out, and epochs count as if it had been so"
        )
    if metadata.config.train.seed != config.train.seed:
        yield "samples come in the order of another seed: of the epochs that have begun some windows come again, and others are left out"


def _other_evaluations(metadata: RunMetadata, config: RunConfig, data: RunData) -> str | None:
    """A sentence if losses of evaluations do not compare with those before; None: they do, or that is unknown."""
    before, now = metadata.validation_fingerprint, data.validation_fingerprint
    if before is None or now is None:
        return None
    if differences := describe_fingerprint_difference(before, now):
        return f"evaluations are on other data, whose losses do not compare with those before: {differences[0]}"
    for key in ("train.evaluation_sequences", "data.reset_at_document_boundaries"):
        was, value = value_of(metadata.config, key), value_of(config, key)
        if was != value:
            return f"losses of evaluations do not compare with those before: {key} was {describe_value(was)} and is {describe_value(value)}"
    return None


def _another_schedule(saved: RunConfig, config: RunConfig, step: int) -> str | None:
    """The learning rate with which a run goes on, in a sentence, where that is not the next one of the checkpoint's schedule; None: it is."""
    if step == 0 or step == config.train.num_steps:
        return None
    last, rate = _rate(saved, step), _rate(config, step + 1)
    is_over = step == saved.train.num_steps  # then the rate goes on only if it stays
    if rate == (last if is_over else _rate(saved, step + 1)):
        return None
    return f"the learning rate of step {step + 1:,} is {rate:.3g}, after {last:.3g} in step {step:,}"


def _rate(config: RunConfig, step: int) -> float:
    return learning_rate(step, config.optim, num_steps=config.train.num_steps)


def attached_to(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The files that are attached to a checkpoint, by name.

    Raises:
        CheckpointCorruptError: A file is missing or was altered.
    """
    return {name: checkpoint.attachment(name).read_bytes() for name in checkpoint.manifest.attachments}


def check_stop(config: RunConfig, position: Position) -> int:
    """The step at which this process stops.

    Raises:
        ConfigError: The checkpoint is already past this step.
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


def _as_written(value: object) -> str:
    return value if isinstance(value, str) else describe_value(value)


def _check_model(path: Path, saved: ModelSection, current: ModelSection) -> None:
    """Refuses a checkpoint of another model; only keys that the model's block reads are compared."""
    different = model_differences(saved, current)
    if different:
        keys = [f"model.{name} was {_as_written(was)} and is {_as_written(now)}" for name, (was, now) in different.items()]
        listed = first_few(keys, separator=", ")
        remedy = ", or begin a new run with its weights by checkpoint.initialise_from" if not shape_differences(saved, current) else ""
        raise CheckpointMismatchError(
            f"{path} is a checkpoint of another model: {listed}; use its config, another run.name, or --resume none{remedy}."
        )


def _check_optimizer(path: Path, saved: RunConfig, current: RunConfig) -> None:
    """Refuses a checkpoint whose optimizer keeps other state; moments in fp32 and in bf16 are converted into each other."""
    pairs = [(key, value_of(saved, key), value_of(current, key)) for key in ("optim.name", "optim.state_dtype")]
    listed = ", ".join(f"{key} was {was} and is {now}" for key, was, now in pairs if was != now and (key == "optim.name" or "fp8" in (was, now)))
    if listed:
        raise CheckpointMismatchError(
            f"{path} holds the state of another optimizer: {listed}; restore the key, or begin a new run with its weights by "
            "checkpoint.initialise_from."
        )


def _check_batch(path: Path, saved: int | None, config: RunConfig, data_parallel_size: int) -> None:
    """Refuses a batch size that the config does not state and that differs from the saved one; None: the checkpoint records no batch size."""
    current = batch_shape(config.train, config.parallel, data_parallel_size=data_parallel_size).global_batch_size
    if config.train.global_batch_size is None and saved not in (None, current):
        raise CheckpointMismatchError(
            f"{path} was trained with {saved} sequences a step, but train.global_batch_size is null, and {data_parallel_size} data-parallel "
            f"ranks would make it {current}; set it to {saved} to go on as before, or to {current} to accept the change."
        )


def _changed_for_data(saved: RunConfig, config: RunConfig) -> list[str]:
    """A sentence for each changed config key that, besides data and tokenizer, determines the tokens of a step."""
    keys = ("train.seed", "data.reset_at_document_boundaries", "data.eod_token")
    values = ((name, value_of(saved, name), value_of(config, name)) for name in keys)
    return [f"{name} was {describe_value(old)} and is {describe_value(new)}" for name, old, new in values if old != new]


def _changed_tokenizer(path: Path, attached: Mapping[str, bytes], current: Mapping[str, bytes]) -> list[str]:
    """A sentence if checkpoint and run have tokenizers of different content, whatever the names of their files."""
    if not attached or not current or list(attached.values()) == list(current.values()):
        return []
    return [f"its tokenizer is {', '.join(str(path / name) for name in attached)}, and data.tokenizer is of other content"]


def _check_data(path: Path, differences: list[str]) -> None:
    if differences:
        raise CheckpointMismatchError(
            f"{path} was trained on other data or in another order of samples: {first_few(differences)}; restore what was changed, "
            "or accept the change with --set data.allow_fingerprint_change=true."
        )
