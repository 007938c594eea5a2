from phase8.config.batch import BatchShape
from phase8.config.schema import ModelSection
from phase8.plan.facts import batch_fact, memory_fact, model_facts
from phase8.plan.memory import MemoryPlan


def test_the_model_in_words():
    section = ModelSection(d_model=8, num_layers=2, num_heads=2, vocab_size=10, sequence_length=4, local_window_size=2, global_tokens=1, ffn_size=12)
    assert dict(model_facts(section, num_parameters=1234567)) == {
        "model": "phase8, 2 layers, width 8, 2 heads of 4, dense",
        "parameters": "1.23M (1,234,567)",
        "FLOPs/token": "9.74 kFLOP training, 3.25 kFLOP forward",
    }
    low_rank = section.model_copy(update={"block": "transformer", "head_size": 6, "low_rank_rank": 3})
    assert dict(model_facts(low_rank, num_parameters=1))["model"] == "transformer, 2 layers, width 8, 2 heads of 6, low rank 3"


def test_planned_memory_by_kind():
    plan = MemoryPlan(weights_bytes=2**20, gradients_bytes=2**21, optimizer_bytes=2**22, activations_bytes=2**20)
    assert memory_fact(plan) == ("planned memory", "8 MiB: weights 1 MiB, gradients 2 MiB, optimizer 4 MiB, activations 1 MiB")


def test_batch_arithmetic():
    shape = BatchShape(global_batch_size=24, micro_batch_size=2, num_microbatches=4, data_parallel_size=3)
    assert batch_fact(shape, sequence_length=512) == (
        "batch",
        "24 sequences of 512 = 12,288 tokens a step: micro batch 2 x 4 microbatches x 3 data-parallel ranks",
    )
