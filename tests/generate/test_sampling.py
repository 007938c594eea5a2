import pytest
import torch

from phase8.config.model_section import ModelSection
from phase8.errors import CheckpointError, ConfigError
from phase8.generate.sampling import SamplingOptions, draw_token, generate_tokens
from tests.model.small import perturbed_model, scaled_down

LOGITS = torch.tensor([0.0, 3.0, 1.0, 2.9, -5.0])


def drawn(**options) -> set[int]:
    generator = torch.Generator().manual_seed(0)
    return {draw_token(LOGITS, SamplingOptions(**options), generator) for _ in range(2000)}


def test_temperature_zero_takes_the_likeliest():
    assert drawn(temperature=0.0) == {1}


def test_top_k_and_top_p_exclude_unlikely_tokens():
    everything = {"temperature": 1.0, "top_p": 1.0}
    assert drawn(**everything) == {0, 1, 2, 3, 4}
    assert drawn(**everything, top_k=2) == {1, 3}
    # Probabilities 0.47, 0.43, 0.06, ...: two tokens reach 0.8, and a tiny top_p leaves the likeliest.
    assert drawn(temperature=1.0, top_p=0.8) == {1, 3}
    assert drawn(temperature=1.0, top_p=1e-6) == {1}


def test_frequencies_follow_the_softmax():
    generator, options = torch.Generator().manual_seed(0), SamplingOptions(temperature=2.0, top_p=1.0)
    counts = torch.bincount(torch.tensor([draw_token(LOGITS, options, generator) for _ in range(20000)]), minlength=5) / 20000
    torch.testing.assert_close(counts, (LOGITS / 2).softmax(-1), rtol=0, atol=0.012)


def test_a_seed_means_one_text_and_ids_beyond_the_tokenizer_never_come():
    model = perturbed_model(scaled_down(ModelSection()))

    def text(seed, num_ids=61):
        options = SamplingOptions(temperature=5.0, top_p=1.0, seed=seed)
        return list(generate_tokens(model, [1, 2], max_tokens=50, options=options, num_ids=num_ids))

    assert text(0) == text(0) != text(1)
    assert max(text(0)) > 20 and max(text(0, num_ids=20)) < 20


def test_the_stop_id_ends_the_text():
    model = perturbed_model(scaled_down(ModelSection()))
    options = SamplingOptions(temperature=0.0)
    tokens = list(generate_tokens(model, [1], max_tokens=10, options=options, num_ids=61))
    stopped = list(generate_tokens(model, [1], max_tokens=10, options=options, num_ids=61, stop_id=tokens[3]))
    assert stopped == tokens[: tokens.index(tokens[3])]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_one_sentence(temperature: float, number: float):
    """Weights from a stranger can be any numbers."""
    with pytest.raises(CheckpointError, match="not finite"):
        draw_token(torch.tensor([0.0, number]), SamplingOptions(temperature=temperature), torch.Generator())


def test_bad_options_are_one_sentence_each():
    with pytest.raises(ConfigError) as caught:
        SamplingOptions(temperature=-1, top_k=-2, top_p=0)
    assert [problem.split()[0] for problem in caught.value.problems] == ["temperature", "top_k", "top_p"]
