"""How many sequences a forward without gradients reads side by side: as many as the memory holds, by the plan, up to a number that fills a device."""

from __future__ import annotations

import torch

from phase8 import accelerator
from phase8.model.model import LanguageModel
from phase8.plan.activations import trace_activations
from phase8.plan.memory import usable_bytes

_TOKENS_ON_GPU = 1 << 17
_TOKENS_ON_CPU = 1 << 13
_LOGITS_BYTES = 3 << 30  # of the part of the tokens whose logits exist at the same time, their exponentials included


def planned_batch_size(model: LanguageModel, *, length: int, packed: bool, device: torch.device) -> int:
    """The number of sequences of a forward.

    A block at work holds at most what its backward would need, and the result of a product beside it.

    Args:
        model: The model, on its device.
        length: Tokens of a sequence.
        packed: Document boundaries are reset.
        device: The device.
    """
    memory = accelerator.free_and_total_bytes(device) if accelerator.is_accelerator(device.type) else None
    if memory is None:
        return max(_TOKENS_ON_CPU // length, 1)
    section = model.section.model_copy(update={"sequence_length": length})
    traced = trace_activations(
        section, dtype=model.dtype, micro_batch_size=1, packed=packed, device_type=device.type, without_mixer=False
    )
    fits = (usable_bytes(memory[0], is_recorded=False) - _LOGITS_BYTES) // (2 * traced.block)
    return max(min(fits, _TOKENS_ON_GPU // length), 1)
