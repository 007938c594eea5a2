from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phase8.checkpoint.checksum import checksum_of
from phase8.checkpoint.load import open_checkpoint
from phase8.checkpoint.manifest import json_problem, manifest_bytes, parse_manifest
from phase8.errors import CheckpointCorruptError, CheckpointError

PATH = Path("step-0000000007/manifest.json")
CRC = "crc32:00000000"


def document() -> dict[str, Any]:
    """A manifest with a tensor of two slices in two files, a scalar and an attachment."""
    return {
        "format": "phase8-checkpoint",
        "format_version": 1,
        "step": 7,
        "metadata": {"tokens": 7000, "config": {"model": {"d_model": 4}}},
        "files": {
            "model-00000.safetensors": {"size_bytes": 100, "header_checksum": CRC},
            "model-00001.safetensors": {"size_bytes": 100, "header_checksum": CRC},
        },
        "tensors": {
            "model.w": {
                "dtype": "F32",
                "shape": [4, 2],
                "slices": [
                    {"file": "model-00000.safetensors", "key": "w", "offsets": [0, 0], "shape": [2, 2], "checksum": CRC},
                    {"file": "model-00001.safetensors", "key": "w", "offsets": [2, 0], "shape": [2, 2], "checksum": CRC},
                ],
            },
            "model.s": {
                "dtype": "BF16",
                "shape": [],
                "slices": [{"file": "model-00000.safetensors", "key": "s", "offsets": [], "shape": [], "checksum": CRC}],
            },
        },
        "attachments": {"tokenizer.model": {"size_bytes": 5, "checksum": CRC}},
    }


def put(keys: str, value: object) -> Callable[[dict], None]:
    """An edit of a document: sets the entry at a slash-separated path."""

    def edit(target: Any) -> None:
        *parents, last = [int(key) if key.isdigit() else key for key in keys.split("/")]
        for key in parents:
            target = target[key]
        target[last] = value

    return edit


def test_what_is_written_is_parsed_back_and_ends_as_documented(sign):
    manifest = parse_manifest(sign(document()), PATH)
    data = manifest_bytes(manifest)
    assert parse_manifest(data, PATH) == manifest
    assert data[-31:].startswith(b'"checksum": "crc32:') and data.endswith(b'"\n}\n')
    assert json.loads(data).keys() == document().keys() | {"checksum"}
    assert {key: value for key, value in json.loads(data).items() if key != "checksum"} == document()


def test_slices_are_found_by_file(sign):
    by_file = parse_manifest(sign(document()), PATH).slices_by_file()
    assert {file: {key: name for key, (name, _) in slices.items()} for file, slices in by_file.items()} == {
        "model-00000.safetensors": {"w": "model.w", "s": "model.s"},
        "model-00001.safetensors": {"w": "model.w"},
    }
    assert by_file["model-00001.safetensors"]["w"][1].offsets == [2, 0]


SLICE = "tensors/model.w/slices/1/"
EDITS = {
    "another format": (put("format", "other"), "format is 'other'"),
    "no format": (lambda d: d.pop("format"), "format is None"),
    "version zero": (put("format_version", 0), "format_version"),
    "version as text": (put("format_version", "1"), "format_version"),
    "version true": (put("format_version", True), "format_version"),
    "negative step": (put("step", -1), "step"),
    "step as float": (put("step", 7.0), "step"),
    "no metadata": (lambda d: d.pop("metadata"), "metadata"),
    "unknown field": (put("more", 1), "more"),
    "unknown field of a slice": (put(SLICE + "more", 1), "more"),
    "absolute file": (put(SLICE + "file", "/etc/passwd"), "file"),
    "parent directory": (put(SLICE + "file", "../model-00000.safetensors"), "file"),
    "dots": (put("files/..", {"size_bytes": 1, "header_checksum": CRC}), "files"),
    "separator": (put("files/a\\b.safetensors", {"size_bytes": 1, "header_checksum": CRC}), "files"),
    "hidden file": (put("attachments/.bashrc", {"size_bytes": 1, "checksum": CRC}), "attachments"),
    "line feed in a name": (put("attachments/a\n", {"size_bytes": 1, "checksum": CRC}), "attachments"),
    "null in a name": (put("attachments/a\0b", {"size_bytes": 1, "checksum": CRC}), "attachments"),
    "attachment over the manifest": (put("attachments/manifest.json", {"size_bytes": 1, "checksum": CRC}), "attachment"),
    "attachment over a tensor file": (put("attachments/model-00000.safetensors", {"size_bytes": 1, "checksum": CRC}), "attachment"),
    "tensor file of another kind": (put("files/model.bin", {"size_bytes": 1, "header_checksum": CRC}), r"model\.bin"),
    "unused file": (put("files/z.safetensors", {"size_bytes": 1, "header_checksum": CRC}), r"z\.safetensors"),
    "unlisted file": (put(SLICE + "file", "model-00002.safetensors"), "not among the files"),
    "space in a tensor name": (put("tensors/a b", {}), "tensors"),
    "unknown dtype": (put("tensors/model.w/dtype", "F31"), "F31"),
    "no slices": (put("tensors/model.w/slices", []), "slices"),
    "missing slice": (lambda d: d["tensors"]["model.w"]["slices"].pop(0), "4 of 8 elements"),
    "overlap": (put(SLICE + "offsets", [1, 0]), "overlap"),
    "slice outside": (put(SLICE + "offsets", [3, 0]), "outside"),
    "slice of other dims": (put(SLICE + "shape", [4]), "number of dims"),
    "same place twice": (put(SLICE + "file", "model-00000.safetensors"), "two slices"),
    "huge shape": (put("tensors/model.s/shape", [2**62, 2**62]), "beyond every memory"),
    "huge empty shape": (put("tensors/model.s/shape", [2**62, 2**62, 0]), "beyond every memory"),
    "shape beyond 64 bits": (put("tensors/model.s/shape", [2**64]), "shape"),
    "sixty-five dims": (put("tensors/model.s/shape", [1] * 65), "shape"),
    "upper-case checksum": (put(SLICE + "checksum", "crc32:ABCDEF00"), "checksum"),
    "other checksum": (put(SLICE + "checksum", "md5:00000000"), "checksum"),
    "infinity": (put("metadata/x", float("inf")), "metadata.x"),
    "nan": (put("metadata/x", [float("nan")]), r"metadata\.x\[0\]"),
}


@pytest.mark.parametrize("name", EDITS)
def test_every_broken_rule_of_an_intact_manifest_is_refused_by_name(name: str, sign):
    edit, message = EDITS[name]
    broken = document()
    edit(broken)
    with pytest.raises(CheckpointCorruptError, match=message) as caught:
        parse_manifest(sign(broken), PATH)
    assert str(caught.value).startswith(str(PATH)) and "\n" not in str(caught.value)


def test_a_newer_format_is_named_and_told_from_damage(sign):
    with pytest.raises(CheckpointError, match="format_version 2 is newer") as caught:
        parse_manifest(sign({"format": "phase8-checkpoint", "format_version": 2, "everything": "else"}), PATH)
    assert not isinstance(caught.value, CheckpointCorruptError)


def with_ending(body: bytes) -> bytes:
    return body + f'"checksum": "{checksum_of(body)}"\n}}\n'.encode()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[",
        b"{]",
        b"\xff{",
        b'{"a": ' + b"[" * 100_000,
        b'{"a": ' + b'{"a":' * 100_000,
        json.dumps(document())[:-1].encode() + b', "step": 7, ',
        b'{"step": ' + b"9" * 5000 + b", ",
        json.dumps(document())[:-1].replace("7000", "[" * 101 + "]" * 101).encode() + b", ",
        json.dumps(document())[:-1].replace("7000", "1e999").encode() + b", ",
    ],
    ids=lambda body: repr(body[:40]),
)
def test_strange_json_with_a_right_checksum_is_refused(body: bytes):
    with pytest.raises(CheckpointCorruptError, match=r"manifest\.json cannot be used"):
        parse_manifest(with_ending(body), PATH)


def test_the_message_of_a_hostile_manifest_has_no_control_characters(sign):
    for edit in (put("format", "\x1b[31m"), put("tensors/model.w/dtype", "\x1b]0;"), put("metadata/\x1b[2J", float("nan")), put("\x1b[", 1)):
        broken = document()
        edit(broken)
        with pytest.raises(CheckpointCorruptError) as caught:
            parse_manifest(sign(broken), PATH)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": (1, 2)}, "metadata.a is of type tuple"),
        ({"a": [{1: 2}]}, r"metadata.a\[0\] has the key 1"),
        ({"a": float("-inf")}, "metadata.a is -inf"),
        ({"a": {"b": b"x"}}, "metadata.a.b is of type bytes"),
        ({"a": Path("x")}, "PosixPath"),
    ],
)
def test_a_value_json_would_change_is_named(value: object, message: str):
    assert re.search(message, json_problem(value, "metadata"))


def test_everything_json_can_hold_passes():
    assert json_problem({"a": [None, True, 1, 2**80, -0.5, "\ud800 ☃", {}, []]}, "metadata") is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["..", "F32", CRC, "model-00000.safetensors"]),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=5,
)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Paths of all values inside a document."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, child in children for place in places(child, (*path, key)))]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzz_values_of_a_signed_manifest_never_raise_another_error(data: st.DataObject, sign):
    mutated: Any = copy.deepcopy(document())
    for _ in range(data.draw(st.integers(1, 3))):
        candidates = [place for place in places(mutated) if place]
        if not candidates:
            break
        *parents, last = data.draw(st.sampled_from(candidates))
        target = mutated
        for key in parents:
            target = target[key]
        if data.draw(st.booleans()):
            target[last] = data.draw(json_values)
        else:
            target.pop(last)
    try:
        manifest = parse_manifest(sign(mutated), PATH)
    except CheckpointError as error:
        assert str(error).isprintable()
    else:
        assert parse_manifest(manifest_bytes(manifest), PATH) == manifest


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzz_bytes_of_a_manifest_never_raise_another_error(data: st.DataObject, sign, tmp_path: Path):
    original = sign(document())
    mutated = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        begin = data.draw(st.integers(0, len(mutated)))
        mutated[begin : begin + data.draw(st.integers(0, 20))] = data.draw(st.binary(max_size=20))
    signed_again = data.draw(st.booleans())
    content = with_ending(bytes(mutated[:-31])) if signed_again else bytes(mutated)
    (tmp_path / "manifest.json").write_bytes(content)
    try:
        parse_manifest(content, PATH)
    except CheckpointError:
        with pytest.raises(CheckpointError):
            open_checkpoint(tmp_path)
    else:
        assert signed_again or content == original
