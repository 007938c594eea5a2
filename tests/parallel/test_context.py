"""Sequences that several ranks share: outputs and every gradient are those of one process that has the whole sequence."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from phase8.config.model_section import ModelSection
from phase8.context_parallel import ring_attention
from phase8.context_parallel.fetch import begin_to_fetch
from phase8.distributed.collectives import ALONE, Axis
from tests.model.small import document_starts, perturbed_model, random_tokens, scaled_down
from tests.parallel.mutations import replaced
from tests.parallel.pool import GLOO, NCCL

LENGTH = 24  # slices of 12, 6 and 3 tokens; the windows are 6 and 14
BLOCKS = {
    "linear": {},
    "delta": {"global_path": "delta"},
    "window": {"global_path": "none", "global_tokens": 3},
    "lorentz": {"score": "lorentz", "convolution_size": 1},
    "chain": {"chain": "both"},
    "chain in the gate": {"global_path": "delta", "chain": "gate"},
    "globals": {"global_tokens": 5, "local_window_size": 3},
    "options": {
        "global_path": "delta", "global_gate": "channel", "local_qk_norm": True, "global_activation": "silu", "decay_floor": -5.0,
        "rotary": (True, False), "value_activation": "silu",
    },
    "transformer": {"block": "transformer", "convolution_size": 4},
    "transformer without convolution": {"block": "transformer", "local_qk_norm": True},
    "transformer with fewer heads of keys": {"block": "transformer", "num_kv_heads": 2, "convolution_size": 4},
    "hybrid": {"global_path": "delta", "local_window_size": (0, 9)},
}  # fmt: skip
DOCUMENTS = {"one document": (), "documents": (0, 5, 12, 13, 20)}


def section(block, length):
    return scaled_down(ModelSection(), **{"sequence_length": length, **BLOCKS[block]})


def context_axis(world_size):
    return ALONE if world_size == 1 else Axis(init_device_mesh("cpu", (world_size,)))


def forward_and_backward(block, begins, world_size, length=LENGTH):
    """Hidden states of this rank's slice, and its summand of every gradient."""
    axis = context_axis(world_size)
    model = perturbed_model(section(block, length), context=axis)
    weights = torch.randn(2, length, model.section.d_model, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    starts = document_starts(*begins, length=length) if begins else None
    tokens, weights = (x.chunk(axis.size, dim=1)[axis.index] for x in (random_tokens(length=length), weights))
    hidden, _ = model(tokens, starts)
    (hidden * weights).sum().backward()
    return hidden.detach(), {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.fixture(scope="module")
def whole():
    """The result of one process, computed once for each case."""
    results = {}

    def of(block, documents):
        if (block, documents) not in results:
            results[block, documents] = forward_and_backward(block, DOCUMENTS[documents], 1)
        return results[block, documents]

    return of


# Eight slices of one document are less than those of several, and are cut as four of them are.
LAYOUTS = [
    pytest.param(documents, world_size, marks=[pytest.mark.full] if (documents, world_size) == ("one document", 8) else [])
    for documents in DOCUMENTS
    for world_size in (2, 4, 8)
]


@pytest.mark.parametrize(("documents", "world_size"), LAYOUTS)
@pytest.mark.parametrize("block", BLOCKS)
def test_slices_together_are_the_whole(pool, whole, block, documents, world_size):
    slices = pool.run(forward_and_backward, block, DOCUMENTS[documents], world_size, world_size=world_size)
    are_together(slices, whole(block, documents))


def with_repeated_keys(*arguments):
    """As on GPUs in fp32, where torch's operator needs as many heads of keys as of queries."""
    with replaced((ring_attention, "_attention"), by=lambda old: lambda q, k: ring_attention._with_repeated_keys(old(q, k))):
        return forward_and_backward(*arguments)


def test_keys_are_repeated_where_an_operator_needs_as_many_as_queries(pool, whole):
    block = "transformer with fewer heads of keys"
    are_together(pool.run(with_repeated_keys, block, (), 4, world_size=4), whole(block, "one document"))


def padding(attention):
    """Like torch's memory-efficient attention: logarithms of sums come in whole tiles of 32 queries."""

    def forward(q, k, v, **arguments):
        out, logsumexp, *rest = attention.forward(q, k, v, **arguments)
        return out, F.pad(logsumexp, (0, -logsumexp.shape[-1] % 32), value=torch.nan), *rest

    def backward(*, logsumexp, query, **arguments):
        assert logsumexp.shape[-1] % 32 == 0
        return attention.backward(logsumexp=logsumexp[..., : query.shape[2]], query=query, **arguments)

    return attention._replace(forward=forward, backward=backward)


def with_padded_sums(*arguments):
    with replaced((ring_attention, "_attention"), by=lambda old: lambda q, k: ring_attention._without_padding(padding(old(q, k)))):
        return forward_and_backward(*arguments)


def test_sums_that_an_operator_pads_are_merged_without_padding(pool, whole):
    are_together(pool.run(with_padded_sums, "transformer", (), 2, world_size=2), whole("transformer", "one document"))


def attention_round_the_ring(device_type, dtype, num_key_heads):
    """Output of this rank's slice and gradients of its queries, keys and values, in fp64 on the host."""
    world_size = dist.get_world_size()
    axis = Axis(init_device_mesh(device_type, (world_size,)))
    *qkv, weights = (x.chunk(world_size, dim=2)[axis.index].to(device_type, dtype) for x in whole_attention(num_key_heads))
    qkv = [x.requires_grad_() for x in qkv]
    out = ring_attention.ring_attention(*qkv, axis)
    (out * weights).sum().backward()
    return [x.detach().cpu().double() for x in (out, *(x.grad for x in qkv))]


def whole_attention(num_key_heads):
    """Queries, keys, values [2, heads, 32, 16], and weights of the output."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, heads, 32, 16, generator=generator, dtype=torch.float64) for heads in (6, num_key_heads, num_key_heads, 6)]


@pytest.mark.parametrize("num_key_heads", [6, 2])
@pytest.mark.parametrize(
    ("device_type", "dtype", "tolerance"),
    [
        pytest.param("cpu", torch.float64, 1e-9, id="cpu"),
        pytest.param("cuda", torch.float32, 1e-4, id="cuda-fp32", marks=pytest.mark.gpu),
        pytest.param("cuda", torch.bfloat16, 5e-2, id="cuda-bf16", marks=pytest.mark.gpu),
    ],
)
def test_attention_round_the_ring_is_that_of_one_process(pool, device_type, dtype, tolerance, num_key_heads):
    if device_type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    backend = NCCL if device_type == "cuda" else GLOO
    slices = pool.run(attention_round_the_ring, device_type, dtype, num_key_heads, world_size=2, backend=backend)
    *qkv, weights = whole_attention(num_key_heads)
    qkv = [x.requires_grad_() for x in qkv]
    out = F.scaled_dot_product_attention(qkv[0], *(x.repeat_interleave(6 // num_key_heads, dim=1) for x in qkv[1:]), is_causal=True)
    (out * weights).sum().backward()
    for found, expected in zip(zip(*slices, strict=True), (out, *(x.grad for x in qkv)), strict=True):
        torch.testing.assert_close(torch.cat(found, dim=2), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("block", BLOCKS)
def test_slices_of_one_token(pool, block):
    slices = pool.run(forward_and_backward, block, (0, 3), 8, 8, world_size=8)
    are_together(slices, forward_and_backward(block, (0, 3), 1, 8))


def are_together(slices, whole):
    hidden, gradients = whole
    torch.testing.assert_close(torch.cat([part for part, _ in slices], 1), hidden, rtol=1e-9, atol=1e-11)
    assert all(found.keys() == gradients.keys() for _, found in slices)
    together = {name: sum(found[name] for _, found in slices) for name in gradients}
    torch.testing.assert_close(together, gradients, rtol=1e-8, atol=1e-9)


def fetch(wanted, length):
    axis = context_axis(len(wanted))
    first = axis.index * length
    x = torch.arange(first, first + length, dtype=torch.float64).expand(2, length)[..., None].clone().requires_grad_()
    found = begin_to_fetch(x, wanted, axis)()
    sum(((10.0**axis.index) * part).sum() for part in found).backward()
    return [part[0, :, 0].tolist() for part in found], x.grad[1, :, 0].tolist()


def test_each_rank_fetches_what_it_wants_and_every_gradient_goes_home(pool):
    wanted = [[range(0), range(5, 7)], [range(1, 3), range(2, 2)], [range(0, 6), range(5, 6)]]
    (first, second, third) = pool.run(fetch, wanted, 2, world_size=3)
    assert first == ([[], [5.0]], [100.0, 110.0]), "token 6 does not exist"
    assert second == ([[1.0, 2.0], []], [110.0, 100.0])
    assert third == ([[0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [5.0]], [100.0, 201.0])


class WorkDuringExchanges(TorchDispatchMode):
    """Counts products and operators of the mixer between the beginning of each exchange and the wait for it, in the order of beginnings."""

    NAMES = ("all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor")

    def __init__(self):
        super().__init__()
        self.products = {name: [] for name in self.NAMES}
        self._pending = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        space, _, name = func.name().split(".")[0].partition("::")
        if space == "_c10d_functional" and name in self.products:
            self._pending[result.untyped_storage()._cdata] = counter = [0]
            self.products[name].append(counter)
        elif name == "wait_tensor":
            self._pending.pop(args[0].untyped_storage()._cdata)
        elif name in ("mm", "bmm", "mkldnn_linear") or name.startswith("_scaled_dot_product") or space == "phase8":
            for counter in self._pending.values():
                counter[0] += 1
        return result


def work_during_exchanges(block):
    axis, length = context_axis(2), 2 * LENGTH
    model = perturbed_model(section(block, length), context=axis)
    with WorkDuringExchanges() as during:
        hidden, _ = model(random_tokens(length=length).chunk(2, dim=1)[axis.index])
        hidden.square().sum().backward()
    return {name: [number for (number,) in counters] for name, counters in during.products.items()}


@pytest.mark.parametrize("block", ["linear", "delta"])
def test_other_work_runs_while_slices_exchange_in_both_directions(pool, block):
    """A layer exchanges tokens twice forward (inputs of the convolution, keys) and twice back, gathers maps once, and their gradients once: of the
    linear recurrence all of them, of the delta rule their sum.
    """
    for products in pool.run(work_during_exchanges, block, world_size=2):
        num_layers = section(block, LENGTH).num_layers
        assert {name: len(numbers) for name, numbers in products.items()} == dict(
            all_to_all_single=4 * num_layers,
            all_gather_into_tensor=(2 if block == "linear" else 1) * num_layers,
            reduce_scatter_tensor=0 if block == "linear" else num_layers,
        )
        assert all(number > 0 for numbers in products.values() for number in numbers), products
