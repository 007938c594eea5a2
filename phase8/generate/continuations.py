"""Continues any number of prompts, several side by side: where one ends, the next one takes its row.

On a GPU tokens are launched before those launched earlier have been looked at, so the device never waits for the host; what it has drawn beyond an
end is dropped.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from phase8.generate.decode import PIECE_TOKENS, DecodingLoop, Drawn


@dataclass(frozen=True)
class Request:
    """A sequence to continue.

    Args:
        number: Number by which the caller knows it.
        prompt: At least one token id.
        seed: Seed of its draws.
    """

    number: int
    prompt: tuple[int, ...]
    seed: int


@dataclass(eq=False)
class _Running:
    """A sequence in a row.

    Args:
        request: What was asked for.
        num_taken: Tokens that the caller has got.
        num_launched: Tokens that the device has drawn or will draw without another word.
    """

    request: Request
    num_taken: int = 0
    num_launched: int = 0


# Takes a token of the request with this number, and says whether the sequence goes on.
Take = Callable[[int, int], bool]


def continue_prompts(loop: DecodingLoop, requests: Iterable[Request], *, max_tokens: int, take: Take) -> None:
    """Continues prompts until `take` or `max_tokens` ends each.

    Args:
        loop: The loop, none of whose rows is in use.
        requests: The prompts; each is asked for when there is a row for it.
        max_tokens: Largest number of tokens of a continuation.
        take: Is given the tokens, those of a request in their order.

    Raises:
        CheckpointError: The model computes logits that are not finite.
    """
    _Run(loop, iter(requests), max_tokens, take).run()


class _Run:
    def __init__(self, loop: DecodingLoop, waiting: Iterator[Request], max_tokens: int, take: Take):
        self._loop, self._waiting, self._max_tokens, self._take = loop, waiting, max_tokens, take
        self._rows: list[_Running | None] = [None] * loop.batch_size

    def run(self) -> None:
        launched: tuple[Drawn, list[_Running | None]] | None = None
        while True:
            self._admit()
            left = [self._max_tokens - each.num_launched for each in self._rows if each is not None]
            following = None
            if left and max(left) > 0:
                count = min(self._loop.most_at_once, max(left))
                following = self._loop.advance(count), list(self._rows)
                for each in self._rows:
                    if each is not None:
                        each.num_launched += count
                if not self._loop.is_ahead:
                    self._hand_out(*following)
                    following = None
            if launched is not None:
                self._hand_out(*launched)
            launched = following
            if launched is None and not left:
                return

    def _admit(self) -> None:
        """Gives free rows to those who wait, until there is no row or nobody waits; a first token may be the last one too."""
        while found := [(row, _Running(request, num_launched=1)) for row, request in zip(self._free(), self._waiting, strict=False)]:
            for group in _read_together(found):
                rows, requests = [row for row, _ in group], [each.request for _, each in group]
                drawn = self._loop.admit(rows, _prompts(requests), [request.seed for request in requests])
                for row, each in group:
                    self._rows[row] = each
                self._hand_out(drawn, [each for _, each in group])

    def _free(self) -> list[int]:
        return [row for row, each in enumerate(self._rows) if each is None]

    def _hand_out(self, drawn: Drawn, owners: Sequence[_Running | None]) -> None:
        for tokens in drawn.wait():
            for each, token in zip(owners, tokens, strict=True):
                if each is not None and each in self._rows and not self._goes_on(each, token):
                    self._rows[self._rows.index(each)] = None

    def _goes_on(self, each: _Running, token: int) -> bool:
        each.num_taken += 1
        return self._take(each.request.number, token) and each.num_taken < self._max_tokens


def _read_together(found: list[tuple[int, _Running]]) -> Iterator[list[tuple[int, _Running]]]:
    """Groups that are read at once: of one prompt, or of prompts of one length that fit into a piece."""

    def by_prompt(item: tuple[int, _Running]) -> tuple[int, tuple[int, ...]]:
        return len(item[1].request.prompt), item[1].request.prompt

    for length, same_length in itertools.groupby(sorted(found, key=by_prompt), key=lambda item: by_prompt(item)[0]):
        singles = []
        for _, same in itertools.groupby(same_length, key=by_prompt):
            group = list(same)
            if len(group) > 1:
                yield group
            else:
                singles += group
        for begin in range(0, len(singles), at_once := max(1, PIECE_TOKENS // length)):
            yield singles[begin : begin + at_once]


def _prompts(requests: list[Request]) -> torch.Tensor:
    """The prompts of a group [n, T], or one for all [1, T]."""
    return torch.tensor([list(prompt) for prompt in dict.fromkeys(request.prompt for request in requests)])
