"""`data.split`: Megatron's notation, and what it refuses."""

from fractions import Fraction

import pytest

from phase8.config.schema import RunConfig
from phase8.config.split import split_shares
from phase8.config.validate import find_problems


def problems(**data):
    return [problem for problem in find_problems(RunConfig.model_validate({"data": data})) if "data.split" in problem]


@pytest.mark.parametrize(
    ("text", "bounds"),
    [("969,30,1", (0.969, 0.999)), ("8, 1, 1", (0.8, 0.9)), ("0.9,0.1,0", (0.9, 1)), ("100,0,0", (1, 1)), ("1,0,3", (0.25, 0.25))],
)
def test_shares_are_those_of_megatron(text, bounds):
    (begin, middle), (same, end) = split_shares(text)
    assert (begin, middle, end) == (0, *(Fraction(str(bound)) for bound in bounds)) and same == middle
    assert problems(train="x", split=text) == []


OTHER_TEXTS = ["", "969,30", "9,0,1,2", "a,b,c", "-1,1,1", "nan,1,1", "inf,1,1", "1e3,1,1", "9;1;1", "1,,1", "9" * 5000 + ",1,1", "１,1,1"]


@pytest.mark.parametrize("text", OTHER_TEXTS)
def test_other_texts_are_refused(text):
    (problem,) = problems(train="x", split=text)
    assert len(problem) < 200 and "must be three numbers from 0 on, the shares of training, validation and neither: 969,30,1." in problem


def test_what_a_split_does_not_go_with():
    assert "leaves nothing to train on" in problems(train="x", split="0,1,1")[0]
    assert "leaves nothing to train on" in problems(train="x", split="0,0,0")[0]
    assert "data.validation is set too" in problems(train="x", validation="y", split="9,1,0")[0]
    assert "the embedded corpus is split already" in problems(split="9,1,0")[0]
