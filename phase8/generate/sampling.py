"""Drawing tokens from logits, and text from a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from phase8.errors import CheckpointError, ConfigError
from phase8.generate.decode import Decoder
from phase8.model.model import LanguageModel


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is drawn.

    Args:
        temperature: Logits are divided by it; 0: always the likeliest token.
        top_k: Only the k likeliest tokens; 0: all.
        top_p: Only the likeliest tokens that together have this probability; 1: all.
        seed: Seed of the random draws.

    Raises:
        ConfigError: A value is out of range.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self):
        problems = []
        if not 0 <= self.temperature < float("inf"):
            problems.append(f"temperature is {self.temperature}, but a number of at least 0 is needed.")
        if self.top_k < 0:
            problems.append(f"top_k is {self.top_k}, but a whole number of at least 0 is needed; 0 keeps every token.")
        if not 0 <= self.seed < 2**63:
            problems.append(f"seed is {self.seed}, but a whole number from 0 to {2**63 - 1} is needed.")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p is {self.top_p}, but a number above 0 and at most 1 is needed; 1 keeps every token.")
        if problems:
            raise ConfigError(problems)


def generate_tokens(
    model: LanguageModel, prompt: Sequence[int], *, max_tokens: int, options: SamplingOptions, num_ids: int, stop_id: int | None = None
) -> Iterator[int]:
    """Token ids that continue a prompt, one at a time.

    Args:
        model: The model.
        prompt: At least one token id.
        max_tokens: Maximum number of tokens drawn.
        options: Sampling options.
        num_ids: Only ids below it are drawn, since a model's vocabulary may be padded beyond its tokenizer's.
        stop_id: Ends the text; not yielded.
    """
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(options.seed)
    decoder = Decoder(model)
    logits = decoder.feed(torch.tensor([list(prompt)], device=device))
    for remaining in reversed(range(max_tokens)):
        token = draw_token(logits[0, :num_ids], options, generator)
        if token == stop_id:
            return
        yield token
        if remaining:
            logits = decoder.feed(torch.tensor([[token]], device=device))


def draw_token(logits: Tensor, options: SamplingOptions, generator: torch.Generator) -> int:
    """Draws one token id from logits [V], on the CPU, so that a seed gives the same token on every device.

    Raises:
        CheckpointError: Some logits are not finite; the weights may be arbitrary numbers.
    """
    logits = logits.float().cpu()
    if not logits.isfinite().all():
        raise CheckpointError("the model computes logits that are not finite, so its weights are damaged or diverged; use an earlier checkpoint")
    if options.temperature == 0:
        return int(logits.argmax())
    # Relative to the largest, so that a tiny temperature cannot overflow.
    kept = _keep_likely((logits - logits.max()) / options.temperature, options)
    return int(torch.multinomial(kept.softmax(-1), 1, generator=generator))


def _keep_likely(logits: Tensor, options: SamplingOptions) -> Tensor:
    """`logits` with -inf for tokens that top_k or top_p exclude; the likeliest always stays."""
    if 0 < options.top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(options.top_k).values[-1], -torch.inf)
    if options.top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        logits = logits.masked_fill(torch.zeros_like(logits, dtype=torch.bool).scatter(0, order, before >= options.top_p), -torch.inf)
    return logits
