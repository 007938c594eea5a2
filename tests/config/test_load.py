import json
import os
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from phase8.config.describe import describe_type, describe_value, iterate_keys
from phase8.config.load import config_from_mapping, config_to_mapping, load_config
from phase8.config.rope_scaling import RopeScaling
from phase8.config.schema import DataSource, RunConfig
from phase8.errors import ConfigError

SECTIONS = "run, model, data, parallel, zero, precision, optim, train, checkpoint, observe"
ALL_KEYS = dict(iterate_keys())


def write(directory: Path, content: str | bytes) -> Path:
    path = directory / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def problems_of(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert caught.value.exit_code == 2
    return [problem.replace(str(path), "FILE") for problem in caught.value.problems]


def one_key(name: str, value: str) -> str:
    """YAML that gives one key a value."""
    *sections, leaf = name.split(".")
    text = f"{leaf}: {value}"
    for section in reversed(sections):
        text = f"{section}: {{{text}}}"
    return text


# Every class of problem, with the whole sentence.
PROBLEMS = {
    # unknown keys
    "misspelt": ("train: {nun_steps: 3}", "FILE: unknown key train.nun_steps; did you mean train.num_steps?"),
    "misspelt in a nested section": (
        "train: {compile: {enbled: true}}",
        "FILE: unknown key train.compile.enbled; did you mean train.compile.enabled?",
    ),
    "other section": ("model: {learning_rate: 3}", "FILE: unknown key model.learning_rate; did you mean optim.learning_rate?"),
    "no section": ("d_model: 256", "FILE: unknown key d_model; did you mean model.d_model?"),
    "nested section outside its own": ("compile: {enabled: true}", "FILE: unknown key compile; did you mean train.compile?"),
    "dots": (
        "train.num_steps: 3",
        "FILE: train.num_steps is written with dots, as for --set; in a file a key stands inside its section: train: {num_steps: ...}.",
    ),
    "dots beside the section": (
        "{train.num_steps: 3, train: {num_steps: 20}}",
        "FILE: train.num_steps is written with dots, as for --set; in a file a key stands inside its section: train: {num_steps: ...}.",
    ),
    "dots inside a section": (
        "train: {anomaly.policy: stop}",
        "FILE: anomaly.policy is written with dots, as for --set; in a file a key stands inside its section: train: {anomaly: {policy: ...}}.",
    ),
    "dots of a section": (
        "train.compile: {enabled: true}",
        "FILE: train.compile is written with dots, as for --set; in a file a key stands inside its section: train: {compile: ...}.",
    ),
    "misspelt dots": ("train.nun_steps: 3", "FILE: unknown key train.nun_steps; did you mean train.num_steps?"),
    "misspelt section": ("modle: {d_model: 256}", "FILE: unknown key modle; did you mean model?"),
    "like nothing": ("zzz: 1", f"FILE: unknown key zzz; the sections are {SECTIONS}."),
    "a number as key": ("7: 1", f"FILE: unknown key 7; the sections are {SECTIONS}."),
    # wrong types, one of each
    "text for whole number": ("train: {num_steps: many}", "FILE: train.num_steps is 'many', but a whole number at least 1 is needed."),
    "fraction for whole number": ("train: {num_steps: 1.5}", "FILE: train.num_steps is 1.5, but a whole number at least 1 is needed."),
    "float for whole number": ("train: {num_steps: 1e3}", "FILE: train.num_steps is 1000.0, but a whole number at least 1 is needed."),
    "bool for whole number": ("zero: {stage: true}", "FILE: zero.stage is true, but a whole number at least 0 and at most 3 is needed."),
    "text for number": ("optim: {eps: tiny}", "FILE: optim.eps is 'tiny', but a number above 0 and finite is needed."),
    "number for bool": ("train: {deterministic: 1}", "FILE: train.deterministic is 1, but true or false is needed."),
    "text for bool": ("train: {deterministic: 'true'}", "FILE: train.deterministic is 'true', but true or false is needed."),
    "bool for path": ("run: {output_dir: true}", "FILE: run.output_dir is true, but a path is needed."),
    "bool for path or null": ("data: {tokenizer: false}", "FILE: data.tokenizer is false, but a path or null is needed."),
    "unknown choice": ("precision: {dtype: fp16}", "FILE: precision.dtype is 'fp16', but one of bf16, fp32 is needed."),
    "number for choice": ("precision: {dtype: 16}", "FILE: precision.dtype is 16, but one of bf16, fp32 is needed."),
    "mapping for key": ("train: {num_steps: {a: 1}}", "FILE: train.num_steps is {'a': 1}, but a whole number at least 1 is needed."),
    "list for key": ("train: {seed: [1]}", "FILE: train.seed is [1], but a whole number at least 0 and at most 9223372036854775807 is needed."),
    # out of range
    "too small": ("train: {num_steps: 0}", "FILE: train.num_steps is 0, but a whole number at least 1 is needed."),
    "too large": (
        "optim: {min_learning_rate_ratio: 1.1}",
        "FILE: optim.min_learning_rate_ratio is 1.1, but a number at least 0 and at most 1 is needed.",
    ),
    "not above": ("optim: {learning_rate: 0}", "FILE: optim.learning_rate is 0, but a number above 0 and finite is needed."),
    "infinite": ("optim: {learning_rate: .inf}", "FILE: optim.learning_rate is inf, but a number above 0 and finite is needed."),
    "not a number": ("optim: {learning_rate: .nan}", "FILE: optim.learning_rate is nan, but a number above 0 and finite is needed."),
    "too small or null": ("model: {head_size: 0}", "FILE: model.head_size is 0, but a whole number at least 1 or null is needed."),
    "pattern": (
        "run: {name: a/b}",
        "FILE: run.name is 'a/b', but a text of letters, digits, '.', '_' and '-' that begins with a letter or a digit is needed.",
    ),
    # null and lists
    "null": ("train: {num_steps: null}", "FILE: train.num_steps is null, but a whole number at least 1 is needed."),
    "null section inside": ("train: {compile: }", "FILE: section train.compile holds null, but a mapping of keys is needed."),
    "list too long": (
        "optim: {betas: [0.9, 0.95, 1]}",
        "FILE: optim.betas is [0.9, 0.95, 1], but a list of 2 values, each a number at least 0 and at most 1 is needed.",
    ),
    "two wrong entries of a list": (
        "optim: {betas: ['0.9', 7]}",
        "FILE: optim.betas is ['0.9', 7], but a list of 2 values, each a number at least 0 and at most 1 is needed.",
    ),
    "no list": ("optim: {betas: 0.9}", "FILE: optim.betas is 0.9, but a list of 2 values, each a number at least 0 and at most 1 is needed."),
    # sections
    "section set to a number": ("model: 3", "FILE: section model holds 3, but a mapping of keys is needed."),
    "section set to a list": ("model: [d_model]", "FILE: section model holds ['d_model'], but a mapping of keys is needed."),
    "nested section set to a bool": ("train: {compile: true}", "FILE: section train.compile holds true, but a mapping of keys is needed."),
    # not YAML, or not a mapping
    "duplicate key": ("model:\n  d_model: 256\n  d_model: 512", "FILE:3: not valid YAML (key 'd_model' is given twice); correct the line."),
    "duplicate section": ("run: {}\nmodel: {}\nrun: {}", "FILE:3: not valid YAML (key 'run' is given twice); correct the line."),
    "unclosed": ("run: {}\nmodel: [1\n", "FILE:3: not valid YAML (expected ',' or ']', but got '<stream end>'); correct the line."),
    "tab": ("run:\n\tname: a", "FILE:2: not valid YAML (found character '\\t' that cannot start any token); correct the line."),
    "template": ("run:\n  name: {{ name }}", "FILE:2: not valid YAML (found unhashable key); correct the line."),
    "python object": (
        "run: !!python/object:os.system {}",
        "FILE:1: not valid YAML (could not determine a constructor for the tag 'tag:yaml.org,2002:python/object:os.system'); correct the line.",
    ),
    "two documents": ("run: {}\n---\nrun: {}", "FILE:2: not valid YAML (but found another document); correct the line."),
    "control character": (
        "run: {name: \x00}",
        'FILE: not valid YAML (unacceptable character #x0000: special characters are not allowed in "<unicode string>", position 12); correct it.',
    ),
    "number of 5,000 digits": (f"train: {{seed: {'7' * 5000}}}", "FILE:1: not valid YAML (a number has 5000 digits); correct the line."),
    "tagged as what it is not": ("train: {seed: !!int 0x10}", "FILE:1: not valid YAML ('0x10' is no decimal whole number); correct the line."),
    "tag of another type": (
        "train: {seed: !!timestamp x}",
        "FILE:1: not valid YAML (could not determine a constructor for the tag 'tag:yaml.org,2002:timestamp'); correct the line.",
    ),
    "null as key": ("null: 1", f"FILE: unknown key null; the sections are {SECTIONS}."),
    "absurd": (
        "train: {num_steps: 1000000000001}",
        "FILE: train.num_steps: 1000000000001 is above 1000000000000, the most that is allowed; check the number of its digits.",
    ),
    "NUL in a path": ('run: {output_dir: "a\\0b"}', "FILE: run.output_dir: the path 'a\\x00b' holds a NUL character, which no path can."),
    "empty path": ("run: {output_dir: ''}", "FILE: run.output_dir: the path is empty; write . for the directory of the process."),
    "list": ("- run", f"Config file FILE holds a list, but a mapping of sections ({SECTIONS}) is needed."),
    "single value": ("quickstart", f"Config file FILE holds a single value, but a mapping of sections ({SECTIONS}) is needed."),
    "not UTF-8": (
        b"run: {name: caf\xe9}",
        "Config file FILE cannot be read ('utf-8' codec can't decode byte 0xe9 in position 15: invalid continuation byte); "
        "give a readable UTF-8 YAML file.",
    ),
}


@pytest.mark.parametrize(("content", "sentence"), PROBLEMS.values(), ids=PROBLEMS)
def test_every_problem_is_one_sentence(tmp_path, content, sentence):
    assert problems_of(write(tmp_path, content)) == [sentence]


@pytest.mark.parametrize("value", ["{a: 1}", "[]", ".nan"])
@pytest.mark.parametrize("name", ALL_KEYS)
def test_every_key_refuses_what_is_not_its_type(tmp_path, name, value):
    shown = describe_value(yaml.safe_load(value))
    expected = f"FILE: {name} is {shown}, but {describe_type(ALL_KEYS[name])} is needed."
    assert problems_of(write(tmp_path, one_key(name, value))) == [expected]


@pytest.mark.parametrize("name", ALL_KEYS)
def test_every_key_takes_null_only_where_it_says_so(tmp_path, name):
    path = write(tmp_path, one_key(name, "null"))
    if "null" in describe_type(ALL_KEYS[name]):
        load_config(path)
    else:
        assert problems_of(path) == [f"FILE: {name} is null, but {describe_type(ALL_KEYS[name])} is needed."]


def test_all_problems_of_file_and_overrides_are_reported_together(tmp_path):
    path = write(tmp_path, "model: {d_modle: 3, num_heads: 0}\nrun: 3\nprecision: {dtype: fp16, tf32: true}")
    assert sorted(problems_of(path, "train.num_steps=0", "optim.lr", "trian.seed=1", "precision.tf32=2")) == sorted(
        [
            "--set 'optim.lr' is not of the form section.key=value, for example train.num_steps=200.",
            "--set 'trian.seed=1': unknown key trian.seed; did you mean train.seed?",
            "--set 'train.num_steps=0': train.num_steps is 0, but a whole number at least 1 is needed.",
            "--set 'precision.tf32=2': precision.tf32 is 2, but true or false is needed.",
            "FILE: unknown key model.d_modle; did you mean model.d_model?",
            "FILE: model.num_heads is 0, but a whole number at least 1 is needed.",
            "FILE: section run holds 3, but a mapping of keys is needed.",
            "FILE: precision.dtype is 'fp16', but one of bf16, fp32 is needed.",
        ]
    )


def test_a_missing_file_and_a_directory_are_named(tmp_path):
    missing = tmp_path / "missing.yaml"
    (problem,) = problems_of(missing)
    assert problem.startswith("Config file FILE does not exist; give a YAML file with --config, or one that comes with phase8: ablation_30m, ")
    (problem,) = problems_of(tmp_path)
    assert problem.startswith("Config file FILE cannot be read (") and problem.endswith("give a readable UTF-8 YAML file.")


@pytest.mark.parametrize("content", ["", "# nothing\n", "run:\nmodel:\n", "{}"])
def test_an_empty_file_or_section_means_the_defaults(tmp_path, content):
    assert load_config(write(tmp_path, content)) == RunConfig()


@pytest.mark.parametrize(("spelling", "number"), [("1e-3", 1e-3), ("1E-8", 1e-8), ("2.5e2", 250.0), ("3", 3.0), ("+1e3", 1000.0), (".5", 0.5)])
def test_numbers_may_be_spelt_as_in_python(tmp_path, spelling, number):
    assert load_config(write(tmp_path, f"optim: {{learning_rate: {spelling}}}")).optim.learning_rate == number


def test_a_date_is_a_text(tmp_path):
    assert load_config(write(tmp_path, "run: {name: 2024-01-31}")).run.name == "2024-01-31"


def test_merge_keys_work(tmp_path):
    assert load_config(write(tmp_path, "train: {<<: {seed: 7, num_steps: 5}, num_steps: 6}")).train.seed == 7


OVERRIDES = {
    "run.name=123": "123",
    "run.name=1e3": "1e3",
    "run.name=true": "true",
    "run.output_dir=a=b": "a=b",
    "data.train=null": None,
    "data.train=~": None,
    "data.train=on": "on",
    "data.train=data/mine": "data/mine",
    'data.train="x y"': "x y",
    "data.train='x y'": "x y",
    'data.train="null"': "null",
    """data.train='it''s "x"'""": 'it\'s "x"',
    'data.train=[{path: "x y", weight: 1}]': (DataSource(path="x y", weight=1),),
    'run.name="007"': "007",
    'observe.sample_prompt="two\\nlines"': "two\nlines",
    'observe.sample_prompt="Yes," she said, "no."': '"Yes," she said, "no."',
    "observe.sample_prompt='tis: so": "'tis: so",
    "observe.sample_prompt=say 'x'": "say 'x'",
    'observe.sample_prompt="a": b': '"a": b',
    "observe.sample_prompt=def main(": "def main(",
    "observe.sample_prompt=[1": "[1",
    "train.num_steps=200": 200,
    "train.stop_at_step=null": None,
    "train.stop_at_step=7": 7,
    "train.deterministic=true": True,
    "train.compile.enabled=true": True,
    "optim.learning_rate=1e-3": 1e-3,
    "optim.learning_rate=1": 1.0,
    "optim.betas=[0.9, 0.99]": (0.9, 0.99),
    "precision.dtype=fp32": "fp32",
    "zero.stage=1": 1,
    "model.global_path=delta": "delta",
    "model.decay_floor=-5": -5.0,
    "model.global_path=none": "none",
    "model.rotary=[true, false]": (True, False),
    "model.rotary=false": False,
    "model.global_path=false": "none",  # as earlier releases spelt it
    "model.global_path=true": "linear",
}


@pytest.mark.parametrize(("override", "value"), OVERRIDES.items(), ids=OVERRIDES)
def test_overrides_are_typed_by_the_schema(tmp_path, override, value):
    found = load_config(write(tmp_path, "train: {num_steps: 5}"), [override])
    for part in override.partition("=")[0].split("."):
        found = dict(found)[part]
    assert found == value and type(found) is type(value)


def test_an_override_beats_the_file_and_the_last_one_wins(tmp_path):
    path = write(tmp_path, "train: {num_steps: wrong, seed: 5}")
    config = load_config(path, ["train.num_steps=6", "train.num_steps=7"])
    assert (config.train.num_steps, config.train.seed) == (7, 5)


OVERRIDE_PROBLEMS = {
    "train.num_steps": "is not of the form section.key=value, for example train.num_steps=200.",
    "=3": "is not of the form section.key=value, for example train.num_steps=200.",
    "seed=3": ": unknown key seed; did you mean train.seed?",
    "model=3": ": model is a section; give one of its keys, model.block for example.",
    "train.compile=true": ": train.compile is a section; give one of its keys, train.compile.enabled for example.",
    "model.blok=x": ": unknown key model.blok; did you mean model.block?",
    "zz.z=1": f": unknown key zz.z; the sections are {SECTIONS}.",
    "train.num_steps=1e3": ": train.num_steps is 1000.0, but a whole number at least 1 is needed.",
    "train.num_steps=[1": ": train.num_steps is '[1', but a whole number at least 1 is needed.",
    "train.num_steps=0b_": ": train.num_steps is '0b_', but a whole number at least 1 is needed.",
    "optim.lr=1": ": unknown key optim.lr; did you mean optim.learning_rate?",
    "data.train=[{path: a": ": not valid YAML (expected ',' or '}', but got '<stream end>'); correct the list.",
    "data.train=[{path: a}]": ": data.train: entry 1 is {'path': 'a'}, which has no weight; give every entry its path and weight.",
    "data.train={path: a, weight: 1}": ": data.train is {'path': 'a', 'weight': 1}, but a path or a list of {path, weight, dialect} or null is "
    "needed.",
    "train.num_steps={a: 1, a: 2}": ": train.num_steps is '{a: 1, a: 2}', but a whole number at least 1 is needed.",
    "model.global_path=1": ": model.global_path is 1, but one of delta, linear, none is needed.",
    "model.decay_floor=0": ": model.decay_floor is 0, but a number below 0 and finite or null is needed.",
    "model.global_path=linaer": ": model.global_path is 'linaer', but one of delta, linear, none is needed.",
    "run.name=a b": ": run.name is 'a b', but a text of letters, digits, '.', '_' and '-' that begins with a letter or a digit is needed.",
}


@pytest.mark.parametrize(("override", "sentence"), OVERRIDE_PROBLEMS.items(), ids=OVERRIDE_PROBLEMS)
def test_every_problem_of_an_override_is_one_sentence(tmp_path, override, sentence):
    (problem,) = problems_of(write(tmp_path, ""), override)
    assert problem == f"--set {override!r}" + (sentence if sentence.startswith(":") else f" {sentence}")


def test_an_override_inside_a_broken_section_adds_no_second_sentence(tmp_path):
    assert problems_of(write(tmp_path, "model: 3"), "model.d_model=4") == ["FILE: section model holds 3, but a mapping of keys is needed."]


def test_round_trip_through_json_and_yaml(tmp_path):
    overrides = [override for override in OVERRIDES if "sample_prompt" not in override]
    config = load_config(write(tmp_path, ""), [*overrides, "observe.sample_prompt=ein Stück: [text", "run.name=2024-01-31"])
    mapping = config_to_mapping(config)
    assert config_from_mapping(json.loads(json.dumps(mapping)), source="manifest") == config
    assert load_config(write(tmp_path, yaml.safe_dump(mapping, allow_unicode=True))) == config
    assert config_from_mapping(config_to_mapping(RunConfig()), source="manifest") == RunConfig()


@pytest.mark.parametrize(("spelling", "name"), [("true", "linear"), ("false", "none"), ("delta", "delta"), ("linear", "linear"), ("none", "none")])
def test_the_global_path_of_earlier_releases_has_its_present_name(tmp_path, spelling, name):
    path = write(tmp_path, f"model: {{global_path: {spelling}}}")
    tree = config_to_mapping(load_config(path))
    assert tree["model"]["global_path"] == name
    assert config_from_mapping({"model": {"global_path": yaml.safe_load(spelling)}}, source="test") == load_config(path)


def test_linear_layers_in_bf16_have_no_format_of_their_own(tmp_path):
    given = load_config(write(tmp_path, "precision: {linear: bf16}"))
    assert given == load_config(write(tmp_path, "precision: {linear: null}")) and config_to_mapping(given)["precision"]["linear"] is None
    assert given.precision == RunConfig().precision == load_config(os.devnull, ["precision.linear=bf16"]).precision
    with pytest.raises(ConfigError, match=r"linear layers in bf16 need precision\.dtype bf16, but it is fp32; set one .* to null\.$"):
        load_config(os.devnull, ["precision.linear=bf16", "precision.dtype=fp32"])
    with pytest.raises(ConfigError, match=r"precision\.dtype is 'no', but one of bf16, fp32 is needed\.$"):
        load_config(os.devnull, ["precision.linear=bf16", "precision.dtype=no"])


def test_scaling_of_positions_is_a_section_and_null_is_none(tmp_path):
    llama = "{type: llama3, factor: 32, original_sequence_length: 8192}"
    scaled = load_config(write(tmp_path, f"model: {{rope_scaling: {llama}}}")).model.rope_scaling
    assert scaled == RopeScaling(type="llama3", factor=32.0) and hash(scaled)
    assert load_config(write(tmp_path, "model: {rope_scaling: null}")).model == RunConfig().model
    assert load_config(write(tmp_path, ""), ["model.rope_scaling.type=linear"]).model.rope_scaling.in_effect == {"type": "linear", "factor": 8.0}


def test_a_stored_config_with_a_problem_names_its_source():
    mapping = config_to_mapping(RunConfig())
    mapping["model"]["d_model"] = "wide"
    with pytest.raises(ConfigError) as caught:
        config_from_mapping(mapping, source="manifest.json")
    assert caught.value.problems == ["manifest.json: model.d_model is 'wide', but a whole number at least 1 is needed."]


@pytest.mark.parametrize("name", ALL_KEYS)
def test_every_key_is_frozen(name):
    *sections, leaf = name.split(".")
    section = RunConfig()
    for part in sections:
        section = dict(section)[part]
    with pytest.raises(ValidationError, match="frozen"):
        setattr(section, leaf, None)


def test_a_blend_is_a_list_of_sources(tmp_path):
    path = tmp_path / "mix.yaml"
    path.write_text("data: {train: [{path: a/web, weight: 3}, {path: /data/books, weight: 1, dialect: deepspeed}]}")
    web, books = load_config(path).data.train
    assert (web.path, web.weight, web.dialect) == ("a/web", 3, None)
    assert (books.path, books.weight, books.dialect) == ("/data/books", 1, "deepspeed")


NO_BLENDS = {
    "[{path: a, weight: '7'}]": "entry 1: weight is '7', but a number above 0 and finite is needed.",
    "[{path: a, weight: 1}, {path: b, weight: true}]": "entry 2: weight is true, but a number above 0 and finite is needed.",
    "[{path: a, weight: 0}]": "entry 1: weight is 0, but a number above 0 and finite is needed.",
    "[{path: a, weight: .inf}]": "entry 1: weight is inf, but a number above 0 and finite is needed.",
    "[{path: a}]": "entry 1 is {'path': 'a'}, which has no weight; give every entry its path and weight.",
    "[{path: a, weight: 1}, {weight: 2}]": "entry 2 is {'weight': 2}, which has no path; give every entry its path and weight.",
    "[{path: '', weight: 1}]": "entry 1: the path is empty; write . for the directory of the process.",
    "[{path: $UNSET_HERE/a, weight: 1}]": "entry 1: the path '$UNSET_HERE/a' uses the variable UNSET_HERE, which is not set; set it, or write the "
    "path out.",
    "[{path: a, weight: 1, wieght: 2}]": "entry 1 is {'path': 'a', 'weight': 1, 'wieght': 2}, but has the unknown key wieght; did you mean weight?",
    "[{path: a, weight: 1, zz: 2}]": "entry 1 is {'path': 'a', 'weight': 1, 'zz': 2}, but has the unknown key zz; the keys are "
    "{path, weight, dialect}.",
    "[{path: a, weight: 1, dialect: fairseq}]": "entry 1: dialect is 'fairseq', but one of megatron, deepspeed, gpt-neox, nanotron or null is "
    "needed.",
    "[a]": "entry 1 is 'a', but {path, weight, dialect} is needed.",
    "[null]": "entry 1 is null, but {path, weight, dialect} is needed.",
}


@pytest.mark.parametrize(("sources", "sentence"), NO_BLENDS.items(), ids=NO_BLENDS)
def test_anything_else_in_a_blend_is_one_sentence_about_the_entry(tmp_path, sources, sentence):
    assert problems_of(write(tmp_path, f"data: {{train: {sources}}}")) == [f"FILE: data.train: {sentence}"]
    override = f"data.train={sources}"
    assert problems_of(write(tmp_path, ""), override) == [f"--set {override!r}: data.train: {sentence}"]


def test_an_empty_blend_is_one_sentence(tmp_path):
    assert problems_of(write(tmp_path, "data: {train: []}")) == [
        "FILE: data.train is [], but a path or a list of {path, weight, dialect} or null is needed."
    ]


def test_a_blend_may_be_given_on_the_command_line_and_its_weights_be_decimal(tmp_path):
    config = load_config(write(tmp_path, ""), ["data.train=[{path: a, weight: 0.3}, {path: 1e5, weight: 2, dialect: deepspeed}]"])
    assert [(source.path, source.weight, source.dialect) for source in config.data.train] == [("a", 0.3, None), ("1e5", 2, "deepspeed")]
    assert config_from_mapping(json.loads(json.dumps(config_to_mapping(config))), source="manifest") == config
    assert load_config(write(tmp_path, yaml.safe_dump(config_to_mapping(config)))) == config


def test_very_many_problems_are_bounded(tmp_path):
    path = write(tmp_path, "\n".join(f"key_{number}: 1" for number in range(10_000)))
    problems = problems_of(path)
    assert len(problems) == 21 and problems[-1] == "FILE: there are more problems than these 20; correct them first."


# Texts that YAML 1.1 or 1.2 reads as something else.
TEXTS = ["010", "08", "1:00", "on", "no", "1e5", "1e-05", "0x10", "1_0", "2024-01-31", "true", "null", "1.5", ".5", "1.", "7"]


@pytest.mark.parametrize("name", TEXTS)
def test_texts_come_back_as_they_were_given(tmp_path, name):
    named = [f"run.name={name}"] if name[0].isalnum() and ":" not in name and name != "null" else []
    config = load_config(write(tmp_path, f"observe: {{sample_prompt: '{name}'}}"), named)
    assert config.observe.sample_prompt == name and (not named or config.run.name == name)
    stored = config_to_mapping(config)
    assert config_from_mapping(json.loads(json.dumps(stored)), source="manifest") == config
    assert load_config(write(tmp_path, yaml.safe_dump(stored))) == config
    if name not in ("true", "null"):
        assert load_config(write(tmp_path, f"data: {{train: {name}}}")).data.train == name
    assert load_config(write(tmp_path, f"data: {{train: '{name}'}}")).data.train == name


ABSURD = ["model.num_layers=1000000000", "model.d_model=1099511627776", "train.global_batch_size=1000000000000", "model.vocab_size=1000000000000",
          "parallel.timeout_seconds=1e300", "data.num_workers=100000", "optim.warmup_steps=9999999999999999", "model.convolution_size=1000000",
          "model.local_window_size=[128, 9999999999999]", "data.train=[{path: a, weight: 1e13}]"]  # fmt: skip


@pytest.mark.parametrize("override", ABSURD)
def test_numbers_that_no_run_can_use_are_refused(tmp_path, override):
    (problem,) = problems_of(write(tmp_path, ""), override)
    assert problem.startswith(f"--set {override!r}: {override.partition('=')[0]}: ")
    assert problem.endswith(", the most that is allowed; check the number of its digits.")
