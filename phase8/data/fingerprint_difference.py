"""Comparisons of the fingerprints of data (fingerprint.py). Fields that only one of two has (older checkpoints lack some) are not compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_SHAPE = {"num_tokens": "number of tokens", "bin_bytes": "size of .bin in bytes"}
_CONTENT = {"idx_sha256": ".idx", "bin_sha256": ".bin", "content": ".bin"}
_HASH_DIGITS = 12  # enough to tell two hashes apart


def describe_fingerprint_difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One sentence per difference between two fingerprints; empty if sample n holds the same tokens. Names may differ."""
    sentences = [
        f"{what} was {old[field]} and is {new[field]}"
        for field, what in (("order_version", "the version of the sample order"), ("sequence_length", "model.sequence_length"))
        if old[field] != new[field]
    ]
    before, after = old["sources"], new["sources"]
    if len(before) != len(after):
        return [*sentences, f"the data had {len(before)} sources and have {len(after)}"]
    ordered = _in_order_of(before, after)
    if ordered != after:
        sentences.append(f"the sources of the blend come in another order: it was {_names(before)} and is {_names(after)}")
    for number, (was, now) in enumerate(zip(before, ordered, strict=True)):
        place = f"source {number} ({was['name']}, now {now['name']})"
        differences = [f"the blend weight was {was['weight']} and is {now['weight']}"] if was["weight"] != now["weight"] else []
        sentences += [f"{place}: {difference}" for difference in [*differences, *_differences(was, now)]]
    return sentences


def is_same_source(was: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether two sources hold the same data in the same order; names and weights may differ."""
    return not _differences(was, now)


def content_of(source: dict[str, Any]) -> dict[str, Any]:
    """The content of a source, without names and without what its writer recorded beside it."""
    own = {field: value for field, value in source.items() if field not in ("name", "bin_sha256", "files")}
    return own | ({"files": [content_of(file) for file in source["files"]]} if "files" in source else {})


def _differences(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The differences between the data of two sources, weights left out."""
    before, after = was.get("files", [was]), now.get("files", [now])
    if len(before) != len(after):
        return [f"the number of its pairs was {len(before)} and is {len(after)}"]
    if len(before) == 1:
        return _file_differences(before[0], after[0])
    ordered, sentences = _in_order_of(before, after), []
    if ordered != after:
        sentences.append(f"its pairs come in another order: it was {_names(before)} and is {_names(after)}")
    for one, other in zip(before, ordered, strict=True):
        sentences += [f"{one['name']}, now {other['name']}: {difference}" for difference in _file_differences(one, other)]
    return sentences


def _file_differences(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    sentences = [f"the {what} was {was[field]} and is {now[field]}" for field, what in _SHAPE.items() if was[field] != now[field]]
    if was.get("documents") != now.get("documents"):
        sentences.append(f"the documents of data.split were {_range(was)} and are {_range(now)}")
    if not sentences:  # otherwise the content differs as well
        compared = [field for field in _CONTENT if field in was and field in now and was[field] != now[field]]
        hashes = [(_CONTENT[field], *(str(each[field])[:_HASH_DIGITS] for each in (was, now))) for field in compared[:1]]
        sentences += [f"the hash of {what} was {before} and is {after}" for what, before, after in hashes]
    return sentences


def _in_order_of(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """`after` in the order of `before` if both hold the same data; otherwise unchanged."""
    ordered, remaining = [], list(after)
    for was in before:
        same = next((now for now in remaining if not _differences(was, now)), None)
        if same is None:
            return list(after)
        ordered.append(same)
        remaining.remove(same)
    return ordered


def _names(sources: Sequence[dict[str, Any]]) -> str:
    return ", ".join(source["name"] for source in sources)


def _range(source: dict[str, Any]) -> str:
    documents = source.get("documents")
    return "all" if documents is None else f"{documents[0]} to {documents[1]}"
