"""How many tokens' logits exist at once on a GPU, and what memory they take."""

import pytest

from phase8.kernels.loss_chunks import choose_chunk_tokens, scratch_bytes, scratch_limit


@pytest.mark.parametrize(
    ("num_tokens", "vocabulary", "width", "element_bytes", "scratch_bytes", "expected"),
    [
        (32768, 131072, 2048, 2, 1_500_000_000, 2048),  # of 1.5 GB, 0.54 are the cast head and 0.54 the logits
        (32768, 131072, 2048, 2, 2_000_000_000, 4096),
        (16384, 32000, 2048, 2, 1_500_000_000, 16384),  # all tokens, in one pass over the gradient of the head
        (8192, 50257, 512, 2, 1_500_000_000, 8192),
        (5000, 131072, 2048, 4, 1_500_000_000, 512),  # fp32: beside the head there is room for fewer than the least
        (300, 131072, 2048, 4, 1_500_000_000, 300),
        (4096, 32000, 1024, 2, 500_000_000, 4096),
        (8192, 32000, 1024, 2, 500_000_000, 4096),  # a device of 8 GB
        (1, 5, 4, 2, 0, 1),
    ],
)
def test_length_of_a_chunk(num_tokens, vocabulary, width, element_bytes, scratch_bytes, expected):
    assert choose_chunk_tokens(num_tokens, vocabulary, width, element_bytes=element_bytes, scratch_bytes=scratch_bytes) == expected


def test_scratch_is_the_logits_of_a_chunk_and_the_cast_head():
    assert scratch_bytes(16384, 32000, 2048, element_bytes=2, device_bytes=80 << 30) == (16384 + 2048) * 32000 * 2
    assert scratch_bytes(100, 33, 8, element_bytes=4, device_bytes=None) == (100 + 8) * 64 * 4
    assert scratch_bytes(8192, 32000, 1024, element_bytes=2, device_bytes=8_000_000_000) == (4096 + 1024) * 32000 * 2


def test_a_small_device_gives_a_part_of_its_memory():
    assert scratch_limit(None) == scratch_limit(80 << 30) == 1_500_000_000
    assert scratch_limit(8_000_000_000) == 500_000_000
