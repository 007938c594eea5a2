"""What a checkpoint says of weights of few bits, `quantization` of its config.

| `quantization` | weights |
|---|---|
| none | as they are trained |
| `{"format": "int8", "dynamic": true or false}` | `precision.int8.Int8` |
| `{"format": "int4", "group": 32, 64, 128 or 256}` | `precision.int4.Int4` |
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from phase8.checkpoint.load import Checkpoint
from phase8.checkpoint.tensor_file import DTYPE_NAMES
from phase8.checkpoint.untrusted import printable, shortened, shown
from phase8.errors import CheckpointCorruptError, CheckpointError
from phase8.precision.int4 import Int4
from phase8.precision.int8 import Int8
from phase8.precision.weight_format import IN_WORDS, WeightFormat

# What weights of few bits are stored in beside the dtypes of other weights.
NUMBER_DTYPES = tuple(DTYPE_NAMES[each.tensors((1, 1))["weight"][0]] for each in (Int8(is_dynamic=False), Int4()))
_READ = '{"format": "int8", "dynamic": true or false} and {"format": "int4", "group": 32, 64, 128 or 256}'


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _Int8(_Record):
    format: Literal["int8"] = "int8"
    dynamic: bool


class _Int4(_Record):
    format: Literal["int4"] = "int4"
    group: Literal[32, 64, 128, 256]


_RECORDS: TypeAdapter[_Int8 | _Int4] = TypeAdapter(Annotated[_Int8 | _Int4, Field(discriminator="format")])


def as_record(weight_format: Int8 | Int4) -> dict[str, Any]:
    """What `quantization` says of a format."""
    if isinstance(weight_format, Int8):
        return _Int8(dynamic=weight_format.is_dynamic).model_dump()
    return _RECORDS.validate_python({"format": "int4", "group": weight_format.group}).model_dump()


def quantization_of(checkpoint: Checkpoint) -> WeightFormat | None:
    """The format of the weights of a checkpoint, if they have few bits; None: they are as they are trained.

    Raises:
        CheckpointCorruptError: They are stored in a way that this release does not know.
    """
    config = checkpoint.metadata.get("config")
    found = config.get("quantization") if isinstance(config, dict) else None
    if found is None:
        return None
    try:
        record = _RECORDS.validate_python(found)
    except ValidationError:
        problem = printable(shortened(f"quantization is {shown(found)}"))
        raise CheckpointCorruptError(
            f"{checkpoint.path}: its metadata cannot be used: {problem}, but this release reads {_READ}; use another checkpoint"
        ) from None
    return Int8(is_dynamic=record.dynamic) if isinstance(record, _Int8) else Int4(group=record.group)


def require_as_trained(checkpoint: Checkpoint) -> None:
    """Refuses weights of few bits where those of training are needed.

    Raises:
        CheckpointError: The weights have few bits.
    """
    if (found := quantization_of(checkpoint)) is not None:
        raise CheckpointError(
            f"{checkpoint.path} has weights of {IN_WORDS[found.bits]} bits, which are for generation and evaluation alone; give the checkpoint that "
            "they are from"
        )
