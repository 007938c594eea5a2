"""The Triton kernel and its launcher: on a GPU, or through the interpreter on tiny fp32 problems; and its machine code."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from phase8.kernels import cross_entropy as operator
from phase8.kernels.cross_entropy import linear_cross_entropy
from phase8.kernels.reference.cross_entropy import IGNORED_TARGET, linear_cross_entropy_gradients
from tests.kernels.offline import OfflineKernel, compile_offline

NAN = float("nan")
ARGUMENTS = {
    "logits": "*bf16", "targets": "*i64", "losses": "*fp32", "leading": 131072, "vocabulary": 131072,
    "IGNORED": IGNORED_TARGET, "LOWEST": -3.0e38, "LOG2E": 1 / math.log(2),
    "WRITES_GRADIENT": True, "FAST": True, "BLOCK": 16384, "VECTOR": 8,
}  # fmt: skip
KERNEL = "phase8.kernels.gpu.cross_entropy:loss_kernel"
OFFLINE = {
    "whole": OfflineKernel(KERNEL, ARGUMENTS, num_warps=32),
    "padded": OfflineKernel(KERNEL, {**ARGUMENTS, "leading": 50272, "vocabulary": 50257, "BLOCK": 8192}, num_warps=32),
    "evaluation": OfflineKernel(KERNEL, {**ARGUMENTS, "WRITES_GRADIENT": False}, num_warps=32),
    "fp32": OfflineKernel(KERNEL, {**ARGUMENTS, "logits": "*fp32", "BLOCK": 8192, "VECTOR": 4}, num_warps=32),
}


@pytest.fixture
def poisoned():
    """New tensors hold NaN until they are written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def padded_logits(vocabulary, device, *, num_rows=3, dtype=torch.float32, scale=3.0):
    """Logits whose padding columns hold NaN, and targets."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.full((num_rows, -(-vocabulary // 64) * 64), NAN)
    logits[:, :vocabulary] = scale * torch.randn(num_rows, vocabulary, generator=generator)
    targets = torch.randint(vocabulary, (num_rows,), generator=generator)
    return logits.to(device, dtype), targets.to(device)


def run_kernel(logits, targets, vocabulary, *, writes_gradient=True, block=None):
    from phase8.kernels.gpu.cross_entropy import losses_of_rows

    losses = torch.full(targets.shape, NAN, device=logits.device)
    losses_of_rows(logits, targets, losses, vocabulary=vocabulary, writes_gradient=writes_gradient, block=block)
    return losses


def exact_rows(logits, targets, vocabulary):
    log_probabilities = logits[:, :vocabulary].double().log_softmax(-1)
    onehot = torch.nn.functional.one_hot(targets, vocabulary)
    return -log_probabilities.gather(1, targets[:, None])[:, 0], log_probabilities.exp() - onehot


def problem(num_tokens, width, vocabulary, device, *, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, width, generator=generator).to(device, dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=generator) / math.sqrt(width)).to(device).requires_grad_()
    targets = torch.randint(vocabulary, (num_tokens,), generator=generator)
    targets[num_tokens // 2] = IGNORED_TARGET
    return hidden, weight, targets.to(device)


def exact_gradients(hidden, weight, targets):
    return linear_cross_entropy_gradients(hidden.detach().double(), weight.detach().to(hidden.dtype).double(), targets)


@pytest.mark.parametrize(("vocabulary", "block"), [(5, 16), (64, 16), (65, 32), (128, 128), (300, 64), (300, None)])
def test_loss_and_gradient_of_rows(kernel_device, vocabulary, block):
    logits, targets = padded_logits(vocabulary, kernel_device)
    exact_losses, exact = exact_rows(logits, targets, vocabulary)
    losses = run_kernel(logits, targets, vocabulary, block=block)
    torch.testing.assert_close(losses.double(), exact_losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits[:, :vocabulary].double(), exact, rtol=1e-5, atol=1e-6)
    assert (logits[:, vocabulary:] == 0).all()


@pytest.mark.parametrize("vocabulary", [64, 77])
def test_evaluation_leaves_the_logits_alone(kernel_device, vocabulary):
    logits, targets = padded_logits(vocabulary, kernel_device)
    before = logits.clone()
    losses = run_kernel(logits, targets, vocabulary, writes_gradient=False, block=32)
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())
    assert torch.equal(losses, run_kernel(logits, targets, vocabulary, block=32))


def test_ignored_rows_are_zero_whatever_their_logits(kernel_device):
    logits, targets = padded_logits(77, kernel_device)
    _, exact = exact_rows(logits, targets, 77)
    logits[1], targets[1] = NAN, IGNORED_TARGET
    losses = run_kernel(logits, targets, 77, block=32)
    assert losses[1] == 0 and (logits[1] == 0).all()
    torch.testing.assert_close(logits[[0, 2], :77].double(), exact[[0, 2]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stray", [-1, 70, 77, 128, 2**40])
def test_a_target_out_of_range_makes_its_loss_nan_and_touches_no_other_row(kernel_device, stray):
    logits, targets = padded_logits(70, kernel_device)
    exact_losses, exact = exact_rows(logits, targets, 70)
    targets[1] = stray
    losses = run_kernel(logits, targets, 70, block=64)
    assert losses[1].isnan()
    torch.testing.assert_close(losses[[0, 2]].double(), exact_losses[[0, 2]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits[[0, 2], :70].double(), exact[[0, 2]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("position", [0, 40, 69])
@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_extreme_logits(kernel_device, extreme, position):
    logits, targets = padded_logits(70, kernel_device, scale=1.0)
    logits[0, position] = extreme
    logits[1, :70] += extreme
    targets[0] = position
    exact_losses, exact = exact_rows(logits, targets, 70)
    losses = run_kernel(logits, targets, 70, block=16)
    # Row 1 is shifted as a whole: its logits, and their products with log2(e), are only known to 1e4 * 2^-24.
    torch.testing.assert_close(losses.double(), exact_losses, rtol=1e-5, atol=2e-3)
    torch.testing.assert_close(logits[:, :70].double(), exact, rtol=0, atol=1e-3)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 9, 100, None])
@pytest.mark.parametrize("vocabulary", [5, 64, 130])
@pytest.mark.usefixtures("poisoned")
def test_launcher_equals_float64(kernel_device, vocabulary, chunk_tokens):
    from phase8.kernels.gpu import cross_entropy as gpu

    hidden, weight, targets = problem(9, 6, vocabulary, kernel_device)
    ours = gpu.linear_cross_entropy_gradients(hidden.detach().T.contiguous().T, weight.detach(), targets, chunk_tokens)
    for x, exact in zip(ours, exact_gradients(hidden, weight, targets), strict=True):
        torch.testing.assert_close(x.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)])
def test_launcher_forms_only_the_wanted_gradients(kernel_device, needs, monkeypatch):
    from phase8.kernels.gpu import cross_entropy as gpu

    hidden, weight, targets = (x.detach() for x in problem(9, 6, 64, kernel_device))
    written, losses_of_rows = [], gpu.losses_of_rows
    monkeypatch.setattr(gpu, "losses_of_rows", lambda *x, **options: (written.append(options["writes_gradient"]), losses_of_rows(*x, **options)))
    with FlopCounterMode(display=False) as counter:
        loss, *gradients = gpu.linear_cross_entropy_gradients(hidden, weight, targets, 4, needs_dhidden=needs[0], needs_dweight=needs[1])
    assert counter.get_total_flops() == (1 + sum(needs)) * 2 * hidden.numel() * 64
    assert [x is not None for x in gradients] == list(needs) and written == 3 * [any(needs)]
    assert loss == gpu.linear_cross_entropy_gradients(hidden, weight, targets, 4)[0]


def test_the_operator_runs_the_kernel(kernel_device, monkeypatch):
    monkeypatch.setattr(operator, "uses_triton", lambda x: True)
    monkeypatch.setattr(operator.reference, "linear_cross_entropy_gradients", None)
    hidden, weight, targets = problem(9, 6, 70, kernel_device)
    ours = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, 4) / 3, (hidden, weight))
    for x, exact in zip(ours, exact_gradients(hidden, weight, targets)[1:], strict=True):
        torch.testing.assert_close(x.double(), exact / 3, rtol=1e-4, atol=1e-5)
    torch.library.opcheck(operator._forward, (hidden, weight, targets, 4, True, True))


def test_the_cast_head_is_aligned_and_padded_with_zeros(kernel_device):
    from phase8.kernels.gpu.cross_entropy import cast_head

    weight = torch.randn(130, 6, device=kernel_device)
    head = cast_head(weight, torch.bfloat16)
    assert head.shape == (192, 6) and torch.equal(head[:130], weight.bfloat16()) and (head[130:] == 0).all()
    assert cast_head(weight[:128], torch.float32).data_ptr() == weight.data_ptr()


@pytest.fixture(scope="module")
def compiled():
    return compile_offline(OFFLINE)


@pytest.mark.parametrize("name", OFFLINE)
def test_machine_code(compiled, name):
    # 1024 threads share 65536 registers. Loads and stores of 16 bytes; the exponential is one instruction.
    writes = OFFLINE[name].arguments["WRITES_GRADIENT"]
    compiled[name].check(max_registers=64, contains=("MUFU.EX2", "LDG.E.EL.128", *(("STG.E.128", "LDG.E.EF.128") if writes else ())))
    costs = [_instructions_per_exponential(loop) for loop in compiled[name].loops if _exponentials(loop)]
    # A pass over whole blocks, and one over what is cut off, which compares; then the same for the gradient. A pass over memory takes about 19.
    assert len(costs) == (4 if writes else 2)
    assert all(cost <= most for cost, most in zip(costs, (7, 11) * 2, strict=False))


def _exponentials(loop):
    return sum(count for opcode, count in loop.items() if opcode.startswith("MUFU.EX2"))


def _instructions_per_exponential(loop):
    return sum(loop.values()) / _exponentials(loop)


@pytest.mark.gpu
@pytest.mark.parametrize(("num_tokens", "width", "vocabulary", "chunk_tokens"), [(1001, 512, 50257, 256), (777, 256, 131072, None), (64, 64, 257, 7)])
def test_bf16_on_real_shapes(num_tokens, width, vocabulary, chunk_tokens):
    hidden, weight, targets = problem(num_tokens, width, vocabulary, "cuda", dtype=torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, targets, chunk_tokens)
    ours = torch.autograd.grad(loss / num_tokens, (hidden, weight))
    exact_loss, *exact = exact_gradients(hidden, weight, targets)
    # Logits of size up to 6 are rounded to bf16 (half an ulp is 2^-9 of them), independently of each other.
    assert abs(loss.double() - exact_loss) <= 6 * 2**-9 * num_tokens
    for x, y in zip(ours, exact, strict=True):
        assert (x.double() * num_tokens - y).norm() <= 2**-7 * y.norm()
    assert ours[1].dtype == torch.float32


@pytest.mark.gpu
def test_a_step_is_deterministic_and_never_waits_for_the_device():
    hidden, weight, targets = problem(2048, 256, 50257, "cuda", dtype=torch.bfloat16)

    def step():
        return torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, 512) / 2048, (hidden, weight))

    first = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.gpu
def test_memory_of_a_large_vocabulary():
    hidden, weight, targets = problem(32768, 2048, 131072, "cuda", dtype=torch.bfloat16)
    (linear_cross_entropy(hidden[:512], weight, targets[:512]) / 512).backward()  # workspaces of cuBLAS
    hidden.grad = weight.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    (linear_cross_entropy(hidden, weight, targets) / 32768).backward()
    gradients = sum(x.grad.numel() * x.grad.element_size() for x in (hidden, weight))
    assert torch.cuda.max_memory_allocated() - before - gradients <= 1.5e9
