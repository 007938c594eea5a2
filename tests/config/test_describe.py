import pytest

from phase8.config.describe import FOREIGN_NAMES, describe_schema, describe_type, describe_value, iterate_keys, unknown_key
from phase8.config.schema import RunConfig

TYPES = {
    "run.name": "a text of letters, digits, '.', '_' and '-' that begins with a letter or a digit",
    "run.output_dir": "a path",
    "data.tokenizer": "a path or null",
    "data.train": "a path or a list of {path, weight, dialect} or null",
    "observe.sample_prompt": "a text or null",
    "model.block": "one of phase8, transformer",
    "model.d_model": "a whole number at least 1",
    "model.head_size": "a whole number at least 1 or null",
    "zero.stage": "a whole number at least 0 and at most 3",
    "optim.learning_rate": "a number above 0 and finite",
    "optim.weight_decay": "a number at least 0 and finite",
    "optim.min_learning_rate_ratio": "a number at least 0 and at most 1",
    "optim.betas": "a list of 2 values, each a number at least 0 and at most 1",
    "train.compile.enabled": "true or false or auto",
    "observe.peak_flops": "a number above 0 and finite or null",
}


@pytest.mark.parametrize(("name", "words"), TYPES.items())
def test_types_in_words(name, words):
    assert describe_type(dict(iterate_keys())[name]) == words


def test_every_leaf_of_the_schema_is_a_key():
    def leaves(tree, prefix=""):
        for name, value in tree.items():
            yield from leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [f"{prefix}{name}"]

    assert [name for name, _ in iterate_keys()] == list(leaves(RunConfig().model_dump()))


def test_every_key_is_documented_with_its_default_and_type():
    text = describe_schema()
    for name, field in iterate_keys():
        assert field.description and f"      {field.description}" in text
        default = field.default if isinstance(field.default, str) else describe_value(field.default)
        assert f"  {name} = {default}    [{describe_type(field)}]" in text
    for name, section in RunConfig.model_fields.items():
        assert f"\n{name}: {section.annotation.__doc__}" in text


@pytest.mark.parametrize(("value", "words"), [(None, "null"), (True, "true"), (False, "false"), (1, "1"), (0.5, "0.5"), ("a", "'a'"), ([1], "[1]")])
def test_values_as_yaml_spells_them(value, words):
    assert describe_value(value) == words


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("optim.lr_schedule", "optim.schedule"),
        ("train.global_batch", "train.global_batch_size"),
        ("parallel.tensor_model_parallel_size", "parallel.tensor_parallel_size"),
        ("train.learning_rate", "optim.learning_rate"),
        ("optim.num_steps", "train.num_steps"),
        ("model.n_layers", "model.num_layers"),
        ("Model.d_model", "model.d_model"),
        ("optim.lr", "optim.learning_rate"),
        ("lr", "optim.learning_rate"),
        ("train.batch-size", "train.global_batch_size"),
        ("train.n_embd", "model.d_model"),
    ],
)
def test_the_nearest_key_is_proposed(name, nearest):
    assert unknown_key(name) == f"unknown key {name}; did you mean {nearest}?"


def test_names_of_other_projects_lead_to_one_key_each():
    keys = [key for key, _ in iterate_keys()]
    names = [name for foreign in FOREIGN_NAMES.values() for name in foreign.split()]
    assert FOREIGN_NAMES.keys() <= set(keys)
    assert len(set(names)) == len(names) and not set(names) & {key.rsplit(".", 1)[-1] for key in keys}


def test_long_values_and_names_are_shortened():
    deep = [[[[[["x" * 1000] * 1000] * 1000] * 1000] * 1000] * 1000] * 1000
    for text in (describe_value(deep), describe_value("x" * 10**6), describe_value({i: deep for i in range(100)}), unknown_key("x" * 10**6)):
        assert len(text) < 600 and "..." in text
