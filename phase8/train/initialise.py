"""Initial weights of a new run from another model (`checkpoint.initialise_from`): it starts at step 0 with its own data, schedule and optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phase8.checkpoint.load import Checkpoint, list_checkpoints
from phase8.checkpoint.model_source import open_model, tokenizer_of
from phase8.checkpoint.quantization import require_as_trained
from phase8.checkpoint.run_metadata import run_metadata
from phase8.checkpoint.state import require_fit
from phase8.checkpoint.weight_files import WeightFiles
from phase8.config.describe import describe_value
from phase8.config.model_keys import FIRST_VALUES, model_differences, settings_towards, shape_differences
from phase8.config.model_section import ModelSection
from phase8.config.schema import RunConfig
from phase8.data.tokenizer import Tokenizer
from phase8.errors import CheckpointError, CheckpointMismatchError, first_few
from phase8.generate.restore import about_another_tokenizer
from phase8.plan.whole_config import shapes_only
from phase8.train.engine.protocol import TrainingEngine
from phase8.train.restore import restore_together
from phase8.train.run_directory import RunDirectory

_Differences = Mapping[str, tuple[Any, Any]]  # key of the model section -> value in the other model, value in the run
# Weights of a model with other heads may have the same shapes, but compute something else; a head that is tied does not show in the names of weights.
_OF_SAME_SHAPES = ("num_heads", "head_size", "tie_embeddings")


@dataclass(frozen=True)
class Origin:
    """The origin of a run's initial weights.

    Args:
        path: The directory of the weights.
        step: Optimizer steps of the model they come from; None: unknown.
        differences: What the run computes differently from that model, one sentence each.
    """

    path: Path
    step: int | None
    differences: tuple[str, ...]

    def __str__(self) -> str:
        return f"initialised from {self.path}" + ("" if self.step is None else f", step {self.step:,}")

    @property
    def fields(self) -> dict[str, str | int | None]:
        """The fields of the event in the run's metrics."""
        return {"source": str(self.path), "source_step": self.step, "message": "; ".join(self.differences) or None}


def initialise_run(
    config: RunConfig, engine: TrainingEngine, tokenizer: Tokenizer | None, *, directory: RunDirectory, resume: str
) -> Origin | None:
    """Loads the weights that the config names into a new run, on all ranks; returns None if it names none, or if the run resumes.

    Args:
        config: Config of the run.
        engine: Engine with its first weights; some may be overwritten if this fails.
        tokenizer: Tokenizer of the run's data.
        directory: Directory of the run; nothing is written there.
        resume: As for `build_run`.

    Raises:
        CheckpointError: The weights are missing or damaged, or do not fit the model.
    """
    source = config.checkpoint.initialise_from
    if source is None:
        return None

    differences: list[str] = []

    def restore(checkpoint: Checkpoint) -> None:
        require_as_trained(checkpoint)
        saved = run_metadata(checkpoint).config.model
        different = model_differences(saved, config.model)
        _check_fit(checkpoint, config, saved)
        differences.extend(_model_sentences(different))
        differences.extend(_tokenizer_sentences(checkpoint, tokenizer))
        engine.restore(checkpoint, weights_only=True)

    is_first = engine.mesh.rank == 0
    begins = is_first and (resume == "none" or (resume == "auto" and not list_checkpoints(directory.checkpoints)))
    try:
        checkpoint = restore_together(Path(source) if begins else None, restore, is_first=is_first, open_at=open_model)
    except CheckpointError as error:
        raise type(error)(f"checkpoint.initialise_from: {error}") from None
    if checkpoint is None:
        return None
    return Origin(checkpoint.path, None if isinstance(checkpoint, WeightFiles) else checkpoint.step, tuple(differences))


def _check_fit(checkpoint: Checkpoint, config: RunConfig, saved: ModelSection) -> None:
    """Refuses weights of another model; the result is the same on every rank, whatever part of the weights it needs.

    Raises:
        CheckpointMismatchError: Names, shapes or heads differ.
    """
    explained = shape_differences(saved, config.model)
    if any(name in explained for name in _OF_SAME_SHAPES):
        raise _another_model(checkpoint, config, saved, explained)
    try:
        require_fit(checkpoint, shapes_only(config), widen=True)
    except CheckpointMismatchError:
        if not explained:
            raise
        raise _another_model(checkpoint, config, saved, explained) from None


def _another_model(checkpoint: Checkpoint, config: RunConfig, saved: ModelSection, different: _Differences) -> CheckpointMismatchError:
    """The error about keys that give the run's model another shape, with the settings that give it the shape of the weights."""
    keys = [f"model.{name} was {describe_value(was)} and is {describe_value(now)}" for name, (was, now) in different.items()]
    mixture = f", or begin with a mixture that `tools/reshard_checkpoint.py {checkpoint.path} DST --upcycle-experts {config.model.num_experts}` makes"
    return CheckpointMismatchError(
        f"{checkpoint.path} is of another model: {first_few(keys, separator=', ')}; the run has its shape with "
        f"--set {' '.join(settings_towards(saved, config.model))}{mixture if saved.ffn == 'swiglu' and config.model.ffn == 'moe' else ''}"
    )


def _model_sentences(different: _Differences) -> Iterator[str]:
    for name, (before, after) in different.items():
        effect = ", without effect: it sets first values of weights, and those are read" if name in FIRST_VALUES else ""
        yield f"model.{name} was {before} and is {after}{effect}"


def _tokenizer_sentences(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> Iterator[str]:
    """Sentences about token ids that may mean other text in the run's data than in the data that trained the weights."""
    if tokenizer is not None:
        sentence = about_another_tokenizer(checkpoint, tokenizer, of="the run")
        yield from () if sentence is None else (sentence,)
    elif (theirs := tokenizer_of(checkpoint)) is not None:
        yield f"{theirs} is the tokenizer of these weights, but the run has none: data.tokenizer is null"
