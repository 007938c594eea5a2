"""Settings that are auto: which they are, and what becomes of them."""

import os
from pathlib import Path

import pytest

from phase8.config.auto import OFF, automatic_keys, with_values, without_auto
from phase8.config.dotted import value_of
from phase8.config.load import config_from_mapping, config_to_mapping, load_config
from phase8.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"


def config_of(*settings):
    return load_config(os.devnull, settings)


def test_everything_is_auto_by_default():
    assert set(automatic_keys(config_of())) == set(OFF)


def test_nothing_is_left_to_choose_without_auto():
    settled = without_auto(config_of())
    assert automatic_keys(settled) == () and {name: value_of(settled, name) for name in OFF} == OFF
    assert without_auto(config_of("train.recompute=budget")).train.compile.enabled is True
    assert config_from_mapping(config_to_mapping(settled), source="here") == settled


def test_explicit_values_are_obeyed():
    config = config_of("train.micro_batch_size=4", "train.recompute=full", "train.recompute_every_n_layers=2", "data.num_workers=3")
    settled = with_values(config, {**OFF, "train.recompute_every_n_layers": 1, "train.activation_memory_budget": 0.1, "train.cuda_graphs": True})
    assert (settled.train.micro_batch_size, settled.train.recompute, settled.train.recompute_every_n_layers) == (4, "full", 2)
    assert (settled.data.num_workers, settled.train.activation_memory_budget, settled.train.cuda_graphs) == (3, 0.5, True)


def test_what_goes_with_recomputation_is_set_with_it():
    settled = with_values(config_of(), {"train.recompute": "budget", "train.activation_memory_budget": 0.25})
    assert (settled.train.recompute, settled.train.activation_memory_budget) == ("budget", 0.25)


def test_the_sentence_of_a_wrong_value_names_auto():
    with pytest.raises(ConfigError, match=r"train.cuda_graphs is 'maybe', but true or false or auto is needed"):
        config_of("train.cuda_graphs=maybe")


@pytest.mark.parametrize("name", ["quickstart", "phase8_small", "phase8_medium_8gb", "phase8_1b"])
def test_shipped_configs_leave_the_speed_to_the_machine(name):
    automatic = automatic_keys(load_config(CONFIGS / f"{name}.yaml"))
    assert {"train.micro_batch_size", "train.recompute", "train.compile.enabled", "train.cuda_graphs"} <= set(automatic)
