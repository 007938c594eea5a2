import torch

from phase8.kernels import gated_delta_rule as operator
from phase8.kernels.gated_delta_rule import gated_delta_rule
from phase8.kernels.reference import gated_delta_rule as reference
from tests.kernels.recurrences import RecurrenceTests, without_earlier_documents


def problem(length, *, dtype=torch.float64, batch=2, heads=3, key_size=4, value_size=5):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(batch, length, heads, key_size, generator=generator, dtype=torch.float64) for _ in range(2))
    v = torch.randn(batch, length, heads, value_size, generator=generator, dtype=torch.float64)
    # From a memory of one token to one of thousands.
    log_decay = -torch.exp(4 * torch.randn(batch, length, heads, generator=generator, dtype=torch.float64) - 2)
    # Keys of about the length sqrt(K), of whose content a tenth to all is replaced.
    beta = torch.rand(batch, length, heads, generator=generator, dtype=torch.float64).clamp(min=0.1) / k.square().sum(-1)
    return [x.to(dtype) for x in (q, k, v, log_decay, beta)]


def recurrence(q, k, v, log_decay, beta, starts=None, state=None):
    """The defining loop over tokens."""
    batch, length, heads, size = q.shape
    state = q.new_zeros(batch, heads, size, v.shape[-1]) if state is None else state
    outputs = []
    for i in range(length):
        state = without_earlier_documents(state, starts, i)
        alpha = log_decay[:, i].exp()[..., None, None]
        key = k[:, i, :, :, None]
        written = beta[:, i, :, None] * (v[:, i] - (alpha * state * key).sum(2))
        state = alpha * state + key * written[:, :, None, :]
        outputs.append((state * q[:, i, :, :, None]).sum(2))
    return torch.stack(outputs, 1), state


class TestGatedDeltaRule(RecurrenceTests):
    operator = operator
    function, reference = staticmethod(gated_delta_rule), staticmethod(reference.gated_delta_rule)
    recurrence, problem = staticmethod(recurrence), staticmethod(problem)
