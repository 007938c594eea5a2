import pytest
import torch

from phase8.errors import ConfigError
from phase8.generate.sampling import SamplingOptions, draw_tokens

LOGITS = torch.tensor([0.0, 3.0, 1.0, 2.9, -5.0])
MANY = 20_000


def drawn(count: int = 2000, **options) -> torch.Tensor:
    """Draws at as many places of one sequence, seed 7."""
    seeds, positions = torch.full((count,), 7), torch.arange(count)
    return draw_tokens(LOGITS.expand(count, -1), seeds, positions, SamplingOptions(**options))


def ids(**options) -> set[int]:
    return set(drawn(**options).tolist())


def test_temperature_zero_takes_the_likeliest():
    assert ids(temperature=0.0) == {1}


def test_top_k_and_top_p_exclude_unlikely_tokens():
    everything = {"temperature": 1.0, "top_p": 1.0}
    assert set(drawn(MANY, **everything).tolist()) == {0, 1, 2, 3, 4}
    assert ids(**everything, top_k=2) == {1, 3}
    # Probabilities 0.47, 0.43, 0.06, ...: two tokens reach 0.8, and a tiny top_p leaves the likeliest.
    assert ids(temperature=1.0, top_p=0.8) == {1, 3}
    assert ids(temperature=1.0, top_p=1e-6) == {1}
    assert ids(temperature=1e-30) == {1}
    assert ids(temperature=1e-300, top_p=1.0) == {1}


@pytest.mark.parametrize("limits", [{"top_p": 1.0}, {"top_p": 0.999999}, {"top_p": 1.0, "top_k": 5}, {"top_p": 1.0, "top_k": 9}])
def test_frequencies_follow_the_softmax(limits):
    counts = torch.bincount(drawn(MANY, temperature=2.0, **limits), minlength=5) / MANY
    torch.testing.assert_close(counts, (LOGITS / 2).softmax(-1), rtol=0, atol=0.012)


def test_noise_depends_on_seed_and_place_alone():
    options = SamplingOptions(temperature=5.0, top_p=1.0)
    seeds, positions = torch.arange(50) // 5, torch.arange(50) % 5
    together = draw_tokens(LOGITS.expand(50, -1), seeds, positions, options)
    alone = [draw_tokens(LOGITS[None], seeds[i : i + 1], positions[i : i + 1], options).item() for i in range(50)]
    assert together.tolist() == alone
    assert len({tuple(together[seeds == seed].tolist()) for seed in range(10)}) > 8 and len(set(together[positions == 0].tolist())) > 1
    # The limits exclude ids, but do not change the noise of the others: the same id wins where it is allowed.
    limited = draw_tokens(LOGITS.expand(50, -1), seeds, positions, SamplingOptions(temperature=5.0, top_p=1.0, top_k=4))
    assert torch.equal(limited[together != 4], together[together != 4])


def test_bad_options_are_one_sentence_each():
    with pytest.raises(ConfigError) as caught:
        SamplingOptions(temperature=-1, top_k=-2, top_p=0)
    assert [problem.split()[0] for problem in caught.value.problems] == ["--temperature", "--top-k", "--top-p"]
