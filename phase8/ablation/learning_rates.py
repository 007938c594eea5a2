"""The search for a learning rate: every variant is trained with several rates, and the one with the lowest held-out loss trains its seeds.

All runs of the search have the same seed. They are as long as the others, so that the best one is the variant's run with that seed already, or
shorter where the command says so. A run that breaks off because its loss diverges counts as one whose loss is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from phase8.ablation.planned_runs import PlannedRun
from phase8.ablation.runs import Record
from phase8.ablation.study import Settings, Study
from phase8.errors import ConfigError, DivergenceError

KEY = "optim.learning_rate"


def check_search(rates: Sequence[float], *, num_steps: int | None, settings: Sequence[str], variants: Mapping[str, Settings]) -> None:
    """Refuses a search that cannot be made.

    Args:
        rates: Values of `--learning-rates`; empty: no search.
        num_steps: Value of `--learning-rate-steps`; None: runs as long as the others.
        settings: What `--set` gives to all runs.
        variants: Settings of the chosen variants.

    Raises:
        ConfigError: A rate is none or named twice, there is nothing to choose from, or the rate is set in another way too.
    """
    if not rates:
        if num_steps is not None:
            raise ConfigError(f"--learning-rate-steps is {num_steps}, but there is no search without --learning-rates; name rates, or leave it out.")
        return
    problems = [f"--learning-rates names {rate:g}; a rate is above 0 and finite." for rate in rates if not 0 < rate < math.inf]
    if len(set(rates)) != len(rates) or len(rates) < 2:
        problems.append(f"--learning-rates names {' '.join(f'{rate:g}' for rate in rates)}; name at least two rates, each once.")
    if num_steps is not None and num_steps < 1:
        problems.append(f"--learning-rate-steps is {num_steps}, but at least 1 is needed.")
    given = {"--set": settings} | {f"the variant {name}": changes for name, changes in variants.items()}
    problems += [
        f"{where} sets {KEY}, which --learning-rates chooses; leave one of them out."
        for where, changes in given.items()
        if any(setting.partition("=")[0] == KEY for setting in changes)
    ]
    if problems:
        raise ConfigError(problems)


def losses_by_rate(search: Sequence[PlannedRun], records: Sequence[Record]) -> dict[str, dict[float, float | None]]:
    """Losses by rate of each variant all of whose runs of the search are finished; None: not finite.

    Rates that earlier commands searched with the same seed and steps are among them: who adds rates to a search wants the best of all.

    Args:
        search: Runs of this command's search.
        records: Records of all finished runs.
    """
    losses: dict[str, dict[float, float | None]] = {}
    for variant in dict.fromkeys(run.variant for run in search):
        asked = {run.learning_rate: (variant, run.seed, run.search_steps) for run in search if run.variant == variant}
        places = set(asked.values())
        found = {
            record.learning_rate: record.validation_loss
            for record in records
            if (record.variant, record.seed, record.search_steps) in places and (record.is_search or record.learning_rate in asked)
        }
        if asked.keys() <= found.keys():
            losses[variant] = {rate: loss for rate, loss in found.items() if rate is not None}
    return losses


def best_rates(losses: Mapping[str, Mapping[float, float | None]]) -> dict[str, float]:
    """The rate with the lowest loss of each variant of `losses_by_rate`.

    Raises:
        DivergenceError: No rate of a variant gave a finite loss.
    """
    best = {}
    for variant, found in losses.items():
        finite = {rate: loss for rate, loss in found.items() if loss is not None}
        if not finite:
            raise DivergenceError(f"{variant} has no finite loss with any learning rate that was tried ({_listed(sorted(found))}); name smaller ones")
        best[variant] = min(finite, key=finite.__getitem__)
    return best


def describe_choice(variant: str, rate: float, rates: Iterable[float]) -> str:
    """A line about the choice, which says if the best rate is at an end of those that were tried."""
    tried = sorted(rates)
    ends = {tried[0]: "smallest", tried[-1]: "largest"}
    remark = f", the {ends[rate]} of {_listed(tried)}: a {ends[rate][:-3]}er one may be better" if rate in ends else f" of {_listed(tried)}"
    return f"{variant}: learning rate {rate:g}{remark}"


def searched(records: Iterable[Record]) -> list[Record]:
    """The runs whose loss decided about a learning rate."""
    return [record for record in records if record.is_search]


def search_lines(study: Study, records: Sequence[Record]) -> list[str]:
    """The table of a search, with what it says, as Markdown; empty without a search."""
    tried = searched(records)
    rates = sorted({record.learning_rate for record in tried})
    if not rates:
        return []
    rows = []
    for variant, seed, steps in dict.fromkeys((record.variant, record.seed, record.search_steps) for record in tried):
        losses = {r.learning_rate: r.validation_loss for r in records if (r.variant, r.seed, r.search_steps) == (variant, seed, steps)}
        cells = ["-" if rate not in losses else "not finite" if losses[rate] is None else f"{losses[rate]:.4f}" for rate in rates]
        is_chosen = [rate == study.learning_rates.get(variant) and rate in losses for rate in rates]
        marked = [f"**{cell}**" if chosen else cell for cell, chosen in zip(cells, is_chosen, strict=True)]
        rows.append([variant, str(seed), "all" if steps is None else f"{steps:,}", *marked])
    table = markdown_table(["variant", "seed", "steps", *(f"{rate:g}" for rate in rates)], rows)
    return [*table, "", "Held-out loss by peak learning rate; the seeds of a variant are trained with the one in bold."]


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table whose columns but the first are numbers."""
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---", *["---:"] * (len(head) - 1)], *rows)]


def _listed(rates: Iterable[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in rates)
