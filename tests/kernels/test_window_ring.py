"""A ring of keys and values gives what window attention of whole sequences computes, at positions that differ from sequence to sequence."""

import pytest
import torch

from phase8.kernels.reference.window_attention import window_attention
from phase8.kernels.window_ring import fill_ring, ring_attention_step, ring_place
from phase8.kernels.window_state import empty_window_state

H, K, T = 2, 4, 23


@pytest.mark.parametrize(("window", "global_tokens", "lorentz"), [(5, 0, False), (5, 3, False), (1, 2, False), (40, 0, False), (6, 2, True)])
@pytest.mark.parametrize("read", [(0, 0), (2, 17), (4, 5)])
@pytest.mark.parametrize("known", [False, True])
def test_attention(window, global_tokens, lorentz, read, known):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, T, H, K, generator=generator, dtype=torch.float64)
    options = {"window": window, "global_tokens": global_tokens, "beta": torch.tensor([0.5, 2.0], dtype=torch.float64) if lorentz else None}
    expected, _ = window_attention(q, k, v, **options)
    keys, values = torch.full((2, 2, global_tokens + window, H, K), 7.0, dtype=torch.float64).unbind()  # whatever a row held before
    for row, length in enumerate(read):
        if length:
            part = (x[row : row + 1, :length] for x in (q, k, v))
            state = empty_window_state(1, H, K, like=keys)
            fill_ring(keys, values, torch.tensor([row]), window_attention(*part, **options, state=state)[1], window=window)
    position = torch.tensor(read)
    for _ in range(T - max(read)):
        longest = int(position.max()) if known else None
        place = ring_place(position, window=window, global_tokens=global_tokens, dtype=torch.float64, longest=longest)
        assert place.bias.shape[-1] == global_tokens + (min(window, longest + 1) if known else window)
        rows = torch.arange(2)
        y = ring_attention_step(*(x[rows, position] for x in (q, k, v)), keys, values, place, options["beta"])
        torch.testing.assert_close(y, expected[rows, position])
        position = position + 1
