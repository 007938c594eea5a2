"""Sequences of the recall tasks: reproducible, and a lookup alone finds every answer."""

import numpy as np
import pytest

from phase8.errors import ConfigError
from phase8.recall.tasks import ASK, BEGIN, MARK, Task
from phase8.recall.write import random_generator
from tests.recall.oracle import look_up

TASKS = [Task("mqar", 256, (4, 30)), Task("passkey", 256, (6,))]


def draw(task, *, seed=1, split="train", length=200, size=None, count=5):
    generator = random_generator(task, seed=seed, split=split, length=length)
    return task.draw(generator, length=length, size=size or task.sizes[-1], count=count)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_seed_gives_the_same_sequences_and_others_give_others(task):
    first = draw(task)
    assert all(np.array_equal(a, b) for a, b in zip(first, draw(task), strict=True))
    for other in (draw(task, seed=2), draw(task, split="evaluation")):
        assert not np.array_equal(first.tokens, other.tokens)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
@pytest.mark.parametrize("length", [122, 200, 1001])
def test_answers_were_shown_before_they_are_asked_and_can_be_looked_up(task, length):
    for size in task.sizes:
        tokens, answers, shown = draw(task, length=length, size=size)
        assert tokens.shape == (5, length) and answers.shape == shown.shape == (5, size)
        expected = np.take_along_axis(tokens, answers, axis=1)
        assert np.array_equal(np.take_along_axis(tokens, shown, axis=1), expected)
        assert np.array_equal(look_up(tokens, answers), expected)
        asked = (tokens == ASK).argmax(axis=1)[:, None]
        assert (shown < asked).all() and (asked < answers).all() and (tokens[:, 0] == BEGIN).all()
        assert tokens.min() >= 0 and tokens.max() < task.vocab_size and expected.min() >= task.vocab_size - task.num_values


def test_every_key_is_asked_once_and_keys_are_no_values():
    tokens, answers, shown = draw(TASKS[0])
    for row, answer, place in zip(tokens, answers, shown, strict=True):
        assert sorted(row[answer - 1]) == sorted(row[place - 1]) and len(set(row[answer - 1])) == 30
        assert row[answer - 1].max() < 256 - TASKS[0].num_values


@pytest.mark.parametrize("length", [122, 200, 1001])
def test_rounds_fill_a_sequence_and_ask_for_every_key_in_each(length):
    rounds = TASKS[0].most_rounds(length, 4)
    drawn = TASKS[0].draw(np.random.default_rng(1), length=length, size=4, count=2, rounds=rounds)
    assert drawn.tokens.shape == (2, length) and drawn.answers.shape == (2, 4 * rounds) and length - 8 < 10 + 8 * rounds <= length
    assert np.array_equal(look_up(drawn.tokens, drawn.answers), np.take_along_axis(drawn.tokens, drawn.answers, axis=1))
    by_round = np.take_along_axis(drawn.tokens, drawn.answers - 1, axis=1).reshape(2, rounds, 4)
    assert (np.sort(by_round, axis=2) == np.sort(by_round[:, :1], axis=2)).all()


def test_passkeys_are_hidden_at_every_depth():
    _, _, shown = draw(TASKS[1], length=100, count=400)
    depths = shown[:, 0]
    assert depths.min() <= 4 and depths.max() >= 82 and 40 < depths.mean() < 48
    assert (draw(TASKS[1]).tokens == MARK).sum() == 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Task("mqar", 126, (30,)), "mqar with --pairs 30 needs 127 ids, but the vocabulary has 126"),
        (lambda: Task("passkey", 256, (0,)), "--key-tokens is 0"),
        (lambda: TASKS[0].check_length(121), "mqar with --pairs 30 needs 122 tokens, but a sequence has 121"),
        (lambda: TASKS[1].check_length(14), "passkey with --key-tokens 6 needs 15 tokens"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_the_smallest_length_has_no_filler():
    TASKS[0].check_length(122)
    assert draw(TASKS[0], length=122).tokens[0, 61] == ASK
