"""Decodes token ids to text while they are being generated."""

from __future__ import annotations

from phase8.data.tokenizer import Tokenizer


class StreamingDecoder:
    """Decodes token ids one at a time, never emitting a part of a character.

    For any ids, all pieces and the flush together equal `decode` of all ids.

    Args:
        tokenizer: The tokenizer of the ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        # The last ids shown are kept as context; spaces alone do not count, since some decoders drop spaces at the beginning of a text.
        self._ids: list[int] = []
        self._num_shown = 0

    def feed(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is incomplete."""
        self._ids.append(token_id)
        text = self._new_text()
        if not text or text.endswith("\ufffd"):
            return ""
        if self._tokenizer.decode(self._ids[self._num_shown :]).strip():
            self._ids = self._ids[self._num_shown :]
        self._num_shown = len(self._ids)
        return text

    def flush(self) -> str:
        """The rest: an incomplete character as U+FFFD. The decoder can then be used for another text."""
        text = self._new_text()
        self._ids, self._num_shown = [], 0
        return text

    def _new_text(self) -> str:
        return self._tokenizer.decode(self._ids)[len(self._tokenizer.decode(self._ids[: self._num_shown])) :]
