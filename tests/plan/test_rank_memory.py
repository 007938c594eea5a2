"""The plan of each stage from a config; that ranks really hold so much is tested in tests/parallel/test_rank_memory.py."""

import os

import pytest
import torch

from phase8.config.load import load_config
from phase8.distributed.peer_memory import ROUNDS, ROUNDS_IN_PLACE
from phase8.plan import rank_memory
from phase8.plan.activations import bytes_within_budget, trace_activations
from phase8.plan.rank_memory import fullest
from phase8.plan.whole_config import count_parameters, plan_stages, shapes_only

SMALL = (
    "model.d_model=32", "model.num_layers=4", "model.num_heads=4", "model.vocab_size=66", "model.sequence_length=48", "model.ffn_size=64",
    "model.local_window_size=[8,16]", "model.global_path=linear", "train.global_batch_size=8", "train.micro_batch_size=1",
    "precision.dtype=fp32",
)  # fmt: skip
PP2 = "parallel.pipeline_parallel_size=2"
INTERLEAVED = (PP2, "parallel.pipeline_schedule=interleaved", "parallel.pipeline_chunks=2")


def config_of(*settings):
    return load_config(os.devnull, [*SMALL, *settings])


def stages_of(*settings, world_size=1):
    return plan_stages(config_of(*settings), world_size=world_size, device_type="cpu")


def traced(window, **changes):
    section = config_of().model.model_copy(update={"local_window_size": window})
    arguments = {"dtype": torch.float32, "micro_batch_size": 1, "packed": False, "device_type": "cpu"}
    return trace_activations(section, **{**arguments, **changes})


def test_one_process_holds_the_model():
    (stage,) = stages_of()
    assert (stage.stage, stage.layers) == (0, (range(4),))
    assert stage.num_parameters == count_parameters(shapes_only(config_of()))
    assert (stage.memory.weights_bytes, stage.memory.optimizer_bytes) == (4 * stage.num_parameters, 8 * stage.num_parameters)


@pytest.mark.parametrize(("dtype", "num_bytes"), [("bf16", 4), ("fp8", 2)])
def test_moments_of_matrices_may_have_fewer_bits(dtype, num_bytes):
    (stage,), (short,) = stages_of(), stages_of(f"optim.state_dtype={dtype}")
    in_vectors = sum(parameter.numel() for parameter in shapes_only(config_of()).parameters() if parameter.ndim < 2)
    assert 0 < in_vectors < 0.1 * stage.num_parameters
    assert short.memory.optimizer_bytes == num_bytes * (stage.num_parameters - in_vectors) + 8 * in_vectors
    assert short.memory.weights_bytes == stage.memory.weights_bytes


def test_layers_keep_what_their_windows_ask_for():
    """Layers 0 and 2 have windows of 8, layers 1 and 3 of 16."""
    small, large = traced(8), traced(16)
    assert small.block < large.block
    (stage,) = stages_of()
    assert stage.memory.activations_bytes == 2 * small.block + 2 * large.block + small.head
    (full,) = stages_of("train.recompute=full", "train.recompute_every_n_layers=3")  # layers 0 and 3
    repeated = large.block - large.block_input
    assert full.memory.activations_bytes == 2 * small.block_input + large.block + small.block + max(repeated, small.head)


def test_stages_hold_their_layers_and_the_ends_of_the_model():
    first, last = stages_of(PP2, world_size=2)
    assert (first.layers, last.layers) == ((range(2),), (range(2, 4),))
    embedding = 66 * 32
    assert first.num_parameters + last.num_parameters == count_parameters(shapes_only(config_of()))
    assert first.num_parameters - last.num_parameters == -32  # embedding and head are alike; the last one has the norm
    tied_first, tied_last = stages_of(PP2, "model.tie_embeddings=true", world_size=2)
    assert (tied_first.num_parameters, tied_last.num_parameters) == (first.num_parameters, last.num_parameters)
    whole = count_parameters(shapes_only(config_of("model.tie_embeddings=true")))
    assert tied_first.num_parameters + tied_last.num_parameters == whole + embedding


def test_the_first_stage_holds_two_microbatches_and_messages():
    first, last = stages_of(PP2, world_size=2)
    small, large = traced(8), traced(16)
    layers, stream = small.block + large.block, small.block_input
    assert first.memory.activations_bytes == 2 * (layers + stream) + 4 * stream
    assert last.memory.activations_bytes == layers + small.head + 4 * stream
    assert fullest((first, last)) is first
    gpipe = stages_of(PP2, "parallel.pipeline_schedule=gpipe", world_size=2)
    assert gpipe[1].memory.activations_bytes == 8 * (layers + small.head) + 4 * stream
    assert fullest(gpipe) is gpipe[1]


def test_interleaved_stages_hold_chunks():
    first, last = stages_of(*INTERLEAVED, world_size=2)
    assert (first.layers, last.layers) == ((range(1), range(2, 3)), (range(1, 2), range(3, 4)))
    small, large = traced(8), traced(16)
    stream = small.block_input
    # Both ends of the first stage's chunks but one lead to another stage; five of its chunks are held.
    assert first.memory.activations_bytes == 5 * (small.block + stream) + 8 * stream
    # Three of the last stage, with the loss of one microbatch.
    assert last.memory.activations_bytes == 2 * (large.block + stream) + large.block + large.head + 8 * stream


@pytest.mark.parametrize(("setting", "scalars"), [("model.low_rank_rank=0", 2), ("model.low_rank_rank=4", 2), ("model.global_path=delta", 3)])
def test_tensor_parallel_ranks_divide_what_can_be_divided(setting, scalars):
    (whole,), (half,) = (
        stages_of("model.global_gate=scalar", setting, *more, world_size=size) for more, size in (((), 1), (("parallel.tensor_parallel_size=2",), 2))
    )
    low_rank = "=4" in setting
    # Norms and the scalars of the global path, and of low-rank pairs the matrices beside the bottleneck.
    of_a_layer = 2 * 32 + scalars * 4 * 32 + (4 * 4 * 32 if low_rank else 0)
    replicated = 4 * of_a_layer + 32
    assert half.num_parameters == (whole.num_parameters + replicated) // 2


def test_data_ranks_divide_parameters_as_zero_says():
    size = count_parameters(shapes_only(config_of()))  # dims that the ranks do not divide are rounded up
    for stage, shard in (("0", None), ("1", 4), ("3", 4)):
        (found,) = stages_of(f"zero.stage={stage}", world_size=4)
        assert found.num_parameters == size if shard is None else size / 4 <= found.num_parameters < size / 4 + 400
    (pairs,) = stages_of("zero.stage=1", "zero.shard_size=2", world_size=4)
    assert size / 2 <= pairs.num_parameters < size / 2 + 400


def test_offloading_reaches_the_plan():
    (kept,) = stages_of("zero.stage=3", world_size=2)
    offloads = ("zero.stage=3", "zero.offload_optimizer=cpu", "zero.offload_params=cpu")
    (offloaded,) = stages_of(*offloads, world_size=2)
    assert offloaded.num_parameters == kept.num_parameters and offloaded.memory.optimizer_bytes == 0
    assert kept.memory.weights_bytes - offloaded.memory.weights_bytes == 4 * kept.num_parameters
    assert (kept.memory.host_bytes, offloaded.memory.host_bytes) == (0, 16 * kept.num_parameters)
    (alone,) = stages_of(*offloads)  # FSDP holds the parameters of one process, too
    assert alone.memory.weights_bytes < 4 * alone.num_parameters
    (pinned,) = plan_stages(config_of(*offloads), world_size=1, device_type="cuda")
    assert pinned.memory.host_bytes > alone.memory.host_bytes == 16 * alone.num_parameters


def test_copies_of_asynchronous_saves_reach_the_plan():
    for settings, world_size in (((), 1), (("zero.stage=3",), 2)):
        (stage,) = stages_of(*settings, "checkpoint.asynchronous=true", world_size=world_size)
        assert stage.memory.host_bytes == 12 * stage.num_parameters


def on_gpu(*settings):
    (stage,) = plan_stages(config_of(*settings), world_size=1, device_type="cuda")
    return stage.memory


def test_compiled_blocks_are_planned_as_the_compiler_partitions_them():
    eager, compiled = on_gpu("train.compile.enabled=false"), on_gpu("train.compile.enabled=true")
    assert compiled.activations_bytes < eager.activations_bytes
    budgeted = on_gpu("train.compile.enabled=true", "train.recompute=budget", "train.activation_memory_budget=0.2")
    assert budgeted.activations_bytes < compiled.activations_bytes
    assert on_gpu("train.compile.enabled=true", "train.recompute=full").activations_bytes < budgeted.activations_bytes


def test_compiled_activations_grow_evenly_with_the_microbatch():
    sizes = [on_gpu("train.compile.enabled=true", f"train.micro_batch_size={size}", "model.vocab_size=64").activations_bytes for size in (1, 2, 4)]
    assert sizes[2] - sizes[1] == pytest.approx(2 * (sizes[1] - sizes[0]), rel=1e-6)


def test_layers_of_a_hybrid_are_planned_each_as_they_are():
    def activations(*settings):
        return on_gpu("train.compile.enabled=false", "model.global_path=delta", "model.num_layers=4", *settings).activations_bytes

    alone, windows = activations("model.local_window_size=0"), activations("model.local_window_size=8", "model.global_path=none")
    assert windows < alone
    assert activations("model.local_window_size=[0,8]") == pytest.approx((alone + windows) / 2, rel=1e-9)


def test_what_a_budget_keeps_is_traced_at_the_size_of_the_microbatch(monkeypatch):
    """It does not grow evenly: the choice depends on the sizes."""
    case = {"dtype": torch.bfloat16, "packed": False}
    model = config_of().model.model_copy(update={"local_window_size": 16})
    small, middle, large = (bytes_within_budget(model, 0.3, micro_batch_size=size, **case) for size in (2, 4, 8))
    assert large - middle != 2 * (middle - small)
    budget = ("train.recompute=budget", "train.activation_memory_budget=0.3")
    settings = ("train.compile.enabled=true", *budget, "train.micro_batch_size=8", "precision.dtype=bf16")
    planned = on_gpu(*settings).activations_bytes
    monkeypatch.setattr(rank_memory, "bytes_within_budget", lambda *arguments, **others: large + 1000)
    assert on_gpu(*settings).activations_bytes == planned + 3 * 1000  # kept by four layers, and less is repeated


def test_the_loss_needs_logits_of_a_chunk_and_the_cast_head():
    few, many = (on_gpu(f"model.vocab_size={size}", "train.compile.enabled=false").activations_bytes for size in (64, 6400))
    hidden_and_head = (6400 - 64) * 32 * 4  # the gradient of the head
    assert many - few == hidden_and_head + (48 + 32) * (6400 - 64) * 4


def test_memory_that_other_gpus_fill_reaches_the_plan():
    def peak(*settings, device_type="cuda", world_size=2):
        stage, *_ = plan_stages(config_of(*settings), world_size=world_size, device_type=device_type)
        return stage.memory.total_bytes

    tensor_parallel, asynchronous = "parallel.tensor_parallel_size=2", "parallel.async_tensor_parallel=true"
    tokens = 48 * 32 * 4
    assert peak(tensor_parallel, asynchronous) - peak(tensor_parallel) == 2 * ROUNDS * tokens
    block = sum(parameter.numel() for parameter in shapes_only(config_of()).blocks["0"].parameters())
    assert peak("zero.stage=3", "zero.copy_engine_gather=true") - peak("zero.stage=3") == ROUNDS_IN_PLACE * 4 * block
    two_chunks, copied = (*INTERLEAVED, "zero.stage=3"), "zero.copy_engine_gather=true"
    assert peak(*two_chunks, copied, world_size=4) - peak(*two_chunks, world_size=4) == 2 * ROUNDS_IN_PLACE * 4 * block
    for settings in ((tensor_parallel, asynchronous), ("zero.stage=3", "zero.copy_engine_gather=true")):
        assert peak(*settings, device_type="cpu") == peak(settings[0], device_type="cpu")


OFFLOADED = ("train.recompute=full", "train.offload_activations=cpu")


def test_inputs_of_blocks_wait_on_the_host():
    """The device keeps two of four."""
    (kept,), (offloaded,) = stages_of("train.recompute=full"), stages_of(*OFFLOADED)
    one = traced(16).block_input
    assert offloaded.memory.host_bytes == 4 * one == kept.memory.host_bytes + 4 * one
    assert offloaded.memory.activations_bytes == kept.memory.activations_bytes - 2 * one
    (every_third,) = stages_of(*OFFLOADED, "train.recompute_every_n_layers=3")  # layers 0 and 3
    assert every_third.memory.host_bytes == 2 * one


def test_the_embedding_that_every_block_adds_is_no_input_that_waits_on_the_host():
    (kept,), (offloaded,) = (stages_of(*ways, "model.embedding_scalars=true") for ways in (("train.recompute=full",), OFFLOADED))
    assert offloaded.memory.host_bytes == kept.memory.host_bytes + 3 * traced(16).block_input


def test_page_locked_inputs_come_in_powers_of_two():
    """An input has 48 x 32 numbers, 6,144 bytes; in slices, two tensors of 20 tokens and one of 8."""
    whole, sliced = (
        plan_stages(config_of(*OFFLOADED, f"train.recompute={way}", "train.recompute_slice_tokens=20"), world_size=1, device_type="cuda")[0]
        for way in ("full", "slices")
    )
    assert (whole.memory.host_bytes, sliced.memory.host_bytes) == (4 * 8192, 4 * (2 * 4096 + 1024))


def test_every_microbatch_on_its_way_through_a_pipeline_has_inputs_on_the_host():
    """Two layers a stage: the first stage has two microbatches before their backward; the last one receives the input of its first layer."""
    first, last = stages_of(*OFFLOADED, PP2, world_size=2)
    one = traced(16).block_input
    assert (first.memory.host_bytes, last.memory.host_bytes) == (2 * 2 * one, one)


def test_gradients_take_less_of_the_place_of_activations_that_are_offloaded():
    one_microbatch = ("train.micro_batch_size=8", "train.recompute=full")
    (kept,), (offloaded,) = stages_of(*one_microbatch), stages_of(*one_microbatch, "train.offload_activations=cpu")
    assert kept.memory.gradients_bytes < offloaded.memory.gradients_bytes <= 4 * kept.num_parameters


def test_of_a_sequence_in_slices_the_head_sees_all():
    """The gradient of the head is there once, not once for each slice."""
    whole = traced(16)
    sliced = traced(16, tokens_at_once=12)
    assert (sliced.head, sliced.block_input) == (whole.head, whole.block_input) and sliced.block < whole.block / 3
