"""The runs of an ablation: every variant with every seed, and those of a search for its learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from phase8.ablation.study import Settings
from phase8.config.load import load_config
from phase8.config.schema import RunConfig
from phase8.config.validate import validate

NO_RATES: Mapping[str, float] = {}


@dataclass(frozen=True)
class PlannedRun:
    """One variant with one seed.

    Args:
        variant: Its name.
        seed: Seed of weights and data order.
        settings: All overrides that turn the config file into this run's config.
        config: The resulting config.
        learning_rate: Peak learning rate that was found for the variant, or is tried; None: that of config and variant.
        search_steps: Steps of a run of a shortened search; None: a run like all others.
        is_search: Its loss decides about the learning rate.
    """

    variant: str
    seed: int
    settings: Settings
    config: RunConfig
    learning_rate: float | None = None
    search_steps: int | None = None
    is_search: bool = False

    @property
    def name(self) -> str:
        """Name of the run and of its directory."""
        return self.config.run.name

    @property
    def directory(self) -> Path:
        """Its run directory."""
        return Path(self.config.run.output_dir) / self.name


def plan_runs(
    config_path: Path,
    settings: Sequence[str],
    variants: Mapping[str, Settings],
    seeds: Sequence[int],
    *,
    output: Path,
    learning_rates: Mapping[str, float] = NO_RATES,
) -> list[PlannedRun]:
    """Lists all runs, with all variants of one seed before the next seed.

    Args:
        config_path: What all runs share.
        settings: What `--set` gives to all runs.
        variants: Settings of the variants.
        seeds: Seeds of weights and data order.
        output: The output directory.
        learning_rates: Learning rates of variants, instead of the config's.

    Raises:
        ConfigError: The config of a run is not valid.
    """
    return [
        _planned(config_path, variant, (*settings, *changes), seed=seed, rate=learning_rates.get(variant), output=output)
        for seed in seeds
        for variant, changes in variants.items()
    ]


def plan_search(
    config_path: Path,
    settings: Sequence[str],
    variants: Mapping[str, Settings],
    rates: Sequence[float],
    *,
    num_steps: int | None,
    seed: int,
    output: Path,
) -> list[PlannedRun]:
    """Lists the runs of a search, with all variants of one rate before the next rate.

    Args:
        config_path: What all runs share.
        settings: What `--set` gives to all runs.
        variants: Settings of the variants.
        rates: Learning rates to try.
        num_steps: Steps of a run; None: as many as of every other run, and the best one is that of its seed.
        seed: Seed of all of them.
        output: The output directory.

    Raises:
        ConfigError: The config of a run is not valid.
    """
    return [
        replace(_planned(config_path, variant, own, seed=seed, rate=rate, search_steps=num_steps, output=output), is_search=True)
        for rate in rates
        for variant, own in ((name, (*settings, *changes)) for name, changes in variants.items())
    ]


def _planned(
    config_path: Path, variant: str, settings: Settings, *, seed: int, rate: float | None, search_steps: int | None = None, output: Path
) -> PlannedRun:
    parts, searched = [variant.replace("+", "_")], []
    if rate is not None:
        parts.append(f"lr{rate!r}".replace("+", ""))
        searched.append(f"optim.learning_rate={rate!r}")
    if search_steps is not None:
        parts.append(f"steps{search_steps}")
        searched.append(f"train.num_steps={search_steps}")
    name = "-".join([*parts, f"seed{seed}"])
    own = (*settings, *searched, f"train.seed={seed}", f"run.name={name}", f"run.output_dir={output / 'runs'}")
    config = load_config(config_path, own)
    validate(config)
    return PlannedRun(variant, seed, own, config, rate, search_steps)
