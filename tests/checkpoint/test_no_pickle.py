"""No code path of a checkpoint can execute what it reads: neither the sources nor the files know pickle."""

from __future__ import annotations

import ast
import json
import pickle
import pickletools
from pathlib import Path

import pytest
import torch

from phase8.checkpoint.load import open_checkpoint
from phase8.checkpoint.random_state import capture_random_state
from phase8.checkpoint.save import save_checkpoint

REPOSITORY = Path(__file__).parents[2]
ASKED = "deepspeed_source.py"  # reads what DeepSpeed wrote, if --trust-pickle asks for it
FILES = (path for path in sorted((REPOSITORY / "phase8" / "checkpoint").rglob("*.py")) if path.name != ASKED)
SOURCES = [*FILES, REPOSITORY / "tools" / "inspect_checkpoint.py"]
FORBIDDEN_MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "copyreg", "importlib", "runpy"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_ATTRIBUTES = {"torch.load", "torch.save", "np.load", "np.save", "numpy.load", "torch.package", "torch.jit", "torch.serialization"}


def test_the_sources_are_found():
    assert {"load.py", "save.py", "state.py", "inspect_checkpoint.py"} <= {path.name for path in SOURCES}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_the_code_neither_unpickles_nor_evaluates(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not {alias.name.partition(".")[0] for alias in node.names} & FORBIDDEN_MODULES
        elif isinstance(node, ast.ImportFrom):
            assert node.module.partition(".")[0] not in FORBIDDEN_MODULES
            assert not {f"{node.module}.{alias.name}" for alias in node.names} & FORBIDDEN_ATTRIBUTES
        elif isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in FORBIDDEN_ATTRIBUTES
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in FORBIDDEN_CALLS
        elif isinstance(node, ast.keyword):
            assert node.arg != "allow_pickle"


def is_pickle(data: bytes) -> bool:
    """Whether the bytes begin with a whole pickle."""
    try:
        for _opcode in pickletools.genops(data):
            pass
    except (ValueError, IndexError, KeyError, UnicodeDecodeError, OverflowError):
        return False
    return True


def test_every_file_of_a_checkpoint_is_json_safetensors_or_the_attachment(tmp_path: Path, make_tensors):
    tokenizer = tmp_path / "tokenizer.model"
    tokenizer.write_bytes(b"words")
    metadata = {"random_state": capture_random_state(torch.device("cpu")), "tokens": 1}
    path = save_checkpoint(tmp_path / "c", step=1, tensors=make_tensors(1), metadata=metadata, attachments={tokenizer.name: tokenizer.read_bytes()})
    files = sorted(path.iterdir())
    assert len(files) == 4
    for file in files:
        data = file.read_bytes()
        assert not is_pickle(data) and not data.startswith((b"PK", b"\x80", b"\x1f\x8b", b"\x93NUMPY"))
        if file.suffix == ".safetensors":
            length = int.from_bytes(data[:8], "little")
            entries = json.loads(data[8 : 8 + length])
            assert max(entry["data_offsets"][1] for key, entry in entries.items() if key != "__metadata__") == len(data) - 8 - length
        elif file.name == "manifest.json":
            json.loads(data)
        else:
            assert data == b"words"
    open_checkpoint(path).verify()


def test_the_scan_itself_recognises_pickles():
    assert all(is_pickle(pickle.dumps({"a": [1, 2.0]}, protocol=protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1))
