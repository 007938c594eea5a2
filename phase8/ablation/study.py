"""An ablation: its variants, and whether the results of their runs may be compared.

Every variant is trained with every seed, each as an ordinary run. The seed gives the initial weights and the order of the data, so with
one seed all variants see the same tokens in the same order. A variant changes a few config keys; all other keys are the same.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from phase8.config.describe import describe_value
from phase8.config.load import config_to_mapping, load_config, with_settings
from phase8.config.model_keys import keys_in_effect
from phase8.config.schema import RunConfig
from phase8.data.fingerprint import data_fingerprint
from phase8.data.fingerprint_difference import content_of, describe_fingerprint_difference
from phase8.data.staging import read_json, write_json
from phase8.errors import ConfigError, DataError, first_few
from phase8.plan.whole_config import count_parameters, shapes_only
from phase8.train.datasets import RunData

REFERENCE = "transformer+conv+norm"
SIZE_TOLERANCE = 0.01
# Keys that a variant may not change: with another length or vocabulary, losses cannot be compared.
SAME_FOR_ALL = ("model.sequence_length", "model.vocab_size")
# These keys name the run, choose what it shows, limit its length or say how data are read; they do not affect the weights. The data
# themselves are compared by their fingerprint.
_UNCOMPARED_SECTIONS = ("run", "data", "checkpoint", "observe")
_UNCOMPARED_KEYS = ("train.seed", "train.stop_at_step")
# Keys that each run gets from the study, and what sets them.
_SET_BY_STUDY = {"train.seed": "--seeds", "run.name": "--variants and --seeds", "run.output_dir": "--output"}
AS_CONFIGURED = "config"  # the variant that changes nothing
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")  # no underscore: it stands for + in the names of runs

Settings = tuple[str, ...]  # `section.key=value`, as --set takes them


def _transformer(*, taps: int, norm: str = "false") -> Settings:
    return ("model.block=transformer", f"model.convolution_size={taps}", f"model.local_qk_norm={norm}")


_PLAIN: Settings = ("model.local_qk_norm=false", "model.global_gate=scalar", "model.global_activation=none")
_DEFAULT: Settings = ("model.local_qk_norm=true", "model.global_gate=channel", "model.global_activation=silu")
_OF_PAPERS: Settings = ("model.local_qk_norm=true", "model.global_gate=channel", "model.global_activation=silu_with_values")
_IN_TURNS: Settings = ("model.global_gate_activation=silu", "model.ffn_size=1368", "model.local_window_size=[0,2048]")


def _phase8(score: str, *, chain: str, global_path: str = "linear", options: Settings = _PLAIN) -> Settings:
    parts = (f"model.score={score}", f"model.global_path={global_path}", f"model.chain={chain}")
    return ("model.block=phase8", "model.convolution_size=4", *parts, *options)


# Each row names every key it is about, so that changing a default changes no variant. What gates per channel take, the feed-forward gives; its widths
# are for configs/ablation_30m.yaml.
VARIANTS: Mapping[str, Settings] = {
    "transformer": _transformer(taps=1),
    "transformer+conv": _transformer(taps=4),
    "transformer+conv+norm": _transformer(taps=4, norm="true"),
    "transformer+conv+norm+values": (*_transformer(taps=4, norm="true"), "model.value_activation=silu"),
    "transformer+conv+norm+embedding": (*_transformer(taps=4, norm="true"), "model.embedding_scalars=true"),
    "phase8": (*_phase8("dot", chain="none", options=_DEFAULT), "model.ffn_size=1320"),
    "phase8+silu": (*_phase8("dot", chain="none", options=_OF_PAPERS), "model.global_gate_activation=silu", "model.ffn_size=1320"),
    "phase8+values": (
        *_phase8("dot", chain="none", options=_DEFAULT), "model.global_gate_activation=silu", "model.value_activation=silu", "model.ffn_size=1320",
    ),
    "phase8+embedding": (*_phase8("dot", chain="none", options=_DEFAULT), "model.ffn_size=1320", "model.embedding_scalars=true"),
    "phase8+delta": (*_phase8("dot", chain="none", global_path="delta", options=_DEFAULT), "model.ffn_size=1320"),
    "window": _phase8("dot", chain="none", global_path="none"),
    "window+global": _phase8("dot", chain="none"),
    "window+delta": _phase8("dot", chain="none", global_path="delta"),
    # The hybrids that others train: layers of a recurrence and layers of a window of 2048 take turns, which at T 2048 see all that came before.
    # Gated DeltaNet-H1, arXiv 2412.06464: convolutions and SiLU of q, k and v, keys and queries of length one, a norm, then a SiLU gate per channel.
    # Other than there: the gate's matrix is a product of rank K, and window layers keep the convolution and the norm that our transformer has.
    "gated-deltanet": (*_phase8("dot", chain="none", global_path="delta", options=_OF_PAPERS), *_IN_TURNS),
    # Mamba-2, arXiv 2405.21060: the same convolutions and SiLU, a decay per head, the skip D. Other than there: q and k are normalised and each head
    # has its own, no step of the decay scales values, the gate comes after the norm and from the low-rank matrix; window layers as above.
    "mamba2": (*_phase8("dot", chain="none", options=_OF_PAPERS), *_IN_TURNS, "model.global_skip=true"),
    "window+global+decay": _phase8("dot", chain="decay"),
    "window+global+gate": _phase8("dot", chain="gate"),
    "window+global+chain": _phase8("dot", chain="both"),
    "lorentz": _phase8("lorentz", chain="none", global_path="none"),
    "lorentz+global": _phase8("lorentz", chain="none"),
    "lorentz+global+decay": _phase8("lorentz", chain="decay"),
    "lorentz+global+gate": _phase8("lorentz", chain="gate"),
    "lorentz+global+chain": _phase8("lorentz", chain="both"),
}

_KEYS_OF_VARIANTS = frozenset(setting.partition("=")[0] for settings in VARIANTS.values() for setting in settings)


@dataclass(frozen=True)
class Study:
    """The settings that all runs in one output directory share, and their variants; stored there as `study.json`.

    Args:
        config: Every key that affects the weights, before the variants change theirs.
        data: Fingerprints of the training and of the held-out data.
        variants: Settings of every variant by name, those of earlier commands included.
        learning_rates: Learning rate of every variant for which one was searched.
        unset: Keys that other variants set and at least one of these reads from the config, with their values there.
    """

    config: dict[str, Any]
    data: dict[str, dict[str, Any]]
    variants: dict[str, Settings]
    learning_rates: dict[str, float] = field(default_factory=dict)
    unset: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Hash of config and data: equal for two ablations that may be compared."""
        data = {split: [content_of(source) for source in fingerprint["sources"]] for split, fingerprint in self.data.items()}
        return hashlib.sha256(json.dumps([self.config, data], sort_keys=True).encode()).hexdigest()[:16]


def choose_variants(names: Sequence[str], definitions: Sequence[Sequence[str]]) -> dict[str, Settings]:
    """The settings of the named variants.

    Args:
        names: `AS_CONFIGURED`, names from `VARIANTS` or `definitions`, each once.
        definitions: New variants: name, the variant it begins as, and what it changes about the model or the optimizer.

    Raises:
        ConfigError: A name is unknown, given twice, or defined in a way that cannot be compared.
    """
    known = {AS_CONFIGURED: Settings(), **VARIANTS}
    for name, *rest in definitions:
        known[name] = _defined(name, rest, known)
    repeated = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if repeated:
        raise ConfigError(f"--variants names {repeated[0]} {names.count(repeated[0])} times; name each once.")
    return {name: _known_settings(name, known, option="--variants") for name in names}


def check_shared_settings(config: RunConfig, settings: Sequence[str], variants: Mapping[str, Settings]) -> None:
    """Refuses settings that would have no effect, and those with which no run reaches its last step.

    Args:
        config: The config with these settings.
        settings: What `--set` gives to all runs.
        variants: Settings of the chosen variants, which come after these.

    Raises:
        ConfigError: The study or every variant sets one of the keys itself, or runs are to stop before `train.num_steps`.
    """
    of_all = set.intersection(*({setting.partition("=")[0] for setting in changes} for changes in variants.values()))
    sets = dict.fromkeys(of_all, "--variants, or a new variant of --define") | _SET_BY_STUDY
    given = dict.fromkeys(setting.partition("=")[0] for setting in settings)
    ignored = [f"{key} (set by {sets[key]})" for key in given if key in sets]
    problems = [f"--set names what an ablation sets for each run: {', '.join(ignored)}; leave it out of --set."] if ignored else []
    stop, last = config.train.stop_at_step, config.train.num_steps
    if stop is not None and stop < last:
        problems.append(
            f"train.stop_at_step {stop} is below train.num_steps {last}, but only a run that reaches its last step is compared; "
            "set train.stop_at_step to null."
        )
    if problems:
        raise ConfigError(problems)


def overridden_settings(settings: Sequence[str], variants: Mapping[str, Settings]) -> dict[str, list[str]]:
    """Keys of `--set` that have no effect on some variants, which set them themselves, with the names of these."""
    own = {name: {setting.partition("=")[0] for setting in changes} for name, changes in variants.items()}
    given = dict.fromkeys(setting.partition("=")[0] for setting in settings)
    return {key: names for key in given if (names := [name for name, keys in own.items() if key in keys])}


def reference_of(names: Iterable[str]) -> str:
    """The variant that the others are compared with: `REFERENCE`, or the first one where it is not among them."""
    present = list(names)
    return REFERENCE if REFERENCE in present else present[0]


def count_variant_parameters(config_path: Path, settings: Sequence[str], variants: Mapping[str, Settings]) -> dict[str, int]:
    """Counts the parameters of each variant without allocating any."""
    return {name: count_parameters(shapes_only(load_config(config_path, [*settings, *changes]))) for name, changes in variants.items()}


def check_sizes(num_parameters: Mapping[str, int]) -> None:
    """Refuses variants whose sizes differ: a larger model is better for being larger.

    Raises:
        ConfigError: A variant differs by more than `SIZE_TOLERANCE` from `REFERENCE` or, without it, from the first variant.
    """
    base = reference_of(num_parameters)
    least, most = (round(num_parameters[base] * (1 + sign * SIZE_TOLERANCE)) for sign in (-1, 1))
    outside = [f"{name} has {count:,}" for name, count in num_parameters.items() if not least <= count <= most]
    if outside:
        raise ConfigError(
            f"variants differ in their number of parameters: {', '.join(outside)}, but {least:,} to {most:,} are allowed, {SIZE_TOLERANCE:.0%} "
            f"around {base}; give a variant another width with --define, or compare them all the same with --any-size."
        )


def current_study(config: RunConfig, data: RunData, variants: Mapping[str, Settings]) -> Study:
    """The study of this command, from its config, data and variants.

    Raises:
        ConfigError: There are no held-out data to evaluate on.
    """
    if data.validation is None or config.train.evaluate_every_n_steps == 0:
        key, value = ("data.validation", "null") if data.validation is None else ("train.evaluate_every_n_steps", "0")
        raise ConfigError(f"{key} is {value}, but an ablation compares losses on held-out data; set it.")
    fingerprints = {"train": data_fingerprint(data.train), "validation": data_fingerprint(data.validation)}
    return Study(_compared_keys(config), fingerprints, dict(variants), unset=_unset_keys(config, variants))


def joined_study(study: Study, output: Path) -> Study:
    """Merges the study with the one that earlier commands left in its output directory.

    Raises:
        ConfigError: The directory holds runs of another config or with other variants of the same name.
        DataError: The directory holds runs on other data.
    """
    path = output / "study.json"
    if not path.exists():
        return study
    tree = read_json(path)
    # Studies of earlier releases searched no learning rates, and did not record what variants read from the config.
    tree = {"learning_rates": {}, "unset": {}, **tree} if isinstance(tree, dict) else {}
    if tree.keys() != asdict(study).keys():
        raise ConfigError(f"{path} is not the record of an ablation; choose another --output.")
    earlier = {name: tuple(map(_present_spelling, settings)) for name, settings in tree["variants"].items()}
    different = [
        f"{key} was {describe_value(tree['config'].get(key))} and is {describe_value(study.config.get(key))}"
        for key in {**tree["config"], **study.config}
        if tree["config"].get(key) != study.config.get(key)
    ]
    different += [
        f"{key} was {describe_value(tree['unset'][key])} and is {describe_value(value)}"
        for key, value in study.unset.items()
        if tree["unset"].get(key, value) != value
    ]
    different += [
        f"{name} was {' '.join(earlier[name])} and is {' '.join(settings)}"
        for name, settings in study.variants.items()
        if earlier.get(name, settings) != settings
    ]
    if different:
        raise ConfigError(f"{output} holds an ablation of another config: {first_few(different)}; choose another --output.")
    for split, fingerprint in study.data.items():
        sentences = describe_fingerprint_difference(tree["data"][split], fingerprint)
        if sentences:
            raise DataError(f"{output} holds an ablation on other data.{split}: {first_few(sentences)}; restore them or choose another --output.")
    return Study(study.config, study.data, {**earlier, **study.variants}, tree["learning_rates"], {**tree["unset"], **study.unset})


def _present_spelling(setting: str) -> str:
    """A recorded setting as it is written now: `model.global_path` once was true or false."""
    return {"model.global_path=true": "model.global_path=linear", "model.global_path=false": "model.global_path=none"}.get(setting, setting)


def record_study(study: Study, output: Path) -> None:
    """Writes `study.json`."""
    write_json(output / "study.json", asdict(study))


def _compared_keys(config: RunConfig) -> dict[str, Any]:
    """Every key that affects the weights, by its dotted name, without the keys that variants set."""
    tree = config_to_mapping(config)
    keys = _flat({name: section for name, section in tree.items() if name not in _UNCOMPARED_SECTIONS})
    keys["data.reset_at_document_boundaries"] = config.data.reset_at_document_boundaries
    return {name: value for name, value in keys.items() if name not in _UNCOMPARED_KEYS and name not in _KEYS_OF_VARIANTS}


def _unset_keys(config: RunConfig, variants: Mapping[str, Settings]) -> dict[str, Any]:
    """Keys of `VARIANTS` that a variant reads and leaves to the config, with their values there, by dotted name."""
    unset = set[str]()
    for settings in variants.values():
        own = {key: yaml.safe_load(value) for key, _, value in (setting.partition("=") for setting in settings)}
        blocks = {key: value for key, value in own.items() if key in ("model.block", "model.global_path")}  # they decide what is read
        read = keys_in_effect(with_settings(config, blocks).model)
        unset |= {key for key in _KEYS_OF_VARIANTS - own.keys() if key.removeprefix("model.") in read}
    return {key: value for key, value in _flat(config_to_mapping(config)).items() if key in unset}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _defined(name: str, rest: Sequence[str], known: Mapping[str, Settings]) -> Settings:
    if _NAME.fullmatch(name) is None or name in known:
        raise ConfigError(f"--define {name}: a new name is needed, of letters, digits, '.', '+' and '-' that begins with a letter or a digit.")
    if len(rest) < 2:
        raise ConfigError(f"--define {name} needs the variant it begins as and what it changes, for example window+global optim.learning_rate=2e-3.")
    base, *changes = rest
    for change in changes:
        key = change.partition("=")[0]
        if not key.startswith(("model.", "optim.")) or key in SAME_FOR_ALL:
            raise ConfigError(f"--define {name}: {change} is not about the model or the optimizer alone; give it to all variants with --set.")
    return (*_known_settings(base, known, option=f"--define {name}"), *changes)


def _known_settings(name: str, known: Mapping[str, Settings], *, option: str) -> Settings:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? There are" if near else "there are"
        raise ConfigError(f"{option}: unknown variant {name}; {hint} {', '.join(known)}.")
    return known[name]
