"""What every section of the schema is made of: frozen models, whose fields are documented config keys."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


def key(default: Any, description: str) -> Any:
    """A documented config key."""
    return Field(default=default, description=description)


class Section(BaseModel):
    """Base of every section: immutable, unknown keys forbidden, no silent conversion between types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())
