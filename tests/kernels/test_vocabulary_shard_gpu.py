"""The two kernels and their launcher: on a GPU, or through the interpreter on tiny fp32 problems; and their machine code."""

import math

import pytest
import torch

from phase8.kernels import vocabulary_shard as operator
from phase8.kernels.reference import vocabulary_shard as reference
from phase8.kernels.reference.cross_entropy import IGNORED_TARGET, linear_cross_entropy_gradients
from phase8.kernels.reference.vocabulary_shard import ELSEWHERE
from tests.kernels.offline import OfflineKernel, compile_offline
from tests.kernels.test_vocabulary_shard import columns_of, in_shards, problem

NAN = float("nan")
COMMON = {
    "num_rows": 4096, "leading": 16000, "vocabulary": 16000,
    "IGNORED": IGNORED_TARGET, "LOWEST": -3.0e38, "LOG2E": 1 / math.log(2), "FAST": True, "BLOCK": 8192, "VECTOR": 8,
}  # fmt: skip
MODULE = "phase8.kernels.gpu.vocabulary_shard"
OFFLINE = {
    "statistics": OfflineKernel(f"{MODULE}:statistics_kernel", {"logits": "*bf16", "columns": "*i64", "statistics": "*fp32", **COMMON}, num_warps=16),
    "gradient": OfflineKernel(f"{MODULE}:gradient_kernel", {"logits": "*bf16", "columns": "*i64", "whole": "*fp32", **COMMON}, num_warps=16),
}


def padded_logits(vocabulary, device, *, num_rows=4):
    """Logits whose padding columns hold NaN; a target here, one elsewhere, none, and another one here."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.full((num_rows, -(-vocabulary // 64) * 64), NAN)
    logits[:, :vocabulary] = 3 * torch.randn(num_rows, vocabulary, generator=generator)
    return logits.to(device), torch.tensor([0, ELSEWHERE, IGNORED_TARGET, vocabulary - 1], device=device)


@pytest.mark.parametrize(("vocabulary", "block"), [(5, 16), (64, 16), (65, 32), (128, 128), (300, 64), (300, None)])
def test_rows(kernel_device, vocabulary, block):
    from phase8.kernels.gpu.vocabulary_shard import row_statistics, write_row_gradients

    logits, columns = padded_logits(vocabulary, kernel_device)
    exact = logits[:, :vocabulary].double()
    logits[2] = NAN  # of a row that does not count
    counts, statistics = columns != IGNORED_TARGET, row_statistics(logits, columns, vocabulary=vocabulary, block=block)
    expected = reference.row_statistics(exact, columns)
    logarithms = [x[0] + x[1].log2() for x in (statistics.double(), expected)]
    torch.testing.assert_close(logarithms[0][counts], logarithms[1][counts], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(statistics[2].double()[counts], expected[2][counts], rtol=1e-6, atol=1e-6)
    assert statistics.isfinite().all()

    # Of the whole vocabulary: as if the others had as much again, twice as large at most.
    whole = torch.stack((statistics[0] + 1, statistics[1] * 1.5, statistics[2]))
    expected = reference.row_gradients(exact, columns, whole.double())
    write_row_gradients(logits, columns, whole, vocabulary=vocabulary, block=block)
    torch.testing.assert_close(logits[:, :vocabulary].double(), expected, rtol=1e-5, atol=1e-6)
    assert (logits[:, vocabulary:] == 0).all() and (logits[2] == 0).all()


@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
@pytest.mark.parametrize("sizes", [(70,), (64, 6)])
def test_one_shard_after_the_other_equals_the_reference(kernel_device, sizes, chunk_tokens):
    """The launcher with an exchange that is known beforehand: the interpreter knows no threads."""
    from phase8.kernels.gpu import vocabulary_shard as gpu

    hidden, weight, targets = problem(9, 6, sum(sizes), dtype=torch.float32, device=kernel_device)
    powers = (hidden.double() @ weight.double().T) * reference.LOG2E
    target_logits = (hidden.double() @ weight.double().T).gather(1, targets.clamp(min=0)[:, None])[:, 0]
    whole = torch.stack((powers.amax(1), (powers - powers.amax(1, keepdim=True)).exp2().sum(1), target_logits)).float()
    losses, dhidden, dweight, first = [], 0, [], 0
    for size in sizes:
        columns = columns_of(targets, first, size)
        chunks = iter(whole.split(chunk_tokens, 1))
        part = gpu.shard_cross_entropy_gradients(
            hidden, weight[first : first + size], columns, lambda _, chunks=chunks: next(chunks), chunk_tokens=chunk_tokens, needs_gradients=True
        )
        losses.append(part[0])
        dhidden, first = dhidden + part[1], first + size
        dweight.append(part[2])
    expected, *gradients = linear_cross_entropy_gradients(hidden.double(), weight.double(), targets)
    for loss in losses:
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    for ours, exact in zip((dhidden, torch.cat(dweight)), gradients, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)


def test_a_device_with_kernels_uses_them(kernel_device, monkeypatch):
    monkeypatch.setattr(operator, "uses_triton", lambda x: True)
    monkeypatch.setattr(operator.reference, "shard_cross_entropy_gradients", None)
    hidden, weight, targets = problem(9, 6, 70, dtype=torch.float32, device=kernel_device)
    loss, *_ = operator.shard_cross_entropy_gradients(hidden, weight, targets, lambda x: x, chunk_tokens=4, needs_gradients=False)
    torch.testing.assert_close(loss.double(), linear_cross_entropy_gradients(hidden.double(), weight.double(), targets)[0], rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def compiled():
    return compile_offline(OFFLINE)


@pytest.mark.parametrize("name", OFFLINE)
def test_machine_code(compiled, name):
    # 512 threads, two programs on a multiprocessor: 64 registers.
    compiled[name].check(max_registers=64, contains=("MUFU.EX2", *{"statistics": ("LDG.E.EL.128",), "gradient": ("STG.E.128", "LDG.E.EF.128")}[name]))


@pytest.mark.gpu
@pytest.mark.parametrize(("num_tokens", "width", "sizes", "chunk_tokens"), [(1001, 512, (25129, 25128), 256), (777, 256, (65536, 65536), 2048)])
def test_bf16_on_real_shapes(num_tokens, width, sizes, chunk_tokens):
    hidden, weight, targets = problem(num_tokens, width, sum(sizes), dtype=torch.bfloat16, device="cuda")
    weight /= math.sqrt(width)
    losses, *ours = in_shards(
        operator.shard_cross_entropy_gradients, hidden, weight, targets, sizes, chunk_tokens=chunk_tokens, needs_gradients=True
    )
    exact_loss, *exact = linear_cross_entropy_gradients(hidden.double(), weight.to(hidden.dtype).double(), targets)
    # Logits of size up to 6 are rounded to bf16 (half an ulp is 2^-9 of them), independently of each other.
    assert losses[0] == losses[1] and abs(losses[0].double() - exact_loss) <= 6 * 2**-9 * num_tokens
    for x, y in zip(ours, exact, strict=True):
        assert (x.double() - y).norm() <= 2**-7 * y.norm()
    assert ours[1].dtype == torch.float32
