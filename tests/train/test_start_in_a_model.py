"""A run directory that itself is a checkpoint or an exported model: no run begins in it, and one that did is read as a run."""

import json
import re
import shutil

import pytest

from phase8.checkpoint.load import find_checkpoint
from phase8.checkpoint.model_source import open_model
from phase8.errors import ConfigError
from tests.tools.doors import load_door
from tests.train.test_start import tree
from tests.train.tiny_run import prepare, train_tiny, write_config

FORMS = {"hf": ("--format", "hf"), "consolidated": ("--format", "consolidated"), "phase8": (), "quantised": None}
RESUME, BEGIN = " --resume {} to go on from it", " checkpoint.initialise_from={} to begin with its weights"
WAYS = {"hf": f", with{BEGIN}", "consolidated": f", with{BEGIN}", "phase8": f", with{RESUME} or{BEGIN}", "quantised": ""}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The config of a run `source` of five steps."""
    config = write_config(tmp_path_factory.mktemp("trained"))
    train_tiny(config, "run.name=source", "train.num_steps=5", "train.evaluate_every_n_steps=0")
    return config


@pytest.fixture
def model(request, trained, tmp_path):
    """The name of a form, and a directory of it made from the run."""
    form = request.param
    source, directory = str(trained.parent / "runs/source"), tmp_path / "runs" / "foo"
    directory.parent.mkdir()
    if FORMS[form] is None:
        assert load_door("quantize_checkpoint").main([source, str(directory)]) == 0
    else:
        assert load_door("reshard_checkpoint").main([source, str(directory), *FORMS[form]]) == 0
    return form, directory


def start(trained, directory, *settings, name="foo", resume="auto"):
    run = prepare(trained, f"run.name={name}", f"run.output_dir={directory.parent}", *settings, resume=resume)
    run.lock.close()
    return run


@pytest.mark.parametrize("model", FORMS, indirect=True)
@pytest.mark.parametrize("resume", ["auto", "none", "{}"])
def test_no_run_begins_inside_a_model(trained, model, resume):
    form, directory = model
    kind = "a checkpoint" if form == "phase8" else "an exported model"
    before = tree(directory.parent)
    ways = WAYS[form].format(*[directory] * 2)
    sentence = f"run.name is foo, but {directory} itself is {kind}, where no run can begin; give another run.name{ways}."
    with pytest.raises(ConfigError, match=f"^{re.escape(sentence)}$"):
        start(trained, directory, resume=resume.format(directory))
    assert tree(directory.parent) == before


@pytest.mark.parametrize("model", ["consolidated", "phase8"], indirect=True)
def test_the_named_ways_lead_on(trained, model):
    form, directory = model
    assert start(trained, directory, f"checkpoint.initialise_from={directory}", name="begun").origin is not None
    if form == "phase8":
        assert start(trained, directory, name="resumed", resume=str(directory)).position.step == 5


@pytest.mark.parametrize("model", ["phase8"], indirect=True)
def test_a_damaged_model_is_only_avoided(trained, model):
    _, directory = model
    (directory / "manifest.json").write_text("{")
    with pytest.raises(ConfigError, match=r"give another run.name\.$"):
        start(trained, directory)


@pytest.mark.parametrize("model", ["hf", "phase8"], indirect=True)
def test_a_run_that_began_inside_a_model_is_read_as_a_run(trained, model):
    _, directory = model
    shutil.copytree(trained.parent / "runs/source/checkpoints", directory / "checkpoints")
    newest = directory / "checkpoints" / "step-0000000005"
    assert find_checkpoint(directory) == open_model(directory).path == newest
    assert start(trained, directory, resume=str(directory)).position.step == 5
    assert load_door("inspect_checkpoint").main([str(directory), "--json"]) == 0


@pytest.mark.parametrize("model", ["hf", "consolidated"], indirect=True)
def test_who_inspects_weights_alone_is_told_what_can_be_inspected(trained, model, capsys):
    _, directory = model
    capsys.readouterr()
    sentence = "but only checkpoints of training and quantised weights are inspected; give the checkpoint that they are from "
    sentence += f"or one that tools/reshard_checkpoint.py {directory} DST makes of them"
    for words in ([], ["--diff", str(directory)]):
        path = trained.parent / "runs/source" if words else directory
        assert load_door("inspect_checkpoint").main([str(path), *words]) == 4
        errors = capsys.readouterr().err
        assert sentence in errors and errors.count("\n") == 1 and "initialise_from" not in errors
    copy = str(directory.with_name("copy"))
    assert load_door("reshard_checkpoint").main([str(directory), copy]) == load_door("inspect_checkpoint").main([copy]) == 0


@pytest.mark.parametrize("model", ["consolidated"], indirect=True)
def test_a_checkpoint_of_step_0_is_only_begun_with(trained, model):
    _, directory = model
    made = directory.with_name("made")
    assert load_door("reshard_checkpoint").main([str(directory), str(made)]) == 0
    with pytest.raises(ConfigError, match=rf"made itself is a checkpoint, .* run.name{re.escape(WAYS['consolidated'].format(made))}\.$"):
        start(trained, directory, name="made")


def test_a_checkpoint_of_deepspeed_is_no_place_for_a_run_either(trained, tmp_path):
    directory = tmp_path / "foo"
    (directory / "global_step3").mkdir(parents=True)
    (directory / "latest").write_text("global_step3")
    (directory / "global_step3" / "mp_rank_00_model_states.pt").touch()
    with pytest.raises(ConfigError, match=r"foo itself is a checkpoint of DeepSpeed, where no run can begin; give another run.name\.$"):
        start(trained, directory)
    shutil.copytree(trained.parent / "runs/source/checkpoints", directory / "checkpoints")
    assert open_model(directory).step == start(trained, directory).position.step == 5


@pytest.mark.parametrize(("name", "content"), [("manifest.json", '{"name": "web"}'), ("latest", "long " * 100)])
def test_files_that_only_have_the_names_of_a_checkpoint_are_in_nobodys_way(trained, tmp_path, name, content):
    (tmp_path / "foo").mkdir()
    (tmp_path / "foo" / name).write_text(content)
    assert start(trained, tmp_path / "foo").position.step == 0


def test_a_config_without_weights_is_no_model(trained, tmp_path):
    directory = tmp_path / "foo"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({}))
    assert start(trained, directory).position.step == 0
