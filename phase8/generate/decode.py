"""Recurrent decoding: prompts in pieces through the kernels, then one token at a time with constant memory and time at any context length.

Shapes: B sequences side by side, T tokens of a prompt, n sequences of a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from phase8 import accelerator
from phase8.errors import CheckpointError
from phase8.generate.sampling import SamplingOptions, draw_tokens
from phase8.model.model import LanguageModel

PIECE_TOKENS = 8192  # of a prompt at once: memory of a longer one is bounded
# On a CPU, of all sequences together, so that its caches hold what a layer computes; of one sequence, at least a chunk of its recurrence.
CPU_PIECE_TOKENS, SHORTEST_CPU_PIECE = 512, 64
_CAPACITY_STEP = 256  # the least room that a transformer's keys and values get
_EAGER_STEPS = 2  # what libraries choose at a first call, and kernels that are compiled then, cannot be recorded


def require_finite(checksum: Tensor) -> None:
    """Refuses a model by a sum of its logits, of which the largest would be no prediction.

    Raises:
        CheckpointError: Some logits were not finite; the weights may be arbitrary numbers.
    """
    if not checksum.isfinite():
        raise CheckpointError("the model computes logits that are not finite, so its weights are damaged or diverged; use an earlier checkpoint")


class Decoder:
    """Reads sequences piece by piece with carried state.

    The Phase 8 block carries a constant state; the transformer baseline carries every key and value.

    Args:
        model: The model, in evaluation or training mode (it has no dropout).
        batch_size: Sequences read side by side.
    """

    def __init__(self, model: LanguageModel, batch_size: int = 1):
        self._model = model
        self.states = model.empty_states(batch_size)
        self.num_tokens = 0
        is_on_cpu = model.head_weight.device.type == accelerator.CPU
        self._piece_tokens = max(CPU_PIECE_TOKENS // batch_size, SHORTEST_CPU_PIECE) if is_on_cpu else PIECE_TOKENS

    @torch.inference_mode()
    def feed(self, tokens: Tensor) -> Tensor:
        """Reads the next tokens.

        Args:
            tokens: [B, T], any T.

        Returns:
            Logits of the token after the last one, fp32 [B, V].
        """
        for piece in tokens.split(self._piece_tokens, dim=1):
            hidden, self.states = self._model(piece, states=self.states, first_position=self.num_tokens)
            self.num_tokens += piece.shape[1]
        return self._model.logits(hidden[:, -1])


@dataclass(frozen=True)
class Drawn:
    """Tokens on their way from the device.

    Args:
        tokens: Token ids [n, B], on the host.
        checksum: Sum of all logits so far, which is finite if they were, on the host.
        arrived: Event after the copies; None: they are there.
    """

    tokens: Tensor
    checksum: Tensor
    arrived: torch.Event | None

    def wait(self) -> list[list[int]]:
        """The tokens of each step, for all sequences.

        Raises:
            CheckpointError: Some logits were not finite; the weights may be arbitrary numbers.
        """
        if self.arrived is not None:
            self.arrived.synchronize()
        require_finite(self.checksum)
        return self.tokens.tolist()


class DecodingLoop:
    """Draws tokens for several sequences side by side; each has a position of its own, and its tokens do not depend on the others.

    On a GPU a step is recorded once as a CUDA graph, from the state to the drawn token, and replayed: the host only counts.

    Args:
        model: A whole model on one device.
        batch_size: Sequences B.
        options: Sampling options; each sequence has a seed of its own.
        num_ids: Only ids below it are drawn, since a model's vocabulary may be padded beyond its tokenizer's.
        most_at_once: Largest number of tokens of an `advance`.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        batch_size: int = 1,
        options: SamplingOptions,
        num_ids: int,
        most_at_once: int = 1,
    ):
        self._model, self._options, self._num_ids = model, options, num_ids
        self._step = model.prepared(capacity=_CAPACITY_STEP)
        self._grows = model.section.block == "transformer"
        self._states = self._step.empty_states(batch_size)
        device = self.device
        self.batch_size, self.most_at_once = batch_size, most_at_once
        self.is_ahead = accelerator.records_steps(device.type)  # the device draws while the host looks at earlier tokens
        self._tokens, self._position, self._seeds = torch.zeros(3, batch_size, dtype=torch.int64, device=device).unbind()
        self._drawn = torch.zeros(most_at_once, batch_size, dtype=torch.int64, device=device)
        self._column = torch.zeros(1, dtype=torch.int64, device=device)
        self._checksum = torch.zeros((), device=device)
        self._positions_on_host = [0] * batch_size  # of a row that is not in use, too
        self._num_eager_steps, self._graph = 0, None

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self._step.head.weight.device

    @property
    def _longest(self) -> int:
        """Largest position of a row, which becomes smaller where another sequence takes the place of the longest one."""
        return max(self._positions_on_host)

    @torch.inference_mode()
    def admit(self, rows: Sequence[int], prompts: Tensor, seeds: Sequence[int]) -> Drawn:
        """Reads prompts of one length in the place of the sequences in some rows, and draws the token after each.

        Args:
            rows: Rows of the sequences [n].
            prompts: Token ids [n, T], or those of one prompt for all rows [1, T].
            seeds: Seed of each sequence [n].
        """
        decoder = Decoder(self._model, len(prompts))
        logits = decoder.feed(prompts.to(self.device))[:, : self._num_ids]
        for row in rows:
            self._positions_on_host[row] = decoder.num_tokens
        self._make_room(decoder.num_tokens)
        at = torch.tensor(list(rows), device=self.device)
        for state, step, read in zip(self._states, self._step.blocks, decoder.states, strict=True):
            step.mixer.fill(state, at, read.as_window())
        self._position[at] = decoder.num_tokens
        self._seeds[at] = torch.tensor(list(seeds), dtype=torch.int64, device=self.device)
        self._checksum.add_(logits.sum())
        drawn = draw_tokens(logits.expand(len(at), -1), self._seeds[at], self._position[at], self._options)
        self._tokens[at] = drawn
        return self._on_the_way(drawn[None])

    @torch.inference_mode()
    def advance(self, num_tokens: int) -> Drawn:
        """Draws the next tokens of all sequences; the host does not wait for them.

        Args:
            num_tokens: Tokens of each sequence n, at most `most_at_once`.
        """
        self._make_room(self._longest + num_tokens)
        self._column.zero_()
        for _ in range(num_tokens):
            self._take_step()
            self._positions_on_host = [position + 1 for position in self._positions_on_host]
        return self._on_the_way(self._drawn[:num_tokens])

    def _take_step(self) -> None:
        if not accelerator.records_steps(self.device.type) or self._num_eager_steps < _EAGER_STEPS:
            self._num_eager_steps += 1
            self._advance_by_one()
            return
        if self._graph is None:
            self._graph = accelerator.Graph()
            with accelerator.recording(self._graph):
                self._advance_by_one()
        self._graph.replay()

    def _advance_by_one(self) -> None:
        """A step on the device: it reads the last tokens, draws the next ones, and moves the positions on."""
        longest = None if self.is_ahead else self._longest  # a recorded step is the same at any length
        logits = self._step(self._tokens, self._position, self._states, longest=longest)[:, : self._num_ids]
        self._checksum.add_(logits.sum())  # a sum is one pass, and keeps what is not finite
        self._position.add_(1)
        self._tokens.copy_(draw_tokens(logits, self._seeds, self._position, self._options))
        self._drawn.index_copy_(0, self._column, self._tokens[None])
        self._column.add_(1)

    def _on_the_way(self, tokens: Tensor) -> Drawn:
        if not accelerator.locks_pages(self.device.type):
            return Drawn(tokens.clone(), self._checksum, None)
        hosts = []
        for source in (tokens, self._checksum):
            host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            hosts.append(host.copy_(source, non_blocking=True))
        return Drawn(*hosts, accelerator.current_stream(self.device).record_event())

    def _make_room(self, num_tokens: int) -> None:
        """Gives a transformer room for the keys and values of so many tokens, at least twice as much as before; its step is recorded again."""
        if not self._grows or num_tokens <= self._step.capacity:
            return
        capacity = max(2 * self._step.capacity, -(-num_tokens // _CAPACITY_STEP) * _CAPACITY_STEP)
        self._step = self._step.with_capacity(capacity)
        before, self._states = self._states, self._step.empty_states(len(self._tokens))
        for old, new in zip(before, self._states, strict=True):
            new.take_over(old)
        self._num_eager_steps, self._graph = 0, None
