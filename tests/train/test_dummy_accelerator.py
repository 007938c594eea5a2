"""A run on an accelerator that torch knows nothing of but its tensors: every line between the command and the checkpoint asks for no vendor."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.tiny_run import write_config

ROOT = Path(__file__).parents[2]


def training(directory, *words):
    command = [sys.executable, "-m", "tests.train.dummy_training", str(write_config(directory)), *words]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return training(tmp_path_factory.mktemp("dummy"))


def test_an_accelerator_of_another_kind_trains_as_the_cpu_does(found):
    (code, losses), (stopped_code, first), (resumed_code, resumed) = found["cpu"], found["stopped"], found["resumed"]
    assert (code, stopped_code, resumed_code) == (0, 0, 0) and found["present"] == "dummy"
    assert len(losses) == 4 and first == pytest.approx(losses[:2], rel=1e-5) and resumed == pytest.approx(losses, rel=1e-5)
    assert resumed[:2] == first


@pytest.mark.full
def test_its_blocks_compile_into_one_graph_each(tmp_path):
    found = training(tmp_path, "compiled")
    assert found["resumed"] == [0, pytest.approx(found["cpu"][1], rel=1e-5)]


def test_what_it_lacks_is_a_default_or_a_sentence(found):
    assert found["memory"] == [None, None] and found["auto"] == "cpu"
    assert found["collectives"].startswith("--device is dummy, for which no backend of torch.distributed is registered")
    assert found["limit"] == "train.device_memory_gib is set, but torch limits no memory on dummy; leave it out."
    assert found["fp8"].startswith("precision.linear is fp8, which is computed on NVIDIA GPUs and CPUs, not on dummy;")
    assert found["missing"].startswith("--device is xpu, but torch finds cpu and dummy on this machine; use --device dummy, or install")
