"""The plain values of a preparation: its options, the paths it writes and its report.

Names follow Megatron: `<output_prefix>_<json_key>_document.{bin,idx}`; with a validation split
`<output_prefix>_train_<json_key>_document` and `<output_prefix>_validation_<json_key>_document`. A tokenizer trained on the way is
`<output_prefix>_<json_key>_tokenizer.model`, and `<output_prefix>_<json_key>_prepared.json` records what everything was made from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from phase8.data.documents import separator_problem
from phase8.data.lost_text import LostText
from phase8.data.shard_pool import worker_problems
from phase8.data.shards import DocumentRules
from phase8.data.staging import sweep_partial


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """Options of a preparation.

    Attributes:
        inputs: Files and directories.
        output_prefix: Beginning of every path that is written.
        tokenizer: An existing tokenizer file.
        train_tokenizer: Train one instead.
        vocab_size: Size of the one to train.
        tokenizer_sample_bytes: Size of the text on which the tokenizer is trained, taken from all over the inputs without validation documents.
        rules: Treatment of a document.
        shard_bytes: Input bytes per shard; at most this much work per worker is lost when a run is killed.
        num_workers: Processes that tokenise.
        overwrite: Replace data that were prepared there from other inputs or with other options.
    """

    inputs: tuple[Path, ...]
    output_prefix: Path
    tokenizer: Path | None = None
    train_tokenizer: bool = False
    vocab_size: int | None = None
    tokenizer_sample_bytes: int = 20_000_000
    rules: DocumentRules = field(default_factory=DocumentRules)
    shard_bytes: int = 16 << 20
    num_workers: int = 1
    overwrite: bool = False

    def problems(self) -> list[str]:
        """The problems of the options, one sentence each."""
        limits = {"--tokenizer-sample-bytes": self.tokenizer_sample_bytes, "--shard-bytes": self.shard_bytes}
        found = [f"{name} is {value}; it must be at least 1" for name, value in limits.items() if value < 1]
        found += worker_problems(self.num_workers)
        if (self.tokenizer is None) != self.train_tokenizer:
            found.append("choose one tokenizer: an existing file with --tokenizer FILE, or --train-tokenizer --vocab-size N")
        elif self.train_tokenizer != (self.vocab_size is not None):
            found.append("--vocab-size belongs to --train-tokenizer, which needs it; an existing tokenizer has its own size")
        if self.train_tokenizer and self.rules.eod_token is not None:
            found.append("--eod-token belongs to --tokenizer; the one that --train-tokenizer makes has an end-of-document token of its own")
        if not 0 <= self.rules.validation_fraction < 1:
            found.append(f"--validation-fraction is {self.rules.validation_fraction}; it must be at least 0 and below 1")
        if not self.rules.json_key or "/" in self.rules.json_key:
            found.append(f"--json-key is {self.rules.json_key!r}; it becomes part of file names, so it must not be empty or hold a slash")
        if (problem := separator_problem(self.rules.document_separator)) is not None:
            found.append(problem)
        if not self.inputs:
            found.append("there is no input; give files or directories")
        return found


@dataclass(frozen=True, kw_only=True)
class PreparedSplit:
    """One written `.bin/.idx` pair."""

    prefix: str
    num_documents: int
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class PrepareReport:
    """The results of a preparation.

    Attributes:
        splits: The written pairs by split.
        tokenizer: The tokenizer file to use in training.
        tokenizer_sha256: Its digest.
        vocab_size: Its number of ids.
        dtype: Type of the tokens in the files.
        text_bytes: UTF-8 bytes of all documents written.
        num_empty: Documents without tokens, which are not written, and files without bytes.
        num_with_nul: Documents written that hold NUL bytes.
        num_invalid: Number of inputs that were skipped because they are not documents.
        first_invalid: Reason for skipping the first of them.
        lost: Text that the tokenizer could not keep.
        eod_token: The piece between documents, where the user named one.
        not_read: How many files and directories below the inputs are not read and why; None: all are.
        dangling_links: Symbolic links in directories without a target.
        is_reused: Whether everything existed already, made from the same inputs and options.
    """

    splits: dict[str, PreparedSplit]
    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    dtype: str
    text_bytes: int
    num_empty: int
    num_with_nul: int
    num_invalid: int
    first_invalid: str | None
    lost: LostText
    eod_token: str | None
    not_read: str | None = None
    dangling_links: list[str] = field(default_factory=list)
    is_reused: bool = False

    @property
    def num_documents(self) -> int:
        """Documents of all splits."""
        return sum(split.num_documents for split in self.splits.values())

    @property
    def num_tokens(self) -> int:
        """Tokens of all splits."""
        return sum(split.num_tokens for split in self.splits.values())

    @property
    def settings(self) -> list[str]:
        """The `--set` overrides of a run on this data."""
        prefixes = {name: split.prefix for name, split in self.splits.items()}
        return training_settings(prefixes, tokenizer=self.tokenizer, eod_token=self.eod_token, vocab_size=self.vocab_size)


def training_settings(
    prefixes: Mapping[str, str], *, tokenizer: str | Path | None = None, eod_token: str | None = None, vocab_size: int | None = None
) -> list[str]:
    """The `--set` overrides of a run on written pairs; None values are left out.

    Args:
        prefixes: The pairs by split.
        tokenizer: The tokenizer file.
        eod_token: The piece between documents, where the user named one.
        vocab_size: Number of ids of the tokenizer.
    """
    pairs = {f"data.{name}": prefix for name, prefix in prefixes.items()}
    settings = pairs | {"data.tokenizer": tokenizer, "data.eod_token": eod_token, "model.vocab_size": vocab_size}
    return [f"{key}={value}" for key, value in settings.items() if value is not None]


class Layout:
    """The paths of a preparation."""

    def __init__(self, options: PrepareOptions):
        self._prefix, self._rules, self._trains_tokenizer = options.output_prefix, options.rules, options.train_tokenizer
        whole = f"{options.output_prefix}_{options.rules.json_key}"
        self.work = Path(f"{whole}.preparing")
        self.publishing = self.work / "publishing.json"  # what the pairs are made from that take their places now
        self.lock = Path(f"{whole}.lock")
        self.record = Path(f"{whole}_prepared.json")
        self.tokenizer = Path(f"{whole}_tokenizer.model")

    def split(self, name: str) -> Path:
        """Prefix of the pair of a split."""
        return self._pair(f"_{name}" if self._rules.validation_fraction else "")

    def replaced(self) -> list[Path]:
        """The files that the preparation replaces if they are there: tokens, and a tokenizer that it trains."""
        return [*(Path(f"{self.split(name)}.bin") for name in self._rules.splits), *([self.tokenizer] if self._trains_tokenizer else [])]

    def everything(self) -> list[Path]:
        """The files that a preparation with this prefix may have written, whatever its options were."""
        return [*(Path(f"{self._pair(infix)}.bin") for infix in ("", "_train", "_validation")), self.tokenizer]

    def _pair(self, infix: str) -> Path:
        return Path(f"{self._prefix}{infix}_{self._rules.json_key}_document")

    def sweep(self) -> None:
        """Removes incomplete files of a killed run; finished shards are kept."""
        sweep_partial(self.work, "")
        for path in [self.record, self.tokenizer, *map(self.split, self._rules.splits)]:
            sweep_partial(path.parent, f"{path.name}.")
