"""Fingerprints of the training data, recorded in every checkpoint and compared by the run that continues from it.

A source has its index, its size, the digest of its content, and the hash of all its tokens where its writer recorded one. A source made
of several pairs has these for each pair under `files`; a source that is a part of the documents has their range under `documents`.
Comparisons are in fingerprint_difference.py.
"""

from __future__ import annotations

from pathlib import Path

from phase8.data.loader import SequenceDataset
from phase8.data.sampler import ORDER_VERSION


def data_fingerprint(dataset: SequenceDataset) -> dict[str, object]:
    """Everything that determines, together with the seed, which tokens sample n holds; plain JSON values."""
    return {
        "order_version": ORDER_VERSION,
        "sequence_length": dataset.sequence_length,
        "sources": [
            {"name": Path(source.prefix).name, "weight": weight, **source.fingerprint()}
            for source, weight in zip(dataset.sources, dataset.order.blend.weights, strict=True)
        ],
    }
