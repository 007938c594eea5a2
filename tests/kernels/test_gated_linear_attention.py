import torch

from phase8.kernels import gated_linear_attention as operator
from phase8.kernels.gated_linear_attention import gated_linear_attention
from phase8.kernels.reference import gated_linear_attention as reference
from tests.kernels.recurrences import RecurrenceTests, without_earlier_documents


def problem(length, *, dtype=torch.float64, batch=2, heads=3, key_size=4, value_size=5):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(batch, length, heads, key_size, generator=generator, dtype=torch.float64) for _ in range(2))
    v = torch.randn(batch, length, heads, value_size, generator=generator, dtype=torch.float64)
    # From a memory of one token to one of thousands.
    log_decay = -torch.exp(4 * torch.randn(batch, length, heads, generator=generator, dtype=torch.float64) - 2)
    return [x.to(dtype) for x in (q, k, v, log_decay)]


def recurrence(q, k, v, log_decay, starts=None, state=None):
    """The defining loop over tokens."""
    batch, length, heads, size = q.shape
    state = q.new_zeros(batch, heads, size, v.shape[-1]) if state is None else state
    outputs = []
    for i in range(length):
        state = without_earlier_documents(state, starts, i)
        alpha = log_decay[:, i].exp()[..., None, None]
        state = alpha * state + (1 - alpha) * k[:, i, :, :, None] * v[:, i, :, None, :] / size**0.5
        outputs.append((state * q[:, i, :, :, None]).sum(2))
    return torch.stack(outputs, 1), state


class TestGatedLinearAttention(RecurrenceTests):
    operator = operator
    function, reference = staticmethod(gated_linear_attention), staticmethod(reference.gated_linear_attention)
    recurrence, problem = staticmethod(recurrence), staticmethod(problem)
