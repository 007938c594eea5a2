"""Prompts side by side: each is continued as if it were alone."""

import pytest
import torch

from phase8.config.model_section import ModelSection
from phase8.errors import CheckpointError
from phase8.generate.continuations import Request, continue_prompts
from phase8.generate.decode import DecodingLoop
from phase8.generate.sampling import SamplingOptions
from tests.model.small import perturbed_model, scaled_down

PROMPTS = [(1, 2, 3), (4,), (1, 2, 3), (9, 8, 7), tuple(range(20)), (5, 6), (1, 2, 3)]
OPTIONS = SamplingOptions(temperature=3.0)


def continued(model, requests, *, batch_size, at_once=1, max_tokens=9, num_ids=61, stop=None, ahead=False, options=OPTIONS):
    loop = DecodingLoop(model, batch_size=batch_size, options=options, num_ids=num_ids, most_at_once=at_once)
    loop.is_ahead = ahead
    found = {request.number: [] for request in requests}

    def take(number, token):
        found[number].append(token)
        return token != stop

    continue_prompts(loop, iter(requests), max_tokens=max_tokens, take=take)
    return found


@pytest.fixture(scope="module", params=["phase8", "transformer"])
def model(request):
    return perturbed_model(scaled_down(ModelSection(block=request.param, global_tokens=2)))


REQUESTS = [Request(number, prompt, seed=number % 3) for number, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize(("batch_size", "at_once", "ahead"), [(3, 1, False), (7, 4, False), (2, 4, True), (9, 16, True)])
def test_each_prompt_is_continued_as_if_it_were_alone(model, batch_size, at_once, ahead):
    alone = {request.number: continued(model, [request], batch_size=1)[request.number] for request in REQUESTS}
    assert all(len(tokens) == 9 for tokens in alone.values()) and alone[0] != alone[2]
    assert alone[0] == continued(model, [Request(0, PROMPTS[6], seed=0)], batch_size=1)[0]
    assert continued(model, REQUESTS, batch_size=batch_size, at_once=at_once, ahead=ahead) == alone
    # Where some end early, others take their rows, and nobody gets what was drawn beyond an end.
    stop = alone[1][4]
    expected = {number: tokens[: tokens.index(stop) + 1] if stop in tokens else tokens for number, tokens in alone.items()}
    assert continued(model, REQUESTS, batch_size=batch_size, at_once=at_once, ahead=ahead, stop=stop) == expected


def test_a_prompt_with_several_samples_is_read_once(model, monkeypatch):
    lengths = []
    admit = DecodingLoop.admit
    monkeypatch.setattr(DecodingLoop, "admit", lambda self, rows, prompts, seeds: lengths.append(len(prompts)) or admit(self, rows, prompts, seeds))
    continued(model, [Request(number, (1, 2), seed=number) for number in range(4)], batch_size=4)
    assert lengths == [1]


def test_one_token_takes_no_step(model, monkeypatch):
    monkeypatch.setattr(DecodingLoop, "advance", None)
    assert list(map(len, continued(model, REQUESTS, batch_size=4, max_tokens=1).values())) == [1] * len(REQUESTS)


def test_ids_beyond_the_tokenizer_never_come(model):
    options = SamplingOptions(temperature=50.0, top_p=1.0)
    drawn = [token for tokens in continued(model, REQUESTS, batch_size=7, num_ids=20, max_tokens=30, options=options).values() for token in tokens]
    assert max(drawn) in (18, 19)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logits_that_are_not_finite_are_one_sentence(temperature, number):
    """Weights from a stranger can be any numbers."""
    damaged = perturbed_model(scaled_down(ModelSection()))
    with torch.no_grad():
        damaged.head_weight[3, 0] = number
    with pytest.raises(CheckpointError, match="not finite"):
        continued(damaged, REQUESTS, batch_size=2, options=SamplingOptions(temperature=temperature))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_found_after_the_first_token_too(number):
    damaged, options = perturbed_model(scaled_down(ModelSection())), SamplingOptions(temperature=0.0)
    first = continued(damaged, REQUESTS[:1], batch_size=1, options=options)[0][0]
    with torch.no_grad():
        damaged.embedding.weight[first] = number
    with pytest.raises(CheckpointError, match="not finite"):
        continued(damaged, REQUESTS[:1], batch_size=1, options=options)
