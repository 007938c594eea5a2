from dataclasses import is_dataclass

import pytest
import torch

from phase8.config.model_section import ModelSection
from phase8.generate.decode import Decoder
from tests.model.small import VARIANT_IDS, VARIANT_SECTIONS, perturbed_model, random_tokens, scaled_down


@pytest.mark.parametrize("section", VARIANT_SECTIONS, ids=VARIANT_IDS)
@pytest.mark.parametrize("prompt_tokens", [1, 8])
def test_decoding_one_by_one_gives_the_logits_of_the_whole(section, prompt_tokens):
    model, tokens = perturbed_model(section), random_tokens(batch=1)
    with torch.inference_mode():
        expected = model.logits(model(tokens)[0])
    decoder = Decoder(model)
    logits = [decoder.feed(tokens[:, :prompt_tokens])]
    logits += [decoder.feed(tokens[:, i : i + 1]) for i in range(prompt_tokens, tokens.shape[1])]
    torch.testing.assert_close(torch.stack(logits, 1), expected[:, prompt_tokens - 1 :], rtol=1e-5, atol=1e-5)


def size_bytes(state):
    """Bytes of the tensors in a state, which is made of dataclasses, tensors and numbers."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    parts = state if isinstance(state, (list, tuple)) else vars(state).values() if is_dataclass(state) else ()
    return sum(map(size_bytes, parts))


def test_memory_is_constant_at_any_length():
    section = scaled_down(ModelSection(global_tokens=3))
    decoder, sizes = Decoder(perturbed_model(section)), []
    for token in random_tokens(batch=1, length=60).split(1, dim=1):
        decoder.feed(token)
        sizes.append(size_bytes(decoder._states))
    full = max(section.window_sizes) - 1 + section.global_tokens
    assert len(set(sizes[full:])) == 1 and sizes[0] < sizes[full]


def test_memory_of_the_baseline_grows():
    decoder, sizes = Decoder(perturbed_model(scaled_down(ModelSection(block="transformer")))), []
    for token in random_tokens(batch=1, length=20).split(1, dim=1):
        decoder.feed(token)
        sizes.append(size_bytes(decoder._states))
    assert sizes == sorted(set(sizes))


def test_the_baseline_keeps_as_many_heads_as_keys_have():
    sizes = []
    for heads in (None, 1):
        decoder = Decoder(perturbed_model(scaled_down(ModelSection(block="transformer", num_kv_heads=heads))))
        decoder.feed(random_tokens(batch=1, length=20))
        state = decoder._states[0]
        sizes.append(size_bytes(state.keys) + size_bytes(state.values))
    assert sizes[0] == 4 * sizes[1] == 2 * 20 * 24 * 8
