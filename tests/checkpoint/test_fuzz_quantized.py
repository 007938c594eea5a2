"""Weights of few bits that nobody wrote: they are read as the file says, or refused in one sentence; nothing is run, changed or taken without bound.

Every run of the tests tries 100 inputs of a kind and format, always the same. Ten thousand new ones each (minutes):

    python -m pytest -m full -s tests/checkpoint/test_fuzz_quantized.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phase8.checkpoint.tensor_file import DTYPE_NAMES
from phase8.errors import Phase8Error
from phase8.generate.restore import restore_model
from tests.checkpoint.fuzzing import Tally, Watch, fuzz, mutated_bytes, mutated_json
from tests.checkpoint.sample_checkpoint import bits
from tests.tools.doors import load_door
from tests.tools.test_upcycle import EXPERTS, write_model

CPU = torch.device("cpu")
WEIGHTS = "model.safetensors"
FORMATS = {"int8": (), "dynamic": ("--dynamic",), "int4": ("--bits", "4")}
NAMES = (
    "blocks.0.mixer.q.down.scale", "blocks.1.feed_forward.experts.gate", "blocks.1.feed_forward.experts.gate_scale", "embedding.weight", "shape",
    "dtype", "data_offsets", "I8", "U8", "BF16", "quantization", "format", "int8", "int4", "group", "dynamic",
)  # fmt: skip


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for each format, of a model with experts and low-rank layers."""
    root = tmp_path_factory.mktemp("few-bits")
    source = write_model(root / "source", *EXPERTS, "model.low_rank_rank=12", "model.shared_experts=1")
    for name, options in FORMATS.items():
        assert load_door("quantize_checkpoint").main([str(source), str(root / name), *options]) == 0
        restore_model(root / name, device=CPU)  # what is imported and cached at the first use is not the fuzzer's
    return root


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a tensor file, and the data after it."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def with_header(text: str, data: bytes) -> bytes:
    head = text.encode("utf-8", "surrogatepass")
    return len(head).to_bytes(8, "little") + head + data


def assert_as_stored(model: torch.nn.Module, content: bytes) -> None:
    """Every tensor has the bytes that the header names, but for those that are widened."""
    header, data = header_of(content)
    compared = 0
    for name, tensor in model.state_dict().items():
        entry = header[name]
        begin, end = entry["data_offsets"]
        if entry["dtype"] == DTYPE_NAMES[tensor.dtype]:
            assert list(tensor.shape) == entry["shape"] and bits(tensor) == data[begin:end], name
            compared += entry["dtype"] in ("I8", "U8")
    assert compared


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def _fuzz(original: Path, watch: Watch, *, file: str, changed: st.SearchStrategy[bytes], num_inputs: int, derandomize: bool) -> None:
    directory, tally = original.with_name(f"damaged-{original.name}"), Tally()
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(original, directory)

    @given(content=changed)
    def check(content: bytes) -> None:
        (directory / file).write_bytes(content)
        before = contents(directory)
        try:
            with watch.over(directory):
                model, *_ = restore_model(directory, device=CPU)
        except Phase8Error as error:
            tally.refused(error)
            assert error.exit_code == 4, repr(error)
        else:
            tally.count("loaded")
            assert_as_stored(model, before[WEIGHTS])
            assert all(scale.isfinite().all() for name, scale in model.named_buffers() if name.endswith("scale"))
        assert contents(directory) == before

    fuzz(check, num_inputs=num_inputs, derandomize=derandomize)()
    tally.check(f"{file} of {original.name}", at_least=num_inputs, among={"loaded", "CheckpointCorruptError"})


def _fuzz_all(original: Path, watch: Watch, **how: Any) -> None:
    content = (original / WEIGHTS).read_bytes()
    header, data = header_of(content)
    _fuzz(original, watch, file=WEIGHTS, changed=mutated_json(header, *NAMES).map(lambda text: with_header(text, data)), **how)
    _fuzz(original, watch, file=WEIGHTS, changed=mutated_bytes(content), **how)
    config = json.loads((original / "config.json").read_text())
    texts = mutated_json(config, *NAMES) | mutated_json(config["quantization"], *NAMES).map(
        lambda text: json.dumps(config | {"quantization": "~"}).replace('"~"', text)
    )
    _fuzz(original, watch, file="config.json", changed=texts.map(lambda text: text.encode("utf-8", "surrogatepass")), **how)


@pytest.mark.parametrize("name", FORMATS)
def test_files_of_few_bits(originals: Path, watch: Watch, name: str) -> None:
    _fuzz_all(originals / name, watch, num_inputs=100, derandomize=True)


@pytest.mark.full
@pytest.mark.parametrize("name", FORMATS)
def test_many_files_of_few_bits(originals: Path, watch: Watch, name: str) -> None:
    _fuzz_all(originals / name, watch, num_inputs=10_000, derandomize=False)


def edited(tensors: dict[str, torch.Tensor], case: str) -> dict[str, torch.Tensor]:
    """The tensors of a file with something wrong."""
    pair, experts = "blocks.1.mixer.q.down.", "blocks.1.feed_forward.experts.gate"
    scale = tensors[f"{experts}_scale"]
    changes: dict[str, dict[str, torch.Tensor | None]] = {
        "no scale": {f"{pair}scale": None},
        "no scale of experts": {f"{experts}_scale": None},
        "no numbers": {f"{pair}weight": None},
        "no expert": {experts: None},
        "a scale that is no number": {f"{pair}scale": torch.full_like(tensors[f"{pair}scale"], float("nan"))},
        "an infinite scale of experts": {f"{experts}_scale": scale.masked_fill(torch.arange(len(scale.flatten())).view(scale.shape) == 3, torch.inf)},
        "numbers of another shape": {experts: tensors[experts][:-1].contiguous()},
        "scales of another shape": {f"{experts}_scale": scale[..., :-1].contiguous()},
        "numbers of another dtype": {f"{pair}weight": tensors[f"{pair}weight"].to(torch.bfloat16)},
        "scales of whole numbers": {f"{experts}_scale": scale.to(tensors[experts].dtype)},
        "a scale too many": {"blocks.0.mixer_norm.scale": torch.ones(24)},
        "a name too many": {"../../outside\x1b[2J": torch.ones(2)},
    }
    return {name: value for name, value in (tensors | changes[case]).items() if value is not None}


CASES = (
    "no scale", "no scale of experts", "no numbers", "no expert", "a scale that is no number", "an infinite scale of experts",
    "numbers of another shape", "scales of another shape", "numbers of another dtype", "scales of whole numbers", "a scale too many",
    "a name too many",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_what_does_not_fit_is_one_sentence_of_the_command_line(originals: Path, tmp_path: Path, capsys: Any, name: str, case: str) -> None:
    from safetensors.torch import load_file, save_file

    directory = tmp_path / "damaged"
    shutil.copytree(originals / name, directory)
    save_file(edited(load_file(directory / WEIGHTS), case), directory / WEIGHTS)
    before = contents(directory)
    arguments = ["--checkpoint", str(directory), "--data", str(tmp_path / "none"), "--device", "cpu", "--output", str(tmp_path / "e.json")]
    assert load_door("evaluate").main(arguments) == 4
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("error: ") and said.strip().isprintable() and "damaged" in said
    assert contents(directory) == before and not (tmp_path / "e.json").exists()
