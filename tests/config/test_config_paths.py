"""Every path is expanded, in the config by the type of its key, on the command line by the type of its option."""

import argparse
import ast
import os
from pathlib import Path

import pytest

from phase8.config.arguments import path_argument, prefix_argument, resume_argument
from phase8.config.describe import describe_type, iterate_keys
from phase8.config.dotted import value_of
from phase8.config.load import config_from_mapping, config_to_mapping, load_config
from phase8.config.schema import DataSource
from phase8.errors import ConfigError

ROOT = Path(__file__).parents[2]
KEYS = {**dict(iterate_keys()), **{f"data.train[].{name}": field for name, field in DataSource.model_fields.items()}}
PATH_KEYS = [name for name, field in iterate_keys() if describe_type(field).startswith("a path")]
# What is neither a path nor a number nor one of several words. A key or an option that is none of these is a path.
TEXT_KEYS = {
    "run.name", "data.eod_token", "data.begin_token", "data.split", "observe.sample_prompt", "observe.project", "observe.wandb_entity",
    "train.compile.backend",
}  # fmt: skip
TEXT_OPTIONS = {
    "--set", "--prompt", "--json-key", "--variants", "--define", "--layouts", "--schedule",
    "--eod-token", "--document-separator", "--gpu", "--stop", "--shape",
}  # fmt: skip
# Started by a tool of ours, which gives it paths and not what somebody has typed.
NOT_BY_HAND = {ROOT / "launch/benchmark_rank.py"}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.delenv("UNSET_HERE", raising=False)


def test_every_text_of_the_schema_is_a_path_or_is_listed():
    assert {name for name, field in KEYS.items() if describe_type(field).startswith("a text")} == TEXT_KEYS
    assert {name for name, field in KEYS.items() if describe_type(field).startswith("a path")} == {
        "run.output_dir", "data.train", "data.validation", "data.tokenizer", "data.cache_dir", "data.train[].path",
        "checkpoint.initialise_from", "zero.nvme_path", "observe.openmetrics",
    }  # fmt: skip


@pytest.mark.parametrize("name", PATH_KEYS)
def test_paths_of_files_and_options_are_expanded(tmp_path, name):
    path = tmp_path / "run.yaml"
    section, _, leaf = name.partition(".")
    path.write_text(f"{section}: {{{leaf}: ~/x}}")
    assert value_of(load_config(path), name) == "/home/somebody/x"
    assert value_of(load_config(os.devnull, [f"{name}=${{SCRATCH}}/x"]), name) == "/scratch/x"
    sentence = f"{name}: the path '$UNSET_HERE/x' uses the variable UNSET_HERE, which is not set; set it, or write the path out."
    with pytest.raises(ConfigError) as caught:
        load_config(os.devnull, [f"{name}=$UNSET_HERE/x"])
    assert caught.value.exit_code == 2 and caught.value.problems == [f"--set '{name}=$UNSET_HERE/x': {sentence}"]


def test_paths_of_a_blend_are_expanded():
    config = load_config(os.devnull, ["data.validation=[{path: ~/a, weight: 1}, {path: $SCRATCH/b, weight: 1}]"])
    assert [source.path for source in config.data.validation] == ["/home/somebody/a", "/scratch/b"]


def test_other_texts_are_not():
    assert load_config(os.devnull, ["observe.sample_prompt=~/x costs $UNSET_HERE"]).observe.sample_prompt == "~/x costs $UNSET_HERE"


def test_what_is_stored_is_expanded_already_and_stays(monkeypatch):
    monkeypatch.setenv("SCRATCH", "/with$UNSET_HERE")
    config = load_config(os.devnull, ["run.output_dir=$SCRATCH/x"])
    assert config.run.output_dir == "/with$UNSET_HERE/x"
    assert config_from_mapping(config_to_mapping(config), source="manifest") == config


def test_arguments_are_expanded_or_refused():
    assert path_argument("~/x") == Path("/home/somebody/x") and path_argument("$SCRATCH/x") == Path("/scratch/x")
    assert [resume_argument(text) for text in ("auto", "none", "~/c", "c")] == ["auto", "none", "/home/somebody/c", "c"]
    for kind in (path_argument, resume_argument, prefix_argument):
        with pytest.raises(argparse.ArgumentTypeError, match="UNSET_HERE, which is not set"):
            kind("$UNSET_HERE/x")
    with pytest.raises(argparse.ArgumentTypeError, match="it is empty, but auto, none or a checkpoint is needed"):
        resume_argument("")  # a variable of a shell that is not set
    assert prefix_argument("$SCRATCH/data/mine.v1") == Path("/scratch/data/mine.v1")
    for text in ("data/", "", ".", "data/.."):  # a Path forgets the slash, and files would lie beside the directory
        with pytest.raises(argparse.ArgumentTypeError, match="ends in no name"):
            prefix_argument(text)


def options(path: Path):
    """(name, what its values are) of the options of a door that take values of no other type and no list of words."""
    for call in (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)):
        if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument":
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            takes_value = "choices" not in given and given.get("action", "'append'") in ("'append'", "'extend'")
            if takes_value and given.get("type") not in ("int", "float"):
                yield call.args[0].value, given.get("type")


def test_every_option_of_a_door_is_expanded_or_is_listed():
    doors = {*(ROOT / "launch").glob("*.py"), *(ROOT / "tools").rglob("*.py")} - NOT_BY_HAND
    found = {(name, kind) for door in doors for name, kind in options(door)}
    assert {name for name, kind in found if kind not in ("path_argument", "prefix_argument", "resume_argument")} == TEXT_OPTIONS
    assert {"--config", "--resume", "--checkpoint", "--tokenizer", "inputs", "source", "destination"} <= {name for name, _ in found}
