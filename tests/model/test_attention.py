"""The transformer's attention with fewer heads of keys than of queries, on each way through torch's operators, against scores written out."""

import math

import pytest
import torch
import torch.nn.functional as F

from phase8.model.attention import _attend

NUM_KEYS = 12
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def inputs(num_queries, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 6, num_queries, 8), (2, 2, NUM_KEYS, 8), (2, 2, NUM_KEYS, 8))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def written_out(q, keys, values, documents):
    """Head h of the queries reads head h // 3 of the keys."""
    outputs = []
    for head in range(q.shape[1]):
        scores = q[:, head] @ keys[:, head // 3].mT / math.sqrt(q.shape[-1])
        last = torch.arange(NUM_KEYS)[-q.shape[2] :]
        hidden = (torch.arange(NUM_KEYS) > last[:, None]).expand(scores.shape)
        if documents is not None:
            hidden = hidden | (documents[:, -q.shape[2] :, None] != documents[:, None])
        outputs.append(scores.masked_fill(hidden, -math.inf).softmax(-1) @ values[:, head // 3])
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("num_queries", "begins"), [(NUM_KEYS, None), (NUM_KEYS, 5), (1, 5), (1, 0), (7, 2)])
def test_each_head_of_queries_reads_its_head_of_keys(num_queries, begins, dtype):
    """A whole sequence, one with two documents, a last token, and the last tokens of a sequence."""
    documents = None if begins is None else (torch.arange(NUM_KEYS) >= begins).int().expand(2, -1)
    found_inputs, exact = inputs(num_queries, dtype), [x.detach().double().requires_grad_() for x in inputs(num_queries, dtype)]
    found, expected = _attend(*found_inputs, documents), written_out(*exact, documents)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad((found * weights.to(dtype)).sum(), found_inputs)
    exact_gradients = torch.autograd.grad((expected * weights).sum(), exact)
    tolerance = TOLERANCES[dtype]
    for ours, theirs in zip((found, *gradients), (expected, *exact_gradients), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=4 * tolerance)


def test_flash_attention_takes_keys_that_are_shared_as_they_are():
    """Without a mask and in half precision, nothing of the size of all heads of queries is kept but queries and output."""
    q, keys, values = inputs(NUM_KEYS, torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        _attend(q, keys, values, None)
    assert sum(x.shape[1] == q.shape[1] for x in kept if x.dim() == 4) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gpu_keeps_no_scores_where_keys_are_shared(dtype):
    length, heads = 4096, 8
    q = torch.randn(1, heads, length, 64, device="cuda", dtype=dtype, requires_grad=True)
    keys, values = (torch.randn(1, 2, length, 64, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _attend(q, keys, values, None).sum().backward()
    scores = heads * length * length * q.element_size()
    assert torch.cuda.max_memory_allocated() - before < scores / 2
    found = [x.grad.cpu().double() for x in (q, keys, values)]
    exact = [x.detach().cpu().double().requires_grad_() for x in (q, keys, values)]
    repeated = (x.repeat_interleave(heads // 2, dim=1) for x in exact[1:])
    F.scaled_dot_product_attention(exact[0], *repeated, is_causal=True).sum().backward()
    for ours, theirs in zip(found, (x.grad for x in exact), strict=True):
        assert (ours - theirs).norm() < (2e-2 if dtype == torch.bfloat16 else 1e-4) * theirs.norm()
