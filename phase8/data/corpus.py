"""The embedded default corpus: the text of the Python standard library found on this machine.

It needs no download and is available wherever this library runs. The files are sorted by path, duplicates are dropped, and a hash of the
path selects the twentieth that is held out for validation. The sources are tokenised once per vocabulary size.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from phase8.data.documents import spread
from phase8.data.indexed import IndexedDataset, IndexedWriter, best_dtype
from phase8.data.made_with import made_with
from phase8.data.staging import exclusive_lock, read_json, sweep_partial, write_json
from phase8.data.tokenizer import Tokenizer, load_tokenizer
from phase8.data.tokenizer_training import train_sentencepiece
from phase8.durable import staged_directory
from phase8.errors import DataError, IndexedFormatError

OnProgress = Callable[[str, int, int], None]

# Must be raised when the same sources and vocabulary size give other tokens than before.
CORPUS_VERSION = 1
VALIDATION_RATIO = 0.05
TOKENIZER_SAMPLE_BYTES = 8_000_000
# pydoc_data is one file of generated prose, large enough to dominate the split it falls into.
_SKIPPED_DIRECTORIES = {"site-packages", "dist-packages", "__pycache__", "pydoc_data"}


@dataclass(frozen=True, kw_only=True)
class EmbeddedCorpus:
    """The prepared corpus: its paths and its unigram entropy.

    Attributes:
        train_prefix: `.bin/.idx` prefix of the training split.
        validation_prefix: `.bin/.idx` prefix of the held-out split.
        tokenizer_path: The sentencepiece model, trained on the training split only.
        unigram_entropy_nats: Cross-entropy per validation token under the add-one smoothed token frequencies of the training
            split: what a model that knows frequencies but no context reaches.
    """

    train_prefix: Path
    validation_prefix: Path
    tokenizer_path: Path
    num_train_documents: int
    num_validation_documents: int
    num_train_tokens: int
    num_validation_tokens: int
    train_text_bytes: int
    validation_text_bytes: int
    unigram_entropy_nats: float


class _Document(NamedTuple):
    name: str
    text: str

    @property
    def is_validation(self) -> bool:
        first_bytes = hashlib.sha256(os.fsencode(self.name)).digest()[:4]
        return int.from_bytes(first_bytes, "big") < round(VALIDATION_RATIO * 2**32)


def prepare_embedded_corpus(
    cache_dir: str | Path, *, vocab_size: int, on_progress: OnProgress | None = None, library: Path | None = None
) -> EmbeddedCorpus:
    """Prepares the embedded corpus, tokenised on first use into `<cache_dir>/stdlib-<python>-v<vocab_size>-<digest of the sources>/`.

    Concurrent callers wait for the first one; a preparation that was killed leaves nothing that counts as finished.

    Args:
        cache_dir: Directory of prepared corpora.
        vocab_size: Number of token ids.
        on_progress: Called with stage, steps done and steps in all.
        library: Directory of the sources; None: the library of the running Python.

    Raises:
        DataError: There are no sources, or they do not support the vocabulary size.
        StorageError: The cache cannot be written.
    """
    documents = _read_library(library or Path(sysconfig.get_paths()["stdlib"]))
    directory = Path(cache_dir) / f"stdlib-{platform.python_version()}-v{vocab_size}-{_digest(documents)[:12]}"
    corpus = _load(directory)
    if corpus is not None:
        return corpus
    with exclusive_lock(directory.with_name(f"{directory.name}.lock"), wait=True):
        corpus = _load(directory)
        if corpus is not None:
            return corpus
        sweep_partial(directory.parent, directory.name)
        with staged_directory(directory) as partial:
            _build(partial, documents, vocab_size=vocab_size, on_progress=on_progress or _silent)
    corpus = _load(directory)
    if corpus is None:
        raise DataError(f"the embedded corpus in {directory} was altered while it was made; run again")
    return corpus


def _silent(stage: str, completed: int, total: int) -> None:
    pass


def _read_library(root: Path) -> list[_Document]:
    """Reads the sources in the order of their path, each text once."""
    documents, seen = [], set()
    for name in sorted(_source_names(root)):
        text = _text_of(root / name)
        if text and text not in seen:
            seen.add(text)
            documents.append(_Document(name, text))
    held_out = sum(document.is_validation for document in documents)
    if held_out in (0, len(documents)):
        raise DataError(
            f"data.train is not set and the Python library in {root} has {len(documents)} source files, too few to make the embedded "
            "corpus of; set data.train to a prefix written by tools/prepare_data.py"
        )
    return documents


def _source_names(root: Path) -> Iterator[str]:
    """Paths of the sources below `root`, with forward slashes."""
    for directory, subdirectories, files in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if name not in _SKIPPED_DIRECTORIES]
        relative = Path(directory).relative_to(root)
        if "data" in relative.parts and any("lib2to3" in part for part in relative.parts):
            continue  # inputs of the Python 2 converter's tests
        # _sysconfigdata holds paths and flags of the machine that built Python.
        sources = [name for name in files if name.endswith(".py") and not name.startswith("_sysconfigdata")]
        yield from ((relative / name).as_posix() for name in sources)


def _text_of(path: Path) -> str | None:
    try:
        return path.read_bytes().decode("utf-8")
    except (UnicodeDecodeError, OSError):  # sources in other encodings only test decoders; unreadable ones are skipped
        return None


def _digest(documents: list[_Document]) -> str:
    digest = hashlib.sha256(f"version {CORPUS_VERSION}".encode())
    for document in documents:
        for field in (os.fsencode(document.name), document.text.encode()):
            digest.update(len(field).to_bytes(8, "big") + field)
    return digest.hexdigest()


def _load(directory: Path) -> EmbeddedCorpus | None:
    """Loads a finished corpus; None if it is missing or damaged, and has to be made anew."""
    record = read_json(directory / "corpus.json")
    if not isinstance(record, dict):
        return None
    places = {"train_prefix": directory / "train", "validation_prefix": directory / "validation", "tokenizer_path": directory / "tokenizer.model"}
    try:
        corpus = EmbeddedCorpus(**record, **places)
        train, validation = IndexedDataset(corpus.train_prefix), IndexedDataset(corpus.validation_prefix)
        load_tokenizer(corpus.tokenizer_path)
    except (TypeError, DataError, IndexedFormatError):
        return None
    is_whole = (train.num_tokens, validation.num_tokens) == (corpus.num_train_tokens, corpus.num_validation_tokens)
    return corpus if is_whole else None


def _build(directory: Path, documents: list[_Document], *, vocab_size: int, on_progress: OnProgress) -> None:
    splits = {
        "train": [document.text for document in documents if not document.is_validation],
        "validation": [document.text for document in documents if document.is_validation],
    }
    on_progress("training the tokenizer", 0, 1)
    sample = _sample(splits["train"], TOKENIZER_SAMPLE_BYTES)
    train_sentencepiece(sample, directory / "tokenizer.model", vocab_size=vocab_size, character_coverage=0.9999)
    on_progress("training the tokenizer", 1, 1)

    tokenizer = load_tokenizer(directory / "tokenizer.model")
    maker = made_with(tokenizer, eod_id=tokenizer.eod_id)
    counts, num_done = {}, 0
    on_progress("tokenizing", 0, len(documents))
    for name, texts in splits.items():
        counts[name] = np.zeros(vocab_size, dtype=np.int64)
        with IndexedWriter(directory / name, dtype=best_dtype(vocab_size), made_with=maker) as writer:
            for tokens in _tokenised(texts, tokenizer):
                writer.add_document(tokens)
                counts[name] += np.bincount(tokens, minlength=vocab_size)
                num_done += 1
                on_progress("tokenizing", num_done, len(documents))
    record = {"unigram_entropy_nats": _cross_entropy_nats(counts["validation"], counts["train"])}
    for name, texts in splits.items():
        record[f"num_{name}_documents"] = len(texts)
        record[f"num_{name}_tokens"] = int(counts[name].sum())
        record[f"{name}_text_bytes"] = sum(len(text.encode()) for text in texts)
    write_json(directory / "corpus.json", record)


def _tokenised(texts: list[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Tokens of each text, ended by the end-of-document token; the tokenizer releases the interpreter lock, so threads run in parallel."""

    def encode(text: str) -> np.ndarray:
        return np.array([*tokenizer.encode(text), tokenizer.eod_id], dtype=best_dtype(tokenizer.vocab_size))

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        yield from threads.map(encode, texts)


def _sample(texts: list[str], num_bytes: int) -> Iterator[str]:
    """Texts spread over the whole list, `num_bytes` in all."""
    for text in spread(texts):
        if num_bytes <= 0:
            return
        yield text
        num_bytes -= len(text.encode())


def _cross_entropy_nats(counts: np.ndarray, model_counts: np.ndarray) -> float:
    """Mean -log of add-one smoothed `model_counts` over the tokens of `counts`."""
    log_probabilities = np.log((model_counts + 1) / (model_counts.sum() + model_counts.size))
    return float(-(counts @ log_probabilities) / counts.sum())
