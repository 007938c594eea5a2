"""One optimizer step: accumulate gradients over microbatches, clip, update."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from phase8.kernels.reference.cross_entropy import IGNORED_TARGET
from phase8.model.model import LanguageModel
from phase8.optim.clip import gradient_norm, step_clipped


@dataclass(frozen=True)
class Microbatch:
    """Inputs and targets of one forward.

    Args:
        tokens: Inputs [B, T].
        targets: The tokens that follow, IGNORED_TARGET where nothing is to be predicted [B, T].
        starts: True where a document begins that sees nothing before it [B, T]; None: boundaries are not reset.
        num_valid: Number of targets that count.
    """

    tokens: Tensor
    targets: Tensor
    starts: Tensor | None
    num_valid: int

    def to(self, device: torch.device) -> Microbatch:
        """The same on a device."""
        tokens, targets, starts = (None if x is None else x.to(device, non_blocking=True) for x in (self.tokens, self.targets, self.starts))
        return Microbatch(tokens, targets, starts, self.num_valid)


@dataclass(frozen=True)
class StepResult:
    """What a step measured.

    Args:
        loss: Mean loss in nats per valid target, over all microbatches.
        grad_norm: Global gradient norm before clipping.
        skipped: Loss or norm was not finite and the weights were left alone.
    """

    loss: float
    grad_norm: float
    skipped: bool


def split_sample(sample: dict[str, Tensor], *, reset_at_document_boundaries: bool) -> Microbatch:
    """Inputs and targets of T + 1 tokens; with resets, the first token of a document is not predicted from another document."""
    tokens, targets = sample["tokens"][:, :-1], sample["tokens"][:, 1:]
    if not reset_at_document_boundaries:
        return Microbatch(tokens, targets, None, targets.numel())
    starts = sample["document_starts"]
    targets = targets.masked_fill(starts[:, 1:], IGNORED_TARGET)
    return Microbatch(tokens, targets, starts[:, :-1], int((targets != IGNORED_TARGET).sum()))


def train_step(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    microbatches: Sequence[Microbatch],
    *,
    learning_rate: float,
    gradient_clip_norm: float,
    cuda_graphs: bool = False,
) -> StepResult:
    """Updates the weights once.

    The loss is a mean over the valid targets of all microbatches, so it does not depend on how the batch is cut.

    Args:
        model: Its gradients must be empty; they are emptied again.
        optimizer: Left alone when loss or gradient norm is not finite.
        microbatches: On the host or on the device.
        learning_rate: For this step.
        gradient_clip_norm: Largest global norm; 0: no clipping.
        cuda_graphs: The blocks replay CUDA graphs. Then gradients are zeroed instead of freed: one that lived in the memory of a
            graph would be overwritten by the next microbatch.
    """
    device = model.embedding.weight.device
    num_valid = max(sum(microbatch.num_valid for microbatch in microbatches), 1)
    total = torch.zeros((), device=device)
    for microbatch in microbatches:
        if cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        batch = microbatch.to(device)
        loss = model.loss_sum(batch.tokens, batch.targets, batch.starts) / num_valid
        loss.backward()
        total += loss.detach()
    norm = gradient_norm(model.parameters())
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    step_clipped(optimizer, norm, max_norm=gradient_clip_norm, finite=total.isfinite() & norm.isfinite())
    optimizer.zero_grad(set_to_none=not cuda_graphs)
    loss_value, norm_value = torch.stack((total, norm.to(total.dtype))).tolist()  # the only synchronisation of the step
    return StepResult(loss_value, norm_value, skipped=not (math.isfinite(loss_value) and math.isfinite(norm_value)))


@torch.no_grad()
def evaluate(model: LanguageModel, microbatches: Iterable[Microbatch], *, cuda_graphs: bool = False) -> tuple[float, int]:
    """Mean loss in nats per valid target, and the number of those targets."""
    device = model.embedding.weight.device
    total, num_valid = torch.zeros((), dtype=torch.float64, device=device), 0
    for microbatch in microbatches:
        if cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        batch = microbatch.to(device)
        total += model.loss_sum(batch.tokens, batch.targets, batch.starts)
        num_valid += batch.num_valid
    return total.item() / max(num_valid, 1), num_valid
