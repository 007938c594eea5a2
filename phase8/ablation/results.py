"""Results of an ablation: a page with tables and charts, and all figures as JSON.

The difference of two variants is the mean, over the seeds that both have, of their relative difference. Runs with the same seed see
the same tokens in the same order, so the influence of the order on the loss cancels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from phase8.ablation.chart import positions_png, validation_png
from phase8.ablation.learning_rates import markdown_table, search_lines, searched
from phase8.ablation.runs import Record
from phase8.ablation.study import Study, reference_of
from phase8.data.staging import write_json
from phase8.durable import replace_file
from phase8.terminal import ESCAPED

NOTHING = "-"


@dataclass(frozen=True)
class Summary:
    """One variant over its seeds.

    Args:
        num_parameters: Parameters of the model.
        tokens: Tokens of a run.
        losses: Final validation loss by seed; None: not finite.
        mean: Mean of the losses; None: one is not finite.
        spread: Largest minus smallest.
        difference: Relative to the reference, over the seeds of both, as a ratio; None: there is no such seed.
        difference_seeds: The number of these seeds.
        tokens_per_second: Median over the runs.
    """

    num_parameters: int
    tokens: int
    losses: dict[int, float | None]
    mean: float | None
    spread: float | None
    difference: float | None
    difference_seeds: int
    tokens_per_second: float | None


def write_results(study: Study, records: Sequence[Record], output: Path) -> str:
    """Writes `table.md`, `results.json` and the charts `curves.png` and `positions.png` into the output directory, and returns the tables.

    Args:
        study: What all runs share.
        records: Records of the finished runs, those of searches for learning rates included, at least one.
        output: The output directory.

    Raises:
        StorageError: It cannot be written.
    """
    runs = _compared(study, records)
    reference = reference_of(study.variants)
    summaries = summarise(runs, reference)
    search = search_lines(study, records)
    positions = {name: by_seed for name, found in runs.items() if (by_seed := {r.seed: _by_position(r) for r in found if r.positions})}
    parts = [[_conditions(study, [record for found in runs.values() for record in found] or records)]]
    if runs:
        parts += [[*_table_lines(summaries, reference), "", _legend(study, runs, records, reference=reference)]]
        parts += [["![Held-out loss against tokens and against seconds](curves.png)"]]
        curves = {name: {record.seed: dict(record.curve) for record in found} for name, found in runs.items()}
        speeds = {name: summary.tokens_per_second for name, summary in summaries.items() if summary.tokens_per_second is not None}
        replace_file(output / "curves.png", validation_png(curves, reference=reference, speeds=speeds))
    if positions:
        parts += [_position_lines(runs), ["![Held-out loss by position in the sequence](positions.png)"]]
        replace_file(output / "positions.png", positions_png(positions, reference=reference))
    table = "\n\n".join("\n".join(part) for part in [*parts, *([search] if search else [])]) + "\n"
    replace_file(output / "table.md", table.encode(errors=ESCAPED))
    write_json(output / "results.json", _tree(study, runs, summaries, records))
    return table


def summarise(runs: Mapping[str, Sequence[Record]], reference: str) -> dict[str, Summary]:
    """Summarises each variant over its seeds, beside the reference."""
    losses = {name: {record.seed: record.validation_loss for record in found} for name, found in runs.items()}
    return {name: _summary(found, losses[name], losses.get(reference, {})) for name, found in runs.items()}


def _compared(study: Study, records: Sequence[Record]) -> dict[str, list[Record]]:
    """The runs to compare, by variant and in the order of their seeds: whole ones, with the learning rate that was found, if one was searched."""
    runs = {
        name: [r for r in records if r.variant == name and r.search_steps is None and r.learning_rate == study.learning_rates.get(name)]
        for name in study.variants
    }
    return {name: sorted(found, key=lambda record: record.seed) for name, found in runs.items() if found}


def _table_lines(summaries: Mapping[str, Summary], reference: str) -> list[str]:
    """The table of losses over the seeds, as Markdown."""
    seeds = sorted({seed for summary in summaries.values() for seed in summary.losses})
    head = ["variant", "parameters", "tokens", *(f"seed {seed}" for seed in seeds), "mean", "spread", f"against {reference}", "tok/s"]
    rows = [
        [
            name,
            f"{summary.num_parameters:,}",
            f"{summary.tokens:,}",
            *(_loss(summary.losses[seed]) if seed in summary.losses else NOTHING for seed in seeds),
            _loss(summary.mean),
            NOTHING if len(summary.losses) < 2 or summary.spread is None else f"{summary.spread:.4f}",
            _difference(summary, is_reference=name == reference),
            NOTHING if summary.tokens_per_second is None else f"{summary.tokens_per_second:,.0f}",
        ]
        for name, summary in summaries.items()
    ]
    return markdown_table(head, rows)


def _position_lines(runs: Mapping[str, Sequence[Record]]) -> list[str]:
    """The table of losses by position, with what it says, as Markdown."""
    ranges = list(dict.fromkeys((first, end) for found in runs.values() for record in found for first, end, _ in record.positions or ()))
    head = ["variant", *(f"{first:,} to {end - 1:,}" for first, end in ranges)]
    rows = []
    for name, found in runs.items():
        own = [{(first, end): loss for first, end, loss in record.positions} for record in found if record.positions]
        losses = [[of_run[place] for of_run in own if place in of_run] for place in ranges]
        rows.append([name, *(NOTHING if not each else _loss(None if None in each else fmean(each)) for each in losses)])
    legend = "Loss on the same held-out sequences by the position of the prediction in its sequence, mean over the seeds."
    return [*markdown_table(head, rows), "", legend]


def _by_position(record: Record) -> dict[int, float | None]:
    """Losses by the end of their range."""
    return {end: loss for _, end, loss in record.positions or ()}


def _summary(found: Sequence[Record], losses: dict[int, float | None], reference: Mapping[int, float | None]) -> Summary:
    known = [loss for loss in losses.values() if loss is not None]
    is_whole = len(known) == len(losses)
    pairs = [(loss, reference[seed]) for seed, loss in losses.items() if loss is not None and reference.get(seed) is not None]
    speeds = [record.tokens_per_second for record in found if record.tokens_per_second is not None]
    return Summary(
        num_parameters=found[0].num_parameters,
        tokens=found[0].tokens,
        losses=losses,
        mean=fmean(known) if is_whole else None,
        spread=max(known) - min(known) if is_whole else None,
        difference=fmean(loss / base - 1 for loss, base in pairs) if pairs else None,
        difference_seeds=len(pairs),
        tokens_per_second=median(speeds) if speeds else None,
    )


def _loss(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"


def _difference(summary: Summary, *, is_reference: bool) -> str:
    if is_reference or summary.difference is None:
        return NOTHING
    partial = "" if summary.difference_seeds == len(summary.losses) else f" ({summary.difference_seeds} of {len(summary.losses)} seeds)"
    return f"{100 * summary.difference:+.2f} %{partial}"


def _conditions(study: Study, records: Sequence[Record]) -> str:
    config, num_tokens = study.config, _num_training_tokens(study)
    longest = max(records, key=lambda record: record.tokens)
    passes = f" ({longest.tokens / num_tokens:.2f} passes a run)" if len(study.data["train"]["sources"]) == 1 else ""
    return (
        f"{', '.join(_distinct(record.device for record in records))}, torch {', '.join(_distinct(record.torch_version for record in records))}; "
        f"{config['precision.dtype']}, T {config['model.sequence_length']}, {config['train.num_steps']:,} steps, peak learning rate "
        f"{config['optim.learning_rate']:g}{' where none was searched' if study.learning_rates else ''}; training data of {num_tokens:,} "
        f"tokens{passes}, validation on {longest.validation_tokens:,} tokens; config hash {study.digest}."
    )


def _legend(study: Study, runs: Mapping[str, Sequence[Record]], records: Sequence[Record], *, reference: str) -> str:
    compared = [record for found in runs.values() for record in found]
    rates = ", ".join(f"{name} {study.learning_rates[name]:g}" for name in runs if name in study.learning_rates)
    skipped, left_out = _skipped(compared), _left_out(compared, records)
    remarks = [f"\nPeak learning rates that were found: {rates}."] if rates else []
    remarks += [f"\nSteps skipped because loss or gradient was not finite: {skipped}."] if skipped else []
    remarks += [f"\nLeft out, because they were trained with another peak learning rate: {left_out}."] if left_out else []
    jobs = " or ".join(_distinct(str(record.jobs) for record in compared))
    return (
        "Loss on held-out data after the last step, nats per token. Spread: largest minus smallest over the seeds. "
        f"Against {reference}: mean over the seeds of both of the relative difference. "
        f"tok/s: median over a run's steps, with at most {jobs} runs side by side on the device."
    ) + "".join(remarks)


def _skipped(records: Sequence[Record]) -> str:
    """The number of skipped steps in words; empty if there were none."""
    return ", ".join(f"{record.variant} seed {record.seed}: {record.skipped_steps}" for record in records if record.skipped_steps)


def _left_out(compared: Sequence[Record], records: Sequence[Record]) -> str:
    """The whole runs beside a search that are not compared, in words; empty if all are."""
    left_out = [record for record in records if record.search_steps is None and not record.is_search and record not in compared]
    rates = ("that of the config" if record.learning_rate is None else f"{record.learning_rate:g}" for record in left_out)
    return ", ".join(f"{record.variant} seed {record.seed} with {rate}" for record, rate in zip(left_out, rates, strict=True))


def _tree(
    study: Study, runs: Mapping[str, Sequence[Record]], summaries: Mapping[str, Summary], records: Sequence[Record]
) -> dict[str, Any]:
    """All figures as plain JSON."""
    return {
        "config_hash": study.digest,
        "config": study.config,
        "data": study.data,
        "reference": reference_of(study.variants),
        "variants": {
            name: {**asdict(summary), "settings": study.variants[name], "runs": [asdict(record) for record in runs[name]]}
            for name, summary in summaries.items()
        },
        "learning_rates": study.learning_rates,
        "search": [asdict(record) for record in searched(records)],
    }


def _num_training_tokens(study: Study) -> int:
    return sum(source["num_tokens"] for source in study.data["train"]["sources"])


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
