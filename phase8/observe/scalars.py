"""The figures of a metrics line as scalars by tag, as TensorBoard, wandb and trackio show them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phase8.observe.routing import routing_scalars

_TAGS = {
    "loss": "loss/train",
    "validation_loss": "loss/validation",
    "learning_rate": "optimizer/learning_rate",
    "grad_norm": "optimizer/grad_norm",
    "tokens": "progress/tokens",
    "tokens_per_second": "speed/tokens_per_second",
    "step_seconds": "speed/step_seconds",
    "data_wait_seconds": "speed/data_wait_seconds",
    "mfu": "speed/mfu",
    "peak_memory_bytes": "memory/peak_bytes",
}


def scalars_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Tag -> figure of a metrics line as `MetricsWriter` writes it; empty for an event, and without figures that are null."""
    if "event" in record:
        return {}
    scalars = {tag: record[key] for key, tag in _TAGS.items() if record.get(key) is not None}
    scalars.update({f"loss/{name}": loss for name, loss in record.get("auxiliary_losses", {}).items() if loss is not None})
    scalars.update(routing_scalars(record.get("routing", {})))
    for name, source in record.get("validation_sources", {}).items():
        if source["loss"] is not None:
            scalars[f"loss/validation/{name}"] = source["loss"]
    return scalars
