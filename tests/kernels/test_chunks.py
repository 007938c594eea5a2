import pytest
import torch

from phase8.kernels.reference.chunks import CHUNK_TOKENS, chunk_decays, chunks, read_chunks, tokens


@pytest.mark.parametrize("length", [1, 63, 64, 130])
def test_chunks_come_back_as_tokens_and_are_filled_with_zeros(length):
    x = torch.randn(2, length, 3, 5, dtype=torch.float64)
    cut = chunks(x)
    assert cut.shape[1:4] == (-(-length // CHUNK_TOKENS), 3, min(CHUNK_TOKENS, length))
    assert torch.equal(tokens(cut, length), x)
    assert cut.sum() == pytest.approx(x.sum().item())


def test_decays_are_products_of_alpha_within_a_document():
    log_decay = -torch.rand(1, 70, 1, dtype=torch.float64)
    starts = torch.zeros(1, 70, dtype=torch.bool)
    starts[:, 10] = True
    decays, alpha = chunk_decays(log_decay, starts), log_decay[0, :, 0].exp()
    torch.testing.assert_close(decays.from_start[0, 0, 0, :10], alpha[:10].cumprod(0))
    assert not decays.from_start[0, 0, 0, 10:].any()
    torch.testing.assert_close(decays.to_end[0, 0, 0, 20], alpha[21:64].prod())
    assert not decays.to_end[0, 0, 0, :10].any() and decays.keeps[0, 0].item() == 0
    torch.testing.assert_close(decays.ratio[0, 0, 0, 15, 12], alpha[13:16].prod())
    assert decays.ratio[0, 0, 0, 12, 9] == 0 and decays.ratio[0, 0, 0, 12, 15] == 0 and decays.ratio[0, 0, 0, 12, 12] == 1
    torch.testing.assert_close(decays.keeps[0, 1].item(), alpha[64:].prod().item())


def test_tokens_read_the_state_before_their_chunk_and_the_tokens_of_their_chunk():
    query, key, value, state = (torch.randn(1, 2, 1, 4, size, dtype=torch.float64) for size in (3, 3, 5, 5))
    state = state[..., :3, :]
    ratio, gate = torch.rand(1, 2, 1, 4, 4, dtype=torch.float64).tril(), torch.rand(1, 2, 1, 4, dtype=torch.float64)
    found = read_chunks(query, key, value, state, ratio, gate)
    for chunk, i in ((0, 0), (1, 3)):
        q = query[0, chunk, 0, i]
        expected = gate[0, chunk, 0, i] * q @ state[0, chunk, 0]
        for j in range(i + 1):
            expected = expected + ratio[0, chunk, 0, i, j] * (q @ key[0, chunk, 0, j]) * value[0, chunk, 0, j]
        torch.testing.assert_close(found[0, chunk, 0, i], expected)
