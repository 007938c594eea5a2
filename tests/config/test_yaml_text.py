"""Numbers are decimal wherever they are written, and no YAML keeps the reader busy."""

import os
import time

import pytest
import yaml

from phase8.config.load import MAX_FILE_BYTES, load_config
from phase8.config.yaml_text import MAX_DEPTH, MAX_VALUES, read_yaml
from phase8.errors import ConfigError

WHOLE_NUMBERS = {"10": 10, "010": 10, "0100": 100, "07": 7, "08": 8, "09": 9, "+5": 5, "0": 0, "00": 0}
NUMBERS = {"0010": 10.0, "1e-3": 0.001, "01e2": 100.0, "00.5": 0.5, ".5": 0.5, "5.": 5.0, "+1.5E1": 15.0}
NO_NUMBERS = ["1:00", "1:00.5", "0o17", "0x10", "0b11", "1_000", "1_0.5", "1e", "1,5", "\u0663", "--1", "1-1", "yes"]


def from_file(tmp_path, name, text):
    path = tmp_path / "file.yaml"
    section, _, leaf = name.partition(".")
    path.write_text(f"{section}: {{{leaf}: {text}}}", encoding="utf-8")
    return load_config(path)


def from_option(tmp_path, name, text):
    return load_config(os.devnull, [f"{name}={text}"])


@pytest.fixture(params=[from_file, from_option], ids=["file", "option"])
def value(request, tmp_path):
    """The value of a key that is given by a file or by an option."""

    def value(name, text):
        found = request.param(tmp_path, name, text)
        for part in name.split("."):
            found = dict(found)[part]
        return found

    return value


@pytest.mark.parametrize(("text", "number"), WHOLE_NUMBERS.items())
def test_whole_numbers_are_decimal(value, text, number):
    found = value("train.seed", text)
    assert found == number and type(found) is int


@pytest.mark.parametrize(("text", "number"), NUMBERS.items())
def test_numbers_are_decimal(value, text, number):
    found = value("optim.learning_rate", text)
    assert found == number and type(found) is float


@pytest.mark.parametrize("name", ["train.seed", "optim.learning_rate"])
@pytest.mark.parametrize("text", NO_NUMBERS)
def test_other_spellings_are_refused_as_the_text_they_are(value, name, text):
    if text == "1,5":
        text = '"1,5"'
    with pytest.raises(ConfigError) as caught:
        value(name, text)
    (problem,) = caught.value.problems
    assert f"{name} is {text.strip(chr(34))!r}, but a " in problem


@pytest.mark.parametrize("text", ["yes", "on", "no", "off", "y", "1"])
def test_only_true_and_false_are_booleans(value, text):
    with pytest.raises(ConfigError, match=r"train.deterministic is .*, but true or false is needed"):
        value("train.deterministic", text)
    assert value("train.deterministic", "True") is True and value("train.deterministic", "false") is False


def laughs(width: int, depth: int) -> str:
    lines = ["run: &level0 [ha]"]
    lines += [f"key{n}: &level{n} [{', '.join([f'*level{n - 1}'] * width)}]" for n in range(1, depth + 1)]
    return "\n".join(lines)


HOSTILE = {
    "nine aliases, eight levels": (laughs(9, 8), f"more than {MAX_VALUES} values"),
    "aliases merged": ("a: &a0 {x: 1}\n" + "\n".join(f"b{n}: &a{n} {{<<: [{f'*a{n - 1}, ' * 9}]}}" for n in range(1, 9)), "more than"),
    "5,000 brackets": ("run: " + "[" * 5000, f"nested more than {MAX_DEPTH} deep"),
    "5,000 braces": ("{a: " * 5000, "nested more than"),
    "5,000 dashes": ("- " * 5000, "nested more than"),
    "a list in itself": ("run: &a [*a]", "contains itself"),
    "many values": (f"run: [{'1,' * (MAX_VALUES + 1)}]", "more than"),
    "too large": ("#" * (MAX_FILE_BYTES + 1), f"holds more than {MAX_FILE_BYTES} bytes"),
}


@pytest.mark.parametrize(("text", "words"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_yaml_is_refused_at_once(tmp_path, text, words):
    path = tmp_path / "hostile.yaml"
    path.write_text(text)
    begin = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert time.process_time() - begin < 10
    (problem,) = caught.value.problems
    assert words in problem and len(problem) < 600 and "\n" not in problem


@pytest.mark.parametrize("key", ["optim.betas", "train.num_steps", "data.train", "observe.sample_prompt"])
def test_brackets_on_the_command_line_are_no_traceback(key):
    text = "[" * 5000
    if key == "observe.sample_prompt":
        assert load_config(os.devnull, [f"{key}={text}"]).observe.sample_prompt == text
        return
    with pytest.raises(ConfigError) as caught:
        load_config(os.devnull, [f"{key}={text}"])
    (problem,) = caught.value.problems
    assert len(problem) < 1000


def test_aliases_that_a_config_may_have_are_read():
    assert read_yaml("a: &x {b: 1}\nc: *x\nd: {<<: *x, e: 2}") == {"a": {"b": 1}, "c": {"b": 1}, "d": {"b": 1, "e": 2}}
    with pytest.raises(yaml.YAMLError, match="undefined alias"):
        read_yaml("a: *x")


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, words in {pipe: "is a pipe", "/dev/zero": "holds more than", tmp_path: "cannot be read (Is a directory)"}.items():
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        assert words in str(caught.value) and len(caught.value.problems) == 1
