"""torch.compile of divided blocks: without a graph break, collectives included, and with the gradients of the eager ones."""

import os
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo import config as dynamo_config
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code

from phase8.config.auto import without_auto
from phase8.config.load import load_config
from phase8.distributed.mesh import build_mesh
from phase8.distributed.placement import gathered
from phase8.kernels import mixer_inputs, window_attention
from phase8.model import mixer
from phase8.topology import Topology
from phase8.train.engine.compilation import compile_modules
from phase8.train.engine.source_order import in_source_order
from phase8.train.engine.train_state import build_train_state
from phase8.zero.fsdp import shard_size
from tests.parallel.training import microbatch_of_slice, perturb

SETTINGS = (
    "model.d_model=32", "model.num_layers=1", "model.num_heads=4", "model.vocab_size=64", "model.sequence_length=32", "model.ffn_size=64",
    "model.local_window_size=8",
)  # fmt: skip


def divided_model(axis, stage, model, num_ranks=2):
    """A small model on two ranks or more, and a microbatch for it."""
    config = without_auto(load_config(os.devnull, [*SETTINGS, f"zero.stage={stage}", *model]))
    axes = ("data", "expert") if axis == "expert" else (axis,)
    topology = Topology(**{f"{name}_parallel_size": num_ranks for name in axes})
    mesh = build_mesh(topology, device_type="cpu", shard_size=shard_size(config.zero, num_token_ranks=topology.num_token_ranks))
    train_state = build_train_state(config, mesh=mesh, device=torch.device("cpu"), dtype=torch.float32)
    perturb(train_state)
    tokens = torch.randint(64, (2, 33), generator=torch.Generator().manual_seed(0))
    starts = torch.zeros(2, 33, dtype=torch.bool)
    starts[:, [0, 13]] = True
    return train_state, microbatch_of_slice(tokens, starts, mesh.own_slice)


def gradients_of_both(axis, stage, budget, model, backend):
    """Largest difference between compiled and eager gradients, over the largest gradient of each parameter, and both losses."""
    train_state, batch = divided_model(axis, stage, model)
    torch.compiler.reset()  # or it takes what was compiled with another budget
    results, functorch_config.activation_memory_budget = [], budget
    for compiled in (False, True):
        if compiled:
            for block in train_state.model.blocks.values():
                block.compile(fullgraph=axis != "expert" and not set(TRANSFORMER) <= set(model), backend=backend)  # as rules of the config allow
        loss = train_state.model.loss_sum(batch.tokens, batch.targets, batch.starts)
        loss.backward()
        results.append((loss.item(), gathered({name: p.grad for name, p in train_state.model.named_parameters()}, keep=True)))
        train_state.shards.drop_gradients()
    torch.compiler.reset()  # or the process groups stay with the compiled blocks
    (eager_loss, eager), (loss, found) = results
    return max(((found[name] - grad).abs().max() / grad.abs().max()).item() for name, grad in eager.items()), loss, eager_loss


DELTA = ("model.global_path=delta",)
TRANSFORMER = ("model.block=transformer",)
EXPERTS = ("model.ffn=moe", "model.num_experts=4", "model.expert_ffn_size=16", "model.shared_experts=1")
DROPLESS = "model.capacity_factor=null"
CHAIN = ("model.chain=both", "model.global_tokens=2")
OPTIONS = (
    *DELTA, "model.global_gate=channel", "model.decay_floor=-5", "model.local_qk_norm=true", "model.global_activation=silu",
    "model.rotary=[true,false]",
)  # fmt: skip


EAGERLY = ("train.compile.enabled=true", "train.compile.backend=eager")  # traced only
INDUCTOR, PARTITION = "inductor", "aot_eager_decomp_partition"  # with the same graphs, of which the second one makes no code


@pytest.mark.parametrize(
    ("axis", "stage", "budget", "model", "backend"),
    # The compiler takes half a minute to a minute for each of the last ones. What is for the full tests has its parts in the others.
    [
        ("tensor", 0, 1.0, (), PARTITION), ("data", 3, 0.3, DELTA, PARTITION),
        pytest.param("tensor", 0, 1.0, ("model.embedding_scalars=true", "model.num_layers=2"), PARTITION, marks=pytest.mark.full),
        *(pytest.param("data", 3, budget, (), PARTITION, marks=pytest.mark.full) for budget in (1.0, 0.3)),
        *(
            pytest.param(axis, 0, 1.0, EXPERTS, PARTITION, marks=pytest.mark.full)
            for axis in ("expert", "tensor")
        ),
        ("expert", 3, 1.0, (*EXPERTS, DROPLESS), PARTITION),
        pytest.param("context", 0, 1.0, CHAIN, PARTITION, marks=pytest.mark.full),
        ("context", 0, 1.0, TRANSFORMER, PARTITION),
        # Each rank that shares sequences compiles what its own slice needs; no other rank may wait for what it leaves out.
        ("context", 0, 1.0, (*CHAIN, "train.recompute=full"), PARTITION),
        ("context", 0, 1.0, (*DELTA, "train.recompute=selective"), PARTITION),
        ("context", 0, 1.0, (*TRANSFORMER, "train.recompute=full"), PARTITION),
        ("context", 0, 1.0, (*TRANSFORMER, "model.convolution_size=4", "train.recompute=selective"), PARTITION),
        *(
            pytest.param(*case, INDUCTOR, marks=pytest.mark.full)
            for case in (
                ("tensor", 0, 1.0, ()), ("data", 3, 1.0, ()), ("data", 3, 0.3, ()),
                ("data", 3, 0.3, DELTA), ("tensor", 0, 1.0, OPTIONS), ("context", 3, 1.0, CHAIN), ("context", 3, 1.0, OPTIONS),
            )
        ),
    ],
)  # fmt: skip
def test_compiled_blocks_have_the_gradients_of_eager_ones(pool, axis, stage, budget, model, backend):
    difference, loss, eager_loss = pool.run(gradients_of_both, axis, stage, budget, model, backend, world_size=2, timeout_seconds=300)[0]
    assert difference < 1e-4 and loss == pytest.approx(eager_loss, rel=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        ("model.rotary=[true,false]", "train.recompute=selective", "train.recompute_every_n_layers=3"),
        ("train.recompute=slices", "train.recompute_slice_tokens=7"),
    ],
)
@dynamo_config.patch(fail_on_recompile_limit_hit=True, recompile_limit=8)  # as torch has it
def test_every_form_of_a_block_is_compiled(settings):
    train_state, batch = divided_model("data", 0, ("model.num_layers=4", *settings), num_ranks=1)
    compile_modules(train_state.stage.chunks, without_auto(load_config(os.devnull, [*SETTINGS, "model.num_layers=4", *settings, *EAGERLY])))
    for size in (2, 1):  # evaluations have smaller microbatches
        tokens, targets, starts = (x[:size] for x in (batch.tokens, batch.targets, batch.starts))
        train_state.model.loss_sum(tokens, targets, starts).backward()
        with torch.no_grad():
            train_state.model.loss_sum(tokens, targets, starts)
    torch.compiler.reset()


def kept_alive(settings):
    """Bytes that the tensors which a compiled block keeps for backward have, and bytes of the memory in which they lie."""
    train_state, batch = divided_model("context", 0, (*settings, "train.recompute=full"))
    torch.compiler.reset()
    (block,) = train_state.model.blocks.values()
    block.compile(backend=PARTITION)
    kept = []

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        train_state.model.loss_sum(batch.tokens, batch.targets, None)
    torch.compiler.reset()
    memory = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept if not hasattr(tensor, "to_local")}
    return sum(tensor.nbytes for tensor in kept), sum(memory.values())


@pytest.mark.parametrize("settings", [pytest.param((), marks=pytest.mark.full), CHAIN])  # with a chain there is all that is without
def test_a_compiled_block_keeps_no_memory_of_which_backward_needs_nothing(pool, settings):
    """A view of no tokens looks small to the compiler, and keeps the queries, keys and values of a whole slice."""
    for own, memory in pool.run(kept_alive, settings, world_size=2, timeout_seconds=300):
        assert 0 < memory <= own


def order_of_work(settings):
    """Exchanges and operations of the mixer in the code that inductor writes for a block's forward and backward; all are operators, as on a GPU."""
    config = without_auto(load_config(os.devnull, [*SETTINGS, "parallel.context_parallel_size=4", "train.compile.enabled=true", *settings]))
    train_state, batch = divided_model("context", 0, settings, num_ranks=4)
    torch.compiler.reset()
    compile_modules(train_state.stage.chunks, config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixer, "window_attention", partial(window_attention._by_operator, beta=None))
        patch.setattr(mixer, "mixer_inputs", mixer_inputs._by_operator)
        # The compiler fuses fewer operations of several sequences, whose numbers lie otherwise in memory; so there is one.
        _, codes = run_and_get_code(lambda: train_state.model.loss_sum(batch.tokens[:1], batch.targets[:1], None).backward())
    torch.compiler.reset()
    called = re.compile(r"torch\.ops\.(?:_c10d_functional|phase8)\.(\w+)\S*\(")  # without what comments and messages name
    names = [called.findall(re.split(r"(?m)^ *def call\(", code)[-1]) for code in codes]
    (forward,) = [each for each in names if "added_state" in each and "mixer_inputs_backward" not in each]
    (backward,) = [each for each in names if "mixer_inputs_backward" in each]
    return forward, backward[backward.index("added_state") :]


@pytest.mark.full
def test_the_compiler_leaves_work_where_it_is_written(pool):
    """Else a rank waits before it begins what hides the exchange and what its neighbours wait for, and each rank in another place."""
    send, gather, wait = "all_to_all_single", "all_gather_into_tensor", "wait_tensor"
    for forward, backward in pool.run(order_of_work, ("train.recompute=full",), world_size=4, timeout_seconds=300):
        assert forward == [
            send, wait, "mixer_inputs", send, "added_state", gather, wait, "window_attention", wait, "gated_linear_attention",
        ]  # fmt: skip
        assert backward == [
            "added_state", gather, "window_attention_backward", send, wait, "gated_linear_attention_backward", wait,
            "mixer_inputs_backward", send, wait,
        ]  # fmt: skip


class Kernel:
    """A node of inductor's scheduler: the place of its earliest operation, what it needs and what it writes."""

    def __init__(self, min_order, needs, *writes):
        self.min_order, self.writes, self.unmet_dependencies = min_order, writes, [SimpleNamespace(name=name) for name in needs]

    def get_buffer_names(self):
        return set(self.writes)


def test_a_fused_kernel_brings_nothing_forward():
    begin, meanwhile, wait = Kernel(0, [], "pending"), Kernel(2, [], "window"), Kernel(3, ["pending"], "told")
    # Its earliest operation stands before the others, its last one reads what a wait returns; it writes for itself, and an input has no writer.
    fused = Kernel(1, ["told", "given", "sum"], "sum", "rest")
    last = Kernel(4, ["window", "rest"], "y")
    assert in_source_order([begin, wait, fused, meanwhile, last]) == [begin, meanwhile, wait, fused, last]


SHARED_SEQUENCES, SHARED_EXPERTS = ("parallel.context_parallel_size=2",), ("parallel.expert_parallel_size=2",)


@pytest.mark.parametrize(("settings", "is_kept"), [((), False), (SHARED_SEQUENCES, True), (SHARED_EXPERTS, True)])
def test_only_blocks_that_exchange_keep_their_order(settings, is_kept):
    with inductor_config.patch(reorder_for_peak_memory=is_kept, reorder_for_locality=is_kept, reorder_for_compute_comm_overlap=not is_kept):
        compile_modules([], without_auto(load_config(os.devnull, ["train.compile.enabled=true", *settings])))
        assert inductor_config.reorder_for_peak_memory is inductor_config.reorder_for_locality is (not is_kept)
        assert inductor_config.reorder_for_compute_comm_overlap is is_kept
        assert inductor_config.reorder_for_compute_comm_overlap_passes == [in_source_order]
