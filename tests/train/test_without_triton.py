"""A step where Triton is not installed: eager, compiled into one graph, exported; in a process of its own, which cannot import Triton."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


# The first one makes the graphs of the second one, forward and backward, but no code of them.
@pytest.mark.parametrize("backend", ["aot_eager_decomp_partition", pytest.param("inductor", marks=pytest.mark.full)])
def test_a_step_compiles_into_one_graph_and_is_exported_without_triton(backend):
    command = [sys.executable, "-m", "tests.train.step_without_triton", backend]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=900)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["triton"] is False and found["unmoved"] == []
    is_code = backend == "inductor"  # which rounds angles and gates of positions, in fp32, as it likes
    assert found["compiled_loss"] == pytest.approx(found["loss"], rel=1e-8 if is_code else 1e-12)
    # AdamW divides small gradients by themselves.
    assert found["gradients"] < (1e-6 if is_code else 1e-12) and found["weights"] < (1e-2 if is_code else 1e-8)
    assert found["num_blocks"] == 4 and found["exported_losses"] == pytest.approx([found["loss"]] * 2, rel=1e-12)
    assert found["exported_gradients"] < 1e-12
