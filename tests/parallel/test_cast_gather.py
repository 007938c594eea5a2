"""ZeRO 3 that gathers matrices in bf16 trains bit for bit as one that gathers them in fp32."""

import math
import os
from contextlib import nullcontext

import pytest
import torch
from torch._functorch import config as functorch_config

from phase8.config.auto import without_auto
from phase8.config.load import load_config
from phase8.distributed.mesh import build_mesh
from phase8.model.experts import Experts
from phase8.model.norm import RMSNorm
from phase8.tensor_parallel.linear import Linear, WideLinear
from phase8.tensor_parallel.parameters import ParameterSpec
from phase8.topology import Topology
from phase8.train.engine.train_state import build_train_state
from phase8.zero import fsdp
from tests.parallel.mutations import replaced
from tests.parallel.test_communication import Counter, step
from tests.parallel.test_compiled import PARTITION
from tests.parallel.test_parity import BLOCKS, OFFLOADED, ranks
from tests.parallel.training import MODEL, train_steps

ACCUMULATION = ("train.micro_batch_size=1",)
INTERLEAVED = ("parallel.pipeline_schedule=interleaved", "parallel.pipeline_chunks=2", "train.micro_batch_size=2")
CASES = {
    # A rank has no rows of a bottleneck of five, and each weight is used for three slices.
    "dp4 low-rank, slices": ("low-rank", ranks(dp=4, stage=3, more=("train.recompute=slices", "train.recompute_slice_tokens=8"))),
    "tp2 dp2 delta, recomputed": ("delta-options", ranks(tp=2, dp=2, stage=3, more=("train.recompute=full",))),
    "ep2 tp2, accumulation": ("experts", ranks(dp=2, tp=2, ep=2, stage=3, more=ACCUMULATION)),
    "dp1 offloaded": ("default", ranks(tp=2, more=OFFLOADED)),
    "dp2": ("default", ranks(dp=2, stage=3)),
    "dp2 offloaded": ("whole", ranks(dp=2, more=OFFLOADED)),
    "dp4 in pairs, accumulation": ("transformer", ranks(dp=4, stage=3, more=("zero.shard_size=2", *ACCUMULATION))),
    "ep2 dp4, counted": ("experts-dropless", ranks(dp=4, ep=2, stage=3)),
    "pp2 dp2 tied": ("deep-tied", ranks(pp=2, dp=2, stage=3, more=INTERLEAVED)),
    "cp2, muon": ("muon", ranks(cp=2, stage=3)),
}  # fmt: skip
QUICK = ("dp4 low-rank, slices", "tp2 dp2 delta, recomputed", "dp1 offloaded")  # the others consist of their parts, and of the experts below


def trained(settings, world_size, *more, mistake=None):
    with MISTAKES[mistake]() if mistake else nullcontext():
        return train_steps((*settings, *more), 2, world_size, dtype=torch.bfloat16)


def with_mistake(settings, world_size, mistake):
    return trained(settings, world_size, mistake=mistake)


def are_equal(found, expected):
    """Whether losses, gradient norms and weights of all ranks are, bit for bit."""
    pairs = list(zip(found, expected, strict=True))
    assert all(weights.keys() == others.keys() for (_, weights), (_, others) in pairs)
    return all(steps == others for (steps, _), (others, _) in pairs) and all(
        torch.equal(weights[name], others[name]) for (_, weights), (_, others) in pairs for name in weights
    )


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in CASES])
def test_gathers_in_bf16_change_no_bit(pool, name):
    block, (world_size, settings) = CASES[name]
    settings = (*BLOCKS[block], *settings)
    found = pool.run(trained, settings, world_size, world_size=world_size)
    assert are_equal(found, pool.run(trained, settings, world_size, "zero.gather_dtype=fp32", world_size=world_size))
    assert all(weight.dtype == torch.float32 for weight in found[0][1].values())


def norms_are_rounded():
    """Norms are declared to be rounded by their layers."""
    return replaced((RMSNorm, "parameter_specs"), by=lambda old: lambda self: {"weight": ParameterSpec(value=1.0, is_rounded=True)})


def gradients_of_experts_stay_narrow():
    """Gradients of experts, which FSDP divides by themselves, are added up over ranks in the dtype in which their products are computed."""
    def careless(old):
        def gather_in(dtype, parameters, unit, arrivals=None):
            old(dtype, parameters, unit, arrivals)
            if isinstance(unit, Experts):
                unit.unshard()
                for each in parameters:
                    each.parameter.grad_dtype = dtype
                unit.reshard()

        return gather_in

    return replaced((fsdp, "gather_in"), by=careless)


MISTAKES = {function.__name__: function for function in (norms_are_rounded, gradients_of_experts_stay_narrow)}


def test_experts_are_gathered_in_bf16_too_and_a_mistake_changes_bits(pool):
    world_size, settings = ranks(dp=4, ep=2, stage=3)
    settings = (*BLOCKS["experts"], *settings)
    expected = pool.run(trained, settings, world_size, "zero.gather_dtype=fp32", world_size=world_size)
    for mistake in (None, *MISTAKES):
        assert are_equal(pool.run(with_mistake, settings, world_size, mistake, world_size=world_size), expected) is (mistake is None), mistake


def gradients_of_compiled(*settings):
    """Gradients of a model whose blocks are compiled without a graph break, under a budget that makes backward repeat what it can."""
    config = without_auto(load_config(os.devnull, [*MODEL, "zero.stage=3", *settings]))
    mesh = build_mesh(Topology(data_parallel_size=2), device_type="cpu", shard_size=2)
    train_state = build_train_state(config, mesh=mesh, device=torch.device("cpu"), dtype=torch.bfloat16)
    torch.compiler.reset()
    with functorch_config.patch(activation_memory_budget=0.3):
        for block in train_state.model.blocks.values():
            block.compile(fullgraph=True, backend=PARTITION)
        tokens = torch.randint(config.model.vocab_size, (2, config.model.sequence_length), generator=torch.Generator().manual_seed(mesh.rank))
        train_state.model.loss_sum(tokens, tokens.roll(-1, 1)).backward()
    torch.compiler.reset()  # or the process groups stay with the compiled blocks
    return {name: parameter.grad.to_local() for name, parameter in train_state.model.named_parameters()}


@pytest.mark.full
def test_compiled_blocks_have_the_same_gradients(pool):
    found, expected = (pool.run(gradients_of_compiled, *more, world_size=2, timeout_seconds=300) for more in ((), ("zero.gather_dtype=fp32",)))
    for ours, theirs in zip(found, expected, strict=True):
        assert all(gradient.dtype == torch.float32 and torch.equal(gradient, theirs[name]) for name, gradient in ours.items())


def padded(parameter):
    """The numbers of a parameter, as many from each of two ranks."""
    rows, *rest = parameter.shape
    return (rows + rows % 2) * math.prod(rest)


def gathered(*settings):
    """Bytes gathered in a step, dtypes and numbers of a block's parameters while it computes, the weights of its linear layers, other numbers."""
    config = without_auto(load_config(os.devnull, [*MODEL, "zero.stage=3", "model.tie_embeddings=true", *settings]))
    mesh = build_mesh(Topology(data_parallel_size=2), device_type="cpu", shard_size=2)
    train_state = build_train_state(config, mesh=mesh, device=torch.device("cpu"), dtype=torch.bfloat16)
    block, dtypes = train_state.model.blocks["0"], {}
    block.register_forward_pre_hook(lambda *_: dtypes.update({name: (each.dtype, padded(each)) for name, each in block.named_parameters()}))
    with Counter(mesh) as counter:
        step(train_state, config)
    matrices = {f"{name}.weight" for name, module in block.named_modules() if isinstance(module, Linear) and not isinstance(module, WideLinear)}
    rest = sum(padded(parameter) for name, parameter in train_state.model.named_parameters() if not name.startswith("blocks."))
    return counter.table()["shard", "all_gather"], dtypes, matrices, rest


def test_matrices_travel_in_two_bytes_and_all_else_in_four(pool):
    for (_, num_bytes), dtypes, matrices, rest in pool.run(gathered, world_size=2):
        assert len(matrices) == 9 and {name for name, (dtype, _) in dtypes.items() if dtype == torch.bfloat16} == matrices
        assert {dtype for name, (dtype, _) in dtypes.items() if name not in matrices} == {torch.float32}
        # Two equal layers are gathered in forward and in backward.
        assert num_bytes == 2 * 2 * sum(number * (2 if name in matrices else 4) for name, (_, number) in dtypes.items()) + 4 * rest


@pytest.mark.parametrize("setting", ["zero.stage=2", "zero.gather_dtype=fp32"])
def test_all_travel_in_four_bytes_below_stage_3_and_where_the_config_says_so(pool, setting):
    for _, dtypes, *_ in pool.run(gathered, setting, world_size=2):
        assert {dtype for dtype, _ in dtypes.values()} == {torch.float32}
