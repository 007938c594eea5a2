"""Recurrent decoding: one token at a time with carried state, constant memory and time per token at any context length."""

from __future__ import annotations

import torch
from torch import Tensor

from phase8.model.model import LanguageModel


class Decoder:
    """Reads a sequence piece by piece with carried state.

    The Phase 8 block carries a constant state; the transformer baseline carries every key and value.

    Args:
        model: The model, in evaluation or training mode (it has no dropout).
        batch_size: Sequences read side by side.
    """

    def __init__(self, model: LanguageModel, batch_size: int = 1):
        self._model = model
        self._states = model.empty_states(batch_size)
        self.num_tokens = 0

    @torch.inference_mode()
    def feed(self, tokens: Tensor) -> Tensor:
        """Reads the next tokens.

        Args:
            tokens: [B, T], any T.

        Returns:
            Logits of the token after the last one, fp32 [B, V].
        """
        hidden, self._states = self._model(tokens, states=self._states, first_position=self.num_tokens)
        self.num_tokens += tokens.shape[1]
        return self._model.logits(hidden[:, -1])
