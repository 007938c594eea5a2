"""One token after the other gives what whole sequences compute."""

import torch

from phase8.kernels.recurrence_step import delta_rule_step, green_step, linear_attention_step
from phase8.kernels.reference.gated_delta_rule import gated_delta_rule
from phase8.kernels.reference.gated_linear_attention import gated_linear_attention
from phase8.kernels.reference.green_scan import green_scan

B, T, H, K, V = 2, 7, 3, 4, 5


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def test_recurrences():
    q, k, v, log_decay, beta = draw(B, T, H, K), 2 * draw(B, T, H, K), draw(B, T, H, V), -draw(B, T, H).abs(), draw(B, T, H).sigmoid() / K
    for whole, step, more in ((gated_linear_attention, linear_attention_step, ()), (gated_delta_rule, delta_rule_step, (beta,))):
        first = draw(B, H, K, V)
        expected, final = whole(q, k, v, log_decay, *more, None, first)
        memory = first.clone()
        found = [step(*(x[:, t] for x in (q, k, v, log_decay, *more)), memory) for t in range(T)]
        torch.testing.assert_close(torch.stack(found, 1), expected)
        torch.testing.assert_close(memory, final)


def test_green():
    potential, energy, eta, hopping, state = draw(B, T, H), draw(H), draw(H).abs() + 0.1, draw(H).abs(), draw(B, H, 2)
    expected = green_scan(potential, energy, eta, hopping, None, state)
    found = [green_step(potential[:, t], energy, eta, hopping, state).clone() for t in range(T)]
    torch.testing.assert_close(torch.stack(found, 1), expected)
    torch.testing.assert_close(state, expected[:, -1])
