"""The metadata of a training run in a checkpoint, parsed strictly: a correct checksum does not prove that a run wrote it.

Types, ranges, and consistency with the sizes of the tensors are checked here, before anything is built or changed.

| key of another release | treatment |
|---|---|
| a key of the model that an earlier release did not write | has the value that every model had by then (`_BEFORE_THE_KEY`), or else its default |
| another key that an earlier release did not write | has its default |
| an unknown key of `config` outside the model section | is dropped, since it only concerned training |
| an unknown key of `config.model` or of `position` | is refused, and no older checkpoint takes its place: ignoring it could misread weights or data |
| an unknown key of `data_fingerprint` or `validation_fingerprint` | is kept, since it is compared with that of the data |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from phase8.checkpoint.load import Checkpoint
from phase8.checkpoint.model_sizes import sizes_problem
from phase8.checkpoint.quantization import quantization_of
from phase8.checkpoint.random_state import check_random_state
from phase8.checkpoint.state import MODEL_PREFIX
from phase8.checkpoint.untrusted import printable, shortened, shown
from phase8.config.describe import iterate_keys
from phase8.config.load import config_from_mapping
from phase8.config.model_section import ModelSection
from phase8.config.schema import RunConfig
from phase8.config.values import SequenceCount
from phase8.errors import CheckpointCorruptError, CheckpointError, CheckpointMismatchError, ConfigError

OF_A_MODEL = ("config",)
OF_A_RUN = ("config", "position", "data_fingerprint", "random_state")
_MOST = 2**63 - 1
# Whole numbers up to it are exact in float64, which charts and JSON readers use: 9e15 is two hundred times the tokens of the largest runs
# so far. A product of steps, batch size and sequence length is no bound: batch size and length may have changed during the run, and
# rollbacks skip samples.
_MOST_READ = 2**53
_LONGEST_SEQUENCE = 2**31 - 1  # the schema's bound, `TokenCount`
_MOST_LOSSES = 1024
_LONGEST_NAME = 4096
_BEFORE_THE_KEY = {"global_path": "linear", "local_qk_norm": False, "global_gate": "scalar", "global_activation": "none"}
_KEYS = {name for name, _ in iterate_keys()}
_SECTIONS = {name.rpartition(".")[0] for name in _KEYS}

Count = Annotated[int, Field(ge=0, le=_MOST)]
ReadCount = Annotated[int, Field(ge=0, le=_MOST_READ)]
PositiveCount = Annotated[int, Field(ge=1, le=_MOST)]
Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Loss = Annotated[float, Field(allow_inf_nan=False)]


def _file_name(value: Any) -> str:
    """The name of a file, which need not be UTF-8: Python has lone surrogates in its place, and a string with them has no length for pydantic."""
    if type(value) is not str or len(value) > _LONGEST_NAME:
        raise ValueError(f"a string of at most {_LONGEST_NAME} characters is needed")
    return value


Name = Annotated[Any, AfterValidator(_file_name)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class StoredPosition(_Record):
    """The progress of a run, with the fields of `train.resume.Position`; fields that earlier releases did not write have a default."""

    step: Count
    samples_consumed: ReadCount
    tokens_seen: ReadCount
    consecutive_skipped: Count = 0
    total_skipped: Count = 0
    recent_losses: Annotated[list[_Loss], Field(max_length=_MOST_LOSSES)] = []
    rolled_back_to: Count | None = None
    rollbacks_in_a_row: Count = 0


class _Pair(_Record):
    """A `.bin/.idx` pair or a range of its documents; fields of later releases are compared, not read."""

    model_config = ConfigDict(extra="allow")

    name: Name
    idx_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bin_bytes: Count
    num_tokens: Count
    documents: Annotated[list[Count], Field(min_length=2, max_length=2)] | None = None


class _Source(_Pair):
    """A data set that is a single pair."""

    weight: Weight


class _SourceOfPairs(_Record):
    """A data set of several pairs."""

    model_config = ConfigDict(extra="allow")

    name: Name
    weight: Weight
    files: list[_Pair]


_KINDS_OF_SOURCE = _ONE_PAIR, _SEVERAL_PAIRS = ("<one pair>", "<several pairs>")


def _kind_of_source(value: Any) -> str:
    return _SEVERAL_PAIRS if isinstance(value, dict) and "files" in value else _ONE_PAIR


class _Fingerprint(_Record):
    """A fingerprint written by `data.fingerprint.data_fingerprint`; that of an imported model has no sources."""

    model_config = ConfigDict(extra="allow")

    order_version: PositiveCount
    sequence_length: PositiveCount
    sources: list[
        Annotated[Annotated[_Source, Tag(_ONE_PAIR)] | Annotated[_SourceOfPairs, Tag(_SEVERAL_PAIRS)], Discriminator(_kind_of_source)]
    ]


class _Draws(_Record):
    key: ReadCount
    drawn: ReadCount


class _Left(_Record):
    source: Annotated[Annotated[_Source, Tag(_ONE_PAIR)] | Annotated[_SourceOfPairs, Tag(_SEVERAL_PAIRS)], Discriminator(_kind_of_source)]
    draws: _Draws


class _OrderHistory(_Record):
    """An order of samples that is not that of the first blend, as `data.order_history.OrderHistory.record` gives it."""

    begin: ReadCount
    draws: list[_Draws]
    left: list[_Left]


class StoredLosses(_Record):
    """What a run had measured of late, as `train.recent_losses.RecentLosses.record` gives it."""

    training: _Loss
    num_steps: PositiveCount
    validation_step: Count | None = None
    validation: _Loss | None = None


class _Metadata(_Record):
    """The keys beside the config, any of which an imported model may lack; unknown keys are ignored."""

    model_config = ConfigDict(extra="ignore")

    position: StoredPosition | None = None
    global_batch_size: SequenceCount | None = None
    data_fingerprint: _Fingerprint | None = None
    validation_fingerprint: _Fingerprint | None = None
    order_history: _OrderHistory | None = None
    losses: StoredLosses | None = None
    random_state: dict[str, Any] | None = None
    torch_version: Annotated[str, Field(max_length=1000)] | None = None


@dataclass(frozen=True)
class RunMetadata:
    """The metadata of a checkpoint; None for a key that is missing.

    Args:
        config: Config of the run that saved it; its model section agrees with the tensors.
        position: Progress of the run.
        global_batch_size: Sequences of its last step.
        data_fingerprint: Fingerprint of its data, as plain JSON.
        validation_fingerprint: The same of what it was evaluated on.
        order_history: What came before its blend, as plain JSON; None: nothing.
        random_state: Argument of `restore_random_state`.
        losses: What the run had measured of late.
    """

    config: RunConfig
    position: StoredPosition | None
    global_batch_size: int | None
    data_fingerprint: dict[str, Any] | None
    validation_fingerprint: dict[str, Any] | None
    order_history: dict[str, Any] | None
    random_state: dict[str, Any] | None
    losses: StoredLosses | None


def run_metadata(checkpoint: Checkpoint, *, needed: Sequence[str] = OF_A_MODEL) -> RunMetadata:
    """Parses the metadata of a checkpoint that a training run or an import has written.

    Args:
        checkpoint: Its manifest is intact; its metadata are not trusted.
        needed: Keys that must be present.

    Raises:
        CheckpointError: A needed key is missing.
        CheckpointMismatchError: A key that only a later release can know.
        CheckpointCorruptError: A value that no run records, or sizes that contradict the tensors.
    """
    found, path = checkpoint.metadata, checkpoint.path
    missing = [key for key in ("config", *needed) if found.get(key) is None]
    if missing:
        raise CheckpointError(f"{path} holds no {missing[0]}, which a training run records; give a checkpoint written by launch/pretrain.py.")
    config = _config_of(found["config"], path)
    try:
        metadata = _Metadata.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        *places, name = (str(place) for place in first["loc"] if place not in _KINDS_OF_SOURCE)
        if first["type"] == "missing":
            _refuse(path, f"{'.'.join(places)} lacks {name}")
        if first["type"] == "extra_forbidden":
            _refuse_later_key(path, ".".join([*places, name]))
        _refuse(path, f"{'.'.join([*places, name])} is {shown(first['input'])}: {first['msg']}")
    if metadata.position is not None and (problem := _position_problem(metadata.position, checkpoint.step)) is not None:
        _refuse(path, problem)
    if metadata.order_history is not None and (problem := _history_problem(metadata, metadata.order_history)) is not None:
        _refuse(path, problem)
    shapes = {
        name.removeprefix(MODEL_PREFIX): checkpoint.entry(name).shape for name in checkpoint.tensor_names if name.startswith(MODEL_PREFIX)
    }
    quantization = quantization_of(checkpoint)
    packed = None if quantization is None else lambda shape: quantization.tensors(shape)["weight"][1]
    if (problem := sizes_problem(config.model, shapes, packed=packed)) is not None:
        _refuse(path, f"its config does not fit its tensors: {problem}")
    if metadata.random_state is not None:
        try:
            check_random_state(metadata.random_state)
        except CheckpointCorruptError as error:
            raise CheckpointCorruptError(f"{path}: {error}") from error
    return RunMetadata(
        config=config,
        position=metadata.position,
        global_batch_size=metadata.global_batch_size,
        data_fingerprint=found.get("data_fingerprint"),
        validation_fingerprint=found.get("validation_fingerprint"),
        order_history=found.get("order_history"),
        random_state=metadata.random_state,
        losses=metadata.losses,
    )


def _config_of(tree: Any, path: Path) -> RunConfig:
    if not isinstance(tree, dict):
        _refuse(path, f"config is {shown(tree)}, but an object of sections is needed")
    if isinstance(model := tree.get("model"), dict) and (later := model.keys() - ModelSection.model_fields.keys()):
        _refuse_later_key(path, f"model.{min(later)}")
    try:
        return stored_config(tree)
    except ConfigError as error:
        _refuse(path, error.problems[0].removesuffix("."))


def stored_config(tree: dict[str, Any]) -> RunConfig:
    """Parses the config in a checkpoint of any release from plain JSON.

    Raises:
        ConfigError: This release cannot read it.
    """
    known = _known_keys(tree)
    if isinstance(model := known.get("model", {}), dict):
        known["model"] = _BEFORE_THE_KEY | model
    return config_from_mapping(known, source="config")


def _known_keys(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A stored config without the keys that this release does not know, except in the model section."""
    result = {}
    for key, value in tree.items():
        name = prefix + key
        if name in _SECTIONS and name != "model" and isinstance(value, dict):
            result[key] = _known_keys(value, f"{name}.")
        elif "." not in key and (name in _KEYS or name in _SECTIONS):
            result[key] = value
    return result


def _position_problem(position: StoredPosition, step: int) -> str | None:
    """Why no run can have these counters, or None.

    Every step reads at least one sequence. A rollback skips samples, so few tokens may belong to many samples, but never more
    than the longest sequences hold.
    """
    if position.step != step:
        return f"position.step is {position.step}, but the checkpoint is of step {step}"
    for name, value in (("samples_consumed", position.samples_consumed), ("tokens_seen", position.tokens_seen)):
        if value < position.step:
            return f"position.{name} is {value}, but each of {position.step} steps reads at least one"
    if position.tokens_seen > position.samples_consumed * _LONGEST_SEQUENCE:
        return f"position.tokens_seen is {position.tokens_seen}, more than {position.samples_consumed} sequences can hold"
    if position.consecutive_skipped > position.total_skipped:
        return f"position.consecutive_skipped is {position.consecutive_skipped}, but position.total_skipped is {position.total_skipped}"
    if position.rolled_back_to is not None and position.rolled_back_to > position.step:
        return f"position.rolled_back_to is {position.rolled_back_to}, but the checkpoint is of step {position.step}"
    return None


def _history_problem(metadata: _Metadata, history: _OrderHistory) -> str | None:
    """Why no order of samples can have come about like this, or None."""
    if metadata.position is not None and history.begin > metadata.position.samples_consumed:
        return f"order_history.begin is {history.begin}, but the run has read {metadata.position.samples_consumed} samples"
    if metadata.data_fingerprint is not None and len(history.draws) != len(metadata.data_fingerprint.sources):
        return f"order_history.draws has {len(history.draws)} entries, but data_fingerprint has {len(metadata.data_fingerprint.sources)} sources"
    keys = [draws.key for draws in (*history.draws, *(left.draws for left in history.left))]
    return None if len(set(keys)) == len(keys) else "order_history has the same key twice"


def _refuse_later_key(path: Path, name: str) -> NoReturn:
    raise CheckpointMismatchError(
        f"{path}: its metadata cannot be used: unknown key {printable(shortened(name))}, which a later release may know; use that release, or "
        "another checkpoint"
    )


def _refuse(path: Path, problem: str) -> NoReturn:
    raise CheckpointCorruptError(f"{path}: its metadata cannot be used: {printable(shortened(problem))}; use another checkpoint")
