"""A sentencepiece model as a tokenizer of transformers, for models that no `tokenizer.json` reproduces: the ids are those of sentencepiece itself."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import PreTrainedTokenizer

VOCABULARY_NAME = "tokenizer.model"
SPACE_MARK = "\u2581"


class Phase8Tokenizer(PreTrainedTokenizer):
    """The tokenizer of a sentencepiece model.

    Args:
        vocab_file: The model.
        add_bos_token: Put the piece that begins a text before every text.
        kwargs: What transformers records of a tokenizer.
    """

    vocab_files_names = {"vocab_file": VOCABULARY_NAME}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str, add_bos_token: bool = False, **kwargs: Any):
        self.vocab_file, self.add_bos_token = vocab_file, add_bos_token
        self._processor = processor = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        spelled = [f"<0x{byte:02X}>" for byte in SPACE_MARK.encode()]
        keeps_spaces = SPACE_MARK not in "".join(processor.encode("a", out_type=str)) and processor.decode(processor.encode("  a  ")) == "  a  "
        # A mark that belongs to the text is spelled in bytes, or it would be decoded to a space; a model that rewrites spaces is used as it is.
        self._spelled_mark = spelled if keeps_spaces and all(processor.is_byte(processor.piece_to_id(piece)) for piece in spelled) else None
        super().__init__(**{"special_tokens_pattern": "none", "add_bos_token": add_bos_token, **kwargs})

    @property
    def vocab_size(self) -> int:
        """Number of pieces of the model."""
        return self._processor.vocab_size()

    def get_vocab(self) -> dict[str, int]:
        """Every piece with its id."""
        return {self._processor.id_to_piece(i): i for i in range(self.vocab_size)} | self.added_tokens_encoder

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: list[int] | None = None) -> list[int]:
        """The ids of one text or two, after the one that begins a text, where texts have one."""
        return [self.bos_token_id] * self.add_bos_token + token_ids_0 + (token_ids_1 or [])

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of pieces."""
        return self._processor.decode(tokens)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copies the model to a directory."""
        destination = Path(save_directory) / ((f"{filename_prefix}-" if filename_prefix else "") + VOCABULARY_NAME)
        if Path(self.vocab_file).resolve() != destination.resolve():
            shutil.copyfile(self.vocab_file, destination)
        return (str(destination),)

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        if self._spelled_mark is None:
            return self._processor.encode(text, out_type=str)
        parts = [self._processor.encode(part, out_type=str) for part in text.split(SPACE_MARK)]
        return [piece for i, part in enumerate(parts) for piece in ((self._spelled_mark if i else []) + part)]

    def _convert_token_to_id(self, token: str) -> int:
        return self._processor.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self._processor.id_to_piece(index)
