from pathlib import Path

import pytest
import yaml

from phase8.config.describe import iterate_keys
from phase8.config.load import config_to_mapping, load_config
from phase8.config.shipped import config_file, shipped_names
from phase8.config.without_effect import SWITCHES, given_without_effect, unread_keys

NO_WANDB = "observe.wandb is none"
# What is set over the defaults, and what of it nothing reads, by the reason.
CASES = {
    "defaults": ([], {}),
    "experts of a dense model": (["model.num_experts=16", "model.top_k=4"], {"model.ffn is swiglu": {"model.num_experts", "model.top_k"}}),
    "a default that somebody wrote": (["model.num_experts=8"], {"model.ffn is swiglu": {"model.num_experts"}}),
    "experts": (["model.ffn=moe", "model.num_experts=16", "model.routed_scaling_factor=2.0"], {}),
    "one expert a token": (
        ["model.ffn=moe", "model.top_k=1", "model.routed_scaling_factor=2.0"], {"model.top_k is 1": {"model.routed_scaling_factor"}},
    ),
    "a window of the transformer": (
        ["model.block=transformer", "model.local_window_size=64", "model.chain=both"],
        {"model.block is transformer": {"model.local_window_size", "model.chain"}},
    ),
    "off, and so nobody's wish": (["model.block=transformer", "model.chain=none", "model.local_window_size=0", "model.capacity_factor=null"], {}),
    "a factor without its scaling": (
        ["model.block=transformer", "model.rope_scaling.factor=4.0"], {"model.rope_scaling.type is none": {"model.rope_scaling.factor"}},
    ),
    "the score of no window": (
        ["model.local_window_size=0", "model.score=lorentz", "model.global_tokens=4", "model.rope_base=5e5"],
        {"model.local_window_size is 0": {"model.score", "model.global_tokens", "model.rope_base"}},
    ),
    "the score of some windows": (["model.local_window_size=[0,8]", "model.score=lorentz"], {}),
    "a base of no rotation": (["model.rotary=false", "model.rope_base=5e5"], {"model.rotary is false": {"model.rope_base"}}),
    "momentum of AdamW": (["optim.momentum=0.9"], {"optim.name is adamw": {"optim.momentum"}}),
    "momentum of Muon": (["optim.name=muon", "optim.momentum=0.9"], {}),
    "a floor of what is constant": (
        ["optim.schedule=constant", "optim.min_learning_rate_ratio=0.5"], {"optim.schedule is constant": {"optim.min_learning_rate_ratio"}},
    ),
    "fp8 that is not on": (["precision.fp8_scaling=row"], {"precision.linear is null": {"precision.fp8_scaling"}}),
    "chunks of one stage": (["parallel.pipeline_chunks=2"], {"parallel.pipeline_parallel_size is 1": {"parallel.pipeline_chunks"}}),
    "gathers of another stage": (["zero.stage=2", "zero.gather_dtype=fp32"], {"zero.stage is 2": {"zero.gather_dtype"}}),
    "a budget that is chosen": (["train.activation_memory_budget=0.2"], {"train.recompute is auto": {"train.activation_memory_budget"}}),
    "slices that may be chosen": (["train.recompute_slice_tokens=64"], {}),
    "a compiler that is not called": (
        ["train.compile.enabled=false", "train.compile.mode=max-autotune"], {"train.compile.enabled is false": {"train.compile.mode"}},
    ),
    "evaluations without data": (
        ["data.train=own", "train.evaluate_every_n_steps=50"], {"data.validation is null": {"train.evaluate_every_n_steps"}},
    ),
    "evaluations of a split": (["data.train=own", "data.split=9,1,0", "train.evaluate_every_n_steps=50"], {}),
    "samples without a prompt": (["observe.sample_at_evaluations=true"], {"observe.sample_prompt is null": {"observe.sample_at_evaluations"}}),
    "a tracker that is off": (
        ["observe.wandb_entity=us", "observe.project=ours"],
        {NO_WANDB: {"observe.wandb_entity"}, f"{NO_WANDB} and observe.trackio is false": {"observe.project"}},
    ),
    "a project in trackio": (["observe.trackio=true", "observe.project=ours"], {}),
}  # fmt: skip


def given(path: Path, *settings: str) -> dict[str, set[str]]:
    return {reason: set(names) for reason, names in given_without_effect(load_config(path, settings)).items()}


@pytest.fixture
def empty(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("", encoding="utf-8")
    return path


@pytest.mark.parametrize(("settings", "expected"), CASES.values(), ids=CASES)
def test_keys_that_nothing_reads_are_named_with_the_key_that_is_why(empty, settings, expected):
    assert given(empty, *settings) == expected


def test_what_is_chosen_counts_beside_what_was_asked_for(empty):
    config = load_config(empty, ["train.compile.fullgraph=true", "train.activation_memory_budget=0.2"])
    settled = load_config(empty, ["train.compile.enabled=false", "train.recompute=budget"])
    assert given_without_effect(config) == {"train.recompute is auto": ("train.activation_memory_budget",)}
    assert given_without_effect(config, settled)["train.compile.enabled is false"] == ("train.compile.fullgraph",)


def test_a_record_of_a_run_gives_all_keys_and_is_asked_for_what_is_no_default(empty, tmp_path):
    record = tmp_path / "record.yaml"
    record.write_text(yaml.safe_dump(config_to_mapping(load_config(empty, ["optim.momentum=0.9"]))))
    assert given(record) == {"optim.name is adamw": {"optim.momentum"}}


@pytest.mark.parametrize("name", shipped_names())
def test_shipped_configs_give_no_key_without_effect(name):
    assert given(config_file(Path(name))) == {}


def test_switches_and_what_they_switch_are_keys(empty):
    names = {name for name, _ in iterate_keys()}
    assert {each for switch in SWITCHES for each in (switch.name, *switch.unread)} <= names
    assert unread_keys(load_config(empty)).keys() <= names
