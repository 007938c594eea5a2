"""The last document of a long sequence gets what it gets alone, also where its numbers lie beyond what 32 bits count."""

import pytest
import torch

from phase8.kernels.gated_delta_rule import gated_delta_rule
from phase8.kernels.gated_linear_attention import gated_linear_attention
from phase8.kernels.mixer_inputs import mixer_inputs
from phase8.kernels.window_attention import window_attention

DOCUMENT, HEADS, SIZE = 128, 16, 128
LONG = 2**20 + DOCUMENT  # tokens, with more than 2**31 numbers in each of their tensors
OPERATIONS = {
    "window attention": (3, lambda x, decays, starts: window_attention(*x, window=64, global_tokens=0, starts=starts)[0]),
    "linear attention": (3, lambda x, decays, starts: gated_linear_attention(*x, decays, starts)[0]),
    "delta rule": (3, lambda x, decays, starts: gated_delta_rule(*x, decays, 0.5 * decays.exp() / SIZE, starts)[0]),
    "mixer inputs": (1, lambda x, decays, starts: mixer_inputs(
        x[0], torch.ones(3 * HEADS * SIZE, 4, device=decays.device) / 2, decays[0, :, :1].expand(-1, SIZE // 2), None, eps=1e-5, starts=starts
    )[0].local_q),
}  # fmt: skip


def result_and_gradients(operation, inputs, decays, starts, grad):
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = operation(inputs, decays, starts)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad, materialize_grads=True)]


def worst_difference(name, length, device, dtype):
    """Largest difference of the last document in the sequence and alone, relative to the largest number."""
    num_inputs, operation = OPERATIONS[name]
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape):
        return torch.randn(1, length, *shape, generator=generator, device=device, dtype=dtype)

    inputs = [drawn(HEADS, SIZE) for _ in range(3)] if num_inputs == 3 else [drawn(3, HEADS, SIZE)]
    decays, grad = -drawn(HEADS).float().abs(), drawn(HEADS, SIZE)
    starts = torch.zeros(1, length, dtype=torch.bool, device=device)
    starts[:, [0, -DOCUMENT]] = True
    *own, own_decays, own_starts, own_grad = (x[:, -DOCUMENT:].clone() for x in (*inputs, decays, starts, grad))
    whole = [x[:, -DOCUMENT:].double() for x in result_and_gradients(operation, inputs, decays, starts, grad)]
    alone = [x.double() for x in result_and_gradients(operation, own, own_decays, own_starts, own_grad)]
    assert all(x.count_nonzero() > 0 for x in whole)
    return max(float((found - expected).abs().max() / expected.abs().max()) for found, expected in zip(whole, alone, strict=True))


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_last_document_is_as_it_is_alone(name):
    assert worst_difference(name, 3 * DOCUMENT, "cpu", torch.float32) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPERATIONS)
def test_offsets_beyond_32_bits(name):
    """Up to 80 GB of tensors."""
    if torch.cuda.mem_get_info()[0] < 100e9:
        pytest.skip("the GPU has too little memory")
    assert worst_difference(name, LONG, "cuda", torch.bfloat16) < 2e-2
