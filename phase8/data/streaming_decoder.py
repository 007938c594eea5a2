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
        self._num_kept = 0  # with them, ids that follow decode as behind all ids before

    def feed(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is incomplete."""
        self._ids.append(token_id)
        shown, text = self._shown_and_new_text()
        if not text and self._num_kept and self._tokenizer.decode(self._ids) == shown:
            self._ids.pop()  # a special token, which no text ever comes of
            return ""
        if not text or text.endswith("\ufffd"):
            return ""
        piece = self._ids[self._num_shown :]
        if self._tokenizer.decode(piece).strip():
            self._ids, self._num_kept = piece, len(piece)
        elif not self._num_kept:
            self._num_kept = len(self._ids)
        else:
            self._forget_spaces(piece, text)
        self._num_shown = len(self._ids)
        return text

    def flush(self) -> str:
        """The rest: an incomplete character as U+FFFD. The decoder can then be used for another text."""
        _, text = self._shown_and_new_text()
        self._ids, self._num_shown, self._num_kept = [], 0, 0
        return text

    def _forget_spaces(self, piece: list[int], text: str) -> None:
        """Drops earlier spaces from the context where the last ones decode without them as they did: endless spaces would make it endless."""
        kept = self._ids[: self._num_kept]
        if self._tokenizer.decode(kept + piece) == self._tokenizer.decode(kept) + text:
            self._ids = kept + piece

    def _shown_and_new_text(self) -> tuple[str, str]:
        shown = self._tokenizer.decode(self._ids[: self._num_shown])
        return shown, self._tokenizer.decode(self._ids)[len(shown) :]
