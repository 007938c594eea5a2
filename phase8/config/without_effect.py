"""Keys that nothing reads because of the value of another key. A config may hold them, as keys are changed one at a time; a run names those given."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from phase8.config.describe import describe_value
from phase8.config.dotted import value_of
from phase8.config.model_keys import KEYS_OF_EXPERTS, KEYS_OF_GLOBAL_PATH, KEYS_OF_WINDOW
from phase8.config.schema import RunConfig
from phase8.config.section import Section


class Switch(NamedTuple):
    """A key that decides whether others are read.

    Args:
        name: Its dotted name.
        off: Its values with which nothing reads the others.
        unread: Dotted names of the others.
    """

    name: str
    off: tuple[object, ...]
    unread: tuple[str, ...]


def _of_model(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"model.{name}" for name in sorted(names))


SWITCHES = (
    Switch("model.block", ("transformer",), _of_model(KEYS_OF_WINDOW | KEYS_OF_GLOBAL_PATH)),
    Switch("model.global_path", ("none",), _of_model(KEYS_OF_GLOBAL_PATH)),
    Switch("model.ffn", ("swiglu", "low_rank_swiglu"), _of_model(KEYS_OF_EXPERTS)),
    Switch("model.top_k", (1,), ("model.routed_scaling_factor",)),
    Switch("data.num_workers", (0,), ("data.prefetch_factor", "data.persistent_workers")),
    Switch("parallel.pipeline_parallel_size", (1,), ("parallel.pipeline_schedule", "parallel.pipeline_chunks")),
    Switch("zero.stage", (0, 1, 2), ("zero.gather_dtype",)),
    Switch("precision.linear", (None,), ("precision.fp8_scaling", "precision.bf16_layers")),
    Switch("optim.name", ("adamw",), ("optim.momentum", "optim.momentum_warmup_steps")),
    Switch("optim.schedule", ("constant",), ("optim.min_learning_rate_ratio",)),
    Switch("train.recompute", ("none", "full", "selective", "budget"), ("train.recompute_slice_tokens",)),
    Switch("train.recompute", ("auto", "none", "full", "selective", "slices"), ("train.activation_memory_budget",)),
    Switch("train.compile.enabled", (False,), ("train.compile.mode", "train.compile.backend", "train.compile.fullgraph")),
    Switch("train.evaluate_every_n_steps", (0,), ("train.evaluation_sequences", "observe.sample_at_evaluations")),
    Switch("observe.sample_prompt", (None,), ("observe.sample_tokens", "observe.sample_at_evaluations")),
    Switch("observe.wandb", ("none",), ("observe.wandb_entity",)),
)


def unread_keys(config: RunConfig) -> dict[str, str]:
    """Maps the dotted name of every key that nothing reads in a run of a valid config to the reason: other keys and their values."""
    unread = dict(_by_several_keys(config))
    for name, off, others in SWITCHES:
        if value_of(config, name) in off:
            unread = dict.fromkeys(others, _stated(config, name)) | unread
    return unread


def given_without_effect(config: RunConfig, settled: RunConfig | None = None) -> dict[str, tuple[str, ...]]:
    """The keys that a config gives and nothing reads, by the reason.

    Values that turn something off ask for nothing. A value that is the default counts where somebody wrote it: not in a record, which has all keys.

    Args:
        config: A valid config as it was loaded.
        settled: The same config with values for what is `auto`; None: they are open.
    """
    unread = ({} if settled is None else unread_keys(settled)) | unread_keys(config)
    is_record = _has_all_keys(config)
    found: dict[str, tuple[str, ...]] = {}
    for name, reason in unread.items():
        if _asks(config, name, counts_default=not is_record):
            found[reason] = (*found.get(reason, ()), name)
    return found


def facts_without_effect(config: RunConfig, settled: RunConfig | None = None) -> list[tuple[str, str]]:
    """The keys that a config gives and nothing reads, a line for each reason, with its name; arguments as of `given_without_effect`."""
    return [("without effect", f"{', '.join(names)}, because {reason}") for reason, names in given_without_effect(config, settled).items()]


def _by_several_keys(config: RunConfig) -> Iterator[tuple[str, str]]:
    model, data, observe = config.model, config.data, config.observe
    if data.train is not None and data.validation is None and data.split is None:
        for name in ("train.evaluate_every_n_steps", "train.evaluation_sequences"):
            yield name, _stated(config, "data.validation")
    if observe.wandb == "none" and not observe.trackio:
        yield "observe.project", f"{_stated(config, 'observe.wandb')} and {_stated(config, 'observe.trackio')}"
    if model.block == "phase8" and not any(model.window_sizes):
        for name in ("score", "local_qk_norm", "global_tokens", "rotary", "rope_base"):
            yield f"model.{name}", _stated(config, "model.local_window_size")
    elif not any(model.has_rotary):
        yield "model.rope_base", _stated(config, "model.rotary")
    for name in type(model.rope_scaling).model_fields.keys() - model.rope_scaling.in_effect.keys():
        yield f"model.rope_scaling.{name}", _stated(config, "model.rope_scaling.type")


def _stated(config: RunConfig, name: str) -> str:
    value = value_of(config, name)
    return f"{name} is {value if isinstance(value, str) else describe_value(value)}"


def _asks(config: RunConfig, name: str, *, counts_default: bool) -> bool:
    """Whether somebody who gave this key asks for something by it."""
    *sections, key = name.split(".")
    section: Section = value_of(config, ".".join(sections))
    value = getattr(section, key)
    if not value or value == "none":
        return False
    return value != type(section).model_fields[key].default or (counts_default and key in section.model_fields_set)


def _has_all_keys(config: RunConfig) -> bool:
    """Whether every key is given, as in the config that a run records."""
    sections = [getattr(config, name) for name in RunConfig.model_fields]
    return all(section.model_fields_set == type(section).model_fields.keys() for section in sections)
