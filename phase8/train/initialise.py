"""The first weights of a new run taken from another model (`checkpoint.initialise_from`): step 0, with data, schedule and optimizer of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phase8.checkpoint.load import Checkpoint, list_checkpoints
from phase8.checkpoint.model_source import open_model, tokenizer_of
from phase8.checkpoint.run_metadata import run_metadata
from phase8.checkpoint.state import require_fit, restore_state
from phase8.checkpoint.weight_files import WeightFiles
from phase8.config.describe import describe_value
from phase8.config.model_keys import FIRST_VALUES, model_differences
from phase8.config.schema import RunConfig
from phase8.data.content import content_digest
from phase8.data.tokenizer import Tokenizer
from phase8.errors import CheckpointError, CheckpointMismatchError
from phase8.plan.whole_config import shapes_only
from phase8.train.learner import Learner
from phase8.train.restore import restore_together
from phase8.train.run_directory import RunDirectory

_Differences = Mapping[str, tuple[Any, Any]]  # key of the model section -> what it was, what it is
# Weights of other heads have the same shapes and are another model all the same.
_OF_SHAPES = ("num_heads", "head_size")
# The weights of a head are there or not, by a key that their name does not tell.
_OF_HEAD = "tie_embeddings"


@dataclass(frozen=True)
class Origin:
    """Where the first weights of a run came from.

    Args:
        path: The directory.
        step: Optimizer steps that they had seen; None: it does not say.
        differences: What the run does with them that the model they come from did not, a sentence each.
    """

    path: Path
    step: int | None
    differences: tuple[str, ...]

    def __str__(self) -> str:
        return f"initialised from {self.path}" + ("" if self.step is None else f", step {self.step:,}")

    @property
    def fields(self) -> dict[str, str | int | None]:
        """What the record of the run says of it."""
        return {"source": str(self.path), "source_step": self.step, "message": "; ".join(self.differences) or None}


def initialise_run(
    config: RunConfig, learner: Learner, tokenizer: Tokenizer | None, *, directory: RunDirectory, resume: str, say: Callable[[str], None]
) -> Origin | None:
    """Gives a run that begins the weights that its config names, on all ranks; None: it names none, or the run goes on from a checkpoint.

    Args:
        config: Of the run.
        learner: With its first weights; keeps them when this fails.
        tokenizer: Of the run's data.
        directory: Of the run; nothing is written there.
        resume: As for `build_run`.
        say: Shows a line.

    Raises:
        CheckpointError: There are no such weights, they are damaged, or do not fit the model.
    """
    source = config.checkpoint.initialise_from
    if source is None:
        return None

    differences: list[str] = []

    def restore(checkpoint: Checkpoint) -> None:
        different = model_differences(run_metadata(checkpoint).config.model, config.model)
        _check_fit(checkpoint, config, different)
        differences.extend(_model_sentences(different))
        differences.extend(_tokenizer_sentences(checkpoint, tokenizer))
        restore_state(checkpoint, learner.stage.module, None, is_part=learner.mesh.pp.size > 1, widen=True)
        learner.shards.read_again()

    is_first = learner.mesh.rank == 0
    begins = is_first and (resume == "none" or (resume == "auto" and not list_checkpoints(directory.checkpoints)))
    try:
        checkpoint = restore_together(Path(source) if begins else None, restore, is_first=is_first, open_at=open_model)
    except CheckpointError as error:
        raise type(error)(f"checkpoint.initialise_from: {error}") from None
    if checkpoint is None:
        return None
    origin = Origin(checkpoint.path, None if isinstance(checkpoint, WeightFiles) else checkpoint.step, tuple(differences))
    say("\n  ".join([str(origin), *differences]))
    return origin


def _check_fit(checkpoint: Checkpoint, config: RunConfig, different: _Differences) -> None:
    """Refuses weights of another model, the same on every rank, whatever part of them it needs.

    Raises:
        CheckpointMismatchError: Names, shapes or heads differ.
    """
    _refuse_keys(checkpoint, different, (_OF_HEAD,))
    require_fit(checkpoint, shapes_only(config), widen=True)
    _refuse_keys(checkpoint, different, _OF_SHAPES)


def _refuse_keys(checkpoint: Checkpoint, different: _Differences, names: Sequence[str]) -> None:
    found = [f"model.{name} was {' and is '.join(map(describe_value, different[name]))}" for name in names if name in different]
    if found:
        raise CheckpointMismatchError(f"{checkpoint.path} is of another model: {', '.join(found)}; use the config it was saved with")


def _model_sentences(different: _Differences) -> Iterator[str]:
    for name, (before, after) in different.items():
        effect = ", without effect: it sets first values of weights, and those are read" if name in FIRST_VALUES else ""
        yield f"model.{name} was {before} and is {after}{effect}"


def _tokenizer_sentences(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> Iterator[str]:
    """Whether the ids of the run's data may mean other text than those that the weights have learned."""
    theirs = tokenizer_of(checkpoint)
    if theirs is None:
        return
    if tokenizer is None:
        yield f"{theirs} is the tokenizer of these weights, but the run has none: data.tokenizer is null"
    elif content_digest(theirs) != content_digest(tokenizer.path):
        yield f"{theirs} is the tokenizer of these weights, but that of the run, {tokenizer.path}, is another: an id may mean other text"
