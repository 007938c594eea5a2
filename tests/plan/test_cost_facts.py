from phase8.config.batch import BatchShape
from phase8.config.model_section import ModelSection
from phase8.exchanges import Operation
from phase8.plan.communication import Collectives, Grid
from phase8.plan.cost_facts import batch_fact, communication_fact, memory_fact, memory_facts, model_facts
from phase8.plan.memory import MemoryPlan
from phase8.plan.rank_memory import StageMemory
from phase8.topology import AxisName


def test_the_model_in_words():
    shape = {"d_model": 8, "num_layers": 2, "num_heads": 2, "vocab_size": 10, "sequence_length": 4, "local_window_size": 2, "ffn_size": 12}
    section = ModelSection(**shape, global_tokens=1, global_path="linear", global_gate="scalar")
    assert dict(model_facts(section, num_parameters=1234567)) == {
        "model": "phase8, 2 layers, width 8, 2 heads of 4, dense",
        "parameters": "1.23M (1,234,567)",
        "FLOPs/token": "9.74 kFLOP training, 3.25 kFLOP forward",
    }
    low_rank = section.model_copy(update={"block": "transformer", "head_size": 6, "low_rank_rank": 3})
    assert dict(model_facts(low_rank, num_parameters=1))["model"] == "transformer, 2 layers, width 8, 2 heads of 6, low rank 3"
    grouped = section.model_copy(update={"block": "transformer", "num_kv_heads": 1})
    assert dict(model_facts(grouped, num_parameters=1))["model"] == "transformer, 2 layers, width 8, 2 heads of 4 on 1 of keys, dense"


def test_planned_memory_by_kind():
    plan = MemoryPlan(weights_bytes=2**20, gradients_bytes=2**21, optimizer_bytes=2**22, activations_bytes=2**20)
    assert memory_fact(plan) == ("planned memory", "8 MiB: weights 1 MiB, gradients 2 MiB, optimizer 4 MiB, activations 1 MiB")
    offloaded = MemoryPlan(weights_bytes=2**20, gradients_bytes=0, optimizer_bytes=0, activations_bytes=0, host_bytes=2**30)
    assert memory_fact(offloaded)[1].endswith("activations 0 B; on the host 1 GiB")


def test_planned_memory_of_stages():
    plans = [MemoryPlan(2**20, 2**20, 0, num_bytes) for num_bytes in (0, 2**20)]
    stages = [StageMemory(0, (range(2), range(4, 5)), 1000, plans[0]), StageMemory(1, (range(2, 4), range(5, 8)), 2000, plans[1])]
    assert memory_facts(stages[:1]) == [("planned memory per rank", memory_fact(plans[0])[1])]
    assert memory_facts(stages) == [
        ("planned memory per rank (stage 1)", memory_fact(plans[1])[1]),
        ("stage 0", "layers 0-1, 4, 1k parameters of a rank, 2 MiB"),
        ("stage 1", "layers 2-3, 5-7, 2k parameters of a rank, 3 MiB"),
    ]


def test_batch_arithmetic():
    shape = BatchShape(global_batch_size=24, micro_batch_size=2, num_microbatches=4, data_parallel_size=3)
    assert batch_fact(shape, sequence_length=512) == (
        "batch",
        "24 sequences of 512 = 12,288 tokens a step: micro batch 2 x 4 microbatches x 3 data-parallel ranks",
    )


def test_communication_axis_by_axis():
    table = [
        Collectives(AxisName.TENSOR, Operation.ALL_GATHER, count=6, num_bytes=2**20),
        Collectives(AxisName.PIPELINE, Operation.ALL_REDUCE, count=3, num_bytes=12),
        Collectives(AxisName.PIPELINE, Operation.SEND, count=5, num_bytes=2**21),
        Collectives(AxisName.PIPELINE, Operation.RECEIVE, count=4, num_bytes=2**20),
        Collectives(AxisName.TENSOR, Operation.ALL_REDUCE, count=2, num_bytes=2**20),
    ]
    assert communication_fact(table, Grid(pipeline=2, tensor=4, stage=1)) == (
        "communication per step and rank (stage 1)",
        "pp 3 collectives and 9 messages of 3 MiB, 2 MiB leave the rank; tp 8 collectives of 2 MiB, 2.25 MiB leave the rank",
    )
    name, fact = communication_fact(table[:1], Grid(tensor=2))
    assert (name, fact) == ("communication per step and rank", "tp 6 collectives of 1 MiB, 512 KiB leave the rank")
