from __future__ import annotations

import json
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from phase8.checkpoint.checksum import checksum_of
from phase8.checkpoint.save import save_checkpoint


@pytest.fixture
def make_tensors() -> Callable[[int], dict[str, Tensor]]:
    """A few small tensors of several kinds, different for every seed."""

    def make(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {
            "model.embedding.weight": torch.randn(8, 4, generator=generator),
            "model.norm.weight": torch.randn(4, generator=generator).to(torch.bfloat16),
            "model.mask": torch.rand(5, generator=generator) < 0.5,
            "optimizer.embedding.weight.exp_avg": torch.randn(8, 4, generator=generator),
            "optimizer.embedding.weight.step": torch.tensor(float(seed)),
            "optimizer.empty.exp_avg": torch.empty(0, 3),
        }

    return make


@pytest.fixture
def save_sample(make_tensors: Callable[[int], dict[str, Tensor]], tmp_path: Path) -> Callable[..., Path]:
    """Saves `make_tensors(seed)` as step `step` under a root, with metadata and an attachment."""
    tokenizer = tmp_path / "source" / "tokenizer.model"
    tokenizer.parent.mkdir()
    tokenizer.write_bytes(bytes(range(256)) * 2)

    def save(root: Path, step: int, seed: int | None = None) -> Path:
        metadata = {"tokens": step * 1000, "config": {"model": {"d_model": 4}}, "name": "Grün ☃"}
        attachments = {"tokenizer.model": tokenizer.read_bytes()}
        return save_checkpoint(root, step=step, tensors=make_tensors(step if seed is None else seed), metadata=metadata, attachments=attachments)

    return save


@pytest.fixture
def sign() -> Callable[[dict], bytes]:
    """Bytes of a manifest with the given content and a right checksum, written independently of the library."""

    def signed(document: dict) -> bytes:
        content = {key: value for key, value in document.items() if key != "checksum"}
        text = json.dumps(content)[:-1] + (", " if content else "")
        return text.encode() + f'"checksum": "{checksum_of(text.encode())}"\n}}\n'.encode()

    return signed


@pytest.fixture
def run_in_fork() -> Callable[[Callable[[], None]], int]:
    """Wait status of a forked child that ran a function; it never returns into the tests and may kill itself."""

    def run(function: Callable[[], None]) -> int:
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)  # the threads of torch's pool do not exist after a fork: waiting for them would never end
            try:
                function()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        return os.waitpid(child, 0)[1]

    return run


@pytest.fixture
def was_killed() -> Callable[[int], bool]:
    def killed(status: int) -> bool:
        return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL

    return killed
