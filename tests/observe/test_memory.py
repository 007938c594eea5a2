from __future__ import annotations

import numpy as np
import pytest
import torch

from phase8.observe.memory import peak_memory_bytes, reset_peak_memory


def test_on_the_cpu_the_peak_is_in_bytes_and_stays_when_memory_is_freed():
    before = peak_memory_bytes(torch.device("cpu"))
    block = np.ones(before + 64 * 2**20, dtype=np.uint8)  # larger than all the process ever held
    with_block = peak_memory_bytes(torch.device("cpu"))
    del block
    reset_peak_memory(torch.device("cpu"))
    assert before > 2**20
    assert before + 60 * 2**20 < with_block < 4 * before + 512 * 2**20
    assert peak_memory_bytes(torch.device("cpu")) >= with_block


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_peak_starts_afresh_after_a_reset():
    device = torch.device("cuda")
    block = torch.zeros(64 * 2**20, dtype=torch.uint8, device=device)
    with_block = peak_memory_bytes(device)
    del block
    reset_peak_memory(device)
    assert with_block >= 64 * 2**20
    assert peak_memory_bytes(device) <= with_block - 64 * 2**20
