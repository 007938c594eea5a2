import functools

import pytest
import torch

from phase8.config.model_section import ModelSection
from phase8.kernels.rotary import rotary_angles
from phase8.model.model import build_model
from phase8.model.parameters import initialise
from phase8.model.recomputation import apply_recomputation
from phase8.plan import activations
from phase8.plan.activations import bytes_within_budget, trace_activations
from phase8.precision.policy import format_named

NUM_LAYERS = 3
SHAPE = {
    "d_model": 64,
    "num_layers": NUM_LAYERS,
    "num_heads": 4,
    "vocab_size": 256,
    "sequence_length": 128,
    "local_window_size": 32,
    "global_tokens": 8,
}
BLOCKS = {
    "phase8": {},
    "delta": {"global_path": "delta"},
    "gates": {"global_path": "delta", "global_gate": "channel", "decay_floor": -5.0, "local_qk_norm": True, "global_activation": "silu"},
    "transformer": {"block": "transformer"},
    "transformer with fewer heads of keys": {"block": "transformer", "num_kv_heads": 1},
    "transformer with norm": {"block": "transformer", "local_qk_norm": True},
}
RECOMPUTE = [("none", 1), ("full", 1), ("full", 2), ("selective", 1), ("selective", 2)]


def saved_bytes(section, *, dtype, micro_batch_size, packed, recompute, every):
    """What autograd really keeps of a forward of the whole model: distinct storages, parameters left out."""
    model = build_model(section, dtype=dtype, device=torch.device("cpu"))
    apply_recomputation(model, recompute, every_n_layers=every)
    initialise(model, seed=0)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {}

    def remember(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return x

    tokens = torch.zeros(micro_batch_size, section.sequence_length, dtype=torch.int64)
    starts = torch.zeros_like(tokens, dtype=torch.bool) if packed else None
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda x: x):
        loss = model.loss_sum(tokens, tokens, starts)
    kept = sum(storage.nbytes() for storage in storages.values())
    assert loss.requires_grad
    return kept


def planned_bytes(section, *, dtype, micro_batch_size, packed, recompute, every):
    traced = trace_activations(section, dtype=dtype, micro_batch_size=micro_batch_size, packed=packed, device_type="cpu")
    recomputed = {"none": traced.block, "full": traced.block_input, "selective": traced.block_without_mixer}[recompute]
    num_recomputed = len(range(0, NUM_LAYERS, every))
    return (NUM_LAYERS - num_recomputed) * traced.block + num_recomputed * recomputed + traced.head


# In fp32 each block whole and with every second mixer recomputed, in bf16 all ways; the others in fp32 are for the full tests.
WAYS = [
    pytest.param(dtype, *way, id=f"{name}-{'-'.join(map(str, way))}", marks=pytest.mark.full if name == "fp32" and way in RECOMPUTE[1:4] else ())
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    for way in RECOMPUTE
]


@pytest.mark.parametrize(("dtype", "recompute", "every"), WAYS)
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_traced_bytes_equal_what_autograd_keeps(block, dtype, recompute, every):
    section = ModelSection(**SHAPE, **block)
    case = {"dtype": dtype, "micro_batch_size": 2, "packed": recompute == "none", "recompute": recompute, "every": every}
    assert planned_bytes(section, **case) == pytest.approx(saved_bytes(section, **case), rel=0.03)


@pytest.mark.parametrize("changes", [{"low_rank_rank": 8, "ffn": "low_rank_swiglu", "tie_embeddings": True}, {"score": "dot", "chain": "none"}])
def test_other_shapes_and_odd_lengths(changes):
    section = ModelSection(**{**SHAPE, "sequence_length": 117, **changes})
    case = {"dtype": torch.bfloat16, "micro_batch_size": 3, "packed": True, "recompute": "none", "every": 1}
    assert planned_bytes(section, **case) == pytest.approx(saved_bytes(section, **case), rel=0.03)


def test_the_delta_rule_keeps_a_share_for_each_head_and_token_and_no_state():
    """Beyond the linear recurrence, two numbers in fp32, the share as its sigmoid keeps it and as the recurrence does; and rows of the weight."""
    case = {"dtype": torch.bfloat16, "micro_batch_size": 2, "packed": False, "device_type": "cuda"}
    linear, delta = (trace_activations(ModelSection(**SHAPE, global_path=path), **case) for path in ("linear", "delta"))
    shares, rows = 2 * (2 * 128 * 4) * 4, 4 * 64 * 2  # the rows are cast to bf16
    assert delta.block - linear.block == shares + rows
    assert delta.block_without_mixer == linear.block_without_mixer


def test_low_rank_q_k_and_v_are_not_kept_where_an_operator_computes_them():
    """A rank of 33 is too large for it."""
    case = {"dtype": torch.bfloat16, "micro_batch_size": 2, "packed": False, "device_type": "cuda"}
    inside, outside = (trace_activations(ModelSection(**SHAPE, head_size=32, low_rank_rank=rank), **case) for rank in (32, 33))
    numbers = 3 * 4 * 32 * (2 * 128 + 3 * 33)  # of tokens, and of the matrix of up weights that a product needs
    assert outside.block - inside.block == pytest.approx(2 * numbers, rel=0.05)


@pytest.mark.parametrize("changes", [{}, {"convolution_size": 1}, {"head_size": 32, "low_rank_rank": 8}], ids=["default", "one tap", "low-rank"])
def test_values_that_pass_silu_keep_nothing_more_where_an_operator_activates_them(changes):
    case = {"dtype": torch.bfloat16, "micro_batch_size": 2, "packed": False, "device_type": "cuda"}
    plain, active = (trace_activations(ModelSection(**SHAPE, **changes, value_activation=each), **case) for each in ("none", "silu"))
    assert active == plain


def test_recomputation_keeps_less():
    traced = trace_activations(ModelSection(**SHAPE), dtype=torch.float32, micro_batch_size=2, packed=False, device_type="cpu")
    assert traced.block > 2 * traced.block_without_mixer > 2 * traced.block_input
    assert traced.block_input == 2 * 128 * 64 * 4


def test_tensor_parallel_ranks_divide_all_but_the_gradient_of_the_final_hidden_states():
    case = {"dtype": torch.float32, "micro_batch_size": 2, "packed": False, "device_type": "cpu"}
    whole, part = (trace_activations(ModelSection(**SHAPE), **case, num_tensor_ranks=ranks) for ranks in (1, 4))
    assert (part.block, part.block_without_mixer, part.block_input) == (whole.block // 4, whole.block_without_mixer // 4, whole.block_input // 4)
    hidden, head = 2 * 128 * 64 * 4, 256 * 64 * 4
    assert part.head == (whole.head - hidden - head) // 4 + hidden + head // 4


def compiled_bytes(section, *, micro_batch_size, recompute="none"):
    """What autograd really keeps of a compiled block of real tensors, its weights left out."""
    torch.compiler.reset()
    model = build_model(section, dtype=torch.bfloat16, device=torch.device("cpu"))
    apply_recomputation(model, recompute)
    initialise(model, seed=0)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    x = torch.randn(micro_batch_size, section.sequence_length, section.d_model, dtype=torch.bfloat16, requires_grad=True)
    angles = rotary_angles(section.sequence_length, section.head_width, base=section.rope_base, first_position=0, device=x.device)
    storages = {}

    def remember(x):
        if x.untyped_storage().data_ptr() not in weights:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    block = torch.compile(model.blocks["0"], backend="aot_eager_decomp_partition", fullgraph=True)
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda x: x):
        block(x, angles, None)
    torch.compiler.reset()
    return sum(storage.nbytes() for storage in storages.values())


# The parts of other blocks are in these, whole or without their mixer; -m full compares both of each.
COMPILED = [("phase8", "none"), ("gates", "selective"), ("transformer with fewer heads of keys", "none")]


@pytest.mark.parametrize(
    ("block", "recompute"),
    [
        pytest.param(name, recompute, marks=[] if (name, recompute) in COMPILED else [pytest.mark.full])
        for name in BLOCKS
        for recompute in ("none", "selective")
    ],
)
def test_traced_bytes_of_a_compiled_block_equal_what_it_keeps(block, recompute):
    section, is_recomputed = ModelSection(**SHAPE, **BLOCKS[block]), recompute == "selective"
    case = {"dtype": torch.bfloat16, "micro_batch_size": 2, "packed": False, "device_type": "cpu", "without_mixer": is_recomputed}
    compiled, eager = trace_activations(section, **case, is_compiled=True), trace_activations(section, **case)
    found = compiled.block_without_mixer if is_recomputed else compiled.block
    assert found == pytest.approx(compiled_bytes(section, micro_batch_size=2, recompute=recompute), rel=0.03)
    assert found < (eager.block_without_mixer if is_recomputed else eager.block) and compiled.block_input == eager.block_input


def test_a_budget_keeps_less_and_nothing_without_the_compiler():
    case = {"dtype": torch.bfloat16, "micro_batch_size": 2, "packed": False, "device_type": "cuda"}
    compiled = trace_activations(ModelSection(**SHAPE), **case, is_compiled=True, without_mixer=False)
    within = bytes_within_budget(ModelSection(**SHAPE), 0.3, dtype=torch.bfloat16, micro_batch_size=2, packed=False)
    assert compiled.block_input < within < 0.8 * compiled.block
    eager = trace_activations(ModelSection(**SHAPE), **case)
    assert eager.block_within_budget == eager.block


def test_numbers_of_fp8_that_hooks_do_not_see_are_counted(monkeypatch):
    section = ModelSection(d_model=256, num_layers=1, num_heads=4, ffn_size=512, vocab_size=256, sequence_length=256, local_window_size=32)
    forward = activations._Forward(section, torch.bfloat16, 2, False, "cuda", format_named("fp8-tensor"))
    count = functools.partial(activations._block_bytes.__wrapped__, forward, is_compiled=True)
    found = count()
    monkeypatch.setattr(activations, "_kept_past_hooks", lambda results: [])
    assert found - count() == 2 * 256 * (3 * 256 + 512)  # a byte for each number of the inputs of q, k, v, of out, of gate and up, and of down
