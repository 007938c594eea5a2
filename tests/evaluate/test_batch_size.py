"""The batch of an evaluation by the plan of memory."""

import torch

from phase8.evaluate.batch_size import planned_batch_size
from tests.evaluate.measuring import tiny_model

GPU = torch.device("cuda", 0)  # only its type and its memory are asked for


def test_a_gpu_reads_as_many_sequences_as_its_memory_holds_and_no_more_than_keep_it_busy(monkeypatch):
    model = tiny_model(d_model=256, num_heads=4, vocab_size=1000)

    def batch_size(gib, length=4096):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(gib * 2**30), 80 << 30))
        return planned_batch_size(model, length=length, packed=True, device=GPU)

    assert batch_size(80) == 32 and batch_size(80, length=1 << 20) == 1
    assert batch_size(1) == 1  # an attempt, whose failure says what is missing
    sizes = [batch_size(gib) for gib in (4, 4.5, 5)]
    assert 1 <= sizes[0] < sizes[1] < sizes[2] < 32


def test_a_cpu_reads_a_few_thousand_tokens_at_once():
    model = tiny_model()
    assert [planned_batch_size(model, length=length, packed=False, device=torch.device("cpu")) for length in (512, 100_000)] == [16, 1]
